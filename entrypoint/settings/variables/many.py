"""Several jobs from one start: a queue and a sweep. `entrypoint.queue` makes the jobs of them, which have neither."""

from __future__ import annotations

from dataclasses import dataclass

from entrypoint.settings.row import row


@dataclass(frozen=True, kw_only=True)
class ManySettings:
    """What makes several jobs of one start. None: not set."""

    jobs: str | None = row(
        "JOBS",
        "text",
        meaning="a queue: a .jsonl file or its URL with an object of variables on each line, or these lines themselves",
    )
    sweep: str | None = row(
        "SWEEP",
        "sweep",
        meaning="a job for each combination of NAME=value,value, with blanks between the names",
    )
