"""Pictures and captions → a cache of everything that the run will use. The encoders are gone when it returns."""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer import cache as caching
from trainer import checkpoint, files, stream
from trainer.cache import Cache
from trainer.dataset import WARNING, Scan, survey
from trainer.engine import torch_dtype
from trainer.errors import DataError, SettingsError
from trainer.families import Family, family
from trainer.loop import MicroBatch
from trainer.memory import AT_ONCE
from trainer.metrics import Status
from trainer.objective import Objective, make_objective
from trainer.order import Batch, Example, Order, fingerprint, fingerprint_differences
from trainer.plan import DataPlan, EnginePlan, Plan, Prompt

log = logging.getLogger(__name__)
CAPTIONS = 16  # encoded at once
TILE = 512  # pixels of a side


def workers() -> int:
    """Threads or processes that prepare pictures: all cores this process may use, 16 at most."""
    return min(16, len(os.sched_getaffinity(0)))


def scanned(data: DataPlan, *, report: Path) -> Scan:
    """The usable pictures; says in / used / skipped, and writes the whole list to `report`. Raises DataError."""
    started = time.monotonic()
    found = survey(data, workers=workers())
    files.write_text(report, found.report(limit=None))
    found.check(strict=data.strict)
    for line in found.report().splitlines():
        bad = WARNING in line or line.startswith("  skipped ")
        log.log(logging.WARNING if bad else logging.INFO, "%s", line.replace(WARNING, ""))
    log.info("Looked at the pictures in %.1f s.", time.monotonic() - started)
    return found


def open_cache(folder: Path, model: Path, *, precision: str) -> Cache:
    """The cache of what the VAE and the text encoders in `model` make."""
    parts = sorted(p for p in model.iterdir() if p.name.startswith(("text_encoder", "tokenizer")))
    encoders = files.digest([precision, *((p.name, files.weights_digest(p)) for p in parts)])
    return Cache(folder, vae=files.weights_digest(model / "vae"), encoders=encoders)


def fill_texts(
    cache: Cache,
    captions: Sequence[str],
    *,
    family: Family,
    model: Path,
    engine: EnginePlan,
    tick: Callable[[], None],
) -> None:
    """Encode the captions that the cache lacks; the text encoders are loaded only if there are any."""
    if not caching.any_missing(cache.text_path(c) for c in dict.fromkeys(captions)):
        log.info("All %d captions are in the cache.", len(set(captions)))
        return
    started = time.monotonic()
    encoders = text_encoders(family, model, engine)
    count = caching.encode_texts(
        cache, captions, encode=partial(family.encode_text, encoders), batch=CAPTIONS, tick=tick
    )
    del encoders
    release()
    log.info("Encoded %d of %d captions in %.1f s.", count, len(set(captions)), time.monotonic() - started)


def text_encoders(family: Family, model: Path, engine: EnginePlan) -> Any:
    """Tokenizers and text encoders for `encode_text`; their layers are streamed where the plan says so."""
    where = "cpu" if engine.stream_encoders else engine.device
    encoders = family.load_encoders(model, device=where, dtype=torch_dtype(engine))
    for name, part in encoders.components.items() if engine.stream_encoders else ():
        if name.startswith("text_encoder") and part is not None:
            stream.layers(part, engine.device)
    return encoders


def decoder(family: Family, model: Path, engine: EnginePlan) -> Any:
    """The VAE for drawing; it decodes piece by piece where the plan says so."""
    vae = family.load_vae(model, device=engine.device)
    if engine.tile_vae:
        vae.enable_tiling()
        # By itself it takes the size that the model was trained with, which is that of the whole picture.
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // 2 ** (len(vae.config.block_out_channels) - 1)
    return vae


def fill_images(
    cache: Cache,
    order: Order,
    *,
    family: Family,
    model: Path,
    engine: EnginePlan,
    tick: Callable[[], None],
) -> None:
    """Encode the views of pictures that the cache lacks. Raises DataError for one that does not decode after all."""
    views = list(order.every_view())
    if not caching.any_missing(cache.image_path(p, v) for p, v in views):
        log.info("All %d latents are in the cache.", len(views))
        return
    started = time.monotonic()
    vae = family.load_vae(model, device=engine.device)
    count, unusable = caching.encode_images(
        cache,
        views,
        encode=partial(family.encode_images, vae),
        workers=workers(),
        at_once=0.0 if engine.tile_vae else AT_ONCE,
        tick=tick,
    )
    del vae
    release()
    if unusable:
        names = "; ".join(f"{picture.name}: {reason}" for picture, reason in unusable[:20])
        raise DataError(f"{len(unusable)} pictures changed while they were read: {names}.")
    log.info("Encoded %d of %d latents in %.1f s.", count, len(views), time.monotonic() - started)


def release() -> None:
    """Give memory back before the next model is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Ready:
    """What training begins with."""

    plan: Plan
    found: Scan
    order: Order
    cache: Cache
    state: checkpoint.State | None

    @property
    def goal(self) -> Objective:
        objective, scheduler = family(self.plan.model.family).FACTS.objective, Path(self.plan.model.path) / "scheduler"
        return make_objective(objective, self.plan.train, scheduler=scheduler, device=self.plan.engine.device)

    @property
    def steps_per_epoch(self) -> int:
        a_step = self.plan.train.gradient_accumulation * self.plan.engine.num_gpus
        return math.ceil(self.order.batches_per_epoch / a_step)

    @property
    def total(self) -> int:
        return self.plan.train.max_steps or self.plan.train.max_epochs * self.steps_per_epoch


def order_of(plan: Plan, found: Scan) -> Order:
    return Order(
        found.pictures,
        plan.data,
        seed=plan.train.seed,
        caption_dropout_rate=plan.train.caption_dropout_rate,
        prior_loss_weight=plan.train.prior_loss_weight,
    )


def ready(plan: Plan, out: Path, *, status: Status, state: checkpoint.State | None, tick: Callable[[], None]) -> Ready:
    """Look at the pictures, and encode them and their captions."""
    kind, model = family(plan.model.family), Path(plan.model.path)
    status.phase("reading the dataset")
    found = scanned(plan.data, report=out / "dataset-report.txt")
    order = order_of(plan, found)
    _same_data(state, found)
    for line in order.describe():
        log.info("%s", line)
    cache = open_cache(Path(plan.output.cache), model, precision=plan.engine.dtype)
    made = Ready(plan, found, order, cache, state)
    log.info("%d optimiser steps, %d an epoch.", made.total, made.steps_per_epoch)
    if order.batches_per_epoch < plan.engine.num_gpus:
        log.warning(
            "An epoch has %d batches: of NUM_GPUS=%d some do nothing.", order.batches_per_epoch, plan.engine.num_gpus
        )
    status.phase("encoding")
    _fill_cache(made, kind=kind, model=model, tick=tick)
    return made


def _same_data(state: checkpoint.State | None, found: Scan) -> None:
    if state is None:
        return
    changed = fingerprint_differences(state.tree["data"], fingerprint(found.pictures))
    if changed:
        raise SettingsError(
            "The dataset is not the one that this run began with:\n  " + "\n  ".join(changed) + "\nPut it back to "
            "resume; or choose another OUTPUT_PATH; or set PARAMS_RESUME_FROM to a LoRA file to go on from its weights."
        )


def _fill_cache(ready: Ready, *, kind: Family, model: Path, tick: Callable[[], None]) -> None:
    # Of the engine's formats, the encoders take the type of activations alone: the others are the denoiser's.
    plan, order, cache = ready.plan, ready.order, ready.cache
    captions = [*order.every_caption(), *prompt_texts(plan.prompts)]
    fill_texts(cache, captions, family=kind, model=model, engine=plan.engine, tick=tick)
    fill_images(cache, order, family=kind, model=model, engine=plan.engine, tick=tick)


def micro_batch(cache: Cache, batch: Batch) -> MicroBatch:
    """Read one batch from the cache."""
    images = [caching.load(cache.image_path(e.picture, e.view)) for e in batch]
    texts = [caching.load(cache.text_path(e.caption)) for e in batch]
    mask = None
    if any("mask" in i for i in images):
        ones = torch.ones(1, *images[0]["moments"].shape[-2:])
        mask = torch.stack([i.get("mask", ones) for i in images])
    return MicroBatch(
        moments_B2CHW=torch.stack([i["moments"] for i in images]),
        text={key: torch.stack([t[key] for t in texts]) for key in texts[0]},
        geometry_B6=torch.tensor([geometry(e) for e in batch], dtype=torch.float32),
        mask_B1HW=mask,
        weight_B=torch.tensor([e.weight for e in batch]),
        names=tuple(e.picture.name for e in batch),
        captions=tuple(e.caption for e in batch),
    )


def geometry(example: Example) -> tuple[int, int, int, int, int, int]:
    """See `loop.MicroBatch`. A flipped picture is cut after it is flipped, as sd-scripts counts too."""
    picture, view = example.picture, example.view
    left = view.scaled[0] - view.size[0] - view.offset[0] if view.flip else view.offset[0]
    return picture.height, picture.width, view.offset[1], left, view.size[1], view.size[0]


def prompt_texts(prompts: Sequence[Prompt]) -> list[str]:
    """All texts that the samples need."""
    return [text for p in prompts for text in (p.text, p.negative)]
