"""The same training step on one GPU and on several, with the gradient averaged over processes as in a job.

    python -m bench gpus --family FAMILY --gpus 1 2 4 --shapes 1,10 [--batch 1 4] [--side 512] [--set NAME=VALUE …]
    python -m bench gpus --family FAMILY --gpus 1 2 4 --what PRECISION+POLICY[+WORD]… [--batch 1 4] [--size W H]
    either with [--sharded]

Starts one process for each GPU, as a job does. With `--shapes`, a job's own steps: planned by `auto` for the default
settings (or `--set`), rehearsed and trained by the job's code (`python -m bench shapes`), with so many sizes of images
side by side, in the steps that a job makes of a shuffled epoch. With `--what`, steps of one size in a variant of
`python -m bench step`.

`batch`: images on each GPU. `images_s`: images per second of all GPUs. `of_linear`: that, relative to the first row of
the same batch and shapes times the number of GPUs. `sum_ms`: how long all processes take to sum the gradient when they
begin at the same moment, and `reduce_ms` the part of it that moves the gradient: what overlapping it with the backward
pass could hide at most. `shape_waits`: the share of a step in which a process waits because another one has a larger
shape, if a step takes as long as its pixels are many. `reserved_gib`: the largest memory that torch took of a device.

With `--sharded`, several GPUs keep a share of the frozen weights each, and one GPU keeps all. `read_gb_s`: how fast
they read the others', with nothing else going on. With `--small`, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench import shapes
from bench.members import connected, rows, wait
from bench.report import Report, options
from bench.step import DEVICE, Bench, base_of, free
from trainer.data.batches import MicroBatch
from trainer.engine.execution import Engine
from trainer.engine.memory.weight_streaming import WeightStreamer
from trainer.spec.errors import KilnError
from trainer.training.distributed import Workers

SUMS = 5  # of which the median is taken


# ---- steps of a job, with images of several shapes


def of_job(asked: argparse.Namespace, count: int, batch: int, workers: Workers) -> dict[str, Any]:
    """The row of `count` shapes."""
    row: dict[str, Any] = {"shapes": count, "batch": batch, "gpus": workers.size}
    settings = dict(setting.split("=", 1) for setting in asked.set)
    plan = shapes.default_plan(asked.base or base_of(asked.family), None, batch, settings)
    engine = replace(plan.engine, num_gpus=workers.size)
    if asked.sharded and workers.size > 1:
        engine = replace(engine, offload="shards", turned_weights=False)
    plan = replace(plan, engine=engine)
    epoch = shapes.epoch_of(count, batch, sides=[256 if asked.small else asked.side])
    made = shapes.micro_batches(plan, epoch)
    job = shapes.Job(plan, epoch, small=asked.small, workers=workers)
    try:
        job.rehearse(epoch, made)
    except KilnError as problem:
        return {**row, "images_s": str(problem).splitlines()[0][:100]}
    rounds = math.ceil(asked.steps / len(made))
    steps: list[list[MicroBatch]] = []
    for number in range(rounds + 1):
        order = made * workers.size  # so often that each step has a batch for every process
        random.Random(number).shuffle(order)
        steps += [order[start : start + workers.size] for start in range(0, len(order), workers.size)]
    times = list(job.train([step[workers.process_rank] for step in steps]))
    measured = steps[len(made) :]
    seconds = times[-1] - times[len(made) - 1]
    images = sum(len(of_one.names) for step in measured for of_one in step)
    row["step_s"] = round(seconds / len(measured), 4)
    row |= sums(job.runner.flat_grad, batch, workers)
    row["images_s"] = round(images / seconds, 3)
    row["shape_waits"] = round(waits(measured), 4)
    row["parameters_m"] = round(job.runner.flat_grad.numel() / 1e6, 1)
    row["captured"] = job.runner.capturing
    row |= memory(job.state.weight_streamer)
    workers.check_same(job.state.optimizer_params)
    job.runner.release()
    return row


def memory(streamer: WeightStreamer | None) -> dict[str, float]:
    """GiB of the device, and how fast sharded weights are read."""
    row: dict[str, float] = {}
    if DEVICE == "cuda":
        row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    if streamer is not None and streamer.shards is not None:
        row["own_gib"] = round(streamer.shards.own_bytes / 2**30, 3)
        row["read_gb_s"] = round(streamer.shards.gb_per_s, 1)
    return row


def waits(measured: list[list[MicroBatch]]) -> float:
    """The share of the time that processes wait for the one with the largest batch, by numbers of pixels."""
    used = longest = 0
    for step in measured:
        pixels = [of_one.moments_B2CHW.numel() for of_one in step]
        used += sum(pixels)
        longest += len(pixels) * max(pixels)
    return 1 - used / longest


def sums(flat_grad: torch.Tensor, batch: int, workers: Workers) -> dict[str, float]:
    """Milliseconds until all processes have the mean gradient, if they begin at once, and of its all-reduce alone."""
    numbers = torch.zeros(batch, device=DEVICE)

    def reduce() -> None:
        if workers.size > 1:
            torch.distributed.all_reduce(flat_grad)

    def in_ms(task: Callable[[], object]) -> float:
        seconds = []
        for _ in range(SUMS):
            wait()
            workers.all_agree(True)
            started = time.monotonic()
            task()
            wait()
            seconds.append(time.monotonic() - started)
        return round(1000 * statistics.median(seconds), 2)

    whole = in_ms(partial(workers.mean_gradient, flat_grad, [numbers], [numbers]))
    return {"sum_ms": whole, "reduce_ms": in_ms(reduce)}


# ---- steps of one shape, in any variant


def of_variant(bench: Bench, asked: argparse.Namespace, batch: int, workers: Workers) -> dict[str, Any]:
    """The row of `--what`."""
    engine = bench.engine(set(asked.what.split("+")))
    row: dict[str, Any] = {"what": asked.what, "batch": batch, "gpus": workers.size}
    if not workers.all_agree(fits(bench, engine, batch)):
        return {**row, "images_s": "out of memory"}
    for number in range(3):
        step(bench, engine, batch, workers, number=number)
    wait()
    started = time.monotonic()
    for number in range(asked.steps):
        step(bench, engine, batch, workers, number=3 + number)
    wait()
    seconds = (time.monotonic() - started) / asked.steps
    row["step_s"] = round(seconds, 4)
    row |= sums(bench.runner.flat_grad, batch, workers)
    row["images_s"] = round(workers.size * batch / seconds, 3)
    row |= memory(bench.streamer)
    workers.check_same(bench.optimizer_params)
    return row


def step(bench: Bench, engine: Engine, batch: int, workers: Workers, *, number: int) -> None:
    """A step as in `trainer.training.loop.train`."""
    loss = bench.backward(engine, batch, seed=number * workers.size + workers.process_rank)
    losses, times = [loss.expand(batch)], [torch.full((batch,), 0.5, device=DEVICE)]
    step_totals_T = workers.mean_gradient(bench.runner.flat_grad, losses, times)
    workers.read_totals(step_totals_T, torch.nn.utils.clip_grad_norm_(bench.optimizer_params, 1.0))
    bench.optimizer.step()
    bench.runner.clear()


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


# ---- processes


def member(asked: argparse.Namespace, size: int) -> None:
    """One of the processes. The first of them prints the rows."""
    torch._dynamo.config.cache_size_limit = 64
    workers = connected(size)
    if asked.shapes:
        for batch in asked.batch:
            for count in map(int, asked.shapes.split(",")):
                torch.compiler.reset()
                free()
                tell(of_job(asked, count, batch, workers), workers)
    else:
        peers = workers.peers() if asked.sharded and size > 1 else None
        bench = Bench(asked.family, asked.what.split("+")[0], base=asked.base, small=asked.small, peers=peers)
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the weights were made in 16 bits
        bench.size = tuple(asked.size or bench.size)
        for batch in asked.batch:
            free()
            tell(of_variant(bench, asked, batch, workers), workers)
    workers.disconnect()


def tell(row: dict[str, Any], workers: Workers) -> None:
    if workers.is_first:
        print(json.dumps(row), flush=True)


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images on each GPU")
    parser.add_argument(
        "--gpus",
        nargs="+",
        type=int,
        default=[1, 2, 4],
        help="numbers of GPUs; the first is the reference for of_linear",
    )
    parser.add_argument("--shapes", help="how many, with commas, such as 1,10: steps of a job")
    parser.add_argument(
        "--side", type=int, default=1024, help="of the square that the shapes are made around, in pixels"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of the job")
    words = "PRECISION+POLICY[+host|+weights][+turned][+replay][+plain][+eager]"
    parser.add_argument("--what", default="fp8+all", help=words)
    parser.add_argument("--size", type=int, nargs=2, help="width and height in pixels, with --what")
    parser.add_argument("--sharded", action="store_true", help="each of several GPUs keeps a share of the weights")
    parser.add_argument("--steps", type=int, default=20, help="steps that are measured, at least")
    parser.add_argument("--member", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.member:
        member(asked, asked.gpus[0])
        return
    report = Report(f"{asked.family}: on several GPUs", asked.markdown)
    reference: dict[tuple[int, int], float] = {}  # shapes, batch → images a second of one GPU, by the first row
    for size in asked.gpus:
        for row in rows("gpus", _member_arguments(asked), size):
            if isinstance(row["images_s"], float):
                of_one = reference.setdefault((row.get("shapes", 1), row["batch"]), row["images_s"] / size)
                row["of_linear"] = round(row["images_s"] / (size * of_one), 3)
            report.row(row)


def _member_arguments(asked: argparse.Namespace) -> list[str]:
    """The arguments of each process."""
    arguments = ["--family", asked.family, "--steps", str(asked.steps), "--batch", *map(str, asked.batch)]
    if asked.small:
        arguments.append("--small")
    if asked.sharded:
        arguments.append("--sharded")
    if asked.shapes:
        arguments += ["--shapes", asked.shapes, "--side", str(asked.side)]
        for setting in asked.set:
            arguments += ["--set", setting]
        return arguments
    arguments += ["--what", asked.what]
    if asked.size:
        arguments += ["--size", *map(str, asked.size)]
    return arguments
