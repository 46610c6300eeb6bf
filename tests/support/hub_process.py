"""`hub_client.py` as a running process: the Hub's client reads its variables when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECRET = "canary"  # is a part of every token in tests, and must not come back


@dataclass
class Done:
    """What a call of the client ended with."""

    code: int
    data: dict[str, Any]
    log: str


class Process:
    """`hub_client.py`, ready to answer."""

    def __init__(self, endpoint: str, place: Path) -> None:
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(place), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | own
        command = [sys.executable, str(ROOT / "tests" / "support" / "hub_client.py")]
        self.process = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def send(self, job: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(job) + "\n")

    def receive(self) -> Done:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the client died"
        assert SECRET not in line
        return Done(**json.loads(line))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)
