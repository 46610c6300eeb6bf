"""plan.json → the trainer's process; signals go in, the exit code comes out."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from trainer.errors import HangError
from trainer.plan import Plan

log = logging.getLogger(__name__)
ALIVE = "KILN_ALIVE"  # as in trainer/watchdog.py
SECRET = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY", "CONFIG_JSON")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def launch(plan: Plan, *, environment: Mapping[str, str]) -> int:
    """Run the trainer on `plan` and return its exit code; 128 + n where signal n killed it, 75 where it hung.

    The trainer gets no secret and needs no network: everything is on local paths by now.
    """
    with tempfile.TemporaryDirectory(prefix="kiln-") as folder:
        path = Path(folder) / "plan.json"
        path.write_text(plan.to_json(), encoding="utf-8")
        children: list[subprocess.Popen[bytes]] = []
        early: list[int] = []

        def forward(number: int, _frame: FrameType | None) -> None:
            for child in children:
                child.send_signal(number)
            if not children:
                early.append(number)

        before = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            # A list of arguments and no shell: nothing in the plan can become a command.
            arguments, alive = [sys.executable, "-m", "trainer", str(path)], Path(folder) / "alive"
            child = subprocess.Popen(arguments, env={**child_environment(environment), ALIVE: str(alive)})  # noqa: S603
            children.append(child)
            for number in early:
                child.send_signal(number)
            code = _watched(child, alive)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _watched(child: subprocess.Popen[bytes], alive: Path) -> int:
    """The exit code of `child`; 75 where it had to be ended because it missed the deadline that it keeps in `alive`.

    It looks after itself (trainer/watchdog.py) unless a call holds Python's lock, or the process is stopped.
    """
    while True:
        try:
            return child.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            pass
        try:
            deadline = float(alive.read_text(encoding="ascii"))
        except (OSError, ValueError):  # not written yet
            continue
        if time.monotonic() > deadline:
            log.error("The trainer hangs, and not even its watchdog answers: it is ended. Its stacks:")
            child.send_signal(signal.SIGUSR1)
            child.send_signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=2)
            child.kill()
            child.wait()
            log.error("%s [exit %d]", HangError.advice, HangError.exit_code)
            return HangError.exit_code


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without secrets, without our settings, among which addresses may be signed, and without the Hub."""
    from entrypoint.variables import NAMES

    settings = {*NAMES} - {"HF_HOME"}
    kept = {k: v for k, v in environment.items() if k not in settings and not any(w in k.upper() for w in SECRET)}
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (root, environment.get("PYTHONPATH", "")) if p)
    ours = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    # Threads that spin while they wait make a CPU step many times slower as soon as another program wants a core.
    # Memory that was freed in pieces of one size serves another.
    return {"OMP_WAIT_POLICY": "PASSIVE", "PYTORCH_ALLOC_CONF": "expandable_segments:True", **kept, **ours}
