"""The same training step on one GPU and on several, with the gradient averaged over processes as in a job.

    python -m bench gpus --family FAMILY --batch 1 4 --gpus 1 2 4 [--what PRECISION+POLICY[+WORD]…] [--size W H]

Starts one process for each GPU, as a job does. `batch`: images on each GPU. `images_s`: images per second of all GPUs.
`of_linear`: that, relative to the first row of the same batch times the number of GPUs. `sum_ms`: from the end of the
backward pass until all processes have the mean gradient. WORD: as for `bench step` (replay: a CUDA graph). With
`--small`, on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.report import Report, options
from bench.step import DEVICE, Bench, free
from entrypoint.processes.launch import member_environment
from entrypoint.system.environment import child_environment
from trainer.engine.execution import Engine
from trainer.training import distributed
from trainer.training.distributed import Workers
from trainer.training.stop_flag import StopFlag


def step(bench: Bench, engine: Engine, batch: int, workers: Workers, *, number: int, apart: bool = False) -> float:
    """A step as in `trainer.training.loop.train`; returns the seconds until the mean gradient was there.

    `apart`: wait for the backward pass of all processes first, so that these seconds are those of the averaging alone.
    """
    loss = bench.backward(engine, batch, seed=number * workers.size + workers.process_rank)
    if apart:
        wait()
        workers.all_agree(True)
    started = time.monotonic()
    losses, times = [loss.expand(batch)], [torch.full((batch,), 0.5, device=DEVICE)]
    step_totals_T = workers.mean_gradient(bench.runner.flat_grad, losses, times)
    if apart:
        wait()
    seconds = time.monotonic() - started
    workers.read_totals(step_totals_T, torch.nn.utils.clip_grad_norm_(bench.optimizer_params, 1.0))
    bench.optimizer.step()
    bench.runner.clear()
    return seconds


def wait() -> None:
    """Wait until the device has finished."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def fits(bench: Bench, engine: Engine, batch: int) -> bool:
    """Whether this process has enough memory for a pass."""
    try:
        bench.backward(engine, batch)
        return True
    except torch.OutOfMemoryError:
        bench.runner.release()
        return False
    finally:
        bench.runner.clear()


def member(asked: argparse.Namespace, size: int) -> None:
    """One of the processes. The first of them prints a row for each batch."""
    workers = distributed.workers_from_environment(size, os.environ, StopFlag())
    torch._dynamo.config.cache_size_limit = 64
    words = set(asked.what.split("+"))
    bench = Bench(asked.family, asked.what.split("+")[0], base=asked.base, small=asked.small)
    bench.size = tuple(asked.size or bench.size)
    workers.connect(DEVICE)
    for batch in asked.batch:
        free()
        engine = bench.engine(words)
        row: dict[str, Any] = {"what": asked.what, "batch": batch, "gpus": size}
        if not workers.all_agree(fits(bench, engine, batch)):
            row["images_s"] = "out of memory"
        else:
            for number in range(3):
                step(bench, engine, batch, workers, number=number)
            wait()
            started = time.monotonic()
            for number in range(asked.steps):
                step(bench, engine, batch, workers, number=3 + number)
            wait()
            seconds = (time.monotonic() - started) / asked.steps
            sums = [step(bench, engine, batch, workers, number=number, apart=True) for number in range(5)]
            row |= {"step_s": round(seconds, 4), "sum_ms": round(1000 * statistics.median(sums), 2)}
            row["images_s"] = round(size * batch / seconds, 3)
        if workers.is_first:
            print(json.dumps(row), flush=True)
    workers.check_same(bench.optimizer_params)
    workers.disconnect()


def rows(arguments: list[str], size: int) -> Iterator[dict[str, Any]]:
    """Start `size` processes; the rows that the first of them prints."""
    with tempfile.TemporaryDirectory(prefix="kiln-") as folder, contextlib.ExitStack() as started:
        children: list[subprocess.Popen[str]] = []
        for process_rank in range(size):
            environment = child_environment(os.environ)
            environment |= member_environment(environment, Path(folder), process_rank, size=size)
            command = [sys.executable, "-m", "bench", "gpus", *arguments, "--gpus", str(size), "--member"]
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


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4], help="images on each GPU")
    parser.add_argument(
        "--gpus",
        nargs="+",
        type=int,
        default=[1, 2, 4],
        help="numbers of GPUs; the first is the reference for of_linear",
    )
    words = "PRECISION+POLICY[+host|+weights][+turned][+replay][+plain][+eager]"
    parser.add_argument("--what", default="fp8+all", help=words)
    parser.add_argument("--size", type=int, nargs=2, help="width and height in pixels")
    parser.add_argument("--steps", type=int, default=20, help="steps that are measured")
    parser.add_argument("--member", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.member:
        member(asked, asked.gpus[0])
        return
    report = Report(f"{asked.family}: on several GPUs", asked.markdown)
    images_s_of_one: dict[int, float] = {}  # batch → of one GPU, by the first row
    for size in asked.gpus:
        for row in rows(_member_arguments(asked), size):
            if isinstance(row["images_s"], float):
                reference = images_s_of_one.setdefault(row["batch"], row["images_s"] / size)
                row["of_linear"] = round(row["images_s"] / (size * reference), 3)
            report.row(row)


def _member_arguments(asked: argparse.Namespace) -> list[str]:
    """The arguments of each process."""
    arguments = ["--family", asked.family, "--what", asked.what, "--steps", str(asked.steps)]
    arguments += ["--batch", *map(str, asked.batch)]
    if asked.small:
        arguments.append("--small")
    if asked.base:
        arguments += ["--base", asked.base]
    if asked.size:
        arguments += ["--size", *map(str, asked.size)]
    return arguments
