"""Fill the cache: text embeddings of captions, and latents of images.

Each encoder is loaded only if the cache lacks something, and freed before the function returns: the denoiser comes
next and needs the memory.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from trainer.data import cache as caching
from trainer.data.cache import Cache, Share, Variant
from trainer.data.epochs import EpochSampler
from trainer.data.records import ImageRecord
from trainer.data.scan import cpu_workers
from trainer.engine.device import release
from trainer.engine.encoders import load_text_encoders
from trainer.spec.errors import DataError
from trainer.spec.family import CLIP_TOKENS, Family
from trainer.spec.memory_model import ENCODE_BATCH_MEGAPIXELS
from trainer.spec.plan import EnginePlan, Prompt
from trainer.storage import digests

log = logging.getLogger(__name__)
PIECE = 1 << 15  # views, or captions, that are looked for in the cache at once
CAPTION_BATCH_SIZE = 16  # captions encoded together: of T5, 16 × 512 tokens, which is enough to keep a GPU busy


def open_cache(folder: Path, model: Path, *, family: str, precision: str, max_tokens: int = CLIP_TOKENS) -> Cache:
    """The cache of items that the VAE and the text encoders in the folder `model` encode.

    `family`: each reads captions in its own way, also where several have the very same encoder, as Z-Image and FLUX.2
    klein may. `precision`: the type that the text encoders compute in, by torch's name, which changes their embeddings
    a little. `max_tokens`: of a caption that CLIP reads.
    """
    encoders: list[str | tuple[str, str]] = [family, precision]
    if max_tokens != CLIP_TOKENS:
        encoders.append(f"{max_tokens} tokens")
    for part in sorted(model.iterdir()):
        if part.name.startswith(("text_encoder", "tokenizer")):
            encoders.append((part.name, digests.weights_digest(part)))
    return Cache(folder, vae=digests.weights_digest(model / "vae"), encoders=digests.digest(encoders))


def prompt_texts(prompts: Sequence[Prompt]) -> list[str]:
    """All texts that the samples need."""
    texts = []
    for prompt in prompts:
        texts += [prompt.text, prompt.negative]
    return texts


def fill_texts(
    cache: Cache,
    captions: Iterable[str],
    *,
    family: Family,
    model: Path,
    engine: EnginePlan,
    check_in: Callable[[], None],
    max_tokens: int = CLIP_TOKENS,
    share: Share = caching.ALONE,
) -> None:
    """Encode the captions that the cache lacks; a caption may come more than once.

    `check_in` is called between batches and may raise. `share`: this process's part, which may be nothing.
    """
    # Streamed encoders stay in the host's memory, which may not have room for a copy of each process.
    own_share = caching.ALONE if engine.stream_encoders else share
    is_idle = engine.stream_encoders and share.index > 0
    encoders = None
    started = time.monotonic()
    total = encoded = lacking = 0
    for number, unique in enumerate(_unique_pieces(captions)):
        if number:  # a caption of the piece before may come again, and another process may have encoded it
            share.merge([0])
            cache.refresh()
        total += len(unique)
        missing = caching.find_missing(unique, cache.text_path, share, has=cache.has)
        lacking += len(missing)
        if is_idle or own_share.index * CAPTION_BATCH_SIZE >= len(missing):
            continue  # all is there, or others' work
        if encoders is None:
            encoders = load_text_encoders(family, model, engine)
        encoded += caching.encode_texts(
            cache,
            missing,
            encode=partial(family.encode_text, encoders, max_tokens=max_tokens),
            batch_size=CAPTION_BATCH_SIZE,
            check_in=check_in,
            share=own_share,
            packed=len(unique) >= caching.PACKED_FROM,
        )
    if not lacking:
        log.info("All %d captions are in the cache.", total)
    if encoders is not None:
        del encoders
        release()
        log.info("Encoded %d of %d captions in %.1f s.", encoded, total, time.monotonic() - started)


def _unique_pieces(captions: Iterable[str]) -> Iterator[list[str]]:
    """Some at a time, each once in its piece."""
    piece: dict[str, None] = {}
    for caption in captions:
        piece[caption] = None
        if len(piece) == PIECE:
            yield list(piece)
            piece = {}
    if piece:
        yield list(piece)


def fill_images(
    cache: Cache,
    sampler: EpochSampler,
    *,
    family: Family,
    model: Path,
    engine: EnginePlan,
    check_in: Callable[[], None],
    share: Share = caching.ALONE,
    window: int | None = None,
) -> None:
    """Encode the image variants (of a window) that the cache lacks. `check_in` is called between batches and may raise.

    `share`: this process's part. Raises DataError for an image that decoded in the scan and does not any more.
    """
    vae = None
    started = time.monotonic()
    total = encoded = 0
    unusable: list[tuple[ImageRecord, str]] = []
    packed = sampler.count_views(window) >= caching.PACKED_FROM
    for variants in _pieces(sampler.all_image_variants(window)):
        total += len(variants)
        missing = caching.find_missing(
            variants, lambda v: cache.image_path(*v), share, threads=cpu_workers(), has=cache.has
        )
        if not missing:
            continue
        if vae is None:
            vae = family.load_vae(model, device=engine.device)
        count, without = caching.encode_images(
            cache,
            missing,
            encode=partial(family.encode_images, vae),
            cpu_workers=cpu_workers(),
            # Tiles are for little memory: then one image at a time.
            max_megapixels=0.0 if engine.tile_vae else ENCODE_BATCH_MEGAPIXELS,
            check_in=check_in,
            share=share,
            packed=packed,
        )
        encoded += count
        unusable += without
    if vae is None:
        log.info("All %d latents are in the cache.", total)
        return
    del vae
    release()
    if unusable:
        names = "; ".join(f"{image.name}: {reason}" for image, reason in unusable[:20])
        raise DataError(f"{len(unusable)} images changed while they were read: {names}.")
    log.info("Encoded %d of %d latents in %.1f s.", encoded, total, time.monotonic() - started)


def _pieces(variants: Iterator[Variant]) -> Iterator[list[Variant]]:
    """Some at a time: a million images with their views are a gigabyte."""
    while piece := list(itertools.islice(variants, PIECE)):
        yield piece
