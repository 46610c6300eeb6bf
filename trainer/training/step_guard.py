"""Whether a step's numbers may change the weights, and what is wrong where they may not."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# What backward passes begin with: in fp16 a gradient at the output is near the inverse of the latents' size, 2^-16 to
# 2^-18, which is too small for 5 bits of exponent. The rule is that of torch.amp.GradScaler.
LOSS_SCALE = {"float16": 2.0**16}
SCALE_GROWTH_INTERVAL_STEPS = 2000  # steps without an overflow, until the scale is doubled
RECENT_LOSSES = 64  # losses that a spike is measured against
MIN_LOSSES_FOR_SPIKE = 16  # of them, before any is called a spike


@dataclass
class StepGuard:
    """Counts the steps that were skipped, and knows what losses are usual. Its state belongs to the run's.

    Backward passes are `scale` times as large as the gradient, unless that is 1: it is halved where they overflow. A
    loss is a spike above `spike` times the largest of the last 64: single losses of a diffusion model differ by a
    factor of ten with the noise level alone, their maximum does not.
    """

    limit: int = 3  # steps that may be skipped in a run; one more stops it
    spike: float = 10.0  # 0: every finite loss is taken
    scale: float = 1.0
    steady: int = 0  # steps since the scale was changed
    skipped: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_LOSSES))

    def overflows(self, loss: float, norm: float) -> bool:
        """Whether the gradient is too large for its format by the scale alone, which is less from now on."""
        if self.scale > 1 and math.isfinite(loss) and not math.isfinite(norm):
            self.scale, self.steady = self.scale / 2, 0
            return True
        self.steady += 1
        if self.scale > 1 and self.steady == SCALE_GROWTH_INTERVAL_STEPS:
            self.scale, self.steady = self.scale * 2, 0
        return False

    def objection(self, loss: float, norm: float) -> str | None:
        """Why this step must not change the weights; None if it may. `norm`: of the gradient, before clipping."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"the loss is {loss:g} and the gradient's norm {norm:g}"
        usual = max(self.recent, default=0.0)
        if self.spike and len(self.recent) >= MIN_LOSSES_FOR_SPIKE and loss > self.spike * usual > 0:
            return f"the loss is {loss:g}, more than {self.spike:g} times the largest of the steps before ({usual:g})"
        self.recent.append(loss)
        return None

    def skip(self) -> bool:
        """Count a skipped step; whether the run may go on."""
        self.skipped += 1
        return self.skipped <= self.limit

    def state(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "recent": [*self.recent],
            "scale": self.scale,
            "steady": self.steady,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped, self.recent = state["skipped"], deque(state["recent"], maxlen=RECENT_LOSSES)
        self.scale, self.steady = state.get("scale", self.scale), state.get("steady", 0)  # older states have neither


def cause(
    inputs: Sequence[tuple[str, Sequence[torch.Tensor]]],
    each: Sequence[tuple[str, float]],
    params: Sequence[torch.nn.Parameter],
) -> str:
    """What most likely made a step's numbers bad, and what helps.

    `inputs`: each picture's name and encoded tensors; `each`: the pictures' names and losses.
    """
    broken = [name for name, tensors in inputs if not all(bool(torch.isfinite(t).all()) for t in tensors)]
    if broken:
        return (
            f"bad data: the encoded {', '.join(broken)} (picture or caption) is not finite before the model sees it. "
            "Take it out, or empty CACHE_PATH"
        )
    if not all(bool(torch.isfinite(p).all()) for p in params):
        return "the adapter's own weights are not finite. Lower PARAMS_LEARNING_RATE and start anew"
    wild = [name for name, loss in each if not math.isfinite(loss)]
    if wild:
        return (
            f"overflow in the model's arithmetic: pictures and weights are finite, its output for {', '.join(wild)} is "
            "not. PARAMS_PRECISION=bf16 has more range than 8 bits, and fp32 more digits than bf16"
        )
    if not all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in params):
        return (
            "overflow on the way back: the losses are finite, the gradient is not. PARAMS_PRECISION=bf16 has more range"
        )
    return "the run diverges. Lower PARAMS_LEARNING_RATE, or set PARAMS_MAX_LOSS_SPIKE=0 to accept such losses"
