"""What photographs of many shapes cost: a job's steps with one, ten and twenty sizes side by side.

    python -m bench shapes --family flux --limit 23
    python -m bench shapes --family sdxl --limit 8 --batch 4 --shapes 1,10
    python -m bench shapes --family sd3 --limit 12 --sides 512,768,1024 --masks

A full-size denoiser with random weights, under a cap of the device's memory, as `auto` plans it for the default
settings (Prodigy, rank 32) and the default dataset.json; rehearsed and trained by the job's own code. The sizes are
those of its buckets around 1024 x 1024 (or around each of `--sides`, as with several resolutions), nearest to the
square first. With `--batch` above 1, the last batch of each bucket has fewer images, so that each shape comes in two
sizes. `--masks`: every second image weighs its loss by a mask, so that each shape comes with one and without.

`weights`: a hash of the adapters after the last step, the same in each run with PARAMS_DETERMINISTIC=true.
`step_s`: mean seconds of a step after the first epoch. `against_one`: that, for as many tokens, divided by the same of
one shape. `before_s`: seconds of the rehearsal and the first epoch, less those of as many usual
steps. `reserved_gib`: the peak of what torch holds; `device_gib`: what the device has in use then, with the driver's.
"""

from __future__ import annotations

import datetime
import gc
import hashlib
import logging
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench import step as steps
from bench.report import Report, options
from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from entrypoint.system.hardware import detect
from trainer.checkpoints.snapshots import Snapshots
from trainer.data.batches import MicroBatch
from trainer.data.buckets import bucket_sizes
from trainer.data.order.variants import Batch, Example
from trainer.data.records import ImageRecord, View
from trainer.engine.device import set_up, torch_dtype
from trainer.engine.execution import Engine
from trainer.engine.load import place_denoiser, shards_for
from trainer.engine.memory.sharding import Peers
from trainer.job import build, sizes
from trainer.job.rehearsal import Rehearsal
from trainer.spec.errors import KilnError
from trainer.spec.family import Family, base_models, get_family
from trainer.spec.memory_model import Workload
from trainer.spec.plan import EnginePlan, Plan
from trainer.spec.strategies import AWAY, described
from trainer.spec.weight_formats import PRECISIONS
from trainer.training import loop
from trainer.training.distributed import Workers
from trainer.training.objective import Denoising, FlowMatching, Objective

EPOCHS = 3  # that are measured, after the first
GIB = 2**30


def shapes(count: int, *, side: int = 1024) -> list[tuple[int, int]]:
    """Widths and heights of the default dataset.json's buckets, nearest to the square first."""
    step = 64 if side >= 512 else 16
    found = bucket_sizes((side, side), smallest=side // 4, largest=2 * side, step=step)
    return sorted(found, key=lambda size: (abs(math.log(size[0] / size[1])), size))[:count]


def default_plan(base: str, limit: float | None, batch: int, settings: dict[str, str]) -> Plan:
    """What a job with default settings plans on this machine. `base`: a value of BASE_MODEL."""
    asked = {
        "BASE_MODEL": base,
        "DATASET_NAME": "org/photographs",
        "PARAMS_BATCH_SIZE": str(batch),
        "PARAMS_MAX_STEPS": "1000",
        "MEMORY_LIMIT_GIB": str(limit) if limit else "",
        **settings,
    }
    now = datetime.datetime.now(datetime.UTC)
    return make_plan(read_settings(asked), read_manifest(None, None), detect(), now=now)


def epoch_of(count: int, batch: int, *, sides: Sequence[int] = (1024,), masks: bool = False) -> list[Batch]:
    """An epoch: two batches of each of `count` shapes around each side; with a `batch` above 1, a smaller one too.

    `masks`: one of the two has them.
    """
    epoch: list[Batch] = []
    for side in sides:
        for number, size in enumerate(shapes(count, side=side)):
            record = ImageRecord(f"{number}.png", Path(), "", *size, dataset=0, subset=0, caption="")
            example = Example(record, View(size, size, (0, 0)), "")
            masked = replace(example, image=replace(record, mask_sha256="alpha" if masks else None))
            epoch += [(example,) * batch, (masked,) * batch]
            if batch > 1:
                epoch.append((example,) * (batch // 2))
    return epoch


def micro_batch(plan: Plan, batch: Batch, generator: torch.Generator) -> MicroBatch:
    """Random latents and text of a batch's size, pinned, as `Session.groups` hands them out."""
    family = get_family(plan.model.family).FACTS.name
    dtype = torch_dtype(plan.engine)
    width, height = batch[0].view.size
    count = len(batch)
    length, features, pooled = steps.text_sizes(family, plan.model.base)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    moments_B2CHW = torch.cat([normal(count, steps.CHANNELS[family], height // 8, width // 8)] * 2, dim=1)
    text = {"tokens": normal(count, length, *features).to(dtype), "pooled": normal(count, pooled).to(dtype)}
    text["real"] = torch.ones(count, length, dtype=torch.bool)  # all tokens are the caption's
    geometry_B6 = torch.tensor([[height, width, 0, 0, height, width]] * count, dtype=torch.float32)
    mask_B1HW = None
    if sizes.size_of(batch)[-1]:
        mask_B1HW = torch.rand(count, 1, *moments_B2CHW.shape[2:], generator=generator)
    made = MicroBatch(moments_B2CHW, text, geometry_B6, mask_B1HW, torch.ones(count), ("random",) * count)
    return made.each(torch.Tensor.pin_memory) if torch.cuda.is_available() else made


def micro_batches(plan: Plan, epoch: list[Batch]) -> list[MicroBatch]:
    """One for each batch of `epoch`; those of a size are the same one."""
    generator = torch.Generator().manual_seed(0)
    by_size: dict[sizes.StepSize, MicroBatch] = {}
    for each in sizes.one_of_each_size(epoch):
        by_size[sizes.size_of(each)] = micro_batch(plan, each, generator)
    return [by_size[sizes.size_of(each)] for each in epoch]


def objective_of(family: str) -> Objective:
    """The family's objective, by the schedule that SDXL was trained with."""
    if family != "sdxl":
        return FlowMatching()
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Denoising(schedule.alphas_cumprod.to(steps.DEVICE))


class Job:
    """Everything that a job trains with, on a random denoiser instead of one from files.

    `workers`: the processes that train it together.
    """

    def __init__(self, plan: Plan, epoch: list[Batch], *, small: bool = False, workers: Workers | None = None) -> None:
        self.plan = plan
        self.workers = workers or Workers()
        self.family = get_family(plan.model.family)
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0)  # the weights are made in 16 bits
        denoiser = steps.denoiser(self.family.FACTS.name, base=plan.model.base, small=small)
        with patch.object(build, "load_denoiser", partial(self._placed, denoiser)):
            peers = self.workers.peers() if plan.engine.offload == "shards" else None
            self.state = build.build_training_state(plan, self.family, model=Path(), total=1000, peers=peers)
        steps.free()
        set_up(plan.engine)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.engine = Engine(
            self.state.denoiser,
            self.family.regions(self.state.denoiser),
            sizes.engine_plan_for(plan, epoch, self.workers),
            self.state.weight_streamer,
        )
        self.runner = build.make_runner(plan.engine, self.engine, self.state)
        self.objective = objective_of(self.family.FACTS.name)
        self.snapshots = Snapshots(self.state.optimizer, plan.engine.device)

    def _placed(
        self, denoiser: Any, family: Family, _: Path, plan: EnginePlan, *, peers: Peers | None, **options: Any
    ) -> tuple[Any, Any]:
        """`load_denoiser` for a model that is there already."""
        streamer = place_denoiser(
            denoiser,
            family.blocks(denoiser),
            precision=plan.precision,
            dtype=torch_dtype(plan),
            device=plan.device,
            streamed=family.regions(denoiser) if plan.offload in AWAY else (),
            shards=shards_for(plan, peers),
            forwards=family.fused_forwards() if PRECISIONS[plan.precision].weight_format == "fp8" else {},
            **options,
        )
        return denoiser, streamer

    def predict(self, noisy_BCHW: torch.Tensor, t_B: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """As `Session.predict`."""
        with self.engine.saved_tensors():
            return self.family.predict(
                self.state.denoiser,
                noisy_BCHW,
                t_B,
                text=batch.text,
                guidance=self.plan.train.guidance_scale,
                geometry_B6=batch.geometry_B6,
            )

    def rehearse(self, epoch: list[Batch], made: list[MicroBatch]) -> None:
        """As `Rehearsal.run`, with batches that are in no cache."""
        of = dict(zip(map(id, epoch), made, strict=True))
        Rehearsal(
            self.engine,
            self.runner,
            self.state,
            self.workers,
            self.snapshots,
            self.predict,
            self.objective,
            dict,
            device=self.plan.engine.device,
            seed=0,
        ).run_steps(
            [of[id(batch)] for batch in sizes.one_of_each_size(epoch)],
            [of[id(batch)] for batch in sizes.largest_batches(epoch)],
            [min(made, key=lambda batch: batch.moments_B2CHW.numel())],
            problem="The largest batch does not fit in memory.",
        )

    def train(self, made: list[MicroBatch]) -> Iterator[float]:
        """A step for each of this process's micro-batches; yields when each is done, by `time.monotonic`."""
        done = loop.train(
            ((1, [batch]) for batch in made),
            predict=self.predict,
            objective=self.objective,
            params=self.state.optimizer_params,
            optimizer=self.state.optimizer,
            schedule=self.state.schedule,
            max_grad_norm=1.0,
            guard=self.state.guard,
            device=self.plan.engine.device,
            seed=0,
            first_step=1,
            runner=self.runner,
            workers=self.workers,
        )
        for _ in done:
            yield time.monotonic()


def measure(plan: Plan, count: int, epoch: list[Batch], *, small: bool = False) -> dict[str, Any]:
    """The row of one number of shapes."""
    row: dict[str, Any] = {"shapes": count, "sizes": 0}
    torch.compiler.reset()
    steps.free()
    made = micro_batches(plan, epoch)
    row["sizes"] = len(set(map(id, made)))
    job = Job(plan, epoch, small=small)
    gc.freeze()  # as a job does
    started = time.monotonic()
    try:
        job.rehearse(epoch, made)
        row["rehearsal_s"] = round(time.monotonic() - started, 1)
        times = list(job.train(made * (EPOCHS + 1)))
    except (torch.OutOfMemoryError, KilnError) as problem:
        job.runner.release()
        return {**row, "problem": str(problem).splitlines()[0][:100]}
    finally:
        gc.unfreeze()
    after = [late - early for early, late in pairwise(times[len(made) - 1 :])]
    usual_s = statistics.mean(after)
    row["before_s"] = round(times[len(made) - 1] - started - usual_s * len(made), 1)
    row["step_s"] = round(usual_s, 4)
    row["longest_s"] = round(max(after), 4)
    footprint = base_models()[plan.model.base][1].footprint
    assert footprint is not None
    tokens = [Workload(math.prod(b[0].view.size), len(b), 1, "").kilotokens(footprint) for b in epoch]
    row["s_per_kilotoken"] = round(usual_s / statistics.mean(tokens), 4)
    with torch.no_grad():
        flat = torch.cat([p.flatten() for p in job.state.optimizer_params])
    row["weights"] = hashlib.sha256(flat.cpu().numpy().tobytes()).hexdigest()[:8]
    row["mode"] = described(*job.engine.fallbacks[0])
    row["compiled"] = job.engine.compiled
    row["captured"] = f"{len(getattr(job.runner, 'captured', ()))} of {row['sizes']}" if job.runner.capturing else "no"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        row["device_gib"] = round((total - free) / GIB, 2)
    job.runner.release()
    return row


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--limit", type=float, help="cap of the device's memory, in GiB")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--shapes", default="1,10,20", help="how many, with commas")
    parser.add_argument("--sides", default="1024", help="of the square that buckets are made around, with commas")
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="of the job, such as PARAMS_PRECISION=bf16")
    asked = parser.parse_intermixed_args(arguments)
    counts = [int(count) for count in asked.shapes.split(",")]
    sides = [int(side) // (4 if asked.small else 1) for side in asked.sides.split(",")]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base = asked.base or steps.base_of(asked.family)
    plan = default_plan(base, asked.limit, asked.batch, dict(s.split("=", 1) for s in asked.settings))
    report = Report(f"{base}: many shapes, {asked.limit or 'all'} GiB, batch {asked.batch}", asked.markdown)
    one_s: float | None = None
    for count in counts:
        epoch = epoch_of(count, asked.batch, sides=sides, masks=asked.masks)
        row = measure(plan, count, epoch, small=asked.small)
        if count == 1:
            one_s = row.get("s_per_kilotoken")
        if one_s and "s_per_kilotoken" in row:
            row["against_one"] = round(row["s_per_kilotoken"] / one_s, 3)
        report.row(row)
        steps.free()
