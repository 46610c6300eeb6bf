"""The order of training: which images, cropped how and with which captions, as a function of seed and epoch.

`epoch(n)` is pure, so a position (epoch, batch) is all of the data that a saved state holds. Random crops, colours and
captions come from a small pool of variants that is drawn once for each image, so that the cache can encode all of them
before training (see the package's page).

Each image draws its variants from a generator of its own, seeded with its key: adding an image to the dataset leaves
the variants, and the cached latents, of the others as they are. The generators are seeded with strings, which Python
hashes with SHA-512 and so the same way on every machine.
"""

from __future__ import annotations

import hashlib
import math
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.data import captions
from trainer.data.buckets import Fit, fit
from trainer.data.compact.columns import FewValues
from trainer.data.compact.image_table import Chosen
from trainer.data.order.epoch import DROPPED, Drawn, Epoch
from trainer.data.order.variants import (
    Batch,
    Bucket,
    Example,
    Variants,
    centre_view,
    count_views,
    draw_captions,
    draw_views,
    generator,
)
from trainer.data.records import ImageRecord, View
from trainer.spec.errors import DataError
from trainer.spec.plan import VARIANTS, DataPlan, Subset
from trainer.spec.rules import outlook


class _Kind(NamedTuple):
    """All that images have alike which take the same steps."""

    bucket: Bucket
    subset: int  # in its dataset
    views: int  # in the pool of each
    has_mask: bool


class EpochSampler:
    """The order of training on `images`.

    `caption_dropout_rate` is the run's; the higher of it and a subset's counts. `prior_loss_weight` is the weight of
    regularisation images. `windows`: gives the window of each image that is trained on; None: there is one. Raises
    DataError if a validation split leaves nothing to train on.
    """

    held_out: Sequence[ImageRecord]  # never trained on; the validation loss is measured on them
    unused: int  # how many regularisation images in excess of the other images
    buckets: Counter[Bucket]  # examples an epoch in each bucket

    def __init__(
        self,
        images: Sequence[ImageRecord],
        data: DataPlan,
        *,
        seed: int,
        caption_dropout_rate: float = 0.0,
        prior_loss_weight: float = 1.0,
        windows: Callable[[Sequence[ImageRecord]], Sequence[int]] | None = None,
    ) -> None:
        self._data = data
        self._seed = seed
        self._caption_dropout_rate = caption_dropout_rate
        self._prior_loss_weight = prior_loss_weight
        training, self.held_out = split(images, data, seed=seed)
        if not training:
            raise DataError("No image to train on. Add images, or lower validation_split.")
        repeats = _repeats(training, data)
        self.unused = sum(count == 0 for count in repeats)
        self._training = training
        self._places = array("I")  # of the images that are used, in `training`
        self._counts = array("I")  # how often each occurs in an epoch
        self._kinds: FewValues[_Kind] = FewValues()
        self.buckets = Counter()
        self._windows = array("I")  # of each image that is used
        self._in_window: dict[int, Counter[Bucket]] = {}  # examples an epoch in each window
        window_of = windows(training) if windows else None
        for place, image in enumerate(training):
            if repeats[place] > 0:
                kind = self._kind(image)
                self._places.append(place)
                self._counts.append(repeats[place])
                self._kinds.append(kind)
                self.buckets[kind.bucket] += repeats[place]
                window = window_of[place] if window_of else 0
                self._windows.append(window)
                self._in_window.setdefault(window, Counter())[kind.bucket] += repeats[place]

    @property
    def windows(self) -> list[int]:
        """Their numbers."""
        return sorted(self._in_window)

    @property
    def batches_per_epoch(self) -> int:
        """The same in every epoch; the last, smaller batch of each bucket counts, in each window."""
        return sum(map(self._batches_of, self._in_window))

    def steps_per_epoch(self, batches_per_step: int) -> int:
        """The last step of each window may have fewer batches."""
        return sum(math.ceil(self._batches_of(window) / batches_per_step) for window in self._in_window)

    def _batches_of(self, window: int) -> int:
        total = 0
        for (dataset, _), examples in self._in_window[window].items():
            total += math.ceil(examples / self._data.datasets[dataset].batch_size)
        return total

    @property
    def examples_per_epoch(self) -> int:
        """Occurrences of images in every epoch."""
        return sum(self.buckets.values())

    @property
    def subject_examples_per_epoch(self) -> int:
        """The same without those of regularisation images."""
        total = 0
        for place, count in enumerate(self._counts):
            if not self._subset_of(self._kinds[place]).is_reg:
                total += count
        return total

    def epoch(self, number: int) -> Epoch:
        """The batches of an epoch, counted from 0, in order. The same for the same seed and number.

        Images are shuffled within their bucket, then cut into batches, then the batches of all buckets are shuffled;
        so window by window, whose order is drawn as well.
        """
        rng = random.Random(f"{self._seed}/epoch/{number}")
        drawn = Drawn()
        windows = self.windows
        groups: dict[int, dict[Bucket, array[int]]] = {window: {} for window in windows}
        for place, count in enumerate(self._counts):
            own = groups[self._windows[place]]
            kind = self._kinds[place]
            subset = self._subset_of(kind)
            for _ in range(count):
                view = rng.choice(range(kind.views))
                caption = rng.choice(range(subset.caption_variants))
                if captions.dropped(subset, rng=rng, epoch=number, dropout_rate=self._caption_dropout_rate):
                    caption = DROPPED
                own.setdefault(kind.bucket, array("I")).append(drawn.append(place, view, caption))
        epoch = Epoch(drawn, self._pool, self._kinds.__getitem__)
        rng.shuffle(windows)
        for window in windows:
            for (dataset, _), occurrences in groups[window].items():
                rng.shuffle(occurrences)
                epoch.add_bucket(occurrences, self._data.datasets[dataset].batch_size)
            epoch.end_window(window, rng)
        return epoch

    def _used(self, window: int | None) -> Sequence[int]:
        """The places of the images of a window, or of all."""
        everywhere = range(len(self._places))
        if window is None:
            return everywhere
        return array("I", (place for place in everywhere if self._windows[place] == window))

    def pools(self, window: int | None = None) -> Iterator[Variants]:
        """What each image that is trained on (in this window) may look like."""
        return map(self._pool, self._used(window))

    def validation(self) -> list[Batch]:
        """The held-out images, each once, cropped at the centre, with one variant of the caption. Never varies."""
        groups: dict[Bucket, list[Example]] = defaultdict(list)
        for image in self.held_out:
            subset = self._subset(image)
            view = centre_view(self._fit(image), subset)
            caption = captions.compose_caption(image.caption, subset, generator(self._seed, "caption", image))
            groups[image.dataset, view.size].append(Example(image, view, caption))
        batches: list[Batch] = []
        for (dataset, _), examples in groups.items():
            batches += _batches(examples, self._data.datasets[dataset].batch_size)
        return batches

    def all_image_variants(self, window: int | None = None) -> Iterator[tuple[ImageRecord, View]]:
        """Each image (of this window) with each view that `epoch` and `validation` may use, once.

        Those of one size together, so that the VAE can encode several at once.
        """
        for place in sorted(self._used(window), key=lambda place: self._kinds[place].bucket):
            variants = self._pool(place)
            for view in dict.fromkeys(variants.views):
                yield variants.image, view
        for batch in self.validation():
            for example in batch:
                yield example.image, example.view

    def files(self, window: int) -> list[Path]:
        """The files of the images of a window, each once: shards among them."""
        return list(dict.fromkeys(self._training[self._places[place]].file for place in self._used(window)))

    def count_views(self, window: int | None = None) -> int:
        """How many `all_image_variants` gives, at most."""
        return sum(self._kinds[place].views for place in self._used(window)) + len(self.held_out)

    def all_captions(self, window: int | None = None) -> Iterator[str]:
        """The texts that `epoch` (in this window) and `validation` may use; "" among them where captions may be
        dropped.

        One by one, and a text as often as it is a caption: all together may be gigabytes.
        """
        for variants in self.pools(window):
            yield from dict.fromkeys(variants.captions)
        for batch in self.validation():
            for example in batch:
                yield example.caption
        for kind in self._kinds.values():
            if captions.may_drop(self._subset_of(kind), dropout_rate=self._caption_dropout_rate):
                yield ""
                return

    def captions_by_image(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The key of each image that is used, with the texts that it may be shown with, without the empty one."""
        for variants in self.pools():
            yield variants.image.key, tuple(text for text in dict.fromkeys(variants.captions) if text)
        for batch in self.validation():
            for example in batch:
                yield example.image.key, (example.caption,) if example.caption else ()

    def shown(self, images: Sequence[ImageRecord]) -> dict[str, tuple[tuple[View, ...], tuple[str, ...]]]:
        """The keys of those of `images` that are used → their views and captions, each once, without the empty one."""
        keys = {image.key for image in images}
        found = {}
        for place in range(len(self._places)):
            if self._training[self._places[place]].key in keys:
                pool = self._pool(place)
                texts = tuple(text for text in dict.fromkeys(pool.captions) if text)
                found[pool.image.key] = (tuple(dict.fromkeys(pool.views)), texts)
        for batch in self.validation():
            for example in batch:
                if example.image.key in keys:
                    found[example.image.key] = ((example.view,), (example.caption,) if example.caption else ())
        return found

    def describe(self) -> list[str]:
        """For the log: the size of an epoch, its shapes, and which subsets vary in how many variants."""
        lines = []
        if self.examples_per_epoch != len(self._places):
            lines.append(
                f"{len(self._places)} images × repeats = {self.examples_per_epoch} examples an epoch, "
                f"{self.batches_per_epoch} batches."
            )
        if len(self._in_window) > 1:
            lines.append(
                f"The cache holds a part of the images at a time: an epoch goes through {len(self._in_window)} windows "
                f"of about {len(self._places) // len(self._in_window)} images."
            )
        if self.held_out:
            lines.append(f"{len(self.held_out)} images are held out for validation.")
        for d in range(len(self._data.datasets)):
            shapes = {size: count for (dataset, size), count in self.buckets.items() if dataset == d}
            which = f"Dataset {d}: " if len(self._data.datasets) > 1 else ""
            lines.append(f"{which}{outlook.describe_shapes(shapes)}")
        if self.unused:
            lines.append(f"{self.unused} regularisation images are not used: there are more of them than others.")
        for d, dataset in enumerate(self._data.datasets):
            for s, subset in enumerate(dataset.subsets):
                lines += [f"Subset {d}.{s}: {text}" for text in _describe_variants(subset, self._caption_dropout_rate)]
        return lines

    def _subset(self, image: ImageRecord) -> Subset:
        return self._data.datasets[image.dataset].subsets[image.subset]

    def _subset_of(self, kind: _Kind) -> Subset:
        return self._data.datasets[kind.bucket[0]].subsets[kind.subset]

    def _fit(self, image: ImageRecord) -> Fit:
        result = fit((image.width, image.height), self._data.datasets[image.dataset])
        assert result is not None  # the scan has skipped images that do not fit
        return result

    def _kind(self, image: ImageRecord) -> _Kind:
        cut = self._fit(image)
        views = count_views(cut, self._subset(image))
        return _Kind((image.dataset, cut.size), image.subset, views, image.mask_sha256 is not None)

    def _pool(self, place: int) -> Variants:
        image = self._training[self._places[place]]
        subset = self._subset(image)
        weight = self._prior_loss_weight if subset.is_reg else 1.0
        views = draw_views(self._fit(image), subset, image, self._seed)
        return Variants(image, views, draw_captions(image, subset, self._seed), self._counts[place], weight)


def split(
    images: Sequence[ImageRecord], data: DataPlan, *, seed: int
) -> tuple[Sequence[ImageRecord], Sequence[ImageRecord]]:
    """Images to train on, and those held out: `validation_split` of each dataset, at least one where it is above 0.

    Chosen by content and seed, so that copies of an image and the same image at another resolution stay together;
    an image that one dataset holds out is trained on in none. Regularisation images are never held out.
    Raises DataError if a dataset would have nothing left to train on.
    """
    held_out: set[tuple[int, str]] = set()  # dataset, SHA-256 of the image
    for d, dataset in enumerate(data.datasets):
        if dataset.validation_split <= 0:
            continue
        contents = {p.sha256 for p in images if p.dataset == d and not dataset.subsets[p.subset].is_reg}
        salt = seed if dataset.validation_seed is None else dataset.validation_seed
        ranked = sorted(contents, key=lambda sha256: _salted(sha256, salt))
        count = max(1, round(dataset.validation_split * len(ranked)))
        if count >= len(ranked):
            raise DataError(
                f"validation_split {dataset.validation_split} holds out {count} of {len(ranked)} different images of "
                f"dataset {d}: none is left to train on. Lower it, or add images."
            )
        held_out |= {(d, sha256) for sha256 in ranked[:count]}
    held_out_anywhere = {sha256 for _, sha256 in held_out}
    training = array("I")
    validation = array("I")
    for place, image in enumerate(images):
        if image.sha256 not in held_out_anywhere:
            training.append(place)
        if (image.dataset, image.sha256) in held_out:
            validation.append(place)
    return Chosen(images, training), Chosen(images, validation)


def _salted(sha256: str, salt: int) -> bytes:
    return hashlib.sha256(f"{salt}/{sha256}".encode()).digest()


def _batches(examples: Sequence[Example], size: int) -> list[Batch]:
    return [tuple(examples[i : i + size]) for i in range(0, len(examples), size)]


def _repeats(images: Sequence[ImageRecord], data: DataPlan) -> array[int]:
    """How often each image occurs in an epoch, by its place.

    In each dataset the regularisation images take turns until they are as many as the others (DreamBooth).
    """
    repeats = array("Q")
    regular: dict[int, array[int]] = {}  # dataset → places of its regularisation images
    wanted: Counter[int] = Counter()  # dataset → occurrences of the others
    for place, image in enumerate(images):
        subset = data.datasets[image.dataset].subsets[image.subset]
        repeats.append(subset.num_repeats)
        if subset.is_reg:
            regular.setdefault(image.dataset, array("Q")).append(place)
        else:
            wanted[image.dataset] += subset.num_repeats
    for dataset, places in regular.items():
        if not wanted[dataset]:
            continue
        turns = array("Q")  # the first occurrence of each, then the second ones, …
        for turn in range(max(repeats[place] for place in places)):
            turns.extend(place for place in places if repeats[place] > turn)
        for place in places:
            repeats[place] = 0
        for i in range(wanted[dataset]):
            repeats[turns[i % len(turns)]] += 1
    return repeats


def _describe_variants(subset: Subset, dropout_rate: float) -> list[str]:
    """The augmentations of a subset, and how many variants of each image and caption the cache holds for them."""
    lines = []
    augmentations = []
    if subset.random_crop:
        augmentations.append("crop")
    if subset.color_aug:
        augmentations.append("colours")
    if augmentations:
        flip = " and flip" if subset.flip_aug else ""
        lines.append(f"{' and '.join(augmentations)}{flip} vary: {VARIANTS} views of each image are encoded")
    elif subset.flip_aug:
        lines.append("flip varies: 2 views of each image are encoded")
    random_parts = captions.random_parts(subset)
    if random_parts:
        lines.append(f"{', '.join(random_parts)} vary: {VARIANTS} variants of each caption are encoded")
    rate = max(subset.caption_dropout_rate, dropout_rate)
    if rate:
        lines.append(f"captions are dropped in {rate:.3g} of the occurrences")
    every = subset.caption_dropout_every_n_epochs
    if every:
        lines.append(f"captions are dropped in every epoch divisible by {every}")
    return lines
