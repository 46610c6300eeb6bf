"""A process beside the job: told lines through a pipe, and waited for at the end of the job, but not for long.

It reads the files of the job, so that training never waits for it, and whatever becomes of it, the job goes on and ends
as it would. Both ends of the pipe are here. `running` is the job's: it starts the process, writes the first line, which
says what to do, and at the end the last one, which says how the job has ended and how many seconds there are for what
is left. `Instructions` are what the process reads. The end of the pipe without a last line: the job is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from entrypoint.system import secrets
from trainer.process import vitals
from trainer.spec.errors import KilnError
from trainer.spec.messages.secrets import without_secrets

log = logging.getLogger(__name__)
STOPS = (130, 143)  # exit codes of a job that is to end within seconds
AFTER_STOP_S = 1.5  # for what is left then
GRACE_S = 10.0  # more than the process was told, until it is killed
GRACE_AFTER_STOP_S = 0.5
HAS_FAILED = 1  # exit code of a process that has said itself why it could not go on


@dataclass(frozen=True)
class SideProcess:
    """One kind of process beside a job."""

    module: str  # of `python -m`
    asked_by: str  # the variable that asks for it, as messages name it
    most_s: float  # seconds for what is left to be sent when the job has ended


@dataclass
class Ending:
    """How the job ends: whoever knows more than its exception says, fills it in."""

    exit_code: int = KilnError.exit_code
    message: str = "An unexpected error: see run.log."


# ---- the job's end of the pipe


@contextmanager
def running(
    side: SideProcess, first_line: Mapping[str, Any], *, own: Mapping[str, str], environment: Mapping[str, str]
) -> Iterator[Ending]:
    """Inside the context the process runs; at its end, it is told how the job ended, and ended itself.

    `own`: the variables of the process. `environment`: those of the job, whose secrets no message has. It raises
    nothing of its own.
    """
    ending = Ending()
    process = _started(side, own)
    if process is None:
        yield ending
        return
    _tell(process, first_line)  # through the pipe, since the arguments of a process are no secret
    try:
        yield ending
    except KilnError as problem:
        ending.exit_code = problem.exit_code
        ending.message = str(problem)
        raise
    finally:
        ending.message = without_secrets(secrets.known(environment).hide(ending.message))
        _end(side, process, ending)


def _started(side: SideProcess, own: Mapping[str, str]) -> subprocess.Popen[str] | None:
    try:
        return subprocess.Popen(  # noqa: S603 (our own program)
            [sys.executable, "-m", side.module],
            env=dict(own),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
    except OSError as problem:  # no memory, too many processes
        log.warning("%s: no process could be started (%s). The job goes on.", side.asked_by, problem.strerror)
        return None


def _tell(process: subprocess.Popen[str], line: Mapping[str, Any]) -> bool:
    """Write a line of JSON; False where the process has ended."""
    assert process.stdin
    try:
        process.stdin.write(f"{json.dumps(line)}\n")
        process.stdin.flush()
    except OSError:
        return False
    return True


def _end(side: SideProcess, process: subprocess.Popen[str], ending: Ending) -> None:
    seconds = side.most_s
    grace = GRACE_S
    if ending.exit_code in STOPS:
        seconds = AFTER_STOP_S
        grace = GRACE_AFTER_STOP_S
        vitals.prolong(os.environ, seconds + grace)
    is_told = _tell(process, {"exit_code": ending.exit_code, "message": ending.message, "seconds": seconds})
    code = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.wait(seconds + grace)
    process.kill()
    process.wait()
    assert process.stdin
    with contextlib.suppress(OSError):
        process.stdin.close()
    if code is None:
        text = "%s: not everything was sent in %.3g s. The next start in this folder sends the rest."
        log.warning(text, side.asked_by, seconds + grace)
    elif not is_told and code != HAS_FAILED:
        log.warning("%s: its process has ended. The job goes on.", side.asked_by)


# ---- the other end


class Instructions:
    """What the job tells this process.

    `first`: the first line. `ended`: set when the job has ended; then `exit_code`, `message` and `seconds` say how, and
    how long this process may take for what is left. Where the job is gone without a word, this process ends at once.
    """

    exit_code: int
    message: str
    seconds: float

    def __init__(self) -> None:
        self.first: dict[str, Any] = json.loads(sys.stdin.readline())
        self.ended = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        line = sys.stdin.readline()
        if not line:
            os._exit(128 + signal.SIGTERM)
        last = json.loads(line)
        self.exit_code = int(last["exit_code"])
        self.message = str(last["message"])
        self.seconds = float(last["seconds"])
        self.ended.set()


def leave_stops_to_the_job() -> None:
    """From here on, this process ends when the job says so."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
