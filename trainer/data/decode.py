"""Open images, scale and crop them. Pillow, and numpy where it is needed; no torch, so that processes start fast.

Every file becomes upright 8-bit sRGB, or is refused for a named reason: nothing is guessed or repaired.
Letters: H height, W width, C channels.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageCms, features

from trainer.data.hygiene.looks import Looks, look
from trainer.storage.read import read_regular

if TYPE_CHECKING:
    import numpy as np

# Never the formats that run programs (EPS), nest (PSD, ICNS) or link to other files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
# Pillow's own limit, above which it warns of a decompression bomb: a quarter GiB of 24-bit pixels, 358 MB as RGBA.
MAX_PIXELS = 89_478_485
MAX_FILE_BYTES = 1 << 30  # of an image's file: as many pixels as are allowed take 0.7 GB at most, uncompressed
# Pillow's decoders raise any of these for a damaged file (tests/fuzz). UnidentifiedImageError is an OSError.
DAMAGED = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    RuntimeError,
    struct.error,
    zlib.error,
)
LARGEST_SAMPLE = 1 << 28  # bytes
# Rows that `_mean_rows` makes at once: their weights are a dense matrix, so few rows keep it and the memory small.
ROWS_AT_ONCE = 16
FLIP = Image.Transpose.FLIP_LEFT_RIGHT
# EXIF orientation → the operation that makes the image upright; 1 is upright.
TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
INTERPOLATIONS = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "area": Image.Resampling.BOX,  # only to enlarge: `_shrink_by_area` shrinks
}
NOT_AN_IMAGE = "not an image in a known format (JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF)"
EMPTY = "the file is empty (0 bytes)"
TOO_LARGE = f"more than {MAX_PIXELS // 1_000_000} million pixels (a decompression bomb?): make it smaller"
ANIMATED = "animated, or several pages: save the one image to train on"
TRANSPARENT = "completely transparent"
UNKNOWN_RANGE = "32-bit pixels outside 0 to 1 (floats) or 0 to 65535 (integers): save it with 8 or 16 bits"


class UnusableImageError(Exception):
    """A file that cannot be trained on; the text is the reason, as the report gives it."""


def open_upright(source: Path | bytes) -> tuple[Image.Image, Image.Image | None]:
    """The image as upright sRGB (mode RGB) over white, and its alpha (mode L) if it is not opaque everywhere.

    16-bit samples are scaled, an ICC profile is converted to sRGB; CMYK without a profile converts by Pillow's formula.
    Raises UnusableImageError.
    """
    image, orientation, _ = _load(_read(source))
    alpha = _alpha(image)
    try:
        colours = _to_rgb(image)
        if alpha is not None:
            white = Image.new("RGB", colours.size, "white")
            colours = Image.composite(colours, white, alpha)
        if orientation in TO_UPRIGHT:
            colours = colours.transpose(TO_UPRIGHT[orientation])
            if alpha is not None:
                alpha = alpha.transpose(TO_UPRIGHT[orientation])
    except DAMAGED as problem:
        raise UnusableImageError(f"cannot be converted to RGB: {problem}") from problem
    return colours, alpha


class Inspected(NamedTuple):
    """Upright width and height in pixels, whether there is transparency, and what it looks like."""

    width: int
    height: int
    has_alpha: bool
    looks: Looks | None


def inspect(source: Path | bytes) -> Inspected:
    """What can be said of an image once the whole file is decoded.

    Raises UnusableImageError for every file that `open_upright` refuses.
    """
    image, orientation, (width, height) = _load(_read(source), fast=True)
    grey = image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = _to_8_bits(image)  # refuses values outside the range
    if orientation >= 5:  # 5 to 8 lie on their side
        width, height = height, width
    return Inspected(width, height, _alpha(image) is not None, look(grey))


def open_mask(source: Path | bytes) -> Image.Image:
    """A mask image as upright grey (mode L): white is trained, black is not. Raises UnusableImageError."""
    image, _ = open_upright(source)
    return image.convert("L")


# ---- scale and crop


def resize_crop(
    image: Image.Image,
    *,
    scaled: tuple[int, int],
    offset: tuple[int, int],
    size: tuple[int, int],
    interpolation: str | None = None,
) -> Image.Image:
    """Scale `image` (RGB or L) to `scaled`, then crop it to `size` at `offset` (left, top); all in pixels.

    `scaled` and `size` are (width, height). `interpolation`: a key of INTERPOLATIONS; None is area where both sides
    shrink, else lanczos. Computes only the pixels of the crop: a strip of 20,000 × 2 pixels would take gigabytes if it
    was scaled as a whole.
    """
    shrinks = scaled[0] <= image.width and scaled[1] <= image.height
    name = interpolation or ("area" if shrinks else "lanczos")
    left, top = offset
    width, height = size
    if scaled == image.size:
        return image.crop((left, top, left + width, top + height))
    if name == "area" and shrinks:
        return _shrink_by_area(image, scaled=scaled, offset=offset, size=size)
    ratio_x = image.width / scaled[0]
    ratio_y = image.height / scaled[1]
    # Rounding may put the last edge a hair outside of the image, which Pillow refuses.
    right = min((left + width) * ratio_x, image.width)
    bottom = min((top + height) * ratio_y, image.height)
    return image.resize(size, INTERPOLATIONS[name], box=(left * ratio_x, top * ratio_y, right, bottom))


def vary_colour(image: Image.Image, seed: int) -> Image.Image:
    """Rotate the hue by up to 16 degrees, or change the gamma by up to 5 %, drawn from `seed`."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        hue, saturation, value = image.convert("HSV").split()
        rotation = round(rng.uniform(-16, 16) / 360 * 256)
        hue = hue.point([(i + rotation) % 256 for i in range(256)])
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    gamma = rng.uniform(0.95, 1.05)
    curve = [round(255 * (i / 255) ** gamma) for i in range(256)]
    return image.point(curve * 3)


def _shrink_by_area(
    image: Image.Image, *, scaled: tuple[int, int], offset: tuple[int, int], size: tuple[int, int]
) -> Image.Image:
    """Each pixel becomes the mean of the area that it covers; pixels at the edge of the area count by their share.

    OpenCV's INTER_AREA, which sd-scripts uses. Pillow's BOX takes or leaves whole pixels, which at 1.2:1 is a
    nearest-neighbour resize with jagged edges.
    """
    import numpy as np  # late: most scans need none of it

    left, right = _covered(image.width, scaled[0], offset[0], size[0])
    top, bottom = _covered(image.height, scaled[1], offset[1], size[1])

    def rows_of_image(low: int, high: int) -> np.ndarray:
        pixels = np.asarray(image.crop((left, low, right, high)))
        return pixels.reshape(high - low, right - left, -1)

    rows_HWC = _mean_rows(
        rows_of_image, start=top, end=bottom, ratio=image.height / scaled[1], first=offset[1], count=size[1]
    )

    def columns_of_rows(low: int, high: int) -> np.ndarray:
        return rows_HWC[:, low - left : high - left].transpose(1, 0, 2)

    out_WHC = _mean_rows(
        columns_of_rows, start=left, end=right, ratio=image.width / scaled[0], first=offset[0], count=size[0]
    )
    out_HWC = np.rint(out_WHC.transpose(1, 0, 2)).clip(0, 255).astype(np.uint8)
    if out_HWC.shape[2] == 1:
        return Image.fromarray(out_HWC[..., 0])
    return Image.fromarray(out_HWC)


def _covered(length: int, scaled: int, offset: int, size: int) -> tuple[int, int]:
    """The pixels [a, b) of a side of `length` that the pixels [offset, offset + size) of `scaled` cover."""
    begin = offset * length // scaled
    end = -(-(offset + size) * length // scaled)  # rounded up
    return begin, min(length, end)


def _mean_rows(
    rows: Callable[[int, int], np.ndarray], *, start: int, end: int, ratio: float, first: int, count: int
) -> np.ndarray:
    """Rows [first, first + count) of the shrunk image, each the mean of `ratio` rows of the image: (count, W, C).

    `rows(a, b)` gives the image's rows [a, b) as (b - a, W, C), for start ≤ a < b ≤ end.
    """
    import numpy as np

    blocks = []
    for begin in range(first, first + count, ROWS_AT_ONCE):
        edges = np.arange(begin, min(begin + ROWS_AT_ONCE, first + count) + 1) * ratio
        low = max(start, int(edges[0]))
        high = min(end, int(np.ceil(edges[-1])))
        grid = np.arange(low, high)
        covered = np.minimum(edges[1:, None], grid + 1) - np.maximum(edges[:-1, None], grid)
        weights = np.maximum(covered, 0)
        weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
        part = rows(low, high)
        means = weights @ part.astype(np.float32).reshape(high - low, -1)
        blocks.append(means.reshape(-1, *part.shape[1:]))
    return np.concatenate(blocks)


# ---- decode


def _read(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return read_regular(source, limit=MAX_FILE_BYTES)
    except OSError as problem:
        raise UnusableImageError(f"cannot be read: {problem.strerror}") from problem


def _load(data: bytes, *, fast: bool = False) -> tuple[Image.Image, int, tuple[int, int]]:
    """Decode `data`; return the image, its EXIF orientation (1 to 8) and its size before that is applied.

    `fast`: a JPEG may be decoded at a quarter of its size; all of its data is still read, so damage is still found.
    """
    if not data:
        raise UnusableImageError(EMPTY)
    formats = [f for f in FORMATS if f != "AVIF" or features.check("avif")]
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        # The header gives the size: nothing is decoded yet. Pillow's own check only warns, and the filters of warnings
        # are shared by all threads.
        if image.width * image.height > MAX_PIXELS:
            raise UnusableImageError(TOO_LARGE)
        # The further images in an MPO are the same scene for another eye or screen.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise UnusableImageError(ANIMATED)
        size = image.size
        if fast and image.format == "JPEG":
            image.draft(None, (image.width // 4, image.height // 4))
            image.load()
            return image, _orientation(image), size
        image.load()
        return image, _orientation(image), image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise UnusableImageError(TOO_LARGE) from problem
    except MemoryError as problem:
        raise UnusableImageError("needs more memory than an image may take") from problem
    except Image.UnidentifiedImageError as problem:
        is_known = any(Image.OPEN[name][1](data[:16]) for name in formats)  # type: ignore[misc]  # None: accepts all
        raise UnusableImageError("damaged or cut short: its header" if is_known else NOT_AN_IMAGE) from problem
    except DAMAGED as problem:
        raise UnusableImageError(f"damaged or cut short: {problem}") from problem


def _orientation(image: Image.Image) -> int:
    """1 to 8. Damaged EXIF is no reason to refuse an image that decodes; Pillow itself turns TIFF while loading."""
    try:
        value = image.getexif().get(0x0112, 1)
    except DAMAGED:
        return 1
    if isinstance(value, int) and 1 <= value <= 8:
        return value
    return 1


def _alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel (mode L), None where all is opaque. Raises UnusableImageError where nothing is visible."""
    if not image.has_transparency_data or image.mode in ("I;16", "I;16B", "I", "F"):
        return None
    if "A" not in image.getbands():  # a transparent colour, or palette entry
        image = image.convert("RGBA")
    alpha = image.getchannel("A")
    low, high = alpha.getextrema()
    if high == 0:
        raise UnusableImageError(TRANSPARENT)
    if low == 255:
        return None
    return alpha


# ---- colours


def _to_rgb(image: Image.Image) -> Image.Image:
    """Colours as sRGB, without alpha."""
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    elif image.mode in ("P", "PA", "RGBA", "RGBX"):
        image = image.convert("RGB")
    elif image.mode in ("LA", "1"):
        image = image.convert("L")
    profile = image.info.get("icc_profile")
    if profile:
        converted = _apply_profile(image, profile)
        if converted is not None:
            return converted
    if image.mode == "LAB":
        return _convert(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    if image.mode == "RGB":
        return image
    return image.convert("RGB")


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """`image` in sRGB; None if it is already, or if the profile is damaged or for another kind of colour."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(source):
            return None  # by far the most common; a transform would cost time and round
        return _convert(image, source)
    except (ImageCms.PyCMSError, *DAMAGED):
        return None


def _convert(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    converted = ImageCms.profileToProfile(
        image,
        source,
        target,
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None  # None only where it works in place
    return converted


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits → mode L, scaled (65535 → 255, and 1.0 → 255), not clipped.

    Raises UnusableImageError for values outside that range, whose meaning the file does not tell.
    """
    import numpy as np

    values = np.asarray(image)
    full = 1.0 if image.mode == "F" else 65535.0
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= full):
        raise UnusableImageError(UNKNOWN_RANGE)
    grey = Image.fromarray(np.rint(values * np.float32(255 / full)).astype(np.uint8))
    grey.info.update(image.info)
    return grey


# ---- images that a job drew


def read_sample(path: Path) -> Image.Image | None:
    """The image in a file; None where it is damaged or missing, or is no file."""
    try:
        image = Image.open(io.BytesIO(read_regular(path, limit=LARGEST_SAMPLE)), formats=("PNG",))
        image.load()
    except (*DAMAGED, Image.DecompressionBombError):
        return None
    return image
