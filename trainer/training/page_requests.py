"""What was asked for on the monitor page: save now, sample now. The job looks between two steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from trainer.process import vitals
from trainer.process.vitals import Vitals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NowDue:
    """What is to be done after this step, beside what is due."""

    save: bool = False
    sample: bool = False


NOTHING = NowDue()


class PageRequests:
    """The requests in `vitals`, each seen once; none without it, as in all processes but the first.

    A save costs memory, room and the time of the disk, so not every click is one: none while `is_saving`, or soon after
    the last. `clock`: in seconds.
    """

    def __init__(self, vitals: Vitals | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._vitals = vitals
        self._clock = clock
        self._seen: dict[int, float | None] = {}
        self._saved: float | None = None
        self.is_saving: Callable[[], bool] = _never

    def take(self) -> NowDue:
        """What is asked for since the last time."""
        if self._vitals is None:
            return NOTHING
        save = self._is_new(vitals.SAVE) and self._may_save()
        sample = self._is_new(vitals.SAMPLE)
        for name, is_asked in (("save", save), ("sample", sample)):
            if is_asked:
                log.info("The monitor page asks to %s now.", name)
        return NowDue(save=save, sample=sample)

    def _may_save(self) -> bool:
        now = self._clock()
        if self.is_saving() or (self._saved is not None and now - self._saved < vitals.BETWEEN_SAVES_S):
            return False
        self._saved = now
        return True

    def _is_new(self, place: int) -> bool:
        assert self._vitals is not None
        asked = self._vitals.read(place)
        if asked is None or asked == self._seen.get(place):
            return False
        self._seen[place] = asked
        return True


def _never() -> bool:
    return False
