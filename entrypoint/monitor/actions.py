"""What the page may ask of the running job: save now, sample now, stop after this step.

The requests go through the small file in memory that all processes of a job share (`trainer.process.vitals`): nothing
is written to the output folder, and the trainer looks at it between two steps, for a microsecond. A stop is seen by the
parent of the job's processes, as MAX_RUNTIME is: so it works in every phase, saves, and ends a rented pod in order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from trainer.process import vitals

PLACES = {"save": vitals.SAVE, "sample": vitals.SAMPLE, "stop": vitals.STOP}


class Actions:
    """The requests that can be made of the job beside which this process runs; none without a job."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._vitals = vitals.Vitals.of(environment)
        self._asked: dict[str, float] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return () if self._vitals is None else tuple(PLACES)

    def is_too_soon(self, name: str) -> bool:
        """Whether the trainer would leave the request out: a save so soon after the last one."""
        if name != "save" or name not in self._asked:
            return False
        return time.monotonic() - self._asked[name] < vitals.BETWEEN_SAVES_S

    def ask(self, name: str) -> bool:
        """Whether there is such a request; makes it."""
        if self._vitals is None or name not in PLACES:
            return False
        now = time.monotonic()
        self._vitals.write(PLACES[name], now)
        self._asked[name] = now
        return True
