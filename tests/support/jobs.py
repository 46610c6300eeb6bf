"""Jobs as a user starts them: an environment in, processes, files out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.programs import Interpreter, Program, Programs, basic_environment


@dataclass
class Job:
    """One output folder, and the environment that fills it."""

    folder: Path
    environment: dict[str, str]
    programs: Programs

    @property
    def out(self) -> Path:
        return Path(self.environment["OUTPUT_PATH"])

    def start(self, *arguments: str, own_interpreter: bool = False, **changes: str) -> Program | Interpreter:
        """`python -m entrypoint ARGUMENTS`, forked from a process that has imported all, or in an interpreter."""
        environment = {"OMP_NUM_THREADS": "1", **basic_environment(), **self.environment, **changes}
        return self.programs.start(
            "-m", "entrypoint", *arguments, environment=environment, own_interpreter=own_interpreter
        )

    def run(self, *arguments: str, own_interpreter: bool = False, **changes: str) -> tuple[int, str]:
        """Exit code, and all that was printed."""
        process = self.start(*arguments, own_interpreter=own_interpreter, **changes)
        printed, _ = process.communicate(timeout=900)
        return process.returncode, printed

    def wait_for_step(self, process: Program | Interpreter, step: int) -> None:
        """Return as soon as `step` is in metrics.jsonl."""
        deadline = time.monotonic() + 120
        while not any(row["step"] >= step for row in self.metrics()):
            assert process.poll() is None, process.printed()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def metrics(self) -> list[dict[str, Any]]:
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def status(self) -> dict[str, Any]:
        return json.loads((self.out / "status.json").read_text())
