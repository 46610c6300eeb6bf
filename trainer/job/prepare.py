"""Pictures and captions → a cache of everything that the run will use. The encoders are gone when it returns."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoints import state_files
from trainer.data.cache import Cache
from trainer.data.encode import cpu_workers, fill_images, fill_texts, open_cache
from trainer.data.epochs import EpochSampler
from trainer.data.identity import fingerprint, fingerprint_differences
from trainer.data.records import WARNING, Scan
from trainer.data.scan import scan
from trainer.job.status import Status
from trainer.spec.errors import SettingsError
from trainer.spec.family import Family, get_family
from trainer.spec.plan import DataPlan, Plan, Prompt
from trainer.storage import atomic
from trainer.training.objective import Objective, make_objective

log = logging.getLogger(__name__)


def scan_and_report(data: DataPlan, *, report: Path) -> Scan:
    """The usable pictures; says in / used / skipped, and writes the whole list to `report`. Raises DataError."""
    started = time.monotonic()
    found = scan(data, cpu_workers=cpu_workers())
    atomic.write_text(report, found.report(limit=None))
    found.check(strict=data.strict)
    for line in found.report().splitlines():
        bad = WARNING in line or line.startswith("  skipped ")
        log.log(logging.WARNING if bad else logging.INFO, "%s", line.replace(WARNING, ""))
    log.info("Looked at the pictures in %.1f s.", time.monotonic() - started)
    return found


@dataclass(frozen=True)
class PreparedData:
    """What training begins with."""

    plan: Plan
    found: Scan
    order: EpochSampler
    cache: Cache
    state: state_files.State | None

    @property
    def objective(self) -> Objective:
        objective, scheduler = (
            get_family(self.plan.model.family).FACTS.objective,
            Path(self.plan.model.path) / "scheduler",
        )
        return make_objective(objective, self.plan.train, scheduler=scheduler, device=self.plan.engine.device)

    @property
    def steps_per_epoch(self) -> int:
        a_step = self.plan.train.gradient_accumulation * self.plan.engine.num_gpus
        return math.ceil(self.order.batches_per_epoch / a_step)

    @property
    def total(self) -> int:
        return self.plan.train.max_steps or self.plan.train.max_epochs * self.steps_per_epoch


def make_sampler(plan: Plan, found: Scan) -> EpochSampler:
    return EpochSampler(
        found.images,
        plan.data,
        seed=plan.train.seed,
        caption_dropout_rate=plan.train.caption_dropout_rate,
        prior_loss_weight=plan.train.prior_loss_weight,
    )


def prepare_data(
    plan: Plan, out: Path, *, status: Status, state: state_files.State | None, check_in: Callable[[], None]
) -> PreparedData:
    """Look at the pictures, and encode them and their captions."""
    kind, model = get_family(plan.model.family), Path(plan.model.path)
    status.phase("reading the dataset")
    found = scan_and_report(plan.data, report=out / "dataset-report.txt")
    order = make_sampler(plan, found)
    _same_data(state, found)
    for line in order.describe():
        log.info("%s", line)
    cache = open_cache(Path(plan.output.cache), model, precision=plan.engine.dtype)
    made = PreparedData(plan, found, order, cache, state)
    log.info("%d optimiser steps, %d an epoch.", made.total, made.steps_per_epoch)
    if order.batches_per_epoch < plan.engine.num_gpus:
        log.warning(
            "An epoch has %d batches: of NUM_GPUS=%d some do nothing.", order.batches_per_epoch, plan.engine.num_gpus
        )
    status.phase("encoding")
    fill_cache(made, kind=kind, model=model, check_in=check_in)
    return made


def _same_data(state: state_files.State | None, found: Scan) -> None:
    if state is None:
        return
    changed = fingerprint_differences(state.tree["data"], fingerprint(found.images))
    if changed:
        raise SettingsError(
            "The dataset is not the one that this run began with:\n  " + "\n  ".join(changed) + "\nPut it back to "
            "resume; or choose another OUTPUT_PATH; or set PARAMS_RESUME_FROM to a LoRA file to go on from its weights."
        )


def fill_cache(ready: PreparedData, *, kind: Family, model: Path, check_in: Callable[[], None]) -> None:
    # Of the engine's formats, the encoders take the type of activations alone: the others are the denoiser's.
    plan, order, cache = ready.plan, ready.order, ready.cache
    captions = [*order.all_captions(), *prompt_texts(plan.prompts)]
    fill_texts(cache, captions, family=kind, model=model, engine=plan.engine, check_in=check_in)
    fill_images(cache, order, family=kind, model=model, engine=plan.engine, check_in=check_in)


def prompt_texts(prompts: Sequence[Prompt]) -> list[str]:
    """All texts that the samples need."""
    return [text for p in prompts for text in (p.text, p.negative)]
