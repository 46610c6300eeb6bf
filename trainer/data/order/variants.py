"""The pool of an image's variants: its views and its captions, drawn from the seed and the image's key."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from trainer.data import captions
from trainer.data.buckets import Fit, Size
from trainer.data.records import ImageRecord, View
from trainer.spec.plan import VARIANTS, Subset

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
class Variants:
    """The pool that an image's occurrences draw from. An entry that is given twice is twice as likely."""

    image: ImageRecord
    views: tuple[View, ...]
    captions: tuple[str, ...]
    repeats: int  # occurrences an epoch
    weight: float


def generator(seed: int, use: str, image: ImageRecord) -> random.Random:
    """Of this image alone: adding an image to the dataset leaves the variants of the others as they are."""
    return random.Random(f"{seed}/{use}/{image.key}")


def draw_captions(image: ImageRecord, subset: Subset, seed: int) -> tuple[str, ...]:
    """The pool of an image's captions, after the caption pipeline."""
    if subset.caption_variants == 1:  # nothing is drawn, and a generator takes longer to seed than a text to make
        return (captions.compose_caption(image.caption, subset, random.Random(0)),)
    rng = generator(seed, "caption", image)
    return tuple(captions.compose_caption(image.caption, subset, rng) for _ in range(subset.caption_variants))


def centre_view(cut: Fit, subset: Subset) -> View:
    """The view without any augmentation."""
    left = (cut.scaled[0] - cut.size[0]) // 2
    top = (cut.scaled[1] - cut.size[1]) // 2
    return View(cut.size, cut.scaled, (left, top), interpolation=subset.resize_interpolation)


def count_views(cut: Fit, subset: Subset) -> int:
    """How many `draw_views` gives, without drawing."""
    if subset.color_aug or (subset.random_crop and cut.scaled != cut.size):
        return VARIANTS
    return 2 if subset.flip_aug else 1


def draw_views(cut: Fit, subset: Subset, image: ImageRecord, seed: int) -> tuple[View, ...]:
    """The pool of an image's views: half of them flipped with flip_aug."""
    centre = centre_view(cut, subset)
    spare = (cut.scaled[0] - cut.size[0], cut.scaled[1] - cut.size[1])  # pixels by which a crop can move
    if count_views(cut, subset) < VARIANTS:
        if subset.flip_aug:
            return centre, replace(centre, flip=True)
        return (centre,)
    rng = generator(seed, "view", image)
    views = []
    for i in range(VARIANTS):
        offset = centre.offset
        if subset.random_crop:
            offset = (rng.randint(0, spare[0]), rng.randint(0, spare[1]))
        # Both are drawn with or without color_aug: the key does not move the crops.
        changes_colour = rng.random() < COLOUR_SHARE
        colour_seed = rng.getrandbits(32)
        colour = colour_seed if subset.color_aug and changes_colour else None
        views.append(replace(centre, offset=offset, flip=subset.flip_aug and i % 2 == 1, colour=colour))
    return tuple(views)
