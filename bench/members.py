"""Processes that measure together, each with an accelerator of its own, as the trainers of a job."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.step import DEVICE
from entrypoint.processes.launch import member_environment
from entrypoint.system.environment import child_environment
from trainer.training import distributed
from trainer.training.distributed import Workers
from trainer.training.stop_flag import StopFlag


def rows(measurement: str, arguments: list[str], size: int) -> Iterator[dict[str, Any]]:
    """Start `size` processes of `python -m bench MEASUREMENT ARGUMENTS`; the rows that the first of them prints.

    They get `--gpus SIZE --member` as well.
    """
    with tempfile.TemporaryDirectory(prefix="kiln-") as folder, contextlib.ExitStack() as started:
        children: list[subprocess.Popen[str]] = []
        for process_rank in range(size):
            environment = child_environment(os.environ)
            environment |= member_environment(environment, Path(folder), process_rank, size=size)
            command = [sys.executable, "-m", "bench", measurement, *arguments, "--gpus", str(size), "--member"]
            out = subprocess.DEVNULL if process_rank else subprocess.PIPE
            children.append(started.enter_context(subprocess.Popen(command, env=environment, stdout=out, text=True)))
            started.callback(children[-1].kill)  # no effect on a process that has ended
        assert children[0].stdout is not None
        for line in children[0].stdout:
            if line.startswith("{"):
                yield json.loads(line)
        codes = [child.wait(timeout=60) for child in children]
        if any(codes):
            raise SystemExit(f"Of {size} processes, these exit codes came: {codes}.")


def connected(size: int) -> Workers:
    """This process's place among those that `rows` has started; they have met."""
    workers = distributed.workers_from_environment(size, os.environ, StopFlag())
    workers.connect(DEVICE)
    return workers


def wait() -> None:
    """Wait until the device has finished."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
