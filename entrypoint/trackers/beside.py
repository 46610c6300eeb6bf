"""The tracking process, as the entrypoint sees it. It alone gets the keys of the tracker's account."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from entrypoint.settings.row import Secret
from entrypoint.system.environment import child_environment, package_index
from trainer.process import vitals

log = logging.getLogger("entrypoint.trackers")
TRACKER = "KILN_TRACKER"  # which library
FOUND = "KILN_TRACKER_FOUND"  # set in the second start of the process, which has it
OWN_VARIABLES = {"wandb": "WANDB_", "mlflow": "MLFLOW_", "trackio": "TRACKIO_"}  # beginnings of names
MOST_S = 120.0  # for what is left to be sent at the end
MOST_AFTER_STOP_S = 1.5
STOPS = (130, 143)


@dataclass(frozen=True)
class Job:
    """What the process reads from its standard input."""

    out: str
    started: float = field(default_factory=time.time)


@dataclass
class Ending:
    """How the job ends."""

    exit_code: int = 70


def environment_of(
    tracker: str, environment: Mapping[str, str], *, cache: Path, hub_token: Secret | None
) -> dict[str, str]:
    """The variables of the process: those of the tracker, its keys among them, and none of another's.

    `hub_token`: for trackio, whose Spaces are on the Hub.
    """
    own = child_environment(environment, network=True) | package_index(environment)
    beginning = OWN_VARIABLES[tracker]
    own |= {name: value for name, value in environment.items() if name.startswith(beginning)}
    own |= {TRACKER: tracker, "CACHE_PATH": str(cache)}
    if tracker == "trackio" and hub_token and environment.get("TRACKIO_SPACE_ID"):
        own["HF_TOKEN"] = hub_token.reveal()
    return own


@contextmanager
def tracking(tracker: str | None, out: Path, environment: Mapping[str, str]) -> Iterator[Ending]:
    """Inside the context, `tracker` gets what the job in `out` writes. `environment`: of `environment_of`.

    It raises nothing of its own: a job does not fail because of a tracker.
    """
    ending = Ending()
    process = _started(tracker, out, environment) if tracker else None
    try:
        yield ending
    finally:
        if process is not None:
            _finish(process, ending.exit_code, environment)


def _started(tracker: str, out: Path, environment: Mapping[str, str]) -> subprocess.Popen[str] | None:
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "entrypoint.trackers"],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
    except OSError as problem:  # no memory, too many processes
        log.warning("LOG_WITH=%s: no process could be started (%s). The job goes on.", tracker, problem.strerror)
        return None
    _say(process, json.dumps(asdict(Job(str(out)))))
    return process


def _finish(process: subprocess.Popen[str], exit_code: int, environment: Mapping[str, str]) -> None:
    seconds = MOST_S
    if exit_code in STOPS:
        seconds = MOST_AFTER_STOP_S
        vitals.prolong(environment, seconds + 1)
    _say(process, json.dumps({"exit_code": exit_code}))
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        log.warning("LOG_WITH: not everything was sent in %.0f s. The next start sends it.", seconds)
    process.kill()
    process.wait()
    if process.stdin:
        with contextlib.suppress(OSError):
            process.stdin.close()


def _say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin
    with contextlib.suppress(OSError):  # it has ended, and has said why
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
