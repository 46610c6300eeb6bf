"""The suffixes of files: images, images in formats that are not read, videos."""

from __future__ import annotations

import re

READABLE = re.compile(r"\.(jpe?g|jpe|jfif|mpo|a?png|webp|bmp|dib|tiff?|gif|avif)", re.IGNORECASE)
# Images in formats that are not read. They count as skipped, so that a folder of them does not look empty.
UNREADABLE = re.compile(
    r"\.(hei[cf]|hif|jxl|jp2|j2k|jpx|psd|psb|xcf|kra|clip|svg|eps|tga|ico|icns|exr|hdr|dds|qoi|pcx|p[pgbn]m|raw|cr[23]"
    r"|nef|arw|dng|orf|rw2|raf|pef|srw|x3f)",
    re.IGNORECASE,
)
VIDEO = re.compile(r"\.(mp4|m4v|mov|mkv|webm|avi|wmv|flv|mpe?g|mts|m2ts|3gp|ogv)", re.IGNORECASE)
A_VIDEO = "a video, and only images are trained on: save single frames of it as PNG or JPEG"
FROM_PHONES = "; an iPhone does so with Settings, Camera, Formats, Most Compatible"


def why_unreadable(suffix: str) -> str:
    """Why an image with a suffix of UNREADABLE is skipped, and what to do."""
    hint = FROM_PHONES if suffix.lower() in (".heic", ".heif", ".hif") else ""
    return f"format {suffix} is not read: save it as PNG or JPEG{hint}"
