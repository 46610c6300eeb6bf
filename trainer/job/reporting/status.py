"""status.json: the phase and the progress of a job, for people and for other programs (keys: docs/outputs.md)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.process import vitals
from trainer.spec.errors import KilnError, StopRequestedError
from trainer.spec.log_lines import safe_lines
from trainer.storage import atomic

log = logging.getLogger(__name__)


class Status:
    """The values of status.json; each change replaces the file at once."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "status.json"
        now = time.time()
        self._began = vitals.began(os.environ) or now  # a download may come before the trainer
        times = {"started": round(now, 3), "job_started": round(self._began, 3)}
        self._values: dict[str, Any] = {"phase": "starting", **times}
        self._since = time.monotonic()  # the beginning of the phase
        self._spent: dict[str, float] = {}  # seconds of this start by phase
        self.step = 0  # the last one done; the file follows every few seconds, and when the job ends
        self.saved: Callable[[], int | None] = lambda: None  # returns the step of the last state that was written

    def update(self, values: dict[str, Any]) -> None:
        """Change some values and write the file."""
        self._values |= values
        atomic.write_json(self._path, {**self._values, "updated": round(time.time(), 3)})

    def phase(self, name: str) -> None:
        """Log and write the phase that begins now."""
        log.info("Phase: %s.", name)
        self._end_phase()
        self.update({"phase": name})

    def captioned(self, done: int, total: int, left_s: float) -> None:
        """Write how far a model is with its captions; `left_s`: seconds that the others take."""
        self.update({"captioned": done, "to_caption": total, "captions_left_s": round(left_s)})

    def _end_phase(self) -> None:
        """Add the time of the phase that ends to what was spent on it before."""
        now, phase = time.monotonic(), self._values["phase"]
        self._spent[phase] = round(self._spent.get(phase, 0.0) + now - self._since, 1)
        self._since = now
        self._values["spent"] = self._spent

    def ended(self, problem: KilnError | None) -> None:
        """Write how the job ended: well (None), or with `problem`; and the last step done, and the last one saved."""
        values: dict[str, Any] = {}
        self._end_phase()
        if self.step:
            values["step"] = self.step
        saved = self.saved()
        if saved is not None:
            values["saved_step"] = saved
        if problem is None:
            self.update({**values, "phase": "done", "exit_code": 0})
        else:
            phase = "stopped" if isinstance(problem, StopRequestedError) else "failed"
            self.update({**values, "phase": phase, "exit_code": problem.exit_code, "message": safe_lines(str(problem))})

    def seconds(self) -> float:
        """How long this start of the job has taken so far, with what came before the trainer."""
        return time.time() - self._began


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    total = round(seconds)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"
