"""Which size a picture is trained at. Pure functions of sizes; all sizes are (width, height) in pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.spec.errors import SettingsError
from trainer.spec.plan import Dataset

Size = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """Scale the picture to `scaled`, which covers `size`, and cut `size` out of it."""

    scaled: Size
    size: Size


def fit(image: Size, dataset: Dataset) -> Fit | None:
    """How `picture` is scaled and cut in `dataset`; None if it is smaller than one step and may not be enlarged."""
    if not dataset.enable_bucket:
        return _cover(image, dataset.resolution)
    if dataset.bucket_no_upscale:
        return _without_enlarging(image, dataset.resolution, dataset.bucket_reso_steps)
    sizes = bucket_sizes(
        dataset.resolution,
        smallest=dataset.min_bucket_reso,
        largest=dataset.max_bucket_reso,
        step=dataset.bucket_reso_steps,
    )
    return _cover(image, nearest(image, sizes))


def bucket_sizes(resolution: Size, *, smallest: int, largest: int, step: int) -> tuple[Size, ...]:
    """Sizes whose sides are multiples of `step` and whose area is at most that of `resolution`, sorted.

    The largest square, and for each side in smallest … largest the longest other side. As in sd-scripts, the limits
    are moved outwards to multiples of `step`; they never exclude the resolution itself.
    """
    area = resolution[0] * resolution[1]
    square = math.isqrt(area) // step * step
    if square == 0:
        raise SettingsError(f"bucket_reso_steps {step} is larger than the resolution {resolution}: make it smaller.")
    smallest = max(step, min(smallest, *resolution) // step * step)
    largest = -(-max(largest, *resolution) // step) * step
    sizes = {(square, square)}
    for side in range(smallest, largest + 1, step):
        other = min(largest, area // side // step * step)
        if other >= smallest:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))


def nearest(image: Size, sizes: tuple[Size, ...]) -> Size:
    """The size whose width / height is nearest to the picture's; the picture's own size if it is there."""
    if image in sizes:
        return image
    aspect = image[0] / image[1]
    return min(sizes, key=lambda size: abs(size[0] / size[1] - aspect))


def _cover(image: Size, size: Size) -> Fit:
    """Scale until both sides reach `size`."""
    if image[0] * size[1] > image[1] * size[0]:  # wider than `size`: the heights meet
        return Fit((max(size[0], _divided(image[0] * size[1], image[1])), size[1]), size)
    return Fit((size[0], max(size[1], _divided(image[1] * size[0], image[0]))), size)


def _divided(dividend: int, divisor: int) -> int:
    """Rounded to the nearest, halves up; exact for any size."""
    return (2 * dividend + divisor) // (2 * divisor)


def _rounded_root(number: int) -> int:
    return (math.isqrt(4 * number) + 1) // 2


def _floor_divided(dividend: int, divisor: int) -> int:
    return dividend // divisor


def _without_enlarging(image: Size, resolution: Size, step: int) -> Fit | None:
    """Shrink a picture whose area is above the resolution's, so that one side is a multiple of `step`; then cut.

    As in sd-scripts, but where its rounding would exceed the area, rounded down.
    """
    width, height = image
    area = math.prod(resolution)
    if width * height <= area:
        return _nearest_cut([image], image, step=step, area=area)
    for root, divided in ((_rounded_root, _divided), (math.isqrt, _floor_divided)):
        # The widest multiple of `step` within the area at this aspect ratio, and likewise the highest.
        wide = root(area * width // height) // step * step
        high = root(area * height // width) // step * step
        options = [(wide, divided(wide * height, width)), (divided(high * width, height), high)]
        found = _nearest_cut(options, image, step=step, area=area)
        if found is not None:
            return found
    return None


def _nearest_cut(options: list[Size], image: Size, *, step: int, area: int) -> Fit | None:
    """The option whose cut to multiples of `step` has the aspect ratio nearest to the picture's."""
    fits = [Fit(scaled, (scaled[0] // step * step, scaled[1] // step * step)) for scaled in options]
    usable = [f for f in fits if 0 < math.prod(f.size) <= area]
    aspect = image[0] / image[1]
    return min(usable, key=lambda f: (abs(f.size[0] / f.size[1] - aspect), -math.prod(f.size)), default=None)
