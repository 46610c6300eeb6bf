"""The last line of a job: how long it took, what that cost, and where the time went."""

from __future__ import annotations

import time
from pathlib import Path

from trainer.spec.rules.quote import HOUR_S, duration
from trainer.storage import json_files

BEFORE = "fetching and starting"
AFTER = "uploads and the report"
SHOWN_PARTS = 6


def receipt(out: Path, *, started: float, price: float | None) -> str | None:
    """For the job that began at `started` (Unix seconds); None where no trainer of it has begun.

    `price`: of the machine, an hour.
    """
    status = json_files.read_object(out / "status.json") or {}
    began, ended, spent = status.get("started"), status.get("updated"), status.get("spent")
    if not isinstance(began, int | float) or not isinstance(ended, int | float) or not isinstance(spent, dict):
        return None
    if began < started:  # of an earlier job
        return None
    now = time.time()
    parts = {BEFORE: began - started, AFTER: now - ended}
    for phase, seconds in spent.items():
        if isinstance(seconds, int | float):
            parts[str(phase)] = parts.get(str(phase), 0.0) + seconds
    longest = sorted(parts.items(), key=lambda part: -part[1])[:SHOWN_PARTS]
    went = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in longest if seconds >= 0.5)
    whole = now - started
    cost = f", which cost {price * whole / HOUR_S:.2f} at {price:g} an hour" if price else ""
    where = f" Where the time went: {went}." if went else ""
    return f"Receipt: {_steps(status)}{duration(whole)} in all{cost}.{where}"


def _steps(status: dict[str, object]) -> str:
    """The steps of this start; "" where it has none."""
    first, step = status.get("first_step"), status.get("step")
    if not isinstance(first, int) or not isinstance(step, int) or step <= first:
        return ""
    return f"{step - first:,} step{'s' if step - first != 1 else ''}, "
