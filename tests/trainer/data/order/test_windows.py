"""Parts of a dataset that the cache holds one after another."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.epochs import EpochSampler
from trainer.data.order.windows import assign
from trainer.data.records import ImageRecord
from trainer.spec.plan import DataPlan, Dataset, Source, Subset

SIZES = ((64, 64), (96, 64), (64, 96))


def images(count: int) -> list[ImageRecord]:
    made = []
    for i in range(count):
        width, height = SIZES[i % 3]
        made.append(ImageRecord(f"{i}.png", Path(f"/{i % 5}.tar"), f"{i:064x}", width, height, 0, 0, f"picture {i}"))
    return made


def bytes_of(image: ImageRecord) -> int:
    return image.width * image.height


@given(st.integers(1, 60), st.integers(1, 300_000), st.integers(0, 9), st.booleans())
def test_a_window_fits_its_bytes_unless_two_units_do_not(count, budget, seed, by_shard):
    unit = (lambda image: image.file) if by_shard else None
    windows = assign(images(count), size=bytes_of, budget=budget, seed=seed, unit=unit)
    filled: Counter[int] = Counter()
    shards = defaultdict(set)
    for window, image in zip(windows, images(count), strict=True):
        filled[window] += bytes_of(image)
        shards[image.file].add(window)
    assert set(filled) == set(range(len(filled)))
    of_units: Counter[object] = Counter()
    for image in images(count):
        of_units[image.file if by_shard else image.name] += bytes_of(image)
    largest = max(of_units.values())
    assert all(size <= max(budget, 2 * largest) for size in filled.values())
    if by_shard:
        assert all(len(found) == 1 for found in shards.values())
    assert windows == assign(images(count), size=bytes_of, budget=budget, seed=seed, unit=unit)


def sampler(count: int, *, batch_size: int = 2, seed: int = 3, budget: int = 40_000, repeats: int = 1) -> EpochSampler:
    data = DataPlan((
        Dataset((Subset(Source("folder", "a"), num_repeats=repeats),), (64, 64), batch_size, enable_bucket=True,
                bucket_reso_steps=32),
    ))  # fmt: skip
    windows = partial(assign, size=bytes_of, budget=budget, seed=seed, unit=None)
    return EpochSampler(images(count), data, seed=seed, windows=windows)


@pytest.mark.parametrize("per_step", [1, 3])
def test_an_epoch_goes_through_the_windows_one_by_one(per_step):
    made = sampler(40, repeats=2)
    assert len(made.windows) > 3
    orders = set()
    for number in range(4):
        epoch = made.epoch(number)
        shown = Counter(example.image.name for batch in epoch for example in batch)
        assert shown == {image.name: 2 for image in images(40)}
        step, order, batches = 0, [], []
        while step < made.steps_per_epoch(per_step):
            span = epoch.span(step, per_step)
            order.append(span.window)
            held = {(image.key, view) for image, view in made.all_image_variants(span.window)}
            texts = set(made.all_captions(span.window))
            for each in span.steps:
                assert epoch.span(each, per_step) == span
                places = span.of_step(each)
                assert 1 <= len(places) <= per_step
                batches += places
                for place in places:
                    assert all((one.image.key, one.view) in held and one.caption in texts for one in epoch[place])
            assert len(span.steps) == math.ceil(len(span.batches) / per_step)
            step = span.steps.stop
        assert sorted(order) == made.windows and batches == list(range(len(epoch)))
        orders.add(tuple(order))
        with pytest.raises(IndexError):
            epoch.span(step, per_step)
    assert len(orders) > 1


def test_without_windows_the_order_is_what_it_was():
    whole = sampler(40, budget=10**9)
    assert whole.windows == [0]
    plain = EpochSampler(images(40), whole._data, seed=3)
    assert whole.epoch(1) == plain.epoch(1)
    assert list(whole.all_image_variants(0)) == list(plain.all_image_variants())
