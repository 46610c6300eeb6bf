"""Whether a step's numbers may change the weights, and what is wrong where they may not."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

RECENT = 64  # losses that a spike is measured against
FEWEST = 16  # of them, before any is called a spike


@dataclass
class Guard:
    """Counts the steps that were skipped, and knows what losses are usual. Its state belongs to the run's.

    A loss is a spike above `spike` times the largest of the last 64: single losses of a diffusion model differ by a
    factor of ten with the noise level alone, their maximum does not.
    """

    limit: int = 3  # steps that may be skipped in a run; one more stops it
    spike: float = 10.0  # 0: every finite loss is taken
    skipped: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def objection(self, loss: float, norm: float) -> str | None:
        """Why this step must not change the weights; None if it may. `norm`: of the gradient, before clipping."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"the loss is {loss:g} and the gradient's norm {norm:g}"
        usual = max(self.recent, default=0.0)
        if self.spike and len(self.recent) >= FEWEST and loss > self.spike * usual > 0:
            return f"the loss is {loss:g}, more than {self.spike:g} times the largest of the steps before ({usual:g})"
        self.recent.append(loss)
        return None

    def skip(self) -> bool:
        """Count a skipped step; whether the run may go on."""
        self.skipped += 1
        return self.skipped <= self.limit

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "recent": [*self.recent]}

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped, self.recent = state["skipped"], deque(state["recent"], maxlen=RECENT)


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
