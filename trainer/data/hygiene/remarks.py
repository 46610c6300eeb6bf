"""What is to be said of the looks of a subset's images: one line for each kind, with names."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence

from trainer.data.buckets import Fit, fit
from trainer.data.hygiene.faces import Face
from trainer.data.hygiene.looks import Looks
from trainer.data.records import ImageRecord
from trainer.spec.plan import Dataset
from trainer.spec.values import many, some

# Photographs that are sharp somewhere have 0.69 and more, with a Gaussian blur of 6 pixels (at 1280) 0.15 and less
# (tests/trainer/data/hygiene/test_looks.py).
BLURRED = 0.2
ALIKE_BITS = 4  # two hashes that differ in no more belong to images that look the same
BANDS = ALIKE_BITS + 1  # of which at least one is equal in two such hashes, so that not all pairs are compared
LEAST_OF_FACE = 0.9  # of each side of a face's box that the crop keeps: the box is larger than the face
ENLARGED = 2.0  # times each side: from there on an image is blurred by it


def remarks(images: Sequence[ImageRecord], looks: Mapping[str, Looks | None], dataset: Dataset) -> list[str]:
    """`looks`: by the name of the image. Nothing of it changes what is trained."""
    lines: list[str] = []
    alike = [f"{name} of {first}" for name, first in near_duplicates(images, looks)]
    if alike:
        lines.append(f"{many(len(alike), 'near-duplicate')}, all used: {some(alike)}")
    blurred = []
    barred = []
    small = []
    beheaded = []
    for image in images:
        seen = looks.get(image.name)
        if seen is not None and seen.sharpness is not None and seen.sharpness < BLURRED:
            blurred.append(image.name)
        if seen is not None and seen.has_bars:
            barred.append(image.name)
        cut = fit((image.width, image.height), dataset)
        if cut is not None and cut.scaled[0] > ENLARGED * image.width:
            small.append(f"{image.name} ({image.width}x{image.height})")
        if seen is not None and cut is not None and any(_is_cut_off(face, cut) for face in seen.faces):
            beheaded.append(image.name)
    if blurred:
        lines.append(f"{many(len(blurred), 'image')} blurred everywhere, used all the same: {some(blurred)}")
    if barred:
        lines.append(f"{many(len(barred), 'image')} with black bars, which are learnt too: {some(barred)}")
    if beheaded:
        lines.append(f"{many(len(beheaded), 'image')} with a face that the crop cuts off: {some(beheaded)}")
    if small:
        lines.append(f"{many(len(small), 'image')} enlarged more than {ENLARGED:g} times: {some(small)}")
    return lines


def _is_cut_off(face: Face, cut: Fit) -> bool:
    """Whether the crop at the centre loses a part of a face."""
    for low, high, scaled, size in zip(face[:2], face[2:], cut.scaled, cut.size, strict=True):
        begin = (scaled - size) / 2
        kept = min(high * scaled, begin + size) - max(low * scaled, begin)
        if kept < LEAST_OF_FACE * (high - low) * scaled:
            return True
    return False


def near_duplicates(images: Sequence[ImageRecord], looks: Mapping[str, Looks | None]) -> Iterator[tuple[str, str]]:
    """Each image that looks like an earlier one, with that one's name. Copies byte for byte are reported elsewhere."""
    contents: set[bytes] = set()
    kept = array("Q")  # hashes of images that look like none before them, and the places of these in `images`
    places = array("Q")
    by_band: dict[tuple[int, int], array[int]] = {}  # a piece of a hash → places in `kept`
    for place, image in enumerate(images):
        content = bytes.fromhex(image.sha256)
        seen = looks.get(image.name)
        if content in contents or seen is None or seen.hash is None:
            continue
        contents.add(content)
        found = _first_alike(seen.hash, kept, by_band)
        if found is not None:
            yield image.name, images[places[found]].name
            continue
        for band in _bands(seen.hash):
            by_band.setdefault(band, array("I")).append(len(kept))
        kept.append(seen.hash)
        places.append(place)


def _first_alike(bits: int, kept: array[int], by_band: Mapping[tuple[int, int], array[int]]) -> int | None:
    """The place in `kept` of a hash that differs from `bits` in a few bits at most."""
    for band in _bands(bits):
        for other in by_band.get(band, ()):
            if (kept[other] ^ bits).bit_count() <= ALIKE_BITS:
                return other
    return None


def _bands(bits: int) -> Iterator[tuple[int, int]]:
    """The number and the value of each of the pieces that the 64 bits are cut into."""
    width = math.ceil(64 / BANDS)
    for number in range(BANDS):
        yield number, bits >> number * width & (1 << width) - 1
