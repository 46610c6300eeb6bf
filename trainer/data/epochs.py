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
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from trainer.data import captions
from trainer.data.buckets import Fit, Size, fit
from trainer.data.records import ImageRecord, View
from trainer.spec.errors import DataError
from trainer.spec.plan import VARIANTS, DataPlan, Subset
from trainer.spec.rules import outlook

COLOUR_SHARE = 1 / 3  # of the views with color_aug, how many change the colours; as in sd-scripts


@dataclass(frozen=True, slots=True)
class Example:
    """One occurrence of an image in an epoch."""

    image: ImageRecord
    view: View
    caption: str  # after the caption pipeline
    weight: float = 1.0  # of the loss


Batch = tuple[Example, ...]  # all of one dataset and one size
Bucket = tuple[int, Size]  # index of the dataset, size in pixels


@dataclass(frozen=True, slots=True)
class _Variants:
    """The pool that an image's occurrences draw from. An entry that is given twice is twice as likely."""

    image: ImageRecord
    views: tuple[View, ...]
    captions: tuple[str, ...]
    repeats: int  # occurrences an epoch
    weight: float


class EpochSampler:
    """The order of training on `images`.

    `caption_dropout_rate` is the run's; the higher of it and a subset's counts. `prior_loss_weight` is the weight of
    regularisation images. Raises DataError if a validation split leaves nothing to train on.
    """

    held_out: list[ImageRecord]  # never trained on; the validation loss is measured on them
    unused: tuple[ImageRecord, ...]  # regularisation images in excess of the other images
    buckets: Counter[Bucket]  # examples an epoch in each bucket

    def __init__(
        self,
        images: Sequence[ImageRecord],
        data: DataPlan,
        *,
        seed: int,
        caption_dropout_rate: float = 0.0,
        prior_loss_weight: float = 1.0,
    ) -> None:
        self._data = data
        self._seed = seed
        self._caption_dropout_rate = caption_dropout_rate
        training, self.held_out = split(images, data, seed=seed)
        if not training:
            raise DataError("No image to train on. Add images, or lower validation_split.")
        repeats = _repeats(training, data)
        self.unused = tuple(image for image in training if repeats[image.key] == 0)
        self._variants: list[_Variants] = []
        for image in training:
            if repeats[image.key] > 0:
                weight = prior_loss_weight if self._subset(image).is_reg else 1.0
                self._variants.append(self._draw_variants(image, repeats[image.key], weight=weight))
        self.buckets = Counter()
        for variants in self._variants:
            self.buckets[variants.image.dataset, variants.views[0].size] += variants.repeats

    @property
    def batches_per_epoch(self) -> int:
        """The same in every epoch; the last, smaller batch of each bucket counts."""
        total = 0
        for (dataset, _), examples in self.buckets.items():
            total += math.ceil(examples / self._data.datasets[dataset].batch_size)
        return total

    @property
    def examples_per_epoch(self) -> int:
        """Occurrences of images in every epoch."""
        return sum(self.buckets.values())

    @property
    def subject_examples_per_epoch(self) -> int:
        """The same without those of regularisation images."""
        return sum(v.repeats for v in self._variants if not self._subset(v.image).is_reg)

    def epoch(self, number: int) -> list[Batch]:
        """The batches of an epoch, counted from 0, in order. The same for the same seed and number.

        Images are shuffled within their bucket, then cut into batches, then the batches of all buckets are shuffled.
        """
        rng = random.Random(f"{self._seed}/epoch/{number}")
        groups: dict[Bucket, list[Example]] = defaultdict(list)
        for variants in self._variants:
            for _ in range(variants.repeats):
                example = self._draw_example(variants, rng, number)
                groups[example.image.dataset, example.view.size].append(example)
        batches: list[Batch] = []
        for (dataset, _), examples in groups.items():
            rng.shuffle(examples)
            batches += _batches(examples, self._data.datasets[dataset].batch_size)
        rng.shuffle(batches)
        return batches

    def validation(self) -> list[Batch]:
        """The held-out images, each once, cropped at the centre, with one variant of the caption. Never varies."""
        groups: dict[Bucket, list[Example]] = defaultdict(list)
        for image in self.held_out:
            subset = self._subset(image)
            view = _centre_view(self._fit(image), subset)
            caption = captions.compose_caption(image.caption, subset, self._rng("caption", image))
            groups[image.dataset, view.size].append(Example(image, view, caption))
        batches: list[Batch] = []
        for (dataset, _), examples in groups.items():
            batches += _batches(examples, self._data.datasets[dataset].batch_size)
        return batches

    def all_image_variants(self) -> Iterator[tuple[ImageRecord, View]]:
        """Each image with each view that `epoch` and `validation` may use, once.

        Those of one size together, so that the VAE can encode several at once.
        """
        for variants in sorted(self._variants, key=lambda v: (v.image.dataset, v.views[0].size)):
            for view in dict.fromkeys(variants.views):
                yield variants.image, view
        for batch in self.validation():
            for example in batch:
                yield example.image, example.view

    def all_captions(self) -> list[str]:
        """Each text that `epoch` and `validation` may use, once; "" among them where captions may be dropped."""
        texts: dict[str, None] = {}
        for variants in self._variants:
            texts.update(dict.fromkeys(variants.captions))
        for batch in self.validation():
            texts.update(dict.fromkeys(example.caption for example in batch))
        for variants in self._variants:
            if captions.may_drop(self._subset(variants.image), dropout_rate=self._caption_dropout_rate):
                texts[""] = None
        return list(texts)

    def captions_by_image(self) -> dict[str, tuple[str, ...]]:
        """The key of each image that is used → the texts that it may be shown with, without the empty one."""
        texts: dict[str, dict[str, None]] = {}
        for variants in self._variants:
            texts.setdefault(variants.image.key, {}).update(dict.fromkeys(variants.captions))
        for batch in self.validation():
            for example in batch:
                texts.setdefault(example.image.key, {})[example.caption] = None
        return {key: tuple(text for text in own if text) for key, own in texts.items()}

    def describe(self) -> list[str]:
        """For the log: the size of an epoch, its shapes, and which subsets vary in how many variants."""
        lines = []
        if self.examples_per_epoch != len(self._variants):
            lines.append(
                f"{len(self._variants)} images × repeats = {self.examples_per_epoch} examples an epoch, "
                f"{self.batches_per_epoch} batches."
            )
        if self.held_out:
            lines.append(f"{len(self.held_out)} images are held out for validation.")
        for d in range(len(self._data.datasets)):
            shapes = {size: count for (dataset, size), count in self.buckets.items() if dataset == d}
            which = f"Dataset {d}: " if len(self._data.datasets) > 1 else ""
            lines.append(f"{which}{outlook.describe_shapes(shapes)}")
        if self.unused:
            lines.append(f"{len(self.unused)} regularisation images are not used: there are more of them than others.")
        for d, dataset in enumerate(self._data.datasets):
            for s, subset in enumerate(dataset.subsets):
                lines += [f"Subset {d}.{s}: {text}" for text in _describe_variants(subset, self._caption_dropout_rate)]
        return lines

    def _subset(self, image: ImageRecord) -> Subset:
        return self._data.datasets[image.dataset].subsets[image.subset]

    def _fit(self, image: ImageRecord) -> Fit:
        result = fit((image.width, image.height), self._data.datasets[image.dataset])
        assert result is not None  # the scan has skipped images that do not fit
        return result

    def _rng(self, use: str, image: ImageRecord) -> random.Random:
        return random.Random(f"{self._seed}/{use}/{image.key}")

    def _draw_variants(self, image: ImageRecord, repeats: int, *, weight: float) -> _Variants:
        subset = self._subset(image)
        views = _draw_views(self._fit(image), subset, self._rng("view", image))
        rng = self._rng("caption", image)
        texts = [captions.compose_caption(image.caption, subset, rng) for _ in range(subset.caption_variants)]
        return _Variants(image, views, tuple(texts), repeats, weight)

    def _draw_example(self, variants: _Variants, rng: random.Random, epoch: int) -> Example:
        view = rng.choice(variants.views)
        caption = rng.choice(variants.captions)
        subset = self._subset(variants.image)
        if captions.dropped(subset, rng=rng, epoch=epoch, dropout_rate=self._caption_dropout_rate):
            caption = ""
        return Example(variants.image, view, caption, variants.weight)


def split(images: Sequence[ImageRecord], data: DataPlan, *, seed: int) -> tuple[list[ImageRecord], list[ImageRecord]]:
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
    training = [image for image in images if image.sha256 not in held_out_anywhere]
    validation = [image for image in images if (image.dataset, image.sha256) in held_out]
    return training, validation


def _salted(sha256: str, salt: int) -> bytes:
    return hashlib.sha256(f"{salt}/{sha256}".encode()).digest()


def _batches(examples: Sequence[Example], size: int) -> list[Batch]:
    return [tuple(examples[i : i + size]) for i in range(0, len(examples), size)]


def _repeats(images: Sequence[ImageRecord], data: DataPlan) -> dict[str, int]:
    """How often each image (by key) occurs in an epoch.

    In each dataset the regularisation images take turns until they are as many as the others (DreamBooth).
    """
    repeats = {image.key: data.datasets[image.dataset].subsets[image.subset].num_repeats for image in images}
    for d, dataset in enumerate(data.datasets):
        regular: list[str] = []  # keys of the regularisation images
        wanted = 0  # occurrences of the others
        for image in images:
            if image.dataset != d:
                continue
            if dataset.subsets[image.subset].is_reg:
                regular.append(image.key)
            else:
                wanted += repeats[image.key]
        if not regular or wanted == 0:
            continue
        turns: list[str] = []  # the first occurrence of each, then the second ones, …
        for turn in range(max(repeats[key] for key in regular)):
            turns += [key for key in regular if repeats[key] > turn]
        repeats.update(dict.fromkeys(regular, 0))
        for i in range(wanted):
            repeats[turns[i % len(turns)]] += 1
    return repeats


def _centre_view(cut: Fit, subset: Subset) -> View:
    """The view without any augmentation."""
    left = (cut.scaled[0] - cut.size[0]) // 2
    top = (cut.scaled[1] - cut.size[1]) // 2
    return View(cut.size, cut.scaled, (left, top), interpolation=subset.resize_interpolation)


def _draw_views(cut: Fit, subset: Subset, rng: random.Random) -> tuple[View, ...]:
    """The pool of an image's views: half of them flipped with flip_aug."""
    centre = _centre_view(cut, subset)
    spare = (cut.scaled[0] - cut.size[0], cut.scaled[1] - cut.size[1])  # pixels by which a crop can move
    if not subset.color_aug and not (subset.random_crop and any(spare)):
        if subset.flip_aug:
            return centre, replace(centre, flip=True)
        return (centre,)
    views = []
    for i in range(VARIANTS):
        offset = centre.offset
        if subset.random_crop:
            offset = (rng.randint(0, spare[0]), rng.randint(0, spare[1]))
        # Both are drawn with or without color_aug: the key does not move the crops.
        changes_colour = rng.random() < COLOUR_SHARE
        seed = rng.getrandbits(32)
        colour = seed if subset.color_aug and changes_colour else None
        views.append(replace(centre, offset=offset, flip=subset.flip_aug and i % 2 == 1, colour=colour))
    return tuple(views)


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
