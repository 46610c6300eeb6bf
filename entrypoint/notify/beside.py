"""The notifying process, as the entrypoint sees it: started, told how the job has ended, and waited for a while."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from entrypoint.settings.row import Secret
from entrypoint.system import secrets
from entrypoint.system.environment import child_environment
from trainer.process import vitals
from trainer.spec.errors import KilnError
from trainer.spec.messages.secrets import without_secrets

log = logging.getLogger("entrypoint.notify")
MOST_S = 60.0  # for the last messages
MOST_AFTER_STOP_S = 1.5  # what is not told by then, the next start tells
STOPS = (130, 143)


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


@dataclass
class Ending:
    """How the job ends: whoever knows more than its exception says, fills it in."""

    exit_code: int = KilnError.exit_code
    message: str = ""


def job_of(
    addresses: Sequence[Secret], secret: Secret | None, *, out: Path, base: str, price: float | None
) -> Job | None:
    """The job of the process; None where nobody is to be told."""
    if not addresses:
        return None
    return Job(
        tuple(address.reveal() for address in addresses), secret.reveal() if secret else "", str(out), base, price
    )


@contextmanager
def telling(job: Job | None, environment: Mapping[str, str]) -> Iterator[Ending]:
    """Inside the context, the addresses of `job` are told what happens; at its end, how it ended.

    It raises nothing of its own: a job does not fail because nobody could be told of it.
    """
    ending = Ending(message="An unexpected error: see run.log.")
    if job is None:
        yield ending
        return
    process = _started(job, environment)
    try:
        yield ending
    except KilnError as problem:
        ending.exit_code, ending.message = problem.exit_code, str(problem)
        raise
    finally:
        if process is not None:
            hidden = without_secrets(secrets.known(environment).hide(ending.message))
            _finish(process, ending.exit_code, hidden, environment)


def _started(job: Job, environment: Mapping[str, str]) -> subprocess.Popen[str] | None:
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "entrypoint.notify"],
            env=child_environment(environment, network=True),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
    except OSError as problem:  # no memory, too many processes
        log.warning("WEBHOOK_URL: nobody is told of this job: no process could be started (%s).", problem.strerror)
        return None
    _say(process, json.dumps(asdict(job)))
    return process


def _finish(process: subprocess.Popen[str], exit_code: int, message: str, environment: Mapping[str, str]) -> None:
    seconds, to_end = MOST_S, 10.0
    if exit_code in STOPS:  # a stop is to end within seconds
        seconds, to_end = MOST_AFTER_STOP_S, 0.5
        vitals.prolong(environment, seconds + to_end)
    _say(process, json.dumps({"exit_code": exit_code, "message": message, "seconds": seconds}))
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds + to_end)
    process.kill()
    process.wait()
    if process.stdin:
        with contextlib.suppress(OSError):
            process.stdin.close()


def _say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin
    try:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    except OSError:
        log.warning("WEBHOOK_URL: the process that tells of this job has ended. The job goes on.")
