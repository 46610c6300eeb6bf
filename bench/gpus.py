"""The same training step on one GPU and on several, with the sum over them that a job makes: what more GPUs give.

    python -m bench gpus --family FAMILY --batch 1 4 --gpus 1 2 4 [--what PRECISION+POLICY[+WORD]…] [--size W H]

As many processes are started as GPUs are asked for, in the way of a job. `batch`: pictures of each GPU; `images_s`: of
all of them; `of_linear`: that, by the first row of the same batch times the GPUs. `sum_ms`: of a step, from the end of
the backward pass until the gradient of all is there. WORD: as for `bench step` (replay: recorded). With --small on the
CPU.
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
    """As `trainer.training.loop.train` does it; `apart`: returns the seconds that the sum over the processes took
    alone."""
    loss = bench.backward(engine, batch, seed=number * workers.size + workers.process_rank)
    if apart:
        wait()
        workers.all_agree(True)
    began = time.monotonic()
    step_totals_3 = workers.mean_gradient(bench.runner.flat_grad, [loss.expand(batch)])
    if apart:
        wait()
    took = time.monotonic() - began
    workers.read_totals(step_totals_3, torch.nn.utils.clip_grad_norm_(bench.optimizer_params, 1.0))
    bench.optimizer.step()
    bench.runner.clear()
    return took


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def fits(bench: Bench, engine: Engine, batch: int) -> bool:
    try:
        bench.backward(engine, batch)
        return True
    except torch.OutOfMemoryError:
        bench.runner.release()
        return False
    finally:
        bench.runner.clear()


def member(asked: argparse.Namespace, size: int) -> None:
    """One process: the first prints a row for each batch."""
    workers = distributed.workers_from_environment(size, os.environ, StopFlag())
    torch._dynamo.config.cache_size_limit = 64
    words = set(asked.what.split("+"))
    bench = Bench(asked.family, asked.what.split("+")[0], small=asked.small)
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
            began = time.monotonic()
            for number in range(asked.steps):
                step(bench, engine, batch, workers, number=3 + number)
            wait()
            seconds = (time.monotonic() - began) / asked.steps
            sums = [step(bench, engine, batch, workers, number=number, apart=True) for number in range(5)]
            row |= {"step_s": round(seconds, 4), "sum_ms": round(1000 * statistics.median(sums), 2)}
            row["images_s"] = round(size * batch / seconds, 3)
        if workers.is_first:
            print(json.dumps(row), flush=True)
    workers.check_same(bench.optimizer_params)
    workers.disconnect()


def rows(arguments: list[str], size: int) -> Iterator[dict[str, Any]]:
    """What the first of `size` processes prints."""
    with tempfile.TemporaryDirectory(prefix="kiln-") as folder, contextlib.ExitStack() as started:
        children: list[subprocess.Popen[str]] = []
        for rank in range(size):
            environment = child_environment(os.environ)
            environment |= member_environment(environment, Path(folder), rank, size=size)
            command = [sys.executable, "-m", "bench", "gpus", *arguments, "--gpus", str(size), "--member"]
            out = subprocess.DEVNULL if rank else subprocess.PIPE
            children.append(started.enter_context(subprocess.Popen(command, env=environment, stdout=out, text=True)))
            started.callback(children[-1].kill)  # before it is waited for; nothing to one that has ended
        assert children[0].stdout is not None
        for line in children[0].stdout:
            if line.startswith("{"):
                yield json.loads(line)
        codes = [child.wait(timeout=60) for child in children]
        if any(codes):
            raise SystemExit(f"Of {size} processes, these exit codes came: {codes}.")


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4], help="pictures of each GPU")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4], help="how many; the first is the measure")
    words = "PRECISION+POLICY[+host|+weights][+turned][+replay][+plain][+eager]"
    parser.add_argument("--what", default="fp8+all", help=words)
    parser.add_argument("--size", type=int, nargs=2, help="width and height in pixels")
    parser.add_argument("--steps", type=int, default=20, help="that are measured")
    parser.add_argument("--member", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.member:
        member(asked, asked.gpus[0])
        return
    report, measure = Report(f"{asked.family}: on several GPUs", asked.markdown), dict[int, float]()
    given = ["--family", asked.family, "--what", asked.what, "--steps", str(asked.steps)]
    given += ["--batch", *map(str, asked.batch), *(["--small"] if asked.small else [])]
    given += ["--size", *map(str, asked.size)] if asked.size else []
    for size in asked.gpus:
        for row in rows(given, size):
            if isinstance(row["images_s"], float):
                of = measure.setdefault(row["batch"], row["images_s"] / size)
                row["of_linear"] = round(row["images_s"] / (size * of), 3)
            report.row(row)
