"""A cache that may be larger than the volume: it holds the images of one window, and then those of the next.

Where the whole cache fits CACHE_PATH, there is no window and nothing of this happens. Otherwise an epoch goes through
the windows of `trainer.data.order.windows`: what the steps before have used is deleted, the next window is encoded,
and steps go on. The GPU either encodes or trains. What a window holds is a function of the seed and of the window's
size, which the run keeps; a window that was not encoded to its end is encoded anew, so that the same images are encoded
together. So a run that is stopped anywhere has the weights that it would have had.

The folder is this run's alone: nothing in it is shared with other jobs, and deleting it is safe.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from trainer.data import encode
from trainer.data.cache import Cache, Share
from trainer.data.epochs import EpochSampler
from trainer.data.order.epoch import Span
from trainer.data.order.windows import assign
from trainer.data.records import ImageRecord, Scan
from trainer.data.shards.stream import ShardStream
from trainer.engine.device import release
from trainer.spec.errors import DataError, GatedError, SettingsError, UnreachableError
from trainer.spec.family import base_models, get_family
from trainer.spec.memory_model import captions_at_once
from trainer.spec.plan import EnginePlan, Plan
from trainer.spec.rules.cache_size import LEAST_BYTES, bytes_per_image
from trainer.spec.values import many
from trainer.storage import atomic, json_files
from trainer.storage.atomic import human_size
from trainer.storage.folders import nearest_existing
from trainer.storage.run_records import RunRecord
from trainer.training.distributed import Workers

log = logging.getLogger(__name__)
FOLDER = "rolling"  # below CACHE_PATH
WHOLE = "whole.json"  # in a window's folder once all of it is encoded
KEY = "window_bytes"  # in a run's record
# Of what is free at CACHE_PATH: saves, samples and other jobs need room as well.
WHOLE_SHARE = 0.9  # that all images may take
WINDOW_SHARE = 0.5  # that those of a window may: captions of some families take more than is estimated


def with_windows(plan: Plan, sampler: EpochSampler, scanned: Scan, cache: Cache, record: RunRecord) -> Plan:
    """The plan with the size of its windows. What a run has chosen once, it keeps: it decides the order of images.

    `sampler`: without windows.
    """
    chosen = record.values.get(KEY)
    if not isinstance(chosen, int) or chosen < 0 or (chosen == 0 and streams_of(plan)):
        chosen = _window_bytes(plan, sampler, scanned, cache)
        record.update({KEY: chosen})
    return dataclasses.replace(plan, output=dataclasses.replace(plan.output, window_bytes=chosen))


def _window_bytes(plan: Plan, sampler: EpochSampler, scanned: Scan, cache: Cache) -> int:
    """0: all fits."""
    limit = plan.output.max_cache_bytes
    if plan.engine.nodes > 1:
        return 0
    size = size_of(plan)
    needed = sum(map(size, scanned.images))
    free = shutil.disk_usage(nearest_existing(Path(plan.output.cache))).free
    is_stream = bool(streams_of(plan))
    room = int(free * WHOLE_SHARE) if limit is None else limit
    if needed <= room and not is_stream:
        return 0
    if limit is None:
        if not is_stream and _missing_share(sampler, cache) * needed <= room:
            return 0  # most of it is there
        room = max(int(free * WINDOW_SHARE), LEAST_BYTES)
    log.info(
        "The cache of all %s would take about %s, and may take %s: they are encoded part by part while the job trains.",
        many(len(scanned.images), "image"), human_size(needed), human_size(room),
    )  # fmt: skip
    return room


def _missing_share(sampler: EpochSampler, cache: Cache) -> float:
    """About which share of the images the cache lacks."""
    total = missing = 0
    for image, view in sampler.all_image_variants():
        total += 1
        missing += not cache.knows(cache.image_path(image, view))
    return missing / max(total, 1)


def streams_of(plan: Plan) -> list[ShardStream]:
    """Those of the sources whose shards do not all fit the volume."""
    found = {subset.source.path: ShardStream.of(Path(subset.source.path)) for subset in plan.data.subsets}
    return [stream for stream in found.values() if stream is not None]


def size_of(plan: Plan) -> Callable[[ImageRecord], int]:
    """The bytes of an image in the cache, about; of one in a shard from elsewhere, with its own bytes."""
    sizes = {}
    for d, dataset in enumerate(plan.data.datasets):
        for s, subset in enumerate(dataset.subsets):
            sizes[d, s] = bytes_per_image(plan, dataset, subset)

    def size(image: ImageRecord) -> int:
        fetched = image.span[1] if _is_fetched(plan, image) and image.span else 0
        return sizes[image.dataset, image.subset] + fetched

    return size


def unit_of(plan: Plan) -> Callable[[ImageRecord], Hashable]:
    """What an image comes with: the shards of a bucket come whole, whether all of them fit or not."""
    return lambda image: str(image.file) if _is_fetched(plan, image) else image.key


def _is_fetched(plan: Plan, image: ImageRecord) -> bool:
    source = plan.data.datasets[image.dataset].subsets[image.subset].source
    return image.span is not None and source.kind != "folder"


def make_sampler(plan: Plan, scanned: Scan) -> EpochSampler:
    """The order in which the images are seen: the same for every process and after every restart."""
    windows = None
    if plan.output.window_bytes:
        windows = partial(
            assign, size=size_of(plan), budget=plan.output.window_bytes, seed=plan.train.seed, unit=unit_of(plan)
        )
    return EpochSampler(
        scanned.images,
        plan.data,
        seed=plan.train.seed,
        caption_dropout_rate=plan.train.caption_dropout_rate,
        prior_loss_weight=plan.train.prior_loss_weight,
        windows=windows,
    )


def folder_of(plan: Plan) -> Path:
    """Where the items of a window are. `OUTPUT_PATH` is one job's at a time, and so is this."""
    home = os.path.realpath(Path(plan.output.path) / plan.output.folder)
    key = hashlib.sha256(json.dumps([home, plan.output.name]).encode()).hexdigest()[:16]
    return Path(plan.output.cache) / FOLDER / key


def fill(
    plan: Plan,
    sampler: EpochSampler,
    cache: Cache,
    *,
    check_in: Callable[[], None],
    share: Share,
    window: int | None = None,
    engine: EnginePlan | None = None,
) -> None:
    """Encode every caption, prompt and image of a window, or of the whole run, that the cache lacks; of that, `share`.

    `engine`: in the place of the plan's.
    """
    family = get_family(plan.model.family)
    model = Path(plan.model.path)
    engine = engine or plan.engine
    captions = itertools.chain(sampler.all_captions(window), encode.prompt_texts(plan.prompts))
    max_tokens = plan.train.max_token_length
    common = {"family": family, "model": model, "engine": engine, "check_in": check_in, "share": share}
    footprint = base_models()[plan.model.base][1].footprint
    at_once = captions_at_once(footprint, engine.precision, streamed=engine.stream_encoders)
    encode.fill_texts(cache, captions, max_tokens=max_tokens, at_once=at_once, **common)  # type: ignore[arg-type]
    encode.fill_images(cache, sampler, window=window, **common)  # type: ignore[arg-type]


@dataclass
class RollingCache:
    """Brings the window of a step into `cache`. All processes of a job call it alike."""

    plan: Plan
    sampler: EpochSampler
    cache: Cache
    workers: Workers
    steps_per_epoch: int
    total: int
    check_in: Callable[[], None]
    share: Share = field(default_factory=Share)
    make_room: Callable[[], None] = release  # on the device, for the encoders
    _held: int | None = None  # the window in the cache, once it is known to be whole

    def __post_init__(self) -> None:
        self._streams = streams_of(self.plan)

    def bring(self, step: int) -> Span:
        """Let the cache hold what the step after `step` needs; returns the part of the epoch that it holds then."""
        span = self._span(step)
        if self._held == span.window:
            return span
        if not self._is_whole(span.window):
            self._encode(span.window)
        self.cache.reopen()
        self._held = span.window
        if self.workers.is_first and self._streams:
            self._want(self._upcoming(step, span))
        return span

    def _span(self, step: int) -> Span:
        epoch, index = divmod(step, self.steps_per_epoch)
        per_step = self.plan.train.gradient_accumulation * self.workers.size
        return self.sampler.epoch(epoch).span(index, per_step)

    def _upcoming(self, step: int, span: Span) -> int | None:
        """The window that follows."""
        window = span.window
        while step < self.total:
            if span.window != window:
                return span.window
            step += span.steps.stop - step % self.steps_per_epoch
            if step < self.total:
                span = self._span(step)
        return None

    def _want(self, window: int | None) -> None:
        """Let the shards of a window come, and the others go."""
        files = self.sampler.files(window) if window is not None else []
        for stream in self._streams:
            stream.want(self._names(stream, files))

    def _names(self, stream: ShardStream, files: list[Path]) -> list[str]:
        return [path.relative_to(stream.root).as_posix() for path in files if path.is_relative_to(stream.root)]

    def _wait(self, window: int) -> None:
        """Raises UnreachableError, StorageError where a shard could not be brought."""
        files = self.sampler.files(window)
        for stream in self._streams:
            for name in self._names(stream, files):
                try:
                    stream.wait(name, self.check_in)
                except (DataError, GatedError, SettingsError) as problem:
                    raise UnreachableError(
                        f"{problem} It was there when the job read its images. Put it back as it was, and start again: "
                        "the job goes on from its last save."
                    ) from problem

    def close(self) -> None:
        """Delete what the last window has left; the run is over."""
        if self.workers.is_first:
            self._want(None)
            shutil.rmtree(self.cache.folder, ignore_errors=True)

    def _is_whole(self, window: int) -> bool:
        record = json_files.read_object(self.cache.folder / WHOLE) or {}
        return self.workers.all_agree(record == self._record(window))

    def _record(self, window: int) -> dict[str, int | str]:
        texts = hashlib.sha256(json.dumps(encode.prompt_texts(self.plan.prompts)).encode()).hexdigest()
        return {"window": window, KEY: self.plan.output.window_bytes, "weights": self.cache.vae, "prompts": texts}

    def _encode(self, window: int) -> None:
        started = time.monotonic()
        self.make_room()
        if self.workers.is_first:
            shutil.rmtree(self.cache.folder, ignore_errors=True)
            self._want(window)
        self.workers.wait_for_all(self.check_in)
        if self._streams:
            self._wait(window)
        self.cache.reopen()
        fill(
            self.plan, self.sampler, self.cache, window=window,
            engine=self._engine(), check_in=self.check_in, share=self.share,
        )  # fmt: skip
        self.workers.wait_for_all(self.check_in)
        if self.workers.is_first:
            atomic.write_text(self.cache.folder / WHOLE, json.dumps(self._record(window)))
        self.workers.wait_for_all(self.check_in)
        count = len(self.sampler.windows)
        log.info("Encoded window %d of %d in %.1f s.", window + 1, count, time.monotonic() - started)

    def _engine(self) -> EnginePlan:
        """The plan's, with the encoders beside a denoiser that stays: one image at a time, and streamed text encoders
        where the device has no room for them.
        """
        engine = self.plan.engine
        if engine.device != "cuda":
            return engine
        free, _ = torch.cuda.mem_get_info()
        encoders = sum(
            path.stat().st_size
            for part in Path(self.plan.model.path).glob("text_encoder*")
            for path in part.rglob("*.safetensors")
        )
        fits = self.workers.all_agree(free > 1.2 * encoders + (2 << 30))
        return dataclasses.replace(engine, tile_vae=True, stream_encoders=engine.stream_encoders or not fits)
