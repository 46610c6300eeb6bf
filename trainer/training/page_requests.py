"""What was asked for on the monitor page: save now, sample now. The job looks between two steps."""

from __future__ import annotations

import logging
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
    """The requests in `vitals`, each seen once; none without it, as in all processes but the first."""

    def __init__(self, vitals: Vitals | None) -> None:
        self._vitals = vitals
        self._seen: dict[int, float | None] = {}

    def take(self) -> NowDue:
        """What is asked for since the last time."""
        if self._vitals is None:
            return NOTHING
        return NowDue(save=self._is_new(vitals.SAVE, "save"), sample=self._is_new(vitals.SAMPLE, "sample"))

    def _is_new(self, place: int, name: str) -> bool:
        assert self._vitals is not None
        asked = self._vitals.read(place)
        if asked is None or asked == self._seen.get(place):
            return False
        self._seen[place] = asked
        log.info("The monitor page asks to %s now.", name)
        return True
