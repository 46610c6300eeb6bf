"""The suffixes of files: images, images in formats that are not read, videos."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

READABLE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
    ".avif",
)
READABLE = re.compile("|".join(re.escape(suffix) for suffix in READABLE_SUFFIXES), re.IGNORECASE)
# Images in formats that are not read. They count as skipped, so that a folder of them does not look empty.
UNREADABLE = re.compile(
    r"\.(hei[cf]|hif|jxl|jp2|j2k|jpx|psd|psb|xcf|kra|clip|svg|eps|tga|ico|icns|exr|hdr|dds|qoi|pcx|p[pgbn]m|raw|cr[23]"
    r"|nef|arw|dng|orf|rw2|raf|pef|srw|x3f)",
    re.IGNORECASE,
)
VIDEO = re.compile(r"\.(mp4|m4v|mov|mkv|webm|avi|wmv|flv|mpe?g|mts|m2ts|3gp|ogv)", re.IGNORECASE)
A_VIDEO = "a video, and only images are trained on: save single frames of it as PNG or JPEG"
FROM_PHONES = "; an iPhone does so with Settings, Camera, Formats, Most Compatible"


def why_none(names: Sequence[str], *, most: int = 3) -> str:
    """Why files of these `names` hold no image that can be trained on, for a message about their folder."""
    reasons = []
    for name in names:
        suffix = PurePosixPath(name).suffix
        if UNREADABLE.fullmatch(suffix):
            reasons.append(f"{name}: {why_unreadable(suffix)}")
        elif VIDEO.fullmatch(suffix):
            reasons.append(f"{name}: {A_VIDEO}")
    if not reasons:
        return "there is no image in it. Put images there (or mount them)."
    more = f"; and {len(reasons) - most} more" if len(reasons) > most else ""
    return f"no image in it can be read. {'; '.join(reasons[:most])}{more}."


def why_unreadable(suffix: str) -> str:
    """Why an image with a suffix of UNREADABLE is skipped, and what to do."""
    hint = FROM_PHONES if suffix.lower() in (".heic", ".heif", ".hif") else ""
    return f"format {suffix} is not read: save it as PNG or JPEG{hint}"
