"""An exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Ema:
    """An exponential moving average of the parameters, on their device and in their dtype.

    The decay warms up as (1 + steps) / (10 + steps), as in diffusers' `EMAModel`, so that the average soon forgets the
    untrained weights that it starts from.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.shadow = [p.detach().clone() for p in params]

    def update(self, params: Sequence[torch.nn.Parameter]) -> None:
        """Move the average towards `params`; once after each optimiser step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for average, p in zip(self.shadow, params, strict=True):
                average.lerp_(p, 1 - decay)
