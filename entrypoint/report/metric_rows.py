"""The lines of metrics.jsonl, read without trust: for the report, the monitor page and the trackers."""

from __future__ import annotations

import json

VALIDATION = "validation_loss"  # the key that tells a row of a validation from one of a step


def metric_row(line: str | bytes) -> dict[str, float] | None:
    """The numbers of a line by their keys, `step` among them; None for a line that is half written, or not ours."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return {key: value for key, value in row.items() if isinstance(value, int | float)}
