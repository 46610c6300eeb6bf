"""The size that an image is trained at. Pure functions of sizes; all sizes are (width, height) in pixels.

Aspect ratio bucketing (NovelAI, 2022): a batch needs images of one size, and cropping all of them to a square would
cut heads and feet off. So there is a list of sizes of about the same area, and each image is trained at the size
whose aspect ratio is nearest to its own. The keys and the rounding are those of sd-scripts, whose dataset files users
bring.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from trainer.spec.errors import SettingsError
from trainer.spec.plan import Dataset

Size = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """Scale the image to `scaled`, which covers `size`, and crop it to `size`."""

    scaled: Size
    size: Size


def fit(image: Size, dataset: Dataset) -> Fit | None:
    """How an image of this size is scaled and cropped in `dataset`.

    None if it is smaller than one step of `bucket_reso_steps` and `bucket_no_upscale` forbids enlarging it.
    """
    if not dataset.enable_bucket:
        return _cover(image, dataset.resolution)
    if dataset.bucket_no_upscale:
        return _without_enlarging(image, dataset.resolution, dataset.bucket_reso_steps)
    size = _nearest_bucket(
        image, dataset.resolution, dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps
    )
    return _cover(image, size)


@functools.lru_cache(1 << 14)  # a million images have some thousand sizes
def _nearest_bucket(image: Size, resolution: Size, smallest: int, largest: int, step: int) -> Size:
    return nearest(image, bucket_sizes(resolution, smallest=smallest, largest=largest, step=step))


def bucket_sizes(resolution: Size, *, smallest: int, largest: int, step: int) -> tuple[Size, ...]:
    """Sizes whose sides are multiples of `step` and whose area is at most that of `resolution`, sorted.

    The largest square, and for each side from `smallest` to `largest` the longest other side. As in sd-scripts, the
    limits are moved outwards to multiples of `step`; they never exclude the resolution itself.
    Raises SettingsError if `step` is larger than the resolution.
    """
    area = resolution[0] * resolution[1]
    square = math.isqrt(area) // step * step
    if square == 0:
        raise SettingsError(f"bucket_reso_steps {step} is larger than the resolution {resolution}: make it smaller.")
    smallest = max(step, min(smallest, *resolution) // step * step)
    largest = -(-max(largest, *resolution) // step) * step  # rounded up
    sizes = {(square, square)}
    for side in range(smallest, largest + 1, step):
        other = min(largest, area // side // step * step)
        if other >= smallest:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))


def nearest(image: Size, sizes: tuple[Size, ...]) -> Size:
    """The size whose width / height is nearest to the image's; the image's own size if it is among them."""
    if image in sizes:
        return image
    aspect = image[0] / image[1]
    return min(sizes, key=lambda size: abs(size[0] / size[1] - aspect))


def _cover(image: Size, size: Size) -> Fit:
    """Scale until both sides reach `size`."""
    width, height = image
    if width * size[1] > height * size[0]:  # wider than `size`: the heights meet
        return Fit((_round_divide(width * size[1], height), size[1]), size)
    return Fit((size[0], _round_divide(height * size[0], width)), size)


# Integers throughout: a float would round differently for large sizes, and an image would change its bucket.


def _round_divide(dividend: int, divisor: int) -> int:
    """Rounded to the nearest, halves up; exact for any size."""
    return (2 * dividend + divisor) // (2 * divisor)


def _round_root(number: int) -> int:
    return (math.isqrt(4 * number) + 1) // 2


def _floor_divide(dividend: int, divisor: int) -> int:
    return dividend // divisor


def _without_enlarging(image: Size, resolution: Size, step: int) -> Fit | None:
    """Shrink an image whose area is above the resolution's, so that one side is a multiple of `step`; then crop.

    Rounds as sd-scripts does. Where that would exceed the area, rounds down instead.
    """
    width, height = image
    area = math.prod(resolution)
    if width * height <= area:
        return _nearest_crop([image], image, step=step, area=area)
    for root, divide in ((_round_root, _round_divide), (math.isqrt, _floor_divide)):
        # The widest multiple of `step` within the area at this aspect ratio, and likewise the highest.
        widest = root(area * width // height) // step * step
        highest = root(area * height // width) // step * step
        options = [
            (widest, divide(widest * height, width)),
            (divide(highest * width, height), highest),
        ]
        crop = _nearest_crop(options, image, step=step, area=area)
        if crop is not None:
            return crop
    return None


def _nearest_crop(options: list[Size], image: Size, *, step: int, area: int) -> Fit | None:
    """The option that, cropped to multiples of `step`, has the aspect ratio nearest to the image's; then the larger."""
    aspect = image[0] / image[1]
    best: Fit | None = None
    best_rank = (math.inf, 0)
    for scaled in options:
        size = (scaled[0] // step * step, scaled[1] // step * step)
        size_area = math.prod(size)
        if not 0 < size_area <= area:
            continue
        rank = (abs(size[0] / size[1] - aspect), -size_area)
        if rank < best_rank:
            best = Fit(scaled, size)
            best_rank = rank
    return best
