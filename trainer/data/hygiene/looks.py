"""What a scan sees in one decoded image: a hash of its looks, its sharpness, black bars, and faces. Needs Pillow alone.

The image may come at a part of its size, as `trainer.data.decode.inspect` decodes JPEGs. It takes less time
than the decoding.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image, ImageChops

from trainer.data.hygiene.faces import Face, find_faces

SIDE = 320  # pixels of the longer side of what is looked at
LEAST_SIDE = 12  # pixels of the shorter side, from which tiles and bars mean something
TILES = 3  # along each side: a photograph with a blurred background is sharp in some of them
LEAST_CONTRAST = 4.0  # mean square of the slopes in a tile, in grey levels: in an even area there is only noise
SQUARES = tuple((level - 128) ** 2 for level in range(256))
BLACK = 20  # grey level that a bar does not exceed, with what JPEG adds to it
BAR_SHARE = 0.03  # of the image's side: the narrowest bar
DARK = 32  # mean grey level below which an image is dark and bars in it mean nothing
# A difference hash (Krawetz 2013): is each pixel of 9 x 8 brighter than its left neighbour?
HASH_SIZE = (9, 8)
LEAST_BITS = 8  # in a hash that says something: an even image has none, a slope has all


class Looks(NamedTuple):
    """Of one image. `sharpness`: of its sharpest part, 0 to about 2; None where nothing in it has contrast."""

    hash: int | None  # 64 bits; None: too even to compare
    sharpness: float | None
    has_bars: bool
    faces: tuple[Face, ...] = ()  # none where no detector is installed


def look(image: Image.Image) -> Looks | None:
    """None for a mode that Pillow does not make grey, and for an image that is too small to say anything of."""
    try:
        grey = image.convert("L")
    except ValueError:
        return None
    faces = find_faces(grey)
    if max(grey.size) > SIDE:
        grey.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    if min(grey.size) < LEAST_SIDE:
        return None
    return Looks(_hash(grey), _sharpness(grey), _has_bars(grey), faces)


def _hash(grey: Image.Image) -> int | None:
    width, height = HASH_SIZE
    pixels = grey.resize(HASH_SIZE, Image.Resampling.BOX).tobytes()
    bits = 0
    for y in range(height):
        for x in range(1, width):
            bits = bits << 1 | (pixels[y * width + x] > pixels[y * width + x - 1])
    return bits if LEAST_BITS <= bits.bit_count() <= 64 - LEAST_BITS else None


def _sharpness(grey: Image.Image) -> float | None:
    """The energy of the curvature in relation to that of the slope, in the tile with the most: blur lowers it."""
    width, height = grey.size
    best: float | None = None
    for x, y in ((1, 0), (0, 1)):  # across, and down
        before = grey.crop((0, 0, width - 2 * x, height - 2 * y))
        middle = grey.crop((x, y, width - x, height - y))
        after = grey.crop((2 * x, 2 * y, width, height))
        slope = ImageChops.subtract(after, before, scale=2, offset=128)
        curvature = ImageChops.subtract(ImageChops.add(after, before, scale=2), middle, offset=128)
        for tile in _tiles(slope.size):
            of_slope = _energy(slope.crop(tile))
            if of_slope >= LEAST_CONTRAST:
                best = max(best or 0.0, _energy(curvature.crop(tile)) / of_slope)
    return best


def _tiles(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    width, height = size[0] // TILES, size[1] // TILES
    for column in range(TILES):
        for row in range(TILES):
            yield column * width, row * height, (column + 1) * width, (row + 1) * height


def _energy(tile: Image.Image) -> float:
    """The mean square of differences that are stored around 128. Pillow's `ImageStat` takes many times as long."""
    return sum(map(operator.mul, tile.histogram(), SQUARES)) / (tile.width * tile.height)


def _has_bars(grey: Image.Image) -> bool:
    """Black at two opposite sides, and not at the others: black all around is a background."""
    width, height = grey.size
    across, along = max(2, round(width * BAR_SHARE)), max(2, round(height * BAR_SHARE))
    sides = {
        "left": (0, 0, across, height),
        "right": (width - across, 0, width, height),
        "top": (0, 0, width, along),
        "bottom": (0, height - along, width, height),
    }
    mean = grey.resize((1, 1), Image.Resampling.BOX).tobytes()[0]
    if mean < DARK:
        return False
    black = {name: not any(grey.crop(box).histogram()[BLACK + 1 :]) for name, box in sides.items()}
    upright = black["left"] and black["right"]
    lying = black["top"] and black["bottom"]
    return upright != lying
