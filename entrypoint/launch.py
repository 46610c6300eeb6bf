"""plan.json → the trainer's process; signals go in, the exit code comes out."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from trainer.plan import Plan

log = logging.getLogger(__name__)
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def launch(plan: Plan, *, environment: Mapping[str, str]) -> int:
    """Run the trainer on `plan` and return its exit code; 128 + n where signal n killed it.

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
            arguments = [sys.executable, "-m", "trainer", str(path)]
            children.append(subprocess.Popen(arguments, env=child_environment(environment)))  # noqa: S603
            for number in early:
                children[0].send_signal(number)
            code = children[0].wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without secrets, settings and network access of the Hub's libraries."""
    hidden = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "CONFIG_JSON")
    kept = {k: v for k, v in environment.items() if not any(word in k.upper() for word in hidden)}
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (root, environment.get("PYTHONPATH", "")) if p)
    ours = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    # Threads that spin while they wait make a CPU step many times slower as soon as another program wants a core.
    return {"OMP_WAIT_POLICY": "PASSIVE", **kept, **ours}
