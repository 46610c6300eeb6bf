"""Images for people: small JPEGs of a bounded size, for the report, messages and the monitor page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from trainer.data.decode import read_sample

QUALITY = 82  # of JPEG
MARGIN = 4  # pixels between the images of a row
BACKGROUND = (24, 24, 27)


def thumbnail(path: Path, width: int) -> bytes:
    """The image in `path` as a JPEG of at most `width` pixels; b"" where it cannot be read."""
    image = read_sample(path)
    if image is None:
        return b""
    return jpeg(fitted(image, width, 2 * width))


def data_address(content: bytes) -> str:
    """A JPEG as an address that holds all of it."""
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode('ascii')}"


def side_by_side(paths: Sequence[Path], *, height: int, longest: int) -> bytes:
    """The images in `paths` in a row of this height, as a JPEG of at most `longest` pixels; b"" if none is readable."""
    images = []
    for path in paths:
        image = read_sample(path)
        if image is not None:
            images.append(fitted(image, longest, height))
    if not images:
        return b""
    width = sum(image.width for image in images) + MARGIN * (len(images) - 1)
    row = Image.new("RGB", (width, max(image.height for image in images)), BACKGROUND)
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + MARGIN
    return jpeg(fitted(row, longest, height))


def fitted(
    image: Image.Image, width: int, height: int, *, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The image inside a box, in RGB; never enlarged."""
    scale = min(1.0, width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, resampling)


def jpeg(image: Image.Image, *, optimize: bool = True) -> bytes:
    """Without metadata: the prompt is beside the image, and a path is nowhere. `optimize`: smaller, in more time."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY, optimize=optimize)
    return out.getvalue()
