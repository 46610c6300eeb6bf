"""The notifying process, as the entrypoint sees it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from entrypoint.processes import side_process
from entrypoint.processes.side_process import Ending, SideProcess
from entrypoint.settings.row import Secret
from entrypoint.system.environment import child_environment

MOST_S = 60.0  # for the last messages; what is not told by then, the next start tells


@dataclass(frozen=True)
class Job:
    """What the process needs. It comes through a pipe: the addresses are secrets."""

    addresses: tuple[str, ...] = field(repr=False)
    secret: str = field(repr=False)
    out: str
    base: str  # BASE_MODEL
    price: float | None
    started: float = field(default_factory=time.time)
    pace: dict[str, float] = field(default_factory=dict)  # of `delivery.Pace`, where it is not the usual


def job_of(
    addresses: Sequence[Secret], secret: Secret | None, *, out: Path, base: str, price: float | None
) -> Job | None:
    """The job of the process; None where nobody is to be told."""
    if not addresses:
        return None
    revealed = tuple(address.reveal() for address in addresses)
    return Job(revealed, secret.reveal() if secret else "", str(out), base, price)


@contextmanager
def telling(job: Job | None, environment: Mapping[str, str]) -> Iterator[Ending]:
    """Inside the context, the addresses of `job` are told what happens; at its end, how it ended.

    It raises nothing of its own: a job does not fail because nobody could be told of it.
    """
    if job is None:
        yield Ending()
        return
    side = SideProcess("entrypoint.notify", "WEBHOOK_URL", MOST_S)
    own = child_environment(environment, network=True)
    with side_process.running(side, asdict(job), own=own, environment=environment) as ending:
        yield ending
