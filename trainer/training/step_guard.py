"""Whether a step's numbers may change the weights, and what most likely went wrong where they may not."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Loss scale by dtype. In fp16 the gradient at the model's output is near the inverse of the latents' size, 2^-16 to
# 2^-18, which is too small for 5 bits of exponent. Initial value and rule are those of torch.amp.GradScaler.
LOSS_SCALE = {"float16": 2.0**16}
SCALE_GROWTH_INTERVAL_STEPS = 2000  # without an overflow, until the scale is doubled (GradScaler's growth_interval)
RECENT_LOSSES = 64  # that a spike is measured against
MIN_LOSSES_FOR_SPIKE = 16  # before that, no loss is called a spike


@dataclass
class StepGuard:
    """Skips steps with bad numbers, counts them, and keeps the loss scale. Part of the run's saved state.

    Backward passes are multiplied by `scale`, which is halved when they overflow. A loss is a spike above `spike` times
    the largest of the last 64: single losses of a diffusion model differ by a factor of ten with the noise level alone,
    their maximum does not.
    """

    limit: int = 3  # steps that may be skipped in a run; one more stops it
    spike: float = 10.0  # 0: every finite loss is accepted
    scale: float = 1.0
    steps_since_scale_change: int = 0
    skipped: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_LOSSES))

    def overflows(self, loss: float, norm: float) -> bool:
        """Whether the gradient overflows because of the scale alone; if so, the scale is halved.

        `norm`: of the gradient, before clipping. Called once in each step, since it also lets the scale grow again.
        """
        if self.scale > 1 and math.isfinite(loss) and not math.isfinite(norm):
            self.scale /= 2
            self.steps_since_scale_change = 0
            return True
        self.steps_since_scale_change += 1
        if self.scale > 1 and self.steps_since_scale_change == SCALE_GROWTH_INTERVAL_STEPS:
            self.scale *= 2
            self.steps_since_scale_change = 0
        return False

    def objection(self, loss: float, norm: float) -> str | None:
        """Why this step must not change the weights; None if it may. `norm`: of the gradient, before clipping."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"the loss is {loss:g} and the gradient's norm {norm:g}"
        usual = max(self.recent, default=0.0)
        if len(self.recent) >= MIN_LOSSES_FOR_SPIKE and loss > self.spike * usual > 0:  # never, with a spike of 0
            return f"the loss is {loss:g}, more than {self.spike:g} times the largest of the steps before ({usual:g})"
        self.recent.append(loss)
        return None

    def skip(self) -> bool:
        """Count a skipped step; returns whether the run may continue."""
        self.skipped += 1
        return self.skipped <= self.limit

    def state(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "recent": [*self.recent],
            "scale": self.scale,
            "steady": self.steps_since_scale_change,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        self.recent = deque(state["recent"], maxlen=RECENT_LOSSES)
        # States from before fp16 was scaled by a rule have neither.
        self.scale = state.get("scale", self.scale)
        self.steps_since_scale_change = state.get("steady", 0)


def likely_cause(
    inputs: Sequence[tuple[str, Sequence[torch.Tensor]]],
    losses: Sequence[tuple[str, float]],
    params: Sequence[torch.nn.Parameter],
) -> str:
    """What most likely made a step's numbers bad, and what helps: checked from the data to the gradient.

    `inputs`: each image's name and encoded tensors; `losses`: each image's name and loss. Waits for the device.
    """
    broken = [name for name, tensors in inputs if not all(_is_finite(t) for t in tensors)]
    if broken:
        return (
            f"bad data: the encoded {', '.join(broken)} (image or caption) is not finite before the model sees it. "
            "Remove it, or empty CACHE_PATH"
        )
    if not all(_is_finite(p) for p in params):
        return "the adapter's own weights are not finite. Lower PARAMS_LEARNING_RATE and start again"
    overflowed = [name for name, loss in losses if not math.isfinite(loss)]
    if overflowed:
        return (
            f"overflow in the model's arithmetic: images and weights are finite, its output for "
            f"{', '.join(overflowed)} is not. PARAMS_PRECISION=bf16 has more range than 8 bits, and fp32 more digits "
            "than bf16"
        )
    if not all(p.grad is None or _is_finite(p.grad) for p in params):
        return (
            "overflow in the backward pass: the losses are finite, the gradient is not. PARAMS_PRECISION=bf16 has more "
            "range"
        )
    return "the run diverges. Lower PARAMS_LEARNING_RATE, or set PARAMS_MAX_LOSS_SPIKE=0 to accept such losses"


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
