"""Fill the cache: text embeddings of captions, and latents of images."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from trainer.data import cache as caching
from trainer.data.cache import Cache
from trainer.data.epochs import EpochSampler
from trainer.engine.device import release
from trainer.engine.encoders import load_text_encoders
from trainer.spec.errors import DataError
from trainer.spec.family import Family
from trainer.spec.memory_model import ENCODE_BATCH_MEGAPIXELS
from trainer.spec.plan import EnginePlan
from trainer.storage import digests

log = logging.getLogger(__name__)
CAPTIONS = 16  # encoded at once


def cpu_workers() -> int:
    """Threads or processes that prepare pictures: all cores this process may use, 16 at most."""
    return min(16, len(os.sched_getaffinity(0)))


def open_cache(folder: Path, model: Path, *, precision: str) -> Cache:
    """The cache of what the VAE and the text encoders in `model` make."""
    parts = sorted(p for p in model.iterdir() if p.name.startswith(("text_encoder", "tokenizer")))
    encoders = digests.digest([precision, *((p.name, digests.weights_digest(p)) for p in parts)])
    return Cache(folder, vae=digests.weights_digest(model / "vae"), encoders=encoders)


def fill_texts(
    cache: Cache,
    captions: Sequence[str],
    *,
    family: Family,
    model: Path,
    engine: EnginePlan,
    check_in: Callable[[], None],
) -> None:
    """Encode the captions that the cache lacks; the text encoders are loaded only if there are any."""
    if not caching.any_missing(cache.text_path(c) for c in dict.fromkeys(captions)):
        log.info("All %d captions are in the cache.", len(set(captions)))
        return
    started = time.monotonic()
    encoders = load_text_encoders(family, model, engine)
    count = caching.encode_texts(
        cache, captions, encode=partial(family.encode_text, encoders), batch=CAPTIONS, check_in=check_in
    )
    del encoders
    release()
    log.info("Encoded %d of %d captions in %.1f s.", count, len(set(captions)), time.monotonic() - started)


def fill_images(
    cache: Cache,
    order: EpochSampler,
    *,
    family: Family,
    model: Path,
    engine: EnginePlan,
    check_in: Callable[[], None],
) -> None:
    """Encode the views of pictures that the cache lacks. Raises DataError for one that does not decode after all."""
    views = list(order.all_image_variants())
    if not caching.any_missing(cache.image_path(p, v) for p, v in views):
        log.info("All %d latents are in the cache.", len(views))
        return
    started = time.monotonic()
    vae = family.load_vae(model, device=engine.device)
    count, unusable = caching.encode_images(
        cache,
        views,
        encode=partial(family.encode_images, vae),
        cpu_workers=cpu_workers(),
        at_once=0.0 if engine.tile_vae else ENCODE_BATCH_MEGAPIXELS,
        check_in=check_in,
    )
    del vae
    release()
    if unusable:
        names = "; ".join(f"{image.name}: {reason}" for image, reason in unusable[:20])
        raise DataError(f"{len(unusable)} pictures changed while they were read: {names}.")
    log.info("Encoded %d of %d latents in %.1f s.", count, len(views), time.monotonic() - started)
