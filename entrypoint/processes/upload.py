"""PUSH_TO_HUB and UPLOAD_TO: a process for each uploads the LoRA files, the samples and a model card.

The one uploads to a repository of the Hub, the other to a bucket. Only that process has the keys, which it gets through
a pipe. During training it uploads each save; a failure there is only logged. At the end it uploads the final files, and
a file in the run's folder (upload.json, stored.json) records which file is there. If that fails, starting the job again
uploads them without training.

The process may end at any moment (out of memory, a crash of the client's native part): then the entrypoint starts
another one for the final files, which does without the client's Xet protocol. Whatever happens to it, the job's exit
code is 0, 75 (try again), 77 or 78 (the user must act); it is never taken for a bug of the training.

Only files of the job's own run are uploaded. Which run that is, the trainer knows once it has read the images, and
writes it into status.json.
"""

from __future__ import annotations

import contextlib
import json
import logging
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from entrypoint.fetch import http
from entrypoint.processes import store
from entrypoint.system.environment import child_environment
from trainer.network import addresses
from trainer.spec.errors import GatedError, KilnError, SettingsError, UnreachableError
from trainer.spec.family import base_models
from trainer.spec.plan import Plan
from trainer.storage.folders import read_json
from trainer.storage.safe_names import is_safe

log = logging.getLogger("entrypoint.processes.upload")
MARKER, STORE_MARKER = "upload.json", "stored.json"
POLL_S = 2.0  # between two looks for a new save
STALL_TIMEOUT_S = 60.0  # a connection that transfers nothing for this long is closed
STARTUP_S = 60.0  # for the process to be there, on a busy machine
SLOWEST_UPLOAD = 2**16  # bytes/s; below that a process is given up at the end
END_S = 1.0  # for a process that was killed to be gone
PROCESSES = 3  # that are started for the final files, where each of them dies
SAID_WHY = (UnreachableError.exit_code, GatedError.exit_code, SettingsError.exit_code)
KINDS = {kind.__name__: kind for kind in (GatedError, SettingsError)}
AT_START, AT_END = http.USUAL, http.RetryPolicy(budget=1800.0, first_wait=2.0, longest_wait=60.0)


@dataclass(frozen=True)
class Job:
    """What to upload, and where to: the process reads it from its standard input."""

    repo: str = field(repr=False)  # an address may be signed
    token: str = field(repr=False)
    out: str  # folder
    name: str  # of the LoRA file, without .safetensors, as far as it is known when the job starts
    base: str  # Hub repository of the base model; "" if it is none
    folder: str = ""  # of the run, below `out`; as far as it is known, too
    started: float = 0.0  # Unix seconds; an older status.json is another job's
    creates: bool = True  # a private repository, if it does not exist; in a bucket, the manifest
    at_start: http.RetryPolicy = AT_START
    at_end: http.RetryPolicy = AT_END
    variable: str = "PUSH_TO_HUB"  # or UPLOAD_TO: then `repo` is an address
    clouds: dict[str, str] = field(default_factory=dict, repr=False)  # the variables of the bucket's service

    @property
    def where(self) -> str:
        """The place, for people."""
        return self.repo if self.variable == "PUSH_TO_HUB" else addresses.shown(self.repo)

    @property
    def label(self) -> str:
        return f"{self.variable}={self.where}"

    @property
    def marker(self) -> str:
        """The file in the run's folder that records what is there."""
        return MARKER if self.variable == "PUSH_TO_HUB" else STORE_MARKER


def is_done(job: Job, final: Path) -> bool:
    """Whether the repository has this very file."""
    marker = read_json(Path(job.out) / job.folder / job.marker) or {}
    return marker.get("repo") == job.where and marker.get("file") == identity_of(final)


def current_run(job: Job) -> tuple[str, Path] | None:
    """The name and the folder of the run that the job trains; None until the trainer knows it."""
    out = Path(job.out)
    status = read_json(out / "status.json") or {}
    began = status.get("started")
    name, folder = status.get("run"), status.get("run_folder")
    if not isinstance(began, (int, float)) or began < job.started:
        return None
    if not isinstance(name, str) or not is_safe(name) or "/" in name:
        return None
    if folder != "." and not is_safe(folder):  # of somebody else's file by that name
        return None
    return name, out / str(folder)


def identity_of(path: Path) -> list[int | str]:
    """What tells a file from an older one of its name. Raises OSError."""
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns]


def job(repo: str | None, token: str | None, plan: Plan, *, creates: bool = True) -> Job | None:
    """The job of the uploading process; None if nothing is to be uploaded. Raises SettingsError."""
    if repo is None:
        return None
    if not token:
        raise SettingsError("PUSH_TO_HUB needs a token that may write: set HF_WRITE_TOKEN, or HF_TOKEN.")
    known = base_models()[plan.model.base][1].source
    base = "" if Path(known).is_absolute() else known
    output = plan.output
    return Job(repo, token, output.path, output.name, base, folder=output.folder, started=time.time(), creates=creates)


def store_job(address: str | None, environ: Mapping[str, str], plan: Plan, *, creates: bool = True) -> Job | None:
    """The same for UPLOAD_TO. Raises SettingsError where that is no place for files."""
    if address is None:
        return None
    if problem := store.problem_of(address):
        raise SettingsError(f"UPLOAD_TO={addresses.shown(address)} {problem}.")
    known = base_models()[plan.model.base][1].source
    base = "" if Path(known).is_absolute() else known
    output, clouds = plan.output, store.keys_for(address, environ)
    about: dict[str, Any] = {"folder": output.folder, "started": time.time(), "creates": creates}
    return Job(address, "", output.path, output.name, base, variable="UPLOAD_TO", clouds=clouds, **about)


@contextmanager
def beside(job: Job | None, environment: Mapping[str, str]) -> Iterator[Callable[[], int]]:
    """Inside the context, saves are uploaded. Yields a function that uploads the final files: 0, 75, 77 or 78.

    Raises GatedError or SettingsError at once if the token may not write to the repository. Training starts even if the
    Hub does not answer, or the uploading process cannot start.
    """
    if job is None:
        yield lambda: 0
        return
    process = _Process(job, environment)
    try:
        kind, message = process.start()
        if kind is not None:
            raise kind(message)
        yield process.finish
    finally:
        process.end()


@contextmanager
def all_beside(jobs: Sequence[Job], environment: Mapping[str, str]) -> Iterator[Callable[[], int]]:
    """`beside` for several places. What fails at one is no reason not to upload to the next: the first code counts."""
    with contextlib.ExitStack() as stack:
        uploads = [stack.enter_context(beside(job, environment)) for job in jobs]

        def finish() -> int:
            codes = [upload() for upload in uploads]
            return next((code for code in codes if code), 0)

        yield finish


class _Process:
    """The uploading process, as the entrypoint sees it; another one takes its place where it dies."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        hidden = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        self.job = job
        self.environment = {k: v for k, v in child_environment(environment, network=True).items() if k not in hidden}
        self.environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        # The client takes HF_ENDPOINT as it is written, blanks included.
        self.environment["HF_ENDPOINT"] = addresses.hub_endpoint(environment)
        self.child: subprocess.Popen[str] | None = None

    def start(self) -> tuple[type[KilnError] | None, str]:
        """Start it, and wait until it may upload; (None, "") if so, or if another try at the end may help."""
        try:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "entrypoint.processes.uploader"],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as problem:  # no memory, too many processes
            log.warning("Uploads wait for the end of the job: no process could be started (%s).", problem.strerror)
            return None, ""
        self._say(json.dumps(asdict(self.job)))
        answer = self._line(2 * self.job.at_start.budget + STARTUP_S)
        name, _, message = answer.strip().partition(": ")
        if name in KINDS:
            return KINDS[name], message
        if answer != "ready\n":
            self.end()
            log.warning("The uploading process has not started. Uploads wait for the end of the job.")
        return None, ""

    def finish(self) -> int:
        """Upload the final files; returns 0, or the exit code of the job."""
        code: int | None = None
        for number in range(PROCESSES):
            if number or self.child is None:
                self.end()
                kind, message = self.start()
                if kind is not None:
                    log.error("%s", message)
                    code = kind.exit_code
                    break
            code = self._final()
            if code == 0:
                return 0
            if code in SAID_WHY:
                break
            log.warning("The uploading process %s.", _how_it_ended(code))
            # The native part of the client is what crashes, hangs and takes memory: the next does without it.
            self.environment["HF_HUB_DISABLE_XET"] = "1"
        text = "The LoRA is in %s, but not in %s. Start the same job again to upload it."
        log.error(text, self.job.out, self.job.where)
        return code if code in SAID_WHY else UnreachableError.exit_code

    def _final(self) -> int | None:
        """The exit code of the process after it was told to upload the final files; None if it had to be ended."""
        if self.child is None:
            return UnreachableError.exit_code
        self._say("final")
        size = sum(path.stat().st_size for path in Path(self.job.out).glob("*.safetensors"))
        try:
            return self.child.wait(1.5 * self.job.at_end.budget + STARTUP_S + size / SLOWEST_UPLOAD)
        except subprocess.TimeoutExpired:
            return None

    def _line(self, seconds: float) -> str:
        """The next line of its standard output; "" if it has ended, or says nothing for so long."""
        assert self.child and self.child.stdout
        ready, _, _ = select.select([self.child.stdout], [], [], seconds)
        return self.child.stdout.readline() if ready else ""

    def _say(self, line: str) -> None:
        assert self.child and self.child.stdin
        try:
            self.child.stdin.write(f"{line}\n")
            self.child.stdin.flush()
        except OSError:  # it has ended; its exit code says why
            log.warning("The uploading process has ended.")

    def end(self) -> None:
        """Kill it, if it is there."""
        if self.child is None:
            return
        self.child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel: nobody waits for that
            self.child.wait(END_S)
        for pipe in (self.child.stdin, self.child.stdout):
            with contextlib.suppress(OSError):  # what was never read by it is lost
                assert pipe
                pipe.close()
        self.child = None


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "did not end, and was killed"
    if code == -signal.SIGKILL:
        return "was killed (by SIGKILL: was the memory full?)"
    if code < 0:
        return f"was killed by signal {-code}"
    return f"ended with exit code {code}"
