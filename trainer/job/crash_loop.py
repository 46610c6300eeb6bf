"""A job that fails again and again at the same step refuses to run: otherwise rented hours are wasted on restarts."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.spec.errors import CrashLoopError, HangError, KilnError, NumbersError, OutOfMemoryError
from trainer.spec.plan import Plan
from trainer.storage import atomic, digests, json_files

log = logging.getLogger(__name__)
MAX_RESTARTS = 3  # without progress
# Errors that come again unless something changes. Others are a signal, the user's to correct, or may pass.
COUNTED = (HangError, NumbersError, OutOfMemoryError)
KEYS = ("plan", "step", "count", "reason")  # of crashes.json
UNEXPECTED = "an unexpected error"


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
        values = json.loads(plan.to_json())
        self._plan = digests.digest({**values, "reasons": None, "warnings": None})
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
        if before.get("plan") == self._plan and before["count"] > MAX_RESTARTS:
            raise CrashLoopError(
                f"This job has failed {before['count']} times without getting past step {before['step']}, the last "
                f"time with: {before.get('reason')}"
            )

    def record(self, reason: str) -> None:
        """Count a failure."""
        step = self._step()
        count = 1
        if self._before.get("plan") == self._plan and step <= self._before["step"]:
            step = self._before["step"]
            count = self._before["count"] + 1
        row = {"plan": self._plan, "step": step, "count": count, "reason": reason}
        atomic.write_json(self._path, json_files.sealed(row))

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, failures that would come again are counted; success deletes the count."""
        reason: str | None = UNEXPECTED
        try:
            yield
            reason = None
            self._path.unlink(missing_ok=True)
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
                    self.record(reason)
