"""From an image file to the pixels, and the loss mask, of one view. Letters: H height and W width in pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.data import decode
from trainer.data.decode import UnusableImageError
from trainer.data.records import ImageRecord, View
from trainer.storage.read import read_regular


def render(file: Path, view: View, *, sha256: str | None = None) -> np.ndarray:
    """The pixels of a view: uint8 (H, W, 3).

    Raises UnusableImageError; also where the file's bytes are no longer those of `sha256`.
    """
    image, _ = decode.open_upright(_read(file, sha256))
    cropped = _crop(image, view, interpolation=view.interpolation)
    if view.colour is not None:
        cropped = decode.vary_colour(cropped, view.colour)
    return np.asarray(cropped)


def render_mask(image: ImageRecord, view: View) -> np.ndarray | None:
    """The loss mask of a view: uint8 (H, W), 255 is trained; None if the image has none.

    Raises UnusableImageError.
    """
    mask: Image.Image | None = None
    if image.mask_file is not None:
        mask = decode.open_mask(_read(image.mask_file, image.mask_sha256))
        if mask.size != (image.width, image.height):
            mask = mask.resize((image.width, image.height), Image.Resampling.BOX)
    elif image.mask_sha256:  # "alpha"
        _, mask = decode.open_upright(_read(image.file, image.sha256))
    if mask is None:
        return None
    return np.asarray(_crop(mask, view, interpolation="bilinear"))


def _crop(image: Image.Image, view: View, *, interpolation: str | None) -> Image.Image:
    cropped = decode.resize_crop(
        image, scaled=view.scaled, offset=view.offset, size=view.size, interpolation=interpolation
    )
    if view.flip:
        return cropped.transpose(decode.FLIP)
    return cropped


def _read(file: Path, sha256: str | None) -> bytes:
    """The file's bytes. The cache names latents by the hash from the scan, so other bytes must not be encoded."""
    try:
        data = read_regular(file, limit=decode.MAX_FILE_BYTES)
    except OSError as problem:
        raise UnusableImageError(f"cannot be read: {problem.strerror}") from problem
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UnusableImageError("changed while the job ran")
    return data
