"""The process of the monitor page, as the entrypoint sees it: started beside a job, and again if it ends, until the job
does. Nothing here waits for it, and nothing here raises.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from entrypoint.settings import read_settings
from entrypoint.settings.row import Secret
from entrypoint.system.environment import QUEUED, child_environment
from trainer.spec.errors import SettingsError, UnreachableError
from trainer.spec.log_lines import escaped

log = logging.getLogger("entrypoint.monitor")
PORT = 8675  # MONITOR_PORT
SHORTEST_TOKEN = 16  # characters of MONITOR_TOKEN: more than anybody can try
LISTENS = "listens"  # what the process prints as soon as it does
VAST_PORT = "VAST_TCP_PORT_"  # Vast.ai's variables for the ports of a container, as they are outside
LONGEST_LINE = 4096  # characters of what it prints
FIRST_PAUSE_S = 1.0  # before it is started again; doubled with each
LONGEST_PAUSE_S = 60.0
STEADY_S = 60.0  # a process that lived so long was well


def page_address(environment: Mapping[str, str], *, port: int, token: str = "") -> str:
    """The address of the page on this machine; on RunPod that of its proxy, on Vast.ai the one outside.

    `token`: where it may be shown.
    """
    pod = environment.get("RUNPOD_POD_ID", "").strip()
    own = environment.get("PUBLIC_IPADDR", "").strip()
    outside = environment.get(f"{VAST_PORT}{port}", "").strip()  # the port that Vast.ai has chosen for it
    place = f"http://localhost:{port}/"
    if pod:
        place = f"https://{pod}-{port}.proxy.runpod.net/"
    elif own and outside:
        place = f"http://{own}:{outside}/"
    return f"{place}#{token}" if token else place


@dataclass(frozen=True)
class Job:
    """What the process needs. It comes through a pipe: the token is a secret.

    `started`: in Unix seconds; 0 of a job that has ended.
    """

    out: str
    port: int
    token: str = field(repr=False)
    price: float | None = None
    started: float = field(default_factory=time.time)
    is_queued: bool = False  # one of several jobs: a stop ends them all


def check_token(token: Secret | None) -> None:
    """Raises SettingsError for a MONITOR_TOKEN that somebody could guess."""
    if token is not None and len(token.reveal()) < SHORTEST_TOKEN:
        raise SettingsError(f"MONITOR_TOKEN is too short. Allowed: {SHORTEST_TOKEN} characters or more.")


@contextmanager
def showing(
    port: int,
    token: Secret | None,
    environment: Mapping[str, str],
    *,
    out: Path,
    price: float | None,
    until: float | None = None,
) -> Iterator[None]:
    """Inside the context, the page of the job in `out` is served on `port`; 0: it is not.

    `until`: of a job that has ended, when that is over, in Unix seconds.
    """
    if not port:
        yield
        return
    own = secrets.token_urlsafe(SHORTEST_TOKEN)
    job = Job(str(out), port, token.reveal() if token else own, price, is_queued=bool(environment.get(QUEUED)))
    words = "The monitor page of this job: "
    if until is not None:
        job = replace(job, started=0.0)
        words = f"The monitor page is served until {time.strftime('%Y-%m-%d %H:%M', time.gmtime(until))} UTC, "
        words += "for downloads: "
    address = page_address(environment, port=port, token="" if token else own)
    keeper = Keeper(job, environment, f"{words}{address}")
    keeper.start()
    try:
        yield
    finally:
        keeper.close()


@contextmanager
def showing_after(environment: Mapping[str, str], seconds: float) -> Iterator[None]:
    """Inside the context, for so many seconds, the page of the job that has ended is served, if it has one."""
    try:
        settings = read_settings(environment)
        check_token(settings.finish.monitor_token)
    except SettingsError:  # the job has said it, and has nothing to show
        yield
        return
    finish, out = settings.finish, settings.output.output_path
    page: dict[str, Any] = {"out": out, "price": finish.price_per_hour, "until": time.time() + seconds}
    with showing(finish.monitor_port, finish.monitor_token, environment, **page):
        yield


class Keeper(threading.Thread):
    """Starts the process, waits for its end, and starts it again. Logs `line`, with its address, when that is one."""

    def __init__(self, job: Job, environment: Mapping[str, str], line: str) -> None:
        super().__init__(daemon=True, name="monitor")
        self._job = job
        self._line = line
        self._is_address_told = False
        self._last_line = ""  # of the process that has ended
        self._environment = child_environment(environment)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._told: set[int | None] = set()

    def run(self) -> None:
        pause = FIRST_PAUSE_S
        while not self._closing.is_set():
            began = time.monotonic()
            code = self._serve()
            if self._closing.is_set():
                return
            if time.monotonic() - began > STEADY_S:
                pause = FIRST_PAUSE_S
            self._tell(code)
            self._closing.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _serve(self) -> int | None:
        """Run the process to its end; returns its exit code, None where it could not be started."""
        with self._lock:
            if self._closing.is_set():
                return None
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", "entrypoint.monitor", "--beside"],
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                )
            except OSError:  # no memory, too many processes
                return None
            self._process = process
        assert process.stdin
        with contextlib.suppress(OSError):
            process.stdin.write(f"{json.dumps(asdict(self._job))}\n")
            process.stdin.flush()
        self._listen(process)
        return process.wait()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Read what the process says until it ends: that it listens, and at last why it does not."""
        assert process.stdout
        self._last_line = ""
        with contextlib.suppress(OSError, ValueError), process.stdout:
            while line := process.stdout.readline(LONGEST_LINE):
                text = line.strip()
                if text != LISTENS:
                    self._last_line = text or self._last_line
                elif not self._is_address_told and not self._closing.is_set():
                    self._is_address_told = True
                    log.info("%s", self._line)

    def _tell(self, code: int | None) -> None:
        """Log each kind of failure once: the job's log is not about its page."""
        port = self._job.port
        if code is None:
            text = "The monitor page cannot be started: no process could be made."
        elif code == UnreachableError.exit_code:
            text = f"MONITOR_PORT={port} is taken by another program. The monitor page comes when it is free."
        elif code == SettingsError.exit_code:
            text = f"MONITOR_PORT={port} cannot be had: {self._said()}"
        else:
            text = f"The process of the monitor page has ended ({code}): {self._said()} It is started again."
        if code not in self._told:
            self._told.add(code)
            unaffected = " Training is not affected." if self._job.started else ""
            log.warning("%s%s MONITOR_PORT chooses another port; 0 is off.", text, unaffected)

    def _said(self) -> str:
        """The last line of the process, as the job's log may have it."""
        said = escaped(self._last_line.replace(self._job.token, "…")).rpartition(" ERROR ")[2] or "it has said nothing"
        return said if said.endswith(".") else f"{said}."

    def close(self) -> None:
        """End the process at once: it has nothing to lose."""
        self._closing.set()
        with self._lock:
            process = self._process
        if process is not None:
            process.kill()
        self.join(1.0)
        if process is not None and process.stdin:
            with contextlib.suppress(OSError):
                process.stdin.close()
