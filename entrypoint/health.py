"""`python -m entrypoint.health`: is the job in this container alive? For a container's HEALTHCHECK; no libraries.

Exit codes: 0 healthy, 1 training is stalled, 64 a wrong command line, 78 a variable that cannot be used.
"""

from __future__ import annotations

from trainer.process import guard

if __name__ == "__main__":
    guard.begin()  # before everything else is imported: from here on a stop is a stop

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entrypoint import DEFAULT_OUTPUT_PATH
from trainer.process import streams
from trainer.spec.commands.parser import Parser
from trainer.spec.errors import SettingsError
from trainer.storage.json_files import read_object

STALL_MIN = 30.0  # longer than a first step with compilation takes
PATIENCE = "HEALTH_PATIENCE_MINUTES"


def main(arguments: Sequence[str] = ()) -> int:
    """Read status.json in OUTPUT_PATH; HEALTH_PATIENCE_MINUTES is how old it may be during training."""
    parser = Parser("python -m entrypoint.health", description="Exit 1 if training is stalled, else 0.")
    try:
        parser.parse_args(list(arguments))
        patience_min = _patience(os.environ.get(PATIENCE, ""))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except SettingsError as wrong:
        print(wrong)  # noqa: T201
        return wrong.exit_code
    folder = Path(os.environ.get("OUTPUT_PATH", "").strip() or DEFAULT_OUTPUT_PATH)
    status = read_object(Path(os.path.expanduser(folder)) / "status.json") or {}  # noqa: PTH111 (never raises)
    problem = stalled(status, now=time.time(), began=_began(), patience_min=patience_min)
    print(problem or "healthy")  # noqa: T201
    return 1 if problem else 0


def _patience(text: str) -> float:
    """HEALTH_PATIENCE_MINUTES. Raises SettingsError for what is no time."""
    if not text.strip():
        return STALL_MIN
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise SettingsError(f"{PATIENCE}={text[:50]!r} is not a number of minutes above 0. Fix: {PATIENCE}=30.")
    return minutes


def stalled(status: Mapping[str, Any], *, now: float, began: float, patience_min: float) -> str:
    """Why the job counts as stalled, or "". Other phases may be silent; a file older than `began` is an earlier
    run's, and one from the future tells of a clock that was set back.
    """
    updated = status.get("updated")
    if status.get("phase") != "training" or not isinstance(updated, (int, float)) or not began <= updated <= now:
        return ""
    silent_min = (now - updated) / 60
    return f"No step for {silent_min:.0f} minutes." if silent_min > patience_min else ""


def _began() -> float:
    """When process 1 of this container started (Unix seconds); 0 if unknown."""
    try:
        ticks = int(Path("/proc/1/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        uptime_s = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return time.time() - uptime_s + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    streams.protect()
    sys.exit(main(sys.argv[1:]))
