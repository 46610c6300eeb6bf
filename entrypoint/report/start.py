"""Write the report of a job that has ended, in a process of its own: whatever becomes of it, the job's end stays."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from entrypoint.system.environment import child_environment
from trainer.spec.log_lines import safe_lines
from trainer.storage import json_files

log = logging.getLogger("entrypoint.report")
MOST_S = 120.0


def write(out: Path, environment: Mapping[str, str], *, started: float, price: float | None) -> None:
    """Write report.html and README.md of the job that began at `started` (Unix seconds), if it came as far as a run.

    `price`: of the machine, an hour.
    """
    status = json_files.read_object(out / "status.json") or {}
    began = status.get("started")
    if not isinstance(began, int | float) or began < started or "run" not in status:
        return  # the trainer has not begun, or another job has the folder
    command = [sys.executable, "-m", "entrypoint.report", str(out)]
    if price:
        command += ["--price-per-hour", f"{price:g}"]
    try:
        done = subprocess.run(  # noqa: S603
            command,
            env=child_environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=MOST_S,
            check=False,
        )
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        problem = "" if done.returncode == 0 else said
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = f"{type(error).__name__}"
    if problem:
        log.warning("report.html could not be written (%s). The job itself is not affected.", safe_lines(problem))
    else:
        log.info("report.html and README.md, the model card, are beside the samples: %s.", out / status["run_folder"])
