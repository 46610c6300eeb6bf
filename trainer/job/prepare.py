"""Images and captions → a cache of everything that the run will use. The encoders are gone when it returns."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoints import state_files
from trainer.checkpoints.open_run import OpenRun, open_run
from trainer.data.cache import Cache
from trainer.data.encode import cpu_workers, fill_images, fill_texts, open_cache
from trainer.data.epochs import EpochSampler
from trainer.data.folders.own_output import Written
from trainer.data.records import WARNING, ImageRecord, Scan
from trainer.data.report import write_report
from trainer.data.scan import scan
from trainer.job.status import Status
from trainer.spec import automatic
from trainer.spec.errors import DataError
from trainer.spec.family import get_family
from trainer.spec.plan import AUTO, DataPlan, Plan, Prompt
from trainer.storage.choose_run import choose
from trainer.storage.run_records import RunRecord
from trainer.training.objective import Objective, make_objective

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """Everything that training begins with, but for the model. `state`: to resume from."""

    plan: Plan
    scan: Scan
    sampler: EpochSampler
    cache: Cache
    state: state_files.State | None

    @property
    def objective(self) -> Objective:
        name = get_family(self.plan.model.family).FACTS.objective
        scheduler = Path(self.plan.model.path) / "scheduler"
        return make_objective(name, self.plan.train, scheduler=scheduler, device=self.plan.engine.device)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps; the last one of an epoch may have fewer batches."""
        return steps_per_epoch(self.plan, self.sampler)

    @property
    def total(self) -> int:
        """Optimiser steps of the whole run."""
        return self.plan.train.max_steps or self.plan.train.max_epochs * self.steps_per_epoch


def steps_per_epoch(plan: Plan, sampler: EpochSampler) -> int:
    """Optimiser steps; the last one of an epoch may have fewer batches."""
    return math.ceil(sampler.batches_per_epoch / (plan.train.gradient_accumulation * plan.engine.num_gpus))


def find_run(plan: Plan, *, status: Status) -> tuple[OpenRun, Scan]:
    """Scan the images and open the run that this job is, in the plan's output folder. Raises DataError."""
    status.phase("reading the dataset")
    opened: list[OpenRun] = []

    def report_place(scanned: Scan) -> Path:
        # The run is known only now: other images are another run. An unusable dataset is none.
        home = choose(plan).home
        with contextlib.suppress(DataError):
            scanned.check(strict=plan.data.strict)
            opened.append(open_run(plan, scanned.images))
            home = opened[0].home
        return home / "dataset-report.txt"

    written = Written({"OUTPUT_PATH": Path(plan.output.path), "CACHE_PATH": Path(plan.output.cache)})
    scanned = scan_and_report(plan.data, report=report_place, seed=plan.train.seed, written=written)
    return opened[0], scanned


def prepare_data(
    run: OpenRun,
    scanned: Scan,
    *,
    status: Status,
    state: state_files.State | None,
    check_in: Callable[[], None],
) -> PreparedData:
    """Encode the images and their captions into the cache; the plan gets the lengths that were left to `auto`."""
    plan = dataclasses.replace(run.plan, data=scanned.data)  # with the subsets that the names of folders make
    sampler = make_sampler(plan, scanned)
    for line in sampler.describe():
        log.info("%s", line)
    plan = with_lengths(plan, sampler, scanned.images, record=run.record)
    cache = open_cache(Path(plan.output.cache), Path(plan.model.path), precision=plan.engine.dtype)
    data = PreparedData(plan, scanned, sampler, cache, state)
    log.info("%d optimiser steps, %d an epoch.", data.total, data.steps_per_epoch)
    if is_over(run, data):
        return data
    if sampler.batches_per_epoch < plan.engine.num_gpus:
        log.warning(
            "An epoch has only %d batches: with NUM_GPUS=%d, some GPUs are idle.",
            sampler.batches_per_epoch,
            plan.engine.num_gpus,
        )
    status.phase("encoding")
    fill_cache(data, check_in=check_in)
    return data


def is_over(run: OpenRun, data: PreparedData) -> bool:
    """Whether the run has all the steps that it is to have, and its final LoRA, or has more."""
    return run.trained(data.state.step if data.state else 0) > data.total or (
        run.was_done and run.record.values.get("total", data.total) == data.total
    )


def with_lengths(plan: Plan, sampler: EpochSampler, images: Sequence[ImageRecord], *, record: RunRecord) -> Plan:
    """`plan` with numbers for how long to train, and how often to save and sample, where it leaves that to `auto`.

    What a run has chosen for its length once, it keeps.
    """
    train = plan.train
    if train.max_steps is None and train.max_epochs == AUTO:
        chosen = record.values.get("automatic_steps")
        older_epochs = record.values.get("automatic_epochs")
        if isinstance(chosen, int) and chosen > 0:
            log.info("PARAMS_MAX_EPOCHS: auto, %d steps as this run chose when it began.", chosen)
        elif isinstance(older_epochs, int) and older_epochs > 0:
            chosen = older_epochs * steps_per_epoch(plan, sampler)
            log.info("PARAMS_MAX_EPOCHS: auto, %d epochs as when this run began.", older_epochs)
        else:
            per_epoch, per_step = images_per_epoch(plan.data, images, sampler), images_per_step(plan)
            chosen = automatic.automatic_steps(per_epoch, per_step)
            reason = automatic.reason(per_epoch, per_step)
            log.info("PARAMS_MAX_EPOCHS: auto, %d steps (%s). PARAMS_MAX_STEPS sets another number.", chosen, reason)
        record.update({"automatic_steps": chosen})
        train = dataclasses.replace(train, max_steps=chosen)
    output = plan.output
    total = train.max_steps or train.max_epochs * steps_per_epoch(plan, sampler)
    save_every, sample_every = automatic.intervals(
        total,
        save_every=None if output.save_every == AUTO else output.save_every,
        sample_every=None if output.sample_every == AUTO else output.sample_every,
    )
    if AUTO in (output.save_every, output.sample_every):
        log.info("Saves every %d steps, samples every %d (0: none).", save_every, sample_every)
    output = dataclasses.replace(output, save_every=save_every, sample_every=sample_every)
    return dataclasses.replace(plan, train=train, output=output)


def images_per_epoch(data: DataPlan, images: Sequence[ImageRecord], sampler: EpochSampler) -> int:
    """Images that are trained on, times their repeats, without regularisation images."""
    held_out = {image.key for image in sampler.held_out}
    count = 0
    for image in images:
        subset = data.datasets[image.dataset].subsets[image.subset]
        if not subset.is_reg and image.key not in held_out:
            count += subset.num_repeats
    return count


def images_per_step(plan: Plan) -> int:
    """Of all GPUs; with several datasets, the largest batch size counts."""
    batch_size = max(dataset.batch_size for dataset in plan.data.datasets)
    return batch_size * plan.train.gradient_accumulation * plan.engine.num_gpus


def scan_and_report(
    data: DataPlan, *, report: Path | Callable[[Scan], Path], seed: int = 0, written: Written | None = None
) -> Scan:
    """The usable images; logs a summary, and writes the whole list to `report` and to a .csv file beside it.

    `seed` is the run's, for the captions of the report. `written`: the folders that this job writes to, which are no
    sources. Raises DataError.
    """
    started = time.monotonic()
    scanned = scan(data, cpu_workers=cpu_workers(), written=written)
    report = report if isinstance(report, Path) else report(scanned)
    write_report(scanned, scanned.data, text=report, seed=seed)
    scanned.check(strict=data.strict)
    for line in scanned.report().splitlines():
        level = logging.INFO
        if WARNING in line or line.startswith("  skipped "):
            level = logging.WARNING
        log.log(level, "%s", line.replace(WARNING, ""))
    log.info("Scanned the images in %.1f s.", time.monotonic() - started)
    return scanned


def make_sampler(plan: Plan, scanned: Scan) -> EpochSampler:
    """The order in which the images are seen: the same for every process and after every restart."""
    return EpochSampler(
        scanned.images,
        plan.data,
        seed=plan.train.seed,
        caption_dropout_rate=plan.train.caption_dropout_rate,
        prior_loss_weight=plan.train.prior_loss_weight,
    )


def fill_cache(data: PreparedData, *, check_in: Callable[[], None]) -> None:
    """Encode every caption, prompt and image that the run will use, and that the cache lacks."""
    plan = data.plan
    family = get_family(plan.model.family)
    model = Path(plan.model.path)
    captions = [*data.sampler.all_captions(), *prompt_texts(plan.prompts)]
    fill_texts(data.cache, captions, family=family, model=model, engine=plan.engine, check_in=check_in)
    fill_images(data.cache, data.sampler, family=family, model=model, engine=plan.engine, check_in=check_in)


def prompt_texts(prompts: Sequence[Prompt]) -> list[str]:
    """All texts that the samples need."""
    texts = []
    for prompt in prompts:
        texts += [prompt.text, prompt.negative]
    return texts
