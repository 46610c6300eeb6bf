"""Which images are trained on when: a pure function of seed and epoch."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import count, islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.captions import compose_caption
from trainer.data.epochs import EpochSampler, split
from trainer.data.identity import fingerprint, fingerprint_differences
from trainer.data.records import ImageRecord
from trainer.spec.errors import DataError
from trainer.spec.plan import VARIANTS, DataPlan, Dataset, Source, Subset

SHAPES = ((640, 480), (480, 640), (512, 512), (1000, 300))


def subset(**keys) -> Subset:
    return Subset(Source("folder", "pictures"), **keys)


def plan(*subsets: Subset, **keys) -> DataPlan:
    keys = {"enable_bucket": True, "batch_size": 3, **keys}
    return DataPlan((Dataset(subsets or (subset(),), (512, 512), **keys),))


def images(count: int, *, dataset: int = 0, subset: int = 0, caption: str | None = "a, b, c", first: int = 0):
    return [
        ImageRecord(
            name=f"{i:03}.png",
            file=Path(f"/somewhere/{i:03}.png"),
            sha256=f"{i:064x}",
            width=SHAPES[i % len(SHAPES)][0],
            height=SHAPES[i % len(SHAPES)][1],
            dataset=dataset,
            subset=subset,
            caption=caption,
        )
        for i in range(first, first + count)
    ]


def make_sampler(data: DataPlan, some=None, *, seed: int = 0, **keys) -> EpochSampler:
    return EpochSampler(images(10) if some is None else some, data, seed=seed, **keys)


def examples(batches):
    return [example for batch in batches for example in batch]


def from_position(sampler: EpochSampler, epoch: int, index: int):
    """(epoch, index, batch) without end, starting with batch `index` of `epoch`."""
    for number in count(epoch):
        for i, batch in enumerate(sampler.epoch(number)):
            if number > epoch or i >= index:
                yield number, i, batch


# ---- an epoch


@given(
    st.integers(1, 30), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**63), st.integers(0, 50), st.booleans()
)
def test_every_image_occurs_exactly_repeats_times(count, repeats, batch_size, seed, epoch, varied):
    keys = {"flip_aug": varied, "random_crop": varied, "color_aug": varied, "shuffle_caption": varied}
    data = plan(subset(num_repeats=repeats, **keys), batch_size=batch_size)
    sampler = make_sampler(data, images(count), seed=seed)
    batches = sampler.epoch(epoch)
    assert Counter(e.image.name for e in examples(batches)) == {p.name: repeats for p in images(count)}
    assert len(batches) == sampler.batches_per_epoch
    assert sampler.examples_per_epoch == count * repeats
    assert all(len({e.view.size for e in batch}) == 1 and len(batch) <= batch_size for batch in batches)
    assert batches == make_sampler(data, images(count), seed=seed).epoch(epoch)


def test_the_last_smaller_batch_of_each_bucket_is_trained():
    sizes = Counter(len(batch) for batch in make_sampler(plan(batch_size=3)).epoch(0))
    assert sizes == {3: 2, 2: 2}  # buckets of 3, 3, 2 and 2 images


def test_batches_of_all_buckets_are_shuffled_together():
    """In the order of the buckets, three blocks would follow each other."""
    sampler = make_sampler(plan(batch_size=1), images(40))
    for number in range(3):
        sizes = [batch[0].view.size for batch in sampler.epoch(number)]
        changes = sum(one != other for one, other in pairwise(sizes))
        assert changes > 12 and len(sizes) == 40


def test_the_order_is_that_of_a_generator_of_the_seed_and_the_epoch():
    """By hand, where nothing varies: each occurrence draws its view, its caption and whether it is dropped; then each
    bucket is shuffled and cut, and then the batches are.
    """
    some = images(9)
    found = make_sampler(plan(batch_size=2), some, seed=5).epoch(3)
    rng, groups = random.Random("5/epoch/3"), {}
    for image in some:
        rng.choice("a"), rng.choice("b"), rng.random()
        groups.setdefault((image.width, image.height), []).append(image.name)
    expected = []
    for names in groups.values():
        rng.shuffle(names)
        expected += [names[i : i + 2] for i in range(0, len(names), 2)]
    rng.shuffle(expected)
    assert [[example.image.name for example in batch] for batch in found] == expected


def test_epochs_and_seeds_differ():
    sampler = make_sampler(plan())
    other = make_sampler(plan(), seed=1)
    orders = set()
    for batches in (sampler.epoch(0), sampler.epoch(1), other.epoch(0)):
        orders.add(tuple(e.image.name for e in examples(batches)))
    assert len(orders) == 3


@given(st.integers(0, 3), st.integers(0, 12))
@settings(max_examples=30)
def test_resuming_anywhere_gives_the_same_rest(epoch, index):
    data = plan(subset(num_repeats=2, flip_aug=True, random_crop=True, shuffle_caption=True, caption_dropout_rate=0.3))
    whole = list(islice(from_position(make_sampler(data), 0, 0), 60))
    per_epoch = make_sampler(data).batches_per_epoch
    index = min(index, per_epoch - 1)
    start = epoch * per_epoch + index
    assert list(islice(from_position(make_sampler(data), epoch, index), 60 - start)) == whole[start:]


def test_datasets_are_never_mixed_and_keep_their_batch_size():
    data = DataPlan(
        (
            Dataset((subset(),), (512, 512), batch_size=4),
            Dataset((subset(),), (512, 512), batch_size=2),
        )
    )
    sampler = make_sampler(data, images(8) + images(6, dataset=1))
    batches = sampler.epoch(0)
    assert Counter((batch[0].image.dataset, len(batch)) for batch in batches) == {(0, 4): 2, (1, 2): 3}
    assert all(len({e.image.dataset for e in batch}) == 1 for batch in batches)
    assert sampler.buckets == {(0, (512, 512)): 8, (1, (512, 512)): 6}


# ---- regularisation


@pytest.mark.parametrize(("regular", "repeats"), [(3, 1), (5, 2), (40, 1)])
def test_regularisation_images_are_as_many_as_the_others(regular, repeats):
    data = plan(subset(num_repeats=2), subset(is_reg=True, num_repeats=repeats))
    sampler = make_sampler(data, images(10) + images(regular, subset=1, first=100), prior_loss_weight=0.5)
    found = examples(sampler.epoch(0))
    assert Counter(e.weight for e in found) == {1.0: 20, 0.5: 20}
    transposes = Counter(e.image.name for e in found if e.weight == 0.5)
    assert max(transposes.values()) - min(transposes.values()) <= 1
    assert sampler.unused == max(0, regular - 20)


def test_a_dataset_of_regularisation_alone_is_trained_as_it_is():
    found = examples(make_sampler(plan(subset(is_reg=True, num_repeats=3)), prior_loss_weight=0.5).epoch(0))
    assert len(found) == 30 and {e.weight for e in found} == {0.5}


# ---- variants, all of which the cache must hold

VARIED = {
    "flip_aug": True,
    "random_crop": True,
    "color_aug": True,
    "shuffle_caption": True,
    "caption_tag_dropout_rate": 0.3,
    "enable_wildcard": True,
    "caption_dropout_rate": 0.2,
}


@pytest.mark.parametrize("keys", [{}, {"flip_aug": True}, {"random_crop": True}, {"caption_dropout_rate": 0.5}, VARIED])
def test_the_variants_to_cache_are_those_that_epochs_use_and_no_others(keys):
    sampler = make_sampler(plan(subset(num_repeats=4, **keys), validation_split=0.2))
    views, texts = list(sampler.all_image_variants()), list(dict.fromkeys(sampler.all_captions()))
    used = examples(b for n in range(40) for b in sampler.epoch(n)) + examples(sampler.validation())
    assert {(e.image, e.view) for e in used} == set(views) and len(views) == len(set(views))
    assert {e.caption for e in used} == set(texts) and len(texts) == len(set(texts))


def test_nothing_varies_unless_asked_for():
    sampler = make_sampler(plan())
    assert len(list(sampler.all_image_variants())) == 10 and set(sampler.all_captions()) == {"a, b, c"}
    for _, view in sampler.all_image_variants():
        assert not view.flip and view.colour is None
        assert view.offset == tuple((s - b) // 2 for s, b in zip(view.scaled, view.size, strict=True))


VARYING = {
    "flip_aug": True,
    "random_crop": True,
    "color_aug": True,
    "shuffle_caption": True,
    "enable_wildcard": True,
    "caption_tag_dropout_rate": 0.3,
}


@pytest.mark.parametrize("key", VARYING)
def test_a_subset_counts_the_variants_that_each_augmentation_adds(key):
    """Preflight computes the size of the cache from these numbers."""
    kept = subset(**{key: VARYING[key]})
    sampler = make_sampler(plan(kept))
    per_image = Counter(p.name for p, _ in sampler.all_image_variants())
    assert (kept.image_variants > 1) == (max(per_image.values()) > 1)
    assert (kept.caption_variants > 1) == ("caption" in key or "wild" in key)
    assert max(per_image.values()) <= kept.image_variants
    assert len(set(sampler.all_captions())) <= kept.caption_variants * len(per_image)


def test_the_pool_of_variants_is_bounded():
    sampler = make_sampler(plan(subset(**VARIED)))
    per_image = Counter(p.name for p, _ in sampler.all_image_variants())
    assert max(per_image.values()) <= VARIANTS
    for name in per_image:
        assert {v.flip for p, v in sampler.all_image_variants() if p.name == name} == {False, True}


def test_a_flip_alone_is_two_views_each_used_about_half_the_time():
    sampler = make_sampler(plan(subset(flip_aug=True, num_repeats=100)))
    assert len(list(sampler.all_image_variants())) == 20
    flipped = sum(e.view.flip for e in examples(sampler.epoch(0)))
    assert 400 < flipped < 600


def test_random_crops_stay_inside():
    sampler = make_sampler(plan(subset(random_crop=True)))
    for _, view in sampler.all_image_variants():
        for offset, scaled, size in zip(view.offset, view.scaled, view.size, strict=True):
            assert 0 <= offset <= scaled - size
    assert len({v.offset for p, v in sampler.all_image_variants() if p.name == "000.png"}) > 1


def test_a_third_of_the_views_change_the_colours_and_only_where_that_is_asked_for():
    """sd-scripts changes them in a third of the occurrences."""
    coloured = make_sampler(plan(subset(color_aug=True)), images(200))
    views = [view for variants in coloured.pools() for view in variants.views]
    assert len(views) == 200 * VARIANTS
    assert abs(sum(view.colour is not None for view in views) / len(views) - 1 / 3) < 0.05
    seeds = {view.colour for view in views if view.colour is not None}
    assert len(seeds) > 450 and 2**31 < max(seeds) < 2**32
    cropped = make_sampler(plan(subset(random_crop=True)), images(20))
    assert {view.colour for variants in cropped.pools() for view in variants.views} == {None}


def test_colours_do_not_move_the_crops():
    def offsets(**keys):
        sampler = make_sampler(plan(subset(random_crop=True, **keys)))
        pools = [[view.offset for view in variants.views] for variants in sampler.pools()]
        return [pool for pool in pools if len(set(pool)) > 1]

    assert offsets() == offsets(color_aug=True) == offsets(flip_aug=True) != []


def test_variants_are_those_of_generators_of_the_seed_their_use_and_the_image():
    """By hand: other seeds would move the crops of a run that resumes, and nothing in a cache would be found again."""
    some = images(8)
    varied = subset(random_crop=True, color_aug=True, shuffle_caption=True)
    for variants in make_sampler(plan(varied), some, seed=5).pools():
        key = f"0.0/{variants.image.name}"
        rng, views = random.Random(f"5/view/{key}"), []
        for view in variants.views:
            spare = [scaled - size for scaled, size in zip(view.scaled, view.size, strict=True)]
            offset = (rng.randint(0, spare[0]), rng.randint(0, spare[1]))
            changes, colour = rng.random() < 1 / 3, rng.getrandbits(32)
            views.append((offset, colour if changes else None))
        assert [(view.offset, view.colour) for view in variants.views] == views
        rng = random.Random(f"5/caption/{key}")
        texts = [compose_caption(variants.image.caption, varied, rng) for _ in range(VARIANTS)]
        assert list(variants.captions) == texts and len(set(texts)) > 1


def test_images_of_one_dataset_and_size_follow_each_other_to_be_encoded_together():
    data = DataPlan(tuple(Dataset((subset(),), (512, 512), enable_bucket=True) for _ in range(2)))
    some = [image for pair in zip(images(12), images(12, dataset=1), strict=True) for image in pair]
    order = [(image.dataset, view.size) for image, view in make_sampler(data, some).all_image_variants()]
    changes = sum(one != following for one, following in pairwise(order))
    assert len(order) == 24 and changes == len(set(order)) - 1 > 4


def test_half_of_a_pool_is_flipped():
    sampler = make_sampler(plan(subset(random_crop=True, flip_aug=True)))
    pools = [variants.views for variants in sampler.pools() if len(variants.views) == VARIANTS]
    assert pools and all([view.flip for view in pool] == [False, True] * (VARIANTS // 2) for pool in pools)


def test_captions_are_dropped_as_often_as_asked():
    sampler = make_sampler(plan(subset(num_repeats=300)), caption_dropout_rate=0.25)
    dropped = sum(e.caption == "" for e in examples(sampler.epoch(0)))
    assert abs(dropped / 3000 - 0.25) < 0.03
    assert set(sampler.all_captions()) == {"a, b, c", ""}


def test_every_second_epoch_without_captions():
    sampler = make_sampler(plan(subset(caption_dropout_every_n_epochs=2)))
    assert [{e.caption for e in examples(sampler.epoch(n))} for n in range(3)] == [{"a, b, c"}, {""}, {"a, b, c"}]


def test_the_log_names_the_augmentations():
    text = "\n".join(make_sampler(plan(subset(**VARIED)), caption_dropout_rate=0.1).describe())
    assert f"crop and colours and flip vary: {VARIANTS} views of each image are encoded" in text
    assert f"{VARIANTS} variants of each caption are encoded" in text
    assert "captions are dropped in 0.2 of the occurrences" in text
    assert "vary" not in "\n".join(make_sampler(plan()).describe())


def test_the_log_says_how_large_an_epoch_is_and_names_datasets_where_there_are_several():
    one = plan(subset(num_repeats=2), validation_split=0.1)
    sampler = make_sampler(one)
    shapes = Counter((p.width, p.height) for p in images(10) if p.name != sampler.held_out[0].name)
    batches = sum(math.ceil(2 * count / 3) for count in shapes.values())
    assert sampler.describe()[:2] == [
        f"9 images × repeats = 18 examples an epoch, {batches} batches.",
        "1 images are held out for validation.",
    ]
    assert [line.split(",")[0] for line in make_sampler(plan()).describe()] == ["Shapes: 4"]
    several = DataPlan((Dataset((subset(),), (512, 512)), Dataset((subset(),), (256, 256))))
    lines = make_sampler(several, images(3) + images(2, dataset=1)).describe()
    assert [line.split(",")[0] for line in lines] == ["Dataset 0: Shapes: 1", "Dataset 1: Shapes: 1"]
    assert "512 × 512 (3)" in lines[0] and "256 × 256 (2)" in lines[1]
    unused = make_sampler(plan(subset(), subset(is_reg=True)), images(4) + images(9, subset=1, first=50)).describe()
    assert "5 regularisation images are not used: there are more of them than others." in unused


@pytest.mark.parametrize(
    ("keys", "rate", "lines"),
    [
        ({}, 0.0, []),
        ({"flip_aug": True}, 0.0, ["flip varies: 2 views of each image are encoded"]),
        ({"random_crop": True}, 0.0, ["crop vary: 8 views of each image are encoded"]),
        ({"color_aug": True, "flip_aug": True}, 0.0, ["colours and flip vary: 8 views of each image are encoded"]),
        ({"caption_dropout_rate": 0.1}, 0.25, ["captions are dropped in 0.25 of the occurrences"]),
        ({"caption_dropout_rate": 0.3}, 0.25, ["captions are dropped in 0.3 of the occurrences"]),
        ({"caption_dropout_every_n_epochs": 3}, 0.0, ["captions are dropped in every epoch divisible by 3"]),
    ],
)
def test_the_log_says_what_varies_in_each_subset(keys, rate, lines):
    found = make_sampler(plan(subset(**keys)), caption_dropout_rate=rate).describe()
    assert found[1:] == [f"Subset 0.0: {line}" for line in lines]


# ---- validation


def test_held_out_images_are_never_trained():
    sampler = make_sampler(plan(validation_split=0.3))
    held = {p.name for p in sampler.held_out}
    assert len(held) == 3
    assert not held & {e.image.name for n in range(5) for e in examples(sampler.epoch(n))}
    assert {e.image.name for e in examples(sampler.validation())} == held


@pytest.mark.parametrize(("count", "share", "held"), [(10, 0.01, 1), (10, 0.5, 5), (2, 0.1, 1), (10, 0.0, 0)])
def test_at_least_one_is_held_out(count, share, held):
    assert len(make_sampler(plan(validation_split=share), images(count)).held_out) == held


def test_the_split_follows_its_own_seed():
    def held(seed, own):
        data = plan(validation_split=0.3, validation_seed=own)
        return [p.name for p in split(images(30), data, seed=seed)[1]]

    assert held(1, 7) == held(2, 7) != held(1, 8)
    assert held(1, None) != held(2, None)


def test_copies_and_other_resolutions_of_a_held_out_image_are_not_trained():
    data = DataPlan((Dataset((subset(), subset()), (512, 512), validation_split=0.3), Dataset((subset(),), (256, 256))))
    some = images(10) + images(10, subset=1) + images(10, dataset=1)
    training, held = split(some, data, seed=0)
    assert not {p.sha256 for p in training} & {p.sha256 for p in held}
    assert len({p.sha256 for p in held}) == 3 and len(held) == 6


def test_regularisation_images_are_not_held_out():
    data = plan(subset(), subset(is_reg=True), validation_split=0.5)
    _, held = split(images(4) + images(40, subset=1, first=100), data, seed=0)
    assert [p.subset for p in held] == [0, 0]


def test_validation_is_the_same_whatever_varies_in_training():
    sampler = make_sampler(plan(subset(**VARIED), validation_split=0.3))
    assert sampler.validation() == sampler.validation()
    assert all(not e.view.flip and e.view.colour is None and e.caption for e in examples(sampler.validation()))


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(DataError, match=r"validation_split 0\.5 holds out 1 of 1"):
        make_sampler(plan(validation_split=0.5), images(1))
    with pytest.raises(DataError, match="No image to train on"):
        make_sampler(plan(), [])


# ---- fingerprint


def test_the_fingerprint_names_what_differs_and_no_local_path():
    old = fingerprint(images(5))
    moved = [p.__class__(**{**{k: getattr(p, k) for k in p.__slots__}, "file": Path("/else")}) for p in images(5)]
    assert fingerprint(moved) == old and "somewhere" not in str(old)
    new = fingerprint(images(1, caption="other") + images(2, first=2) + images(1, first=9))
    assert fingerprint_differences(old, old) == []
    assert fingerprint_differences(old, new) == [
        "changed: 0.0/000.png (caption)",
        "removed: 0.0/001.png",
        "removed: 0.0/004.png",
        "added: 0.0/009.png",
    ]
    assert fingerprint_differences(old, {}, limit=2) == ["removed: 0.0/000.png", "removed: 0.0/001.png", "and 3 more"]


def test_changed_bytes_and_lost_captions_are_told_apart():
    first, second = images(1)[0], images(1, caption=None, first=1)[0]
    old, new = fingerprint([first]), {first.key: fingerprint([second])[second.key]}
    assert fingerprint_differences(old, new) == ["changed: 0.0/000.png (image, caption)"]


def test_an_empty_caption_is_not_a_missing_one():
    assert fingerprint(images(1, caption="")) != fingerprint(images(1, caption=None))
