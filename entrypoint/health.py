"""`python -m entrypoint.health`: exits 1 if training is stalled, else 0. For a container's HEALTHCHECK; no
libraries.
"""

from __future__ import annotations

from trainer.process import guard

if __name__ == "__main__":
    guard.begin()  # before everything else is imported: from here on a stop is a stop

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrypoint import DEFAULT_OUTPUT_PATH
from trainer.process import streams
from trainer.storage.json_files import read_object

STALL_MIN = 30.0  # longer than a first step with compilation takes


def main() -> int:
    """Read status.json in OUTPUT_PATH; HEALTH_PATIENCE_MINUTES is how old it may be during training."""
    path = Path(os.environ.get("OUTPUT_PATH") or DEFAULT_OUTPUT_PATH) / "status.json"
    status = read_object(path) or {}
    stall_min = float(os.environ.get("HEALTH_PATIENCE_MINUTES") or STALL_MIN)
    problem = stalled(status, now=time.time(), began=_began(), patience_min=stall_min)
    print(problem or "healthy")  # noqa: T201
    return 1 if problem else 0


def stalled(status: Mapping[str, Any], *, now: float, began: float, patience_min: float) -> str:
    """Why the job counts as stalled, or "". Other phases may be silent; a file older than `began` is an earlier
    run's.
    """
    updated = status.get("updated")
    if status.get("phase") != "training" or not isinstance(updated, (int, float)) or updated < began:
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
    sys.exit(main())
