"""ON_FINISH: when a job ends, exit; or stop, terminate or keep the rented pod that it runs in.

A pod restarts a container that exits, for ever, and bills for it. So a job in a pod is supervised: when nothing is left
to do, the pod is ended through RunPod's API; a job that fails is tried again a few times, with growing pauses. The
attempts are counted in pod.json in OUTPUT_PATH, which outlives the container.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from entrypoint import DEFAULT_OUTPUT_PATH
from entrypoint.fetch import http
from entrypoint.processes.pod import asked_to_end, start_ssh
from entrypoint.settings.variables.finish import ACTIONS
from trainer.spec.documents.strict_json import load_json
from trainer.spec.errors import SettingsError, StorageError
from trainer.storage.folders import read_json, write_text

log = logging.getLogger(__name__)


PERMANENT_FAILURES = (64, 65, 77, 78)  # exit codes that another start would give again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MAX_ATTEMPTS = 5  # without a training step between them
CONSOLE = "https://console.runpod.io/pods"


@dataclass(frozen=True)
class Times:
    """All in seconds."""

    first_pause: float = 30.0  # before the second attempt; doubled with each
    longest_pause: float = 600.0
    linger: float = 1800.0  # a pod started after its job is done stays this long, so that results can be fetched
    farewell: float = 300.0  # how long a pod may take to send the signal after its stop was accepted
    retries: http.RetryPolicy = http.USUAL


USUAL = Times()


@dataclass(frozen=True)
class PodRecord:
    """What earlier containers of this pod (or of this volume) recorded."""

    attempts: int = 0  # starts since the last progress
    step: int = 0  # of training, at the last start
    done: bool = False
    run: str = ""  # that was at this step


def supervised(job: Callable[[], int], environ: Mapping[str, str], *, times: Times | None = None) -> int:
    """Run `work`, then do what ON_FINISH says; returns the exit code of `work`."""
    times, action = times or USUAL, asked_action(environ)
    pod = environ.get("RUNPOD_POD_ID", "")
    if not pod:
        code = job()
        if action == "idle":
            log.info("The job ended with %d; ON_FINISH=idle keeps the container.", code)
            _wait(None)
        return code
    start_ssh(environ)
    before = _opened(environ)
    if before.attempts > MAX_ATTEMPTS:
        log.error("%d attempts without progress: giving up. Delete pod.json to start over.", MAX_ATTEMPTS)
        # Terminating would delete the volume, and with it what is not done or not uploaded yet: stop instead.
        return _end(75, "stop" if action == "terminate" else action, pod, environ, times)
    if before.attempts > 1:
        pause = min(times.first_pause * 2 ** (before.attempts - 2), times.longest_pause)
        log.warning("Attempt %d of %d, in %.0f s.", before.attempts, MAX_ATTEMPTS, pause)
        if code := _wait(pause):
            return code
    reached = _reached(environ)
    code = job()
    done = code == 0 or (before.done and code == 75)  # a pod may be started without GPUs, only to fetch results
    if not done and code not in PERMANENT_FAILURES and not Limit.reached.is_set():
        if code < 128:
            log.error("The container exits with %d. The pod will start it again.", code)
        return code
    _write(environ, replace(before, attempts=0, done=done))
    if done and before.done and _reached(environ) == reached:  # other settings may have begun a new run meanwhile
        log.info(
            "This job is already done. The pod stays for %.0f minutes, so that you can fetch its results.",
            times.linger / 60,
        )
        if stopped := _wait(times.linger):
            return stopped
    return _end(code, action, pod, environ, times)


def asked_action(environ: Mapping[str, str]) -> str:
    """ON_FINISH, even if other settings are invalid; an unknown value counts as the default."""
    asked = _raw(environ, "ON_FINISH").lower()
    if asked in ACTIONS:
        return asked
    return "stop" if environ.get("RUNPOD_POD_ID") else "exit"


# ---- limits of time and money


class Limit:
    """Whether MAX_RUNTIME or MAX_COST has ended the job. One for the whole process, because the kernel has one
    alarm.
    """

    reached = threading.Event()

    @staticmethod
    def set(max_hours: float | None, max_cost: float | None, price: float | None) -> None:
        """Send SIGTERM to this process when the limit is reached; the job then saves its state and ends.

        `max_hours` counts from now; `max_cost` and `price` (for an hour) are in the same currency. Raises
        SettingsError for a cost without a price.
        """
        if max_cost is not None and not price:
            raise SettingsError("MAX_COST needs PRICE_PER_HOUR, the price of this machine in the same currency.")
        hours = []
        if max_hours is not None:
            hours.append(max_hours)
        if max_cost is not None and price:
            hours.append(max_cost / price)
        if not hours:
            return

        def end(_number: int, _frame: FrameType | None) -> None:
            Limit.reached.set()
            log.warning("MAX_RUNTIME or MAX_COST is reached. The job saves its state and ends.")
            os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, min(hours) * 3600)
        log.info("This job will end after %.2f hours at the latest.", min(hours))


# ---- the record of attempts


def _opened(environ: Mapping[str, str]) -> PodRecord:
    """The record, with this start counted."""
    out = _output(environ)
    known = read_json(out / "pod.json") or {}
    run, step = _reached(environ)
    with suppress(TypeError):
        before = PodRecord(**known)
        attempts = before.attempts + 1
        if step > before.step or run != before.run:  # it has got on since
            attempts = 1
        now = PodRecord(attempts=attempts, step=step, done=before.done, run=run)
        _write(environ, now)
        return now
    return PodRecord(attempts=1, step=step, run=run)


def _reached(environ: Mapping[str, str]) -> tuple[str, int]:
    """The run that was trained last, and its last step."""
    status = read_json(_output(environ) / "status.json") or {}
    run = status.get("run")
    step = status.get("step")
    if not isinstance(run, str):
        run = ""
    if not isinstance(step, int):
        step = 0
    return run, step


def _write(environ: Mapping[str, str], diary: PodRecord) -> None:
    try:
        write_text(_output(environ) / "pod.json", json.dumps(asdict(diary)))
    except StorageError as problem:
        log.warning("Cannot count the attempts of this pod: %s", problem)


def _output(environ: Mapping[str, str]) -> Path:
    return Path(_raw(environ, "OUTPUT_PATH") or DEFAULT_OUTPUT_PATH).expanduser()


def _raw(environ: Mapping[str, str], name: str) -> str:
    """A variable from the environment, or from CONFIG_JSON."""
    if value := environ.get(name, "").strip():
        return value
    try:
        config = load_json(environ.get("CONFIG_JSON", ""))
    except ValueError:
        return ""
    found = config.get(name) if isinstance(config, dict) else None
    return found.strip() if isinstance(found, str) else ""


# ---- the end of a pod


def _end(code: int, action: str, pod: str, environ: Mapping[str, str], times: Times) -> int:
    """Do what ON_FINISH says; returns `code` if the container is to exit, else when a signal arrives."""
    if action == "exit":
        return code
    if action in ("stop", "terminate"):
        if asked_to_end(action, pod, environ, times.retries):
            log.info("Asked RunPod to %s this pod; the job ended with %d.", action, code)
            if _wait(times.farewell):
                return code
        log.error("THIS POD IS NOT STOPPED AND COSTS MONEY: %s it at %s (%s).", action, CONSOLE, pod)
    log.info("The job ended with %d; the container stays. python -m entrypoint.runpod stop %s ends it.", code, pod)
    return _wait(None) and code


@contextmanager
def _signalled() -> Iterator[list[int]]:
    """A list that collects the numbers of the signals that arrive inside the context."""
    received: list[int] = []
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(seconds: float | None) -> int:
    """Wait (None: for ever) until a signal arrives; returns 128 + its number, or 0 if none did."""
    end = None if seconds is None else time.monotonic() + seconds
    with _signalled() as received:
        while not received and (end is None or time.monotonic() < end):
            time.sleep(0.2)
    return 128 + received[0] if received else 0
