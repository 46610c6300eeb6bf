"""A job that fails again and again at the same step refuses to run: otherwise rented hours are wasted on restarts.

A file that is not what was trained (`FileMismatchError`) would be the same again, and the job has nothing left to
train: the next start refuses at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.spec.errors import (
    CrashLoopError,
    FileMismatchError,
    HangError,
    KilnError,
    NumbersError,
    OutOfMemoryError,
)
from trainer.spec.plan import Plan
from trainer.storage import atomic, digests, json_files

log = logging.getLogger(__name__)
MAX_RESTARTS = 3  # without progress
# Errors that come again unless something changes. Others are a signal, the user's to correct, or may pass.
COUNTED = (HangError, NumbersError, OutOfMemoryError)
KEYS = ("plan", "step", "count", "reason")  # of crashes.json
UNEXPECTED = "an unexpected error"
NEVER_AGAIN = -1  # in the place of the count: one failure is enough
# What differs from one start of the same job to the next: times, and what is said or chosen by them.
CHANGING = ("reasons", "warnings", "printed")
CHANGING_OUTPUT = ("started", "name")


def _read(path: Path) -> dict[str, Any] | None:
    """The count in crashes.json; None where it is missing, or not what was written."""
    row = json_files.read_sealed(path, unsealed=KEYS)
    return row if row is not None and row.keys() == set(KEYS) else None


class CrashLog:
    """crashes.json in the output folder: how often this very plan has failed without getting further.

    `step`: returns the last step done.
    """

    def __init__(self, out: Path, plan: Plan, *, step: Callable[[], int]) -> None:
        self._path = out / "crashes.json"
        self._step = step
        self._plan = _identity(plan)
        json_files.set_aside_unless(self._path, lambda path: _read(path) is not None)
        self._before = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            row = _read(self._path) or {}
            return {**row, "step": int(row["step"]), "count": int(row["count"])}
        except (ValueError, KeyError, TypeError, OverflowError):
            return {"step": -1, "count": 0}

    def check(self) -> None:
        """Raises CrashLoopError after three restarts of the same plan that got no further than the first attempt."""
        before = self._before
        if before.get("plan") != self._plan:
            return
        if before["count"] == NEVER_AGAIN:
            raise CrashLoopError(f"This job ended at step {before['step']}, and would end so again: {before['reason']}")
        if before["count"] > MAX_RESTARTS:
            raise CrashLoopError(
                f"This job has failed {before['count']} times without getting past step {before['step']}, the last "
                f"time with: {before.get('reason')}"
            )

    def record(self, reason: str, *, once: bool = False) -> None:
        """Count a failure. `once`: one is enough, and the job is not tried again."""
        step = self._step()
        count = NEVER_AGAIN if once else 1
        if not once and self._before.get("plan") == self._plan and step <= self._before["step"]:
            step = self._before["step"]
            count = self._before["count"] + 1
        row = {"plan": self._plan, "step": step, "count": count, "reason": reason}
        atomic.write_json(self._path, json_files.sealed(row))

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, failures that would come again are counted; success deletes the count."""
        reason: str | None = UNEXPECTED
        once = False
        try:
            yield
            reason = None
            self._path.unlink(missing_ok=True)
        except FileMismatchError as problem:
            reason = str(problem)
            once = True
            raise
        except KilnError as problem:
            # KilnError itself is raised for what must not happen.
            counts = isinstance(problem, COUNTED) or type(problem) is KilnError
            reason = str(problem) if counts else None
            raise
        finally:
            if reason == UNEXPECTED:
                reason = f"{UNEXPECTED}: {sys.exc_info()[1]!r}"
            if reason is not None:
                with contextlib.suppress(OSError, KilnError):
                    self.record(reason, once=once)


def _identity(plan: Plan) -> str:
    """A digest of what makes a plan this job's: the same at each start, whenever that is."""
    values = json.loads(plan.to_json())
    output = {key: value for key, value in values["output"].items() if key not in CHANGING_OUTPUT}
    kept = {key: value for key, value in values.items() if key not in CHANGING}
    return digests.digest({**kept, "output": output})
