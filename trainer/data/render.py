"""From an image file to the pixels, and the loss mask, of one view. Letters: H height and W width in pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from trainer.data import decode
from trainer.data.decode import UnusableImageError
from trainer.data.records import ImageRecord, View
from trainer.storage.read import read_regular


def render(image: ImageRecord, view: View) -> np.ndarray:
    """The pixels of a view: uint8 (H, W, 3).

    Raises UnusableImageError; also where the image's bytes are no longer those that the scan has found.
    """
    upright, _ = decode.open_upright(_read_image(image))
    cropped = _crop(upright, view, interpolation=view.interpolation)
    if view.colour is not None:
        cropped = decode.vary_colour(cropped, view.colour)
    return np.asarray(cropped)


def render_mask(image: ImageRecord, view: View) -> np.ndarray | None:
    """The loss mask of a view: uint8 (H, W), 255 is trained; None if the image has none.

    Raises UnusableImageError.
    """
    mask: Image.Image | None = None
    if image.mask_file is not None:
        data = _checked(partial(read_regular, image.mask_file, limit=decode.MAX_FILE_BYTES), image.mask_sha256)
        mask = decode.open_mask(data)
        if mask.size != (image.width, image.height):
            mask = mask.resize((image.width, image.height), Image.Resampling.BOX)
    elif image.mask_sha256:  # "alpha"
        _, mask = decode.open_upright(_read_image(image))
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


def _read_image(image: ImageRecord) -> bytes:
    return _checked(lambda: image.read(limit=decode.MAX_FILE_BYTES), image.sha256)


def _checked(read: Callable[[], bytes], sha256: str | None) -> bytes:
    """What `read` gives. The cache names latents by the hash from the scan, so other bytes must not be encoded."""
    try:
        data = read()
    except OSError as problem:
        raise UnusableImageError(f"cannot be read: {problem.strerror}") from problem
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UnusableImageError("changed while the job ran")
    return data
