"""The order of an epoch, kept as numbers, is that of lists of examples that are shuffled one by one."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from pathlib import Path

import pytest

from trainer.data.epochs import EpochSampler
from trainer.data.order.variants import Example, draw_views
from trainer.data.records import ImageRecord
from trainer.job import sizes
from trainer.spec.plan import DataPlan, Dataset, Source, Subset

SHAPES = ((640, 480), (480, 640), (512, 512), (1000, 300))


def make(count: int, *, batch_size: int = 3, **keys) -> EpochSampler:
    subset = Subset(Source("folder", "x"), **keys)
    images = []
    for i in range(count):
        width, height = SHAPES[i % 4]
        mask = "alpha" if i % 7 == 0 else None
        images.append(
            ImageRecord(f"{i}.png", Path(f"/a/{i}.png"), f"{i:064x}", width, height, 0, 0, "a, b, c", mask_sha256=mask)
        )
    data = DataPlan((Dataset((subset,), (512, 512), batch_size=batch_size, enable_bucket=True),))
    return EpochSampler(images, data, seed=4, caption_dropout_rate=0.2)


@pytest.mark.parametrize("number", [0, 3])
def test_the_order_is_that_of_lists_shuffled_by_the_epoch_s_generator(number):
    sampler = make(25, num_repeats=3, random_crop=True, flip_aug=True, shuffle_caption=True)
    rng = random.Random(f"4/epoch/{number}")
    groups = defaultdict(list)
    for pool in sampler.pools():
        for _ in range(3):
            view, caption = rng.choice(pool.views), rng.choice(pool.captions)
            if rng.random() < 0.2:
                caption = ""
            groups[view.size].append(Example(pool.image, view, caption))
    batches = []
    for examples in groups.values():
        rng.shuffle(examples)
        batches += [tuple(examples[i : i + 3]) for i in range(0, len(examples), 3)]
    rng.shuffle(batches)
    epoch = sampler.epoch(number)
    assert epoch == batches and [*epoch] == batches and epoch[2:5] == batches[2:5]
    assert len(epoch) == sampler.batches_per_epoch and epoch != batches[::-1] and epoch != batches[1:]


@pytest.mark.parametrize("count", [1, 10, 57])
def test_the_outline_has_every_size_that_the_epoch_has(count):
    epoch = make(count, num_repeats=2).epoch(0)
    outline = epoch.outline()
    assert sizes.one_of_each_size(outline) == sizes.one_of_each_size(epoch)
    assert sizes.largest_batches(outline) == sizes.largest_batches(epoch)

    def pixels(batch):
        return len(batch) * math.prod(batch[0].view.size)

    assert min(outline, key=pixels) == min(epoch, key=pixels)
    if count == 57:
        assert len(outline) < len(epoch)


def test_a_place_that_is_not_there_ends_an_epoch():
    epoch = make(4).epoch(0)
    assert epoch[-1] == list(epoch)[-1]
    with pytest.raises(IndexError):
        epoch[len(epoch)]


def test_an_image_that_cannot_be_moved_has_one_view_whatever_the_seed():
    sampler = make(4, random_crop=True)
    square = next(pool for pool in sampler.pools() if pool.image.width == pool.image.height)
    assert len(square.views) == 1
    assert draw_views(sampler._fit(square.image), Subset(Source("folder", "x")), square.image, 9) == square.views
