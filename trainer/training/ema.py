"""An exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Ema:
    """An exponential moving average of the parameters, with a warm-up so that the start is forgotten (as diffusers)."""

    def __init__(self, params: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.shadow = [p.detach().clone() for p in params]

    def update(self, params: Sequence[torch.nn.Parameter]) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for average, p in zip(self.shadow, params, strict=True):
                average.lerp_(p, 1 - decay)
