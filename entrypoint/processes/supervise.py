"""ON_FINISH: when a job ends, exit; or stop, terminate or keep the rented machine that it runs on.

By then its uploads and webhooks are done, or were given up: they belong to the job, and each has a limit of time.

A pod restarts a container that exits, for ever, and bills for it. So a job in a pod is supervised: when nothing is left
to do, the pod is ended through RunPod's API; a job that fails is tried again a few times, with growing pauses. The
attempts are counted in pod.json in OUTPUT_PATH, which outlives the container. Of several pods that train together, the
first does this; another one counts, in CACHE_PATH, the starts at which it did not find the first. An instance of
Vast.ai is ended through its API as well, but is not started again by itself. Whoever waits serves the monitor page
meanwhile, for downloads.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from entrypoint import DEFAULT_CACHE_PATH
from entrypoint.fetch import http
from entrypoint.nodes import cluster
from entrypoint.processes import places
from entrypoint.processes.farewell import output_path
from entrypoint.processes.pod import asked_to_end, start_ssh
from entrypoint.settings import read_settings
from entrypoint.settings.variables.finish import ACTIONS, FinishSettings
from entrypoint.system.raw_value import raw_value
from trainer.process import guard, vitals
from trainer.spec.errors import SettingsError, StorageError
from trainer.storage import json_files, own_files
from trainer.storage.folders import read_json, write_text

log = logging.getLogger(__name__)


PERMANENT_FAILURES = (64, 65, 77, 78)  # exit codes that another start would give again
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit codes: whoever stops a job wants the container to end
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MAX_ATTEMPTS = 5  # without a training step between them
CONSOLE = "https://console.runpod.io/pods"
FOREVER_S = 1e9
HOW_TO_COPY = "Its results are in %s: copy them from the mounted folder, or with docker cp."
ANSWER_S = 2.5  # how long this process may take to end after a signal, while it waits or talks to RunPod


@dataclass(frozen=True)
class Times:
    """All in seconds."""

    first_pause: float = 30.0  # before the second attempt; doubled with each
    longest_pause: float = 600.0
    linger: float = 1800.0  # a pod started after its job is done stays this long, so that results can be fetched
    farewell: float = 300.0  # how long a pod may take to send the signal after its stop was accepted
    retries: http.RetryPolicy = http.USUAL
    page: float = 86_400.0  # the monitor page is served so long at most, where the container stays for ever


USUAL = Times()


@dataclass(frozen=True)
class PodRecord:
    """What earlier containers of this pod (or of this volume) recorded."""

    attempts: int = 0  # starts since the last progress
    step: int = 0  # of training, at the last start
    done: bool = False
    run: str = ""  # that was at this step


# Inside what it returns, the monitor page of the ended job is served, as it says, for so many seconds.
Serving = Callable[[float], AbstractContextManager[object]]


def _in_a_process_of_its_own(job: Callable[[], int]) -> guard.Ending:
    return guard.guarded(job, "entrypoint.processes.farewell")


def supervised(
    job: Callable[[], int],
    environ: Mapping[str, str],
    *,
    times: Times | None = None,
    run: Callable[[Callable[[], int]], guard.Ending] = _in_a_process_of_its_own,
    serving: Serving = lambda _: nullcontext(),
) -> int:
    """Do `job`, then what ON_FINISH says; returns the exit code of `job`. `run`: how it is done on a rented machine."""
    times, action = times or USUAL, asked_action(environ)
    began = time.monotonic()
    pod = environ.get("RUNPOD_POD_ID", "")
    if not pod and places.place(environ) == places.VAST:
        return _on_vast(_in_time(job, environ, run), action, environ, times, began=began, serving=serving)
    if not pod:
        return _finished_elsewhere(job(), action, environ, times, began=began, serving=serving)
    start_ssh(environ)
    before = _opened(environ)
    if before.attempts > MAX_ATTEMPTS:
        log.error("%d attempts without progress: giving up. Delete %s to start over.", MAX_ATTEMPTS, _record(environ))
        return _end(75, _keeping_volume(action), pod, environ, times, began=began, serving=serving)
    if before.attempts > 1:
        pause = min(times.first_pause * 2 ** (before.attempts - 2), times.longest_pause)
        log.warning("Attempt %d of %d, in %.0f s.", before.attempts, MAX_ATTEMPTS, pause)
        if code := _wait(pause):
            return code
    reached = _reached(environ)
    ending = _in_time(job, environ, run)
    code = ending.exit_code
    done = code == 0 or (before.done and code == 75)  # a pod may be started without GPUs, only to fetch results
    if not done and code not in PERMANENT_FAILURES and not ending.limit_reached:
        if code < 128:
            log.error("The container exits with %d. The pod will start it again.", code)
        return code
    _write(environ, replace(before, attempts=0, done=done))
    if done and before.done and _reached(environ) == reached:  # other settings may have begun a new run meanwhile
        log.info(
            "This job is already done. The pod stays for %.0f minutes, so that you can fetch its results.",
            times.linger / 60,
        )
        if stopped := _stay(times.linger, times, serving):
            return stopped
        if action == "wait":  # it has
            action = "stop"
    if not done:
        action = _keeping_volume(action)
    return _end(code, action, pod, environ, times, began=began, serving=serving)


def _in_time(
    job: Callable[[], int], environ: Mapping[str, str], run: Callable[[Callable[[], int]], guard.Ending]
) -> guard.Ending:
    """Do `job` in a process of its own, whose parent ends it in time; so this one outlives a limit."""
    vitals.allow(environ, FOREVER_S)
    ending = run(job)
    vitals.allow(environ, 0)
    return ending


def without_attempts(
    job: Callable[[], int],
    environ: Mapping[str, str],
    *,
    times: Times | None = None,
    run: Callable[[Callable[[], int]], guard.Ending] = _in_a_process_of_its_own,
    serving: Serving = lambda _: nullcontext(),
) -> int:
    """Do `job`, which fills the volume and trains nothing, then what ON_FINISH says. Attempts are those of training.

    A pod is never terminated here: that would delete what was brought.
    """
    times, began = times or USUAL, time.monotonic()
    action, pod = asked_action(environ), environ.get("RUNPOD_POD_ID", "")
    if not pod:
        return job()
    start_ssh(environ)
    ending = _in_time(job, environ, run)
    code = ending.exit_code
    if code in STOPPED and not ending.limit_reached:
        return code
    action = "stop" if action == "terminate" else action
    return _end(code, action, pod, environ, times, began=began, serving=serving)


def _keeping_volume(action: str) -> str:
    """`action` for a job that is not done: terminating would delete the volume, and what it has saved with it."""
    if action != "terminate":
        return action
    log.warning(
        "The job is not done: the machine is stopped, in place of ON_FINISH=terminate, so that its volume stays and "
        "the same job can go on."
    )
    return "stop"


def _on_vast(
    ending: guard.Ending, action: str, environ: Mapping[str, str], times: Times, *, began: float, serving: Serving
) -> int:
    """ON_FINISH on an instance of Vast.ai, after the job has ended so. Returns its exit code."""
    code = ending.exit_code
    if code in STOPPED and not ending.limit_reached:  # whoever did that ends the container
        return code
    if action == "wait":
        seconds = _linger(action, environ, times, began=began)
        log.info("The job ended with %d; ON_FINISH=wait stops the instance in %.0f minutes.", code, seconds / 60)
        if _stay(seconds, times, serving):
            return code
        action = "stop"
    if code != 0:
        action = _keeping_volume(action)
    if action in ("stop", "terminate"):
        with _signalled() as received:
            if places.asked_to_end(action, environ, times.retries):
                log.info("Asked Vast.ai to %s this instance; the job ended with %d.", action, code)
                _arrived(received, times.farewell)
                return code
    log.error("%s", places.what_follows(action, environ))
    if action == "idle":
        log.info("The job ended with %d; ON_FINISH=idle keeps the container until it is stopped.", code)
        _stay(FOREVER_S, times, serving)
    return code


def _finished_elsewhere(
    code: int, action: str, environ: Mapping[str, str], times: Times, *, began: float, serving: Serving
) -> int:
    """ON_FINISH on a machine that cannot be ended from here: the container exits, now or later. Returns `code`."""
    said = places.what_follows(action, environ)
    seconds = 0.0 if code in STOPPED else _linger(action, environ, times, began=began)
    if action in ("idle", "wait") and code in STOPPED:
        log.info("The job was stopped (%d): the container exits now, whatever ON_FINISH=%s says.", code, action)
    elif action == "idle":
        log.info("The job ended with %d; ON_FINISH=idle keeps the container until it is stopped.", code)
    elif action == "wait" and seconds:
        log.info("The job ended with %d; ON_FINISH=wait keeps the container %.0f minutes.", code, seconds / 60)
    if seconds:
        log.info(HOW_TO_COPY, output_path(environ))
    if said:
        log.warning("%s", said)
    if seconds:
        _stay(seconds, times, serving)
    return code


def _stay(seconds: float, times: Times, serving: Serving) -> int:
    """Wait, and serve the monitor page; returns 128 + the number of a signal that ends the wait, else 0."""
    served = min(seconds, times.page)
    with serving(served):
        stopped = _wait(served)
    if stopped or seconds <= served:
        return stopped
    log.info("The monitor page has ended. python -m entrypoint monitor serves it again.")
    return _wait(seconds - served)


def _linger(action: str, environ: Mapping[str, str], times: Times, *, began: float) -> float:
    """How many seconds the container stays after its job: not beyond MAX_COST where it waits.

    `began`: this start, by the monotonic clock.
    """
    if action == "idle":
        return FOREVER_S
    if action != "wait":
        return 0.0
    with suppress(SettingsError):  # then no limit was set either
        finish = read_settings(environ).finish
        if finish.max_cost is not None and finish.price_per_hour:
            left = began + finish.max_cost / finish.price_per_hour * 3600 - time.monotonic()
            if left < times.linger:
                log.info("ON_FINISH=wait does not wait beyond MAX_COST=%g.", finish.max_cost)
            return min(max(left, 0.0), times.linger)
    return times.linger


def asked_action(environ: Mapping[str, str]) -> str:
    """ON_FINISH, even if other settings are invalid; an unknown value counts as the default."""
    asked = raw_value(environ, "ON_FINISH").lower()
    if asked in ACTIONS:
        return asked
    return "stop" if environ.get("RUNPOD_POD_ID") else "exit"


# ---- limits of time and money


def set_limit(asked: FinishSettings, environ: Mapping[str, str], *, began: float) -> None:
    """Have the parent of this process stop the job when MAX_RUNTIME or MAX_COST is reached: it saves and ends.

    The parent does it whatever this process and the trainer are busy with. `began`: this start of the job, in Unix
    seconds. Raises SettingsError for a cost without a price.
    """
    if asked.max_cost is not None and not asked.price_per_hour:
        raise SettingsError("MAX_COST needs PRICE_PER_HOUR, the price of this machine in the same currency.")
    hours = []
    if asked.max_runtime is not None:
        hours.append(asked.max_runtime)
    if asked.max_cost is not None and asked.price_per_hour:
        hours.append(asked.max_cost / asked.price_per_hour)
    if not hours:
        return
    shared = vitals.Vitals.of(environ)
    if shared is None:
        log.warning("This system has no way to end the job after MAX_RUNTIME or MAX_COST: watch it yourself.")
        return
    shared.write(vitals.LIMIT, time.monotonic() + began - time.time() + min(hours) * 3600)
    shared.close()
    log.info("This job will end after %.2f hours at the latest.", min(hours))


# ---- the record of attempts


def _is_another_node(environ: Mapping[str, str]) -> bool:
    """Whether this pod is one of a cluster that trains together, and not its first, which alone knows of progress."""
    return cluster.is_another(raw_value(environ, "NODES", is_number=True), environ)


def _record(environ: Mapping[str, str]) -> Path:
    """Where attempts are counted. CACHE_PATH may be one volume for several pods."""
    if not _is_another_node(environ):
        return output_path(environ) / "pod.json"
    cache = Path(raw_value(environ, "CACHE_PATH") or DEFAULT_CACHE_PATH).expanduser()
    return cache / f"pod-{environ.get('RUNPOD_POD_ID', '')}.json"


def has_met(environ: Mapping[str, str]) -> None:
    """On another node than the first: all are here. From now on the first one counts the attempts."""
    if environ.get("RUNPOD_POD_ID") and _is_another_node(environ):
        _write(environ, PodRecord())


def _opened(environ: Mapping[str, str]) -> PodRecord:
    """The record, with this start counted."""
    place = _record(environ)
    with suppress(StorageError):
        json_files.set_aside_unless(place, own_files.has_keys("attempts", "step"))
    known = read_json(place) or {}
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
    """The run that was trained last, and its last step; nothing on another node than the first, which writes them."""
    if _is_another_node(environ):
        return "", 0
    status = read_json(output_path(environ) / "status.json") or {}
    run = status.get("run")
    step = status.get("step")
    if not isinstance(run, str):
        run = ""
    if not isinstance(step, int):
        step = 0
    return run, step


def _write(environ: Mapping[str, str], diary: PodRecord) -> None:
    if _is_another_node(environ):
        diary = replace(diary, done=False)  # it has no results for which it should stay when it is started again
    try:
        write_text(_record(environ), json.dumps(asdict(diary)))
    except StorageError as problem:
        log.warning("Cannot count the attempts of this pod: %s", problem)


# ---- the end of a pod


def _end(
    code: int,
    action: str,
    pod: str,
    environ: Mapping[str, str],
    times: Times,
    *,
    began: float,
    serving: Serving,
) -> int:
    """Do what ON_FINISH says; returns `code` if the container is to exit, else when a signal arrives."""
    if action == "exit":
        return code
    stays = "The job ended with %d; the container stays. python -m entrypoint.runpod stop %s ends it."
    if action == "idle":
        log.info(stays, code, pod)
        _stay(FOREVER_S, times, serving)
        return code
    if action == "wait":
        seconds = _linger(action, environ, times, began=began)
        log.info("The job ended with %d; ON_FINISH=wait keeps the pod %.0f minutes, then stops it.", code, seconds / 60)
        if stopped := _stay(seconds, times, serving):
            return stopped
        action = "stop"
    with _signalled() as received:  # RunPod's stop may send its signal before it has answered
        if asked_to_end(action, pod, environ, times.retries):
            log.info("Asked RunPod to %s this pod; the job ended with %d.", action, code)
            if _arrived(received, times.farewell):
                return code
        log.error("THIS POD IS NOT STOPPED AND COSTS MONEY: %s it at %s (%s).", action, CONSOLE, pod)
        log.info(stays, code, pod)
        _arrived(received, None)
    return code


@contextmanager
def _signalled() -> Iterator[list[int]]:
    """A list that collects the numbers of the signals that arrive inside the context."""
    received: list[int] = []
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in SIGNALS}
    vitals.allow(os.environ, ANSWER_S)
    try:
        yield received
    finally:
        vitals.allow(os.environ, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _arrived(received: Sequence[int], seconds: float | None) -> bool:
    """Wait (None: for ever) until a signal is in `received`; whether one is."""
    end = None if seconds is None else time.monotonic() + seconds
    while not received and (end is None or time.monotonic() < end):
        time.sleep(0.2)
    return bool(received)


def _wait(seconds: float | None) -> int:
    """Wait (None: for ever) until a signal arrives; returns 128 + its number, or 0 if none did."""
    with _signalled() as received:
        _arrived(received, seconds)
    if not received:
        return 0
    return 128 + (signal.SIGINT if received[0] == signal.SIGINT else signal.SIGTERM)
