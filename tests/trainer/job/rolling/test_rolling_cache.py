"""Whether a run needs windows, how large they are, and what is made of one that was not encoded to its end."""

from __future__ import annotations

import dataclasses
import shutil
from collections import namedtuple

import pytest

from trainer.data.scan import scan
from trainer.job.prepare import cache_of
from trainer.job.rolling import rolling_cache
from trainer.job.rolling.rolling_cache import WHOLE, RollingCache, make_sampler, with_windows
from trainer.spec.family import base_models
from trainer.spec.rules.cache_size import LEAST_BYTES
from trainer.storage.run_records import RunRecord
from trainer.training.distributed import Workers

Usage = namedtuple("Usage", "total used free")
PER_IMAGE = 128 * 128 * 16 // 8  # bytes of latents of 16 channels, at the size of the pictures


@pytest.fixture
def plan(job_plan):
    return job_plan("sdxl", PARAMS_RESOLUTION="128")


@pytest.fixture
def chosen(plan, tmp_path, monkeypatch):
    """`chosen(free, limit, record)`: the bytes of a window where so many are free, and MAX_CACHE_GIB allows so many."""
    scanned = scan(plan.data, cpu_workers=0)

    def choose(free: int, limit: int | None = None, record: RunRecord | None = None) -> int:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
        output = dataclasses.replace(plan.output, max_cache_bytes=limit)
        asked = dataclasses.replace(plan, output=output)
        sampler = make_sampler(asked, scanned)
        record = record or RunRecord(tmp_path / f"{free} {limit}")
        return with_windows(asked, sampler, scanned, cache_of(asked), record).output.window_bytes

    return choose


def test_the_cache_holds_all_where_that_fits_and_else_a_part(chosen):
    two = 2 * PER_IMAGE
    assert chosen(free=int(two / 0.9) + 1) == 0
    assert chosen(free=int(two / 0.9) - 10) == LEAST_BYTES  # less is not worth the overhead
    assert chosen(free=10**12, limit=two) == 0
    assert chosen(free=10**12, limit=two - 1) == two - 1


def test_half_of_what_is_free_is_a_window(chosen, monkeypatch):
    monkeypatch.setattr(rolling_cache, "bytes_per_image", lambda *_, **__: 10**12)
    assert chosen(free=10**12) == 5 * 10**11


def test_a_run_keeps_the_windows_that_it_began_with(chosen, tmp_path):
    record = RunRecord(tmp_path)
    assert chosen(free=10**12, limit=PER_IMAGE, record=record) == PER_IMAGE
    assert chosen(free=10**12, record=RunRecord(tmp_path)) == PER_IMAGE
    whole = RunRecord(tmp_path / "whole")
    assert chosen(free=10**12, record=whole) == 0
    assert chosen(free=10, limit=PER_IMAGE, record=whole) == 0


def test_images_are_sized_by_the_footprint_of_the_base_model(plan):
    image = scan(plan.data, cpu_workers=0).images[0]
    assert rolling_cache.size_of(plan)(image) == PER_IMAGE
    full = dataclasses.replace(
        plan,
        model=dataclasses.replace(plan.model, base="sdxl"),
        engine=dataclasses.replace(plan.engine, precision="bf16"),
    )
    captions = base_models()["sdxl"][1].footprint.caption_values * 2 * plan.data.datasets[0].subsets[0].caption_variants
    assert rolling_cache.size_of(full)(image) == PER_IMAGE // 4 + captions


def test_a_window_that_was_not_encoded_to_its_end_is_encoded_anew(plan):
    plan = dataclasses.replace(plan, output=dataclasses.replace(plan.output, window_bytes=PER_IMAGE))
    sampler, cache = make_sampler(plan, scan(plan.data, cpu_workers=0)), cache_of(plan)

    def bring(step: int) -> set[str]:
        steps = sampler.steps_per_epoch(1)
        rolling = RollingCache(plan, sampler, cache, Workers(), steps, 10 * steps, check_in=lambda: None)
        span = rolling.bring(step)
        assert all(cache.has(cache.image_path(*view)) for view in sampler.all_image_variants(span.window))
        assert all(cache.has(cache.text_path(text)) for text in sampler.all_captions(span.window))
        return {path.name for path in cache.folder.rglob("*") if path.is_file()}

    first = bring(0)
    assert WHOLE in first
    kept = next(cache.folder.rglob("*.safetensors"))
    stamp = kept.stat().st_mtime_ns
    assert bring(0) == first and kept.stat().st_mtime_ns == stamp
    (cache.folder / WHOLE).unlink()
    stray = kept.with_name("stray.safetensors")
    stray.write_bytes(b"half")
    assert bring(0) == first and not stray.exists()
    assert len(sampler.windows) == 2
    assert {bring(step) == first for step in (0, 1)} == {True, False}  # what another window has is not there
