"""Which pictures are trained on when, how cut, and with which words: a pure function of the seed and the epoch.

A position (epoch, batch) is therefore all the state that a resumed run needs. Random crops, colours and captions come
from a small pool drawn once for each picture, so that the cache can encode all of them before training starts: caching
never switches an augmentation off.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainer.data import captions
from trainer.data.buckets import Fit, Size, fit
from trainer.data.records import ImageRecord, View
from trainer.spec.errors import DataError
from trainer.spec.plan import VARIANTS, DataPlan, Subset

COLOUR_SHARE = 1 / 3  # of the views with color_aug that are changed, as in sd-scripts


@dataclass(frozen=True, slots=True)
class Example:
    """One occurrence of a picture in an epoch."""

    image: ImageRecord
    view: View
    caption: str  # as the text encoders get it
    weight: float = 1.0  # of the loss


Batch = tuple[Example, ...]  # all of one dataset and one size


@dataclass(frozen=True, slots=True)
class _Variants:
    """What a picture may look like and be called; repeated entries are more likely."""

    image: ImageRecord
    views: tuple[View, ...]
    captions: tuple[str, ...]
    repeats: int  # occurrences an epoch
    weight: float


class EpochSampler:
    """The order of training on `pictures`. Raises DataError if a validation split leaves nothing to train on."""

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
        self._dropout = caption_dropout_rate
        training, self.held_out = split(images, data, seed=seed)
        if not training:
            raise DataError("No picture to train on. Add pictures, or lower validation_split.")
        repeats = _repeats(training, data)
        self._pools = [
            self._pool(p, repeats[p.key], weight=prior_loss_weight if self._subset(p).is_reg else 1.0)
            for p in training
            if repeats[p.key] > 0
        ]
        self.unused = tuple(p for p in training if repeats[p.key] == 0)
        self.buckets = Counter[tuple[int, Size]]()
        for pool in self._pools:
            self.buckets[pool.image.dataset, pool.views[0].size] += pool.repeats

    @property
    def batches_per_epoch(self) -> int:
        """The same in every epoch; the last, smaller batch of each bucket counts."""
        return sum(math.ceil(n / self._data.datasets[d].batch_size) for (d, _), n in self.buckets.items())

    @property
    def examples_per_epoch(self) -> int:
        """Occurrences of pictures in every epoch."""
        return sum(self.buckets.values())

    def epoch(self, number: int) -> list[Batch]:
        """The batches of an epoch, counted from 0, in order. The same for the same seed and number."""
        rng = random.Random(f"{self._seed}/epoch/{number}")
        groups: dict[tuple[int, Size], list[Example]] = defaultdict(list)
        for pool in self._pools:
            for _ in range(pool.repeats):
                example = self._example(pool, rng, number)
                groups[example.image.dataset, example.view.size].append(example)
        batches: list[Batch] = []
        for (dataset, _), examples in groups.items():
            rng.shuffle(examples)
            batches += _batches(examples, self._data.datasets[dataset].batch_size)
        rng.shuffle(batches)
        return batches

    def from_position(self, epoch: int, index: int) -> Iterator[tuple[int, int, Batch]]:
        """(epoch, index, batch) without end, beginning with batch `index` of `epoch`."""
        while True:
            for i, batch in enumerate(self.epoch(epoch)[index:], index):
                yield epoch, i, batch
            epoch, index = epoch + 1, 0

    def validation(self) -> list[Batch]:
        """The held-out pictures, uncut by chance, each once, with the first wording of its caption. Never varies."""
        groups: dict[tuple[int, Size], list[Example]] = defaultdict(list)
        for image in self.held_out:
            subset, cut = self._subset(image), self._fit(image)
            view = _view(cut, subset)
            words = captions.compose_caption(image.caption, subset, self._rng("caption", image))
            groups[image.dataset, view.size].append(Example(image, view, words))
        return [b for (d, _), some in groups.items() for b in _batches(some, self._data.datasets[d].batch_size)]

    def all_image_variants(self) -> Iterator[tuple[ImageRecord, View]]:
        """Each picture with each view that `epoch` and `validation` may use, once; those of one size together."""
        for pool in sorted(self._pools, key=lambda pool: (pool.image.dataset, pool.views[0].size)):
            for view in dict.fromkeys(pool.views):
                yield pool.image, view
        for batch in self.validation():
            for example in batch:
                yield example.image, example.view

    def all_captions(self) -> list[str]:
        """Each text that `epoch` and `validation` may use, once."""
        found = dict.fromkeys(text for pool in self._pools for text in pool.captions)
        found |= dict.fromkeys(example.caption for batch in self.validation() for example in batch)
        if any(captions.may_drop(self._subset(p.image), dropout_rate=self._dropout) for p in self._pools):
            found[""] = None
        return list(found)

    def describe(self) -> list[str]:
        """For the log: the size of an epoch, its buckets, and what varies in how many variants."""
        lines = [
            f"{len(self._pools)} pictures × repeats = {self.examples_per_epoch} examples an epoch, "
            f"{self.batches_per_epoch} batches; {len(self.held_out)} pictures held out for validation."
        ]
        for (d, size), count in sorted(self.buckets.items()):
            lines.append(f"Dataset {d}: bucket {size[0]}×{size[1]}, {count} examples.")
        if self.unused:
            lines.append(
                f"{len(self.unused)} regularisation pictures are not used: there are more of them than others."
            )
        for d, dataset in enumerate(self._data.datasets):
            for s, subset in enumerate(dataset.subsets):
                lines += [f"Subset {d}.{s}: {text}" for text in _variation(subset, self._dropout)]
        return lines

    def _subset(self, image: ImageRecord) -> Subset:
        return self._data.datasets[image.dataset].subsets[image.subset]

    def _fit(self, image: ImageRecord) -> Fit:
        cut = fit((image.width, image.height), self._data.datasets[image.dataset])
        assert cut is not None  # a scan has skipped those that do not fit
        return cut

    def _rng(self, use: str, image: ImageRecord) -> random.Random:
        return random.Random(f"{self._seed}/{use}/{image.key}")

    def _pool(self, image: ImageRecord, repeats: int, *, weight: float) -> _Variants:
        subset = self._subset(image)
        views = _views(self._fit(image), subset, self._rng("view", image))
        rng = self._rng("caption", image)
        texts = tuple(captions.compose_caption(image.caption, subset, rng) for _ in range(subset.caption_variants))
        return _Variants(image, views, texts, repeats, weight)

    def _example(self, pool: _Variants, rng: random.Random, epoch: int) -> Example:
        view, text = rng.choice(pool.views), rng.choice(pool.captions)
        if captions.dropped(self._subset(pool.image), rng=rng, epoch=epoch, dropout_rate=self._dropout):
            text = ""
        return Example(pool.image, view, text, pool.weight)


def split(images: Sequence[ImageRecord], data: DataPlan, *, seed: int) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Pictures to train on, and those held out: `validation_split` of each dataset, at least one where it is above 0.

    Chosen by content and seed, so that copies of a picture and the same picture at another resolution stay together;
    what is held out anywhere is trained nowhere. Regularisation pictures are never held out.
    """
    held: set[tuple[int, str]] = set()
    for d, dataset in enumerate(data.datasets):
        if dataset.validation_split <= 0:
            continue
        own = [p for p in images if p.dataset == d and not dataset.subsets[p.subset].is_reg]
        salt = seed if dataset.validation_seed is None else dataset.validation_seed
        ranked = sorted({p.sha256 for p in own}, key=lambda sha: hashlib.sha256(f"{salt}/{sha}".encode()).digest())
        count = max(1, round(dataset.validation_split * len(ranked)))
        if count >= len(ranked):
            raise DataError(
                f"validation_split {dataset.validation_split} holds out {count} of {len(ranked)} different pictures of "
                f"dataset {d}: none is left to train on. Lower it, or add pictures."
            )
        held |= {(d, sha) for sha in ranked[:count]}
    anywhere = {sha for _, sha in held}
    return [p for p in images if p.sha256 not in anywhere], [p for p in images if (p.dataset, p.sha256) in held]


def _batches(examples: Sequence[Example], size: int) -> list[Batch]:
    return [tuple(examples[i : i + size]) for i in range(0, len(examples), size)]


def _repeats(images: Sequence[ImageRecord], data: DataPlan) -> dict[str, int]:
    """How often each picture (by key) occurs in an epoch.

    In each dataset the regularisation pictures take turns until they are as many as the others.
    """
    counts = {p.key: data.datasets[p.dataset].subsets[p.subset].num_repeats for p in images}
    for d, dataset in enumerate(data.datasets):
        own = [p for p in images if p.dataset == d]
        regular = [p for p in own if dataset.subsets[p.subset].is_reg]
        wanted = sum(counts[p.key] for p in own) - sum(counts[p.key] for p in regular)
        if not regular or wanted == 0:
            continue
        most = max(counts[p.key] for p in regular)
        transposes = [p.key for turn in range(most) for p in regular if counts[p.key] > turn]
        counts.update(dict.fromkeys((p.key for p in regular), 0))
        for i in range(wanted):
            counts[transposes[i % len(transposes)]] += 1
    return counts


def _view(cut: Fit, subset: Subset) -> View:
    """The view that nothing random touches: the middle."""
    offset = ((cut.scaled[0] - cut.size[0]) // 2, (cut.scaled[1] - cut.size[1]) // 2)
    return View(cut.size, cut.scaled, offset, interpolation=subset.resize_interpolation)


def _views(cut: Fit, subset: Subset, rng: random.Random) -> tuple[View, ...]:
    """The pool of views: half of them flipped with flip_aug."""
    middle = _view(cut, subset)
    free = (cut.scaled[0] - cut.size[0], cut.scaled[1] - cut.size[1])
    if not (subset.color_aug or (subset.random_crop and any(free))):
        return _flipped(middle, False), *([_flipped(middle, True)] if subset.flip_aug else [])
    views = []
    for i in range(VARIANTS):
        offset = (rng.randint(0, free[0]), rng.randint(0, free[1])) if subset.random_crop else middle.offset
        changed = rng.random() < COLOUR_SHARE
        seed = rng.getrandbits(32)
        views.append(
            View(
                cut.size,
                cut.scaled,
                offset,
                flip=subset.flip_aug and i % 2 == 1,
                colour=seed if subset.color_aug and changed else None,
                interpolation=subset.resize_interpolation,
            )
        )
    return tuple(views)


def _flipped(view: View, flip: bool) -> View:
    return View(view.size, view.scaled, view.offset, flip=flip, interpolation=view.interpolation)


def _variation(subset: Subset, dropout: float) -> list[str]:
    """What varies in a subset, and how it goes together with the cache."""
    pixels = [n for n, on in {"crop": subset.random_crop, "colours": subset.color_aug}.items() if on]
    flip = " and flip" if subset.flip_aug else ""
    lines = [f"{' and '.join(pixels)}{flip} vary: {VARIANTS} views of each picture are encoded"] if pixels else []
    lines += ["flip varies: 2 views of each picture are encoded"] if subset.flip_aug and not pixels else []
    words = captions.varying(subset)
    lines += [f"{', '.join(words)} vary: {VARIANTS} wordings of each caption are encoded"] if words else []
    rate, every = max(subset.caption_dropout_rate, dropout), subset.caption_dropout_every_n_epochs
    lines += [f"captions are dropped in {rate:.3g} of the occurrences"] if rate else []
    lines += [f"captions are dropped in every epoch divisible by {every}"] if every else []
    return lines
