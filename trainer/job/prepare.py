"""Images and captions → a cache of everything that the run will use. The encoders are gone when it returns."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.captioning.captioning import caption_images
from trainer.captioning.requests import wanting
from trainer.checkpoints import state_files
from trainer.checkpoints.open_run import OpenRun, open_run
from trainer.data import caption_length
from trainer.data.cache import Cache
from trainer.data.encode import open_cache
from trainer.data.epochs import EpochSampler
from trainer.data.folders.own_output import Written
from trainer.data.records import WARNING, Scan
from trainer.data.report import write_cuts, write_report
from trainer.data.scan import Progress, cpu_workers, scan
from trainer.job.reporting.dataset_view import write_dataset_view
from trainer.job.reporting.status import Status
from trainer.job.rolling import rolling_cache
from trainer.spec.errors import DataError
from trainer.spec.family import facts_of, get_family
from trainer.spec.plan import AUTO, DataPlan, Plan
from trainer.spec.rules import automatic, outlook, quote, sanity
from trainer.storage import own_files
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
        facts = get_family(self.plan.model.family).FACTS
        scheduler = Path(self.plan.model.path) / "scheduler"
        return make_objective(facts, self.plan.train, scheduler=scheduler, device=self.plan.engine.device)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps; the last one of an epoch may have fewer batches."""
        return steps_per_epoch(self.plan, self.sampler)

    @property
    def total(self) -> int:
        """Optimiser steps of the whole run."""
        return self.plan.train.max_steps or self.plan.train.max_epochs * self.steps_per_epoch


def steps_per_epoch(plan: Plan, sampler: EpochSampler) -> int:
    """Optimiser steps; the last one of an epoch, or of a window, may have fewer batches."""
    return sampler.steps_per_epoch(plan.train.gradient_accumulation * plan.engine.processes)


def find_run(plan: Plan, *, status: Status, check_in: Callable[[], None]) -> tuple[OpenRun, Scan]:
    """Scan the images, caption those that a model is to caption, and open the run that this job is.

    Captions are content, as images are: so they are made before it is known which run of the output folder this is.
    Raises DataError, and what `caption_images` raises.
    """
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

    def captioned(scanned: Scan) -> Scan:
        if any(wanting(scanned.images, scanned.data)):
            status.phase("captioning")
        return caption_images(
            scanned,
            scanned.data,
            cache=Path(plan.output.cache),
            engine=plan.engine,
            check_in=check_in,
            told=status.captioned,
        )

    scanned = scan_and_report(
        plan.data,
        report=report_place,
        seed=plan.train.seed,
        written=written,
        captioned=captioned,
        progress=lambda *_: check_in(),
    )
    return opened[0], scanned


def prepare_data(
    run: OpenRun,
    scanned: Scan,
    *,
    state: state_files.State | None,
) -> PreparedData:
    """Everything but the encoding (`rolling_cache.fill`); the plan gets the lengths that were left to `auto`."""
    plan = dataclasses.replace(run.plan, data=scanned.data)  # with the subsets that the names of folders make
    sampler = rolling_cache.make_sampler(plan, scanned)
    cache = cache_of(plan)
    plan = rolling_cache.with_windows(plan, sampler, scanned, cache, run.record)
    if plan.output.window_bytes:
        sampler = rolling_cache.make_sampler(plan, scanned)
        cache = cache_of(plan)
    for line in sampler.describe():
        log.info("%s", line)
    plan = with_lengths(plan, sampler, run.record)
    data = PreparedData(plan, scanned, sampler, cache, state)
    for line in outlook.describe_length(plan, steps_per_epoch=data.steps_per_epoch):
        log.info("%s", line)
    if is_over(run, data):
        return data
    log_quote(data)
    note_long_captions(plan, sampler, scanned=scanned, report=run.home / "dataset-report.txt")
    for warning in sanity.warnings(plan, sanity.Length(data.total, data.steps_per_epoch, len(scanned.images))):
        log.warning("%s", warning)
    if sampler.batches_per_epoch < plan.engine.processes:
        log.warning(
            "An epoch has only %d batches: with %d processes (NUM_GPUS, NODES), some GPUs are idle.",
            sampler.batches_per_epoch,
            plan.engine.processes,
        )
    return data


def log_quote(data: PreparedData) -> None:
    """Log how long the rest takes and what it costs, as far as that is known before it has begun."""
    plan, total = data.plan, data.total
    first = data.state.step if data.state else 0
    images = len(data.scan.images)
    predicted = quote.predict(plan, first=first, total=total, images=images, examples=data.sampler.buckets)
    for line in quote.describe(plan, predicted, first=first, total=total):
        log.info("%s", line)
    if predicted is None:
        return
    warning = quote.limit_warning(plan, predicted, first=first, total=total)
    if warning:
        log.warning("%s", warning)


def is_over(run: OpenRun, data: PreparedData) -> bool:
    """Whether the run has all the steps that it is to have, and its final LoRA, or has more."""
    return run.trained(data.state.step if data.state else 0) > data.total or (
        run.was_done and run.record.values.get("total", data.total) == data.total
    )


def with_lengths(plan: Plan, sampler: EpochSampler, record: RunRecord) -> Plan:
    """`plan` with the lengths that it leaves to `auto`. What a run has chosen for its length once, it keeps."""
    per_epoch = steps_per_epoch(plan, sampler)
    chosen = record.values.get("automatic_steps")
    older_epochs = record.values.get("automatic_epochs")
    if not isinstance(chosen, int) or chosen < 1:
        chosen = older_epochs * per_epoch if isinstance(older_epochs, int) and older_epochs > 0 else None
    is_automatic = plan.train.max_steps is None and plan.train.max_epochs == AUTO
    plan, lines = automatic.with_lengths(
        plan, images_per_epoch=sampler.subject_examples_per_epoch, steps_per_epoch=per_epoch, chosen=chosen
    )
    if is_automatic:
        record.update({"automatic_steps": plan.train.max_steps})
    for line in lines:
        log.info("%s", line)
    return plan


def scan_and_report(
    data: DataPlan,
    *,
    report: Path | Callable[[Scan], Path],
    seed: int = 0,
    written: Written | None = None,
    captioned: Callable[[Scan], Scan] | None = None,
    progress: Progress | None = None,
) -> Scan:
    """The usable images; logs a summary, and writes the whole list to `report` and to a .csv file beside it.

    `seed` is the run's, for the captions of the report. `written`: the folders that this job writes to, which are no
    sources. `captioned`: adds the captions that a model makes, to a dataset that can be used. `progress`: see `scan`.
    Raises DataError.
    """
    started = time.monotonic()
    scanned = scan(data, cpu_workers=cpu_workers(), progress=progress, written=written)
    taken = time.monotonic() - started
    if captioned is not None and scanned.is_usable(strict=data.strict):
        scanned = captioned(scanned)
    report = report if isinstance(report, Path) else report(scanned)
    write_report(scanned, scanned.data, text=report, seed=seed)
    scanned.check(strict=data.strict)
    for line in scanned.report().splitlines():
        level = logging.INFO
        if WARNING in line or line.startswith("  skipped "):
            level = logging.WARNING
        log.log(level, "%s", line.replace(WARNING, ""))
    log.info("Scanned the images in %.1f s.", taken)
    return scanned


def note_long_captions(plan: Plan, sampler: EpochSampler, *, scanned: Scan, report: Path) -> None:
    """Warn of captions and prompts that the text encoder does not read to their end; the report gets all of them."""
    facts = facts_of(plan.model.family, plan.model.base)
    model = Path(plan.model.path)
    reader = caption_length.load_reader(facts, model, max_tokens=plan.train.max_token_length)
    write_dataset_view(report.with_name(own_files.DATASET_VIEW), scanned, plan.data, sampler, reader=reader)
    if reader is None:
        return
    cuts = caption_length.find_cuts(reader, sampler.captions_by_image())
    for line in caption_length.describe_cuts(reader, cuts, facts, limit=caption_length.SHOWN_CAPTIONS):
        log.warning("%s", line)
    for line in caption_length.describe_prompts(reader, plan.prompts):
        log.warning("%s", line)
    if cuts:
        lines = caption_length.describe_cuts(reader, cuts, facts, limit=None)
        lost = {image: cut.lost_start for image, cut in cuts.items()}
        write_cuts(scanned, scanned.data, report=report, seed=plan.train.seed, lines=lines, cuts=lost)


def cache_of(plan: Plan) -> Cache:
    """What the run's images and captions are encoded into, with the weights of its encoders."""
    folder = rolling_cache.folder_of(plan) if plan.output.window_bytes else Path(plan.output.cache)
    return open_cache(
        folder,
        Path(plan.model.path),
        family=plan.model.family,
        precision=plan.engine.dtype,
        max_tokens=plan.train.max_token_length,
    )
