"""Whether a loss has gone where nobody wants it: in the log, the report and on the monitor page alike. No torch.

The loss of one step says little: it depends on the noise that was drawn. Half of the steps of a stretch are below its
median, which one spike does not move. A loss that stays where it was is usual for a LoRA; one that is several times as
high is not.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

FIRST = 20  # steps: a loss that rises does so early
STRETCH = 30  # steps at the end, at least; else a quarter of those that were done
RISEN = 2.5  # times
ADVICE = (
    "It is probably getting worse: compare the samples. Fix: an earlier save, or a lower learning rate "
    "(PARAMS_LEARNING_RATE; with prodigy, PARAMS_D_COEF=0.5)."
)


class Risen(NamedTuple):
    """The medians of the first FIRST steps, and of the last `steps`."""

    first: float
    last: float
    steps: int

    def __str__(self) -> str:
        before = f"{self.first:.3g} (median of the first {FIRST} steps)"
        return f"the loss has risen from {before} to {self.last:.3g} (of the last {self.steps})"


def risen(losses: Sequence[float]) -> Risen | None:
    """How a run's losses have risen; None where they have not, or are too few to say."""
    if len(losses) < 2 * STRETCH:
        return None
    steps = max(STRETCH, len(losses) // 4)
    found = Risen(statistics.median(losses[:FIRST]), statistics.median(losses[-steps:]), steps)
    return found if found.first > 0 and found.last >= RISEN * found.first else None
