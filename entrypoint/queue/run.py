"""Starts the jobs of a queue, one after another or one on each GPU, records how they end, and stops them when asked."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from entrypoint.monitor.beside import page_address
from entrypoint.processes import farewell, supervise
from entrypoint.processes.supervise import FOREVER_S, PERMANENT_FAILURES
from entrypoint.queue import record as states
from entrypoint.queue import sheet, table
from entrypoint.queue.jobs import QueuedJob, describe, whole_limits
from entrypoint.queue.record import QueueRecord
from entrypoint.settings import names, read_settings
from entrypoint.settings.checks import Notes
from entrypoint.system import hardware
from entrypoint.system.environment import FORWARDED, QUEUED, REPOSITORY, VISIBLE
from entrypoint.system.hardware import HOST_SHARE, Hardware
from trainer.process import vitals
from trainer.process.guard import KILLED_EXIT_CODE, stopped_how
from trainer.spec.errors import StorageError
from trainer.storage import json_files, locks
from trainer.storage.folders import write_text
from trainer.storage.read import read_text

log = logging.getLogger("entrypoint.queue")
TICK_S = 0.2
MIRROR_S = 5.0  # between two copies of a running job's status
TOKEN_CHARACTERS = 16
LONGEST_MESSAGE = 1 << 16  # bytes
ENDING_S = 3.0  # for the table and the last status, if a stop is asked for: a dead volume must not hold the end up


@dataclass
class Running:
    """A job that runs in a slot: the variables that give it a GPU. `told`: the file in which it says why it ended."""

    job: QueuedJob
    slot: int
    process: subprocess.Popen[bytes]
    began: float
    told: Path


@dataclass
class Queue:
    """The jobs, what became of them, and how they are started. `slots`: variables for each job that runs at once."""

    out: Path
    jobs: Sequence[QueuedJob]
    slots: Sequence[Mapping[str, str]]
    record: QueueRecord
    stopped: int = 0  # the signal that asked for it
    stopped_at: float = 0.0  # monotonic
    running: list[Running] = field(default_factory=list)
    mirrored_at: float = 0.0

    def run(self) -> int:
        """All jobs that are not done; the exit code of the queue."""
        before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            with tempfile.TemporaryDirectory(prefix="kiln-queue-") as folder:
                self._run(Path(folder))
                # Before anything else: the parent (trainer.process.guard) kills at once what is allowed nothing.
                waited = time.monotonic() - self.stopped_at if self.stopped else 0.0
                vitals.allow(os.environ, waited + ENDING_S)
                code = self._ended()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if not self.stopped:  # else it would kill this process at its next look, on its way out
                vitals.allow(os.environ, 0)
        return code

    def _run(self, folder: Path) -> None:
        """Start and watch jobs until all have ended. `folder`: for what they say to the queue."""
        waiting = [job for job in self.jobs if not self.record.is_done(job)]
        log.info("%s %d to do, %d at a time.", describe(self.jobs), len(waiting), len(self.slots))
        vitals.allow(os.environ, FOREVER_S)  # each job is ended in time by a parent of its own
        while self.running or (waiting and not self.stopped):
            free = sorted({*range(len(self.slots))} - {running.slot for running in self.running})
            if waiting and free and not self.stopped:
                self._start(waiting.pop(0), free[0], folder)
                continue
            time.sleep(TICK_S)
            self._look()

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if not self.stopped:
            self.stopped, self.stopped_at = number, time.monotonic()
        for running in self.running:
            running.process.send_signal(number)

    def _start(self, job: QueuedJob, slot: int, folder: Path) -> None:
        entry = self.record.entries[job.name]
        entry.state, entry.exit_code, entry.starts = states.RUNNING, None, entry.starts + 1
        self.record.write()
        number = [one.name for one in self.jobs].index(job.name) + 1
        log.info("---- Job %d of %d: %s, in %s", number, len(self.jobs), job.name, job.out)
        own = {name: value for name, value in job.environ.items() if name != vitals.VARIABLE}
        told = folder / f"{number}.txt"
        own |= {**self.slots[slot], QUEUED: str(told)}
        own["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), own.get("PYTHONPATH", ""))))
        # A stop that arrives before the job is in the list would not reach it. The job inherits the mask, and its own
        # parent (trainer.process.guard) takes the signals from there.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "entrypoint", "train"],
                env=own,
                stdin=subprocess.DEVNULL,
            )
            self.running.append(Running(job, slot, process, time.monotonic(), told))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if self.stopped:  # since before the mask, when there was no process to tell
            process.send_signal(self.stopped)

    def _look(self) -> None:
        """Record the jobs that have ended, and copy the status of one that runs."""
        for running in [*self.running]:
            code = running.process.poll()
            if code is not None:
                self.running.remove(running)
                self._record(running, 128 - code if code < 0 else code)
        if self.running and time.monotonic() > self.mirrored_at + MIRROR_S:
            self.mirrored_at = time.monotonic()
            self._mirror()

    def _record(self, running: Running, code: int) -> None:
        entry = self.record.entries[running.job.name]
        entry.exit_code = code
        entry.seconds = round(entry.seconds + time.monotonic() - running.began, 1)
        if code == 0:
            entry.state, entry.uploads = states.DONE, running.job.uploads
        elif code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
            entry.state = states.STOPPED
        else:
            entry.state = states.FAILED
        entry.message = _why(running) if code else ""
        self.record.write()
        level = logging.INFO if code == 0 else logging.ERROR
        log.log(level, "---- %s has ended with %d.", running.job.name, code)
        if entry.state == states.STOPPED and not self.stopped and not _was_its_own_limit(running.job, entry.message):
            log.info("A stop of %s is one of the whole queue.", running.job.name)
            self._forward(code - 128, None)

    def _mirror(self) -> None:
        """Copy the status of the running job that was silent longest: the health check and a pod's record read it."""
        found: list[dict[str, Any]] = []
        for running in self.running:
            status = json_files.read_object(running.job.out / "status.json")
            if status is not None and isinstance(status.get("updated"), int | float):
                found.append({**status, "run": running.job.name})
        if found:
            self._write_status(min(found, key=lambda status: status["updated"]))

    def _ended(self) -> int:
        """Write the last status, the table and, unless a stop leaves no time, the sheet; returns the exit code."""
        code = exit_code([self.record.entries[job.name] for job in self.jobs], self.stopped)
        done = sum(self.record.entries[job.name].state == states.DONE for job in self.jobs)
        message = f"{done} of {len(self.jobs)} jobs are done: {self.out / table.NAME}."
        if code:
            message += " The same command goes on with the others."
        phase = "done"
        if code:
            phase = "stopped" if self.stopped else "failed"
        # First: the table of many jobs takes seconds.
        self._write_status({"phase": phase, "exit_code": code, "message": message, "step": done, "run": "queue"})
        rows = table.rows(self.jobs, self.record)
        try:
            write_text(self.out / table.NAME, table.as_markdown(rows))
            if not self.stopped:
                sheet.write(self.out, self.jobs)
        except StorageError as problem:
            log.warning("%s", problem)
        for line in table.as_text(rows):
            log.info("%s", line)
        log.log(logging.ERROR if code and not self.stopped else logging.INFO, "%s [exit %d]", message, code)
        return code

    def _write_status(self, status: Mapping[str, Any]) -> None:
        now = round(time.time(), 3)
        with suppress(StorageError):
            write_text(
                self.out / "status.json", json.dumps({"started": now, "updated": now, **status}, indent=2) + "\n"
            )


def _was_its_own_limit(job: QueuedJob, message: str) -> bool:
    """Whether a job was stopped by a limit of its own line, and by nobody: whoever stops one wants to end it all."""
    has_limit = any(name in job.given for name in ("MAX_COST", "MAX_RUNTIME"))
    return has_limit and stopped_how(signal.SIGTERM, on_page=True) not in message


def _why(running: Running) -> str:
    """Why a job has ended: what it said before it had a status.json, or what that says."""
    with suppress(OSError, ValueError):
        return " ".join(read_text(running.told, limit=LONGEST_MESSAGE).split())
    status = json_files.read_object(running.job.out / "status.json") or {}
    return str(status.get("message") or "")


def run_all(jobs: Sequence[QueuedJob], environ: Mapping[str, str]) -> int:
    """All jobs that are not done; returns the exit code of the queue.

    MAX_COST and MAX_RUNTIME are those of the whole queue, from this start on. Raises SettingsError if another queue or
    job runs in OUTPUT_PATH.
    """
    began = time.time()
    finish = read_settings({**jobs[0].environ, **whole_limits(environ)}).finish
    if vitals.VARIABLE in os.environ:
        environ = {**environ, vitals.VARIABLE: os.environ[vitals.VARIABLE]}
    supervise.set_limit(finish, environ, began=began)
    out = farewell.output_path(environ)
    slots = slots_of(jobs, hardware.detect(), environ)
    for slot in slots:
        port, token = int(slot["MONITOR_PORT"]), slot.get("MONITOR_TOKEN", "")
        if port and token:  # a token of our own, which no job shows
            log.info("The monitor page of the job that runs: %s", page_address(environ, port=port, token=token))
    with locks.locked(out):
        return Queue(out, jobs, slots, QueueRecord.opened(out, jobs)).run()


def exit_code(entries: Sequence[states.Entry], stopped: int) -> int:
    """Of the queue: 143 or 130 if it was stopped; 75 if another start may do more; else the first failed job's."""
    if stopped:
        return 128 + (signal.SIGINT if stopped == signal.SIGINT else signal.SIGTERM)
    codes = [entry.exit_code or 0 for entry in entries if entry.state != states.DONE]
    for code in codes:
        if code not in PERMANENT_FAILURES and code:
            return KILLED_EXIT_CODE
    return next((code for code in codes if code), 0)


def slots_of(jobs: Sequence[QueuedJob], found: Hardware, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """The variables for each job that runs at the same time: one for each GPU, unless a job takes several itself."""
    port = read_settings(jobs[0].environ).finish.monitor_port
    common = names.variables(environ, Notes())  # those of CONFIG_JSON too
    token = {}
    if "MONITOR_TOKEN" not in common:
        token["MONITOR_TOKEN"] = secrets.token_urlsafe(TOKEN_CHARACTERS)
    one = [{"MONITOR_PORT": str(port), **token}]
    for job in jobs:
        engine = read_settings(job.environ).engine
        if engine.backend == "cpu" or (engine.num_gpus or 1) > 1:
            return one
    if found.vendor == "cpu" or found.count < 2:
        return one
    name = next((name for name in VISIBLE if environ.get(name)), VISIBLE[-1])
    devices = [device.strip() for device in environ.get(name, "").split(",") if device.strip()]
    slots = []
    count = min(found.count, len(jobs))
    for i in range(count):
        device = devices[i] if i < len(devices) else str(i)
        own = {name: device, "MONITOR_PORT": str(port + i if port else 0), **token, HOST_SHARE: str(count)}
        if price := common.get("PRICE_PER_HOUR"):
            with suppress(ValueError):
                own["PRICE_PER_HOUR"] = f"{float(price) / count:.6g}"
        slots.append(own)
    return slots
