"""From an image file to the pixels, and the loss mask, of one view."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.data import decode
from trainer.data.decode import UnusableImageError
from trainer.data.records import ImageRecord, View


def render(file: Path, view: View, *, sha256: str | None = None) -> np.ndarray:
    """The pixels of a view: uint8 (height, width, 3).

    Raises UnusableImageError; also where the bytes are no longer those of `sha256`.
    """
    image, _ = decode.open_upright(_bytes(file, sha256))
    cut = _cut(image, view, interpolation=view.interpolation)
    return np.asarray(cut if view.colour is None else decode.vary_colour(cut, view.colour))


def render_mask(image: ImageRecord, view: View) -> np.ndarray | None:
    """The loss mask of a view: uint8 (height, width), 255 is trained; None if the picture has none.

    Raises UnusableImageError.
    """
    if image.mask_file is not None:
        mask = decode.open_mask(_bytes(image.mask_file, image.mask_sha256))
        if mask.size != (image.width, image.height):
            mask = mask.resize((image.width, image.height), Image.Resampling.BOX)
    elif image.mask_sha256:
        alpha = decode.open_upright(_bytes(image.file, image.sha256))[1]
        if alpha is None:
            return None
        mask = alpha
    else:
        return None
    return np.asarray(_cut(mask, view, interpolation="bilinear"))


def _cut(image: Image.Image, view: View, *, interpolation: str | None) -> Image.Image:
    cut = decode.resize_crop(image, scaled=view.scaled, offset=view.offset, size=view.size, interpolation=interpolation)
    return cut.transpose(decode.FLIP) if view.flip else cut


def _bytes(file: Path, sha256: str | None) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as problem:
        raise UnusableImageError(f"cannot be read: {problem.strerror}") from problem
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UnusableImageError("changed while the job ran")
    return data
