"""A job that fails again and again at the same step stops asking to be started: rented hours go by otherwise."""

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
from trainer.storage import atomic, digests

log = logging.getLogger(__name__)
RESTARTS = 3
COUNTED = (HangError, NumbersError, OutOfMemoryError)  # what ends in the same way unless something changes


class CrashLog:
    """crashes.json in the output folder: how often this very plan has failed without coming further."""

    def __init__(self, out: Path, plan: Plan, *, step: Callable[[], int]) -> None:
        self._path, self._step = out / "crashes.json", step
        whole = json.loads(plan.to_json())
        self._plan = digests.digest({**whole, "reasons": None})
        self._before = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return {"step": int(found["step"]), "count": int(found["count"]), **found}
        except (OSError, ValueError, KeyError, TypeError):
            return {"step": -1, "count": 0}

    def check(self) -> None:
        """Raises CrashLoopError after three restarts of the same plan that came no further than the first attempt."""
        before = self._before
        if before.get("plan") == self._plan and before["count"] > RESTARTS:
            raise CrashLoopError(
                f"This job has failed {before['count']} times without getting past step {before['step']}, the last "
                f"time with: {before.get('reason')}"
            )

    def record(self, reason: str) -> None:
        """Count a failure."""
        again = self._before.get("plan") == self._plan and self._step() <= self._before["step"]
        row = {
            "plan": self._plan,
            "step": max(self._step(), self._before["step"]) if again else self._step(),
            "count": self._before["count"] + 1 if again else 1,
            "reason": reason,
        }
        atomic.write_json(self._path, row)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, what fails is counted; what ends well, by a signal or for a reason that may pass by itself is not."""
        reason: str | None = "an unexpected error"
        try:
            yield
            reason = None
            self._path.unlink(missing_ok=True)
        except KilnError as problem:
            reason = str(problem) if isinstance(problem, COUNTED) or type(problem) is KilnError else None
            raise
        finally:
            if reason is not None:
                with contextlib.suppress(OSError, KilnError):
                    self.record(f"{reason}: {sys.exc_info()[1]!r}" if reason.startswith("an unexp") else reason)
