"""Start the trainers on plan.json, forward signals to them, and return the exit code of the job."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from entrypoint.fetch import flash_attention
from entrypoint.system.environment import FORWARDED, VISIBLE, child_environment
from trainer.spec.errors import HangError, KilnError, PeerError, StorageError
from trainer.spec.plan import ALIVE_VARIABLE, RANK_VARIABLE, TEAM_VARIABLE, Plan
from trainer.storage import folders

log = logging.getLogger(__name__)
GRACE_S = 5.0  # for the first process to finish cleanly when another has failed


def launch(plan: Plan, *, environment: Mapping[str, str]) -> int:
    """Run the trainer on `plan` and return its exit code: 128 + n if signal n killed it, 75 if it hung.

    With NUM_GPUS above 1, the first process leads: it gets the signals, and when it ends, the job ends. If another one
    fails, the rest is stopped, and its exit code is the job's.
    The trainer gets no secrets and needs no network: everything is on local paths by now.
    """
    with tempfile.TemporaryDirectory(prefix="kiln-") as name:
        folder = Path(name)
        path = folder / "plan.json"
        path.write_text(plan.to_json(), encoding="utf-8")
        children: list[subprocess.Popen[bytes]] = []
        early: list[int] = []

        def forward(number: int, _frame: FrameType | None) -> None:
            for child in children[:1]:
                child.send_signal(number)
            if not children:
                early.append(number)

        before = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            # A list of arguments, no shell: nothing in the plan can become a command.
            arguments = [sys.executable, "-m", "trainer", str(path)]
            size = plan.engine.num_gpus
            common = child_environment(environment)
            if plan.engine.attention == "flash_4":
                common |= flash_attention.environment(Path(plan.output.cache), common)
            for process_rank in range(size):
                own = dict(common)
                if size > 1:
                    own |= member_environment(own, folder, process_rank, size=size)
                if process_rank == 0:
                    own[ALIVE_VARIABLE] = str(folder / "alive")
                children.append(subprocess.Popen(arguments, env=own))  # noqa: S603
            for number in early:
                children[0].send_signal(number)
            code, failed = _watch(children, folder / "alive")
        finally:
            for child in children:
                child.kill()
                child.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        if failed:
            _report_failure(plan, folder / f"rank-{failed}", failed, code)
    return code


def member_environment(environment: Mapping[str, str], folder: Path, process_rank: int, *, size: int) -> dict[str, str]:
    """The variables that make a process number `process_rank` of `size`: its device, and how to reach the others."""
    own = {RANK_VARIABLE: str(process_rank), TEAM_VARIABLE: str(folder)}
    for name in VISIBLE:
        if environment.get(name) or name == VISIBLE[-1]:
            devices = [device.strip() for device in environment.get(name, "").split(",") if device.strip()]
            own[name] = devices[process_rank] if process_rank < len(devices) else str(process_rank)
    own |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    # NCCL must not kill a process that waits for another: our own watchdog finds the one that hangs.
    own["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    if "OMP_NUM_THREADS" not in environment:
        own["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // size))
    return own


def _watch(children: Sequence[subprocess.Popen[bytes]], alive: Path) -> tuple[int, int]:
    """The exit code of the job, and the process it comes from; 75 if the first one missed the deadline in `alive`.

    Its own watchdog (trainer/job/watchdog.py) cannot act while a call holds the GIL, or while the process is stopped.
    """
    first = children[0]
    while True:
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.5 / len(children))
        failed = [i for i, child in enumerate(children) if child.returncode]
        if failed:
            return _end_all(children, failed, alive.parent)
        if first.returncode == 0:
            return 0, 0
        try:
            deadline = float(alive.read_text(encoding="ascii"))
        except (OSError, ValueError):  # not written yet
            continue
        if time.monotonic() > deadline:
            log.error("The trainer hangs, and not even its watchdog answers. Ending it. Its stacks:")
            for child in children:
                child.send_signal(signal.SIGUSR1)
                child.send_signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                first.wait(timeout=2)
            _log_stacks(alive.parent)
            log.error("%s [exit %d]", HangError.advice, HangError.exit_code)
            return HangError.exit_code, 0


def _log_stacks(folder: Path) -> None:
    """Log the Python stacks that the processes wrote on request."""
    for path in sorted(folder.glob("stacks-*.txt")):
        if text := path.read_text(encoding="utf-8", errors="replace"):
            log.error("Process %s:\n%s", path.stem.removeprefix("stacks-"), text.rstrip())


def _end_all(children: Sequence[subprocess.Popen[bytes]], failed: Sequence[int], folder: Path) -> tuple[int, int]:
    """End all processes after some have failed; returns the exit code of the one to blame, and its number.

    The others may wait for it in a call that no signal interrupts. A process that ended only because another did
    (PeerError) is not to blame.
    """
    first, deadline = children[0], time.monotonic() + GRACE_S

    def to_blame() -> list[int]:
        return [i for i, child in enumerate(children) if child.poll() not in (None, 0, PeerError.exit_code)]

    if len(children) > 1 and failed[0]:
        log.error("Process %d of %d has failed. Ending the others.", failed[0], len(children))
    while not to_blame() and time.monotonic() < deadline:  # the one to blame may still be writing its status
        time.sleep(0.05)
    blamed = to_blame()
    if first.poll() is None:  # so that its files are complete and its status says how it ended
        first.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            first.wait(timeout=max(0.0, deadline - time.monotonic()))
    if first.returncode == HangError.exit_code:
        for child in children[1:]:
            child.send_signal(signal.SIGUSR1)  # their stacks may show why the first one hung
        time.sleep(0.5 if len(children) > 1 else 0)
        _log_stacks(folder)
    return (_code(children[blamed[0]]), blamed[0]) if blamed else (KilnError.exit_code, 0)


def _code(child: subprocess.Popen[bytes]) -> int:
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _report_failure(plan: Plan, folder: Path, process_rank: int, code: int) -> None:
    """Put the reason of another process into status.json, which only the first one writes."""
    how = f"was killed by {signal.Signals(code - 128).name}" if code > 128 else f"ended with exit code {code}"
    message = (folders.read_json(folder / "status.json") or {}).get("message")
    message = message or f"Process {process_rank} of {plan.engine.num_gpus} {how}."
    log.error("%s [exit %d]", message, code)
    status = Path(plan.output.path) / "status.json"
    with contextlib.suppress(StorageError):
        ended = {"phase": "failed", "exit_code": code, "message": message}
        folders.write_text(status, json.dumps((folders.read_json(status) or {}) | ended, indent=2) + "\n")
