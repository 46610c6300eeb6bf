"""What a queue ends in: a row for each job with its loss, time, cost and exit code; in the log and in queue.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from entrypoint.queue.jobs import QueuedJob
from entrypoint.queue.record import QueueRecord
from entrypoint.report.gather import gather
from entrypoint.settings import read_settings
from trainer.spec.rules.quote import HOUR_S, duration

NAME = "queue.md"
LAST_SHARE = 0.1  # of the steps: the loss of one step alone says little
LONGEST_MESSAGE = 120  # characters; queue.json has all of it
HEAD = ("job", "steps", "loss", "validation", "time", "cost", "exit", "what went wrong")


class Row(NamedTuple):
    """One job. None: not known."""

    name: str
    state: str
    steps: int
    loss: float | None  # mean of the last tenth of the steps
    validation: float | None  # the last
    seconds: float  # of all its starts
    cost: float | None
    exit_code: int | None
    message: str


def rows(jobs: Sequence[QueuedJob], record: QueueRecord) -> list[Row]:
    """A row for each job, from the files that it has written."""
    found = []
    for job in jobs:
        entry = record.entries[job.name]
        run = gather(job.out)
        losses = [step["loss"] for step in run.steps if "loss" in step]
        last = losses[-max(1, round(len(losses) * LAST_SHARE)) :]
        price = read_settings(job.environ).finish.price_per_hour
        found.append(
            Row(
                job.name,
                entry.state,
                run.done,
                sum(last) / len(last) if last else None,
                run.validations[-1][1] if run.validations else None,
                entry.seconds,
                price * entry.seconds / HOUR_S if price else None,
                entry.exit_code,
                _cut(entry.message),
            )
        )
    return found


def _cut(message: str) -> str:
    first = message.partition("\n")[0]
    return first if len(first) <= LONGEST_MESSAGE else f"{first[:LONGEST_MESSAGE].rstrip()} …"


def _cells(row: Row) -> tuple[str, ...]:
    exit_code = row.state if row.exit_code is None else str(row.exit_code)
    return (
        row.name,
        f"{row.steps:,}",
        "" if row.loss is None else f"{row.loss:.4f}",
        "" if row.validation is None else f"{row.validation:.4f}",
        duration(row.seconds) if row.seconds else "",
        "" if row.cost is None else f"{row.cost:.2f}",
        exit_code,
        row.message,
    )


def _total(found: Sequence[Row]) -> tuple[str, ...]:
    costs = [row.cost for row in found if row.cost is not None]
    seconds = sum(row.seconds for row in found)
    return ("all", "", "", "", duration(seconds), f"{sum(costs):.2f}" if costs else "", "", "")


def as_text(found: Sequence[Row]) -> list[str]:
    """Lines with columns under each other."""
    lines = [HEAD, *(_cells(row) for row in found), _total(found)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def as_markdown(found: Sequence[Row]) -> str:
    """The same as a Markdown table."""
    lines = [HEAD, ("---",) * len(HEAD), *(_cells(row) for row in found), _total(found)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
