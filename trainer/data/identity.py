"""A dataset's fingerprint: whether the dataset is still the one that a run started with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from trainer.data.records import ImageRecord

PARTS = ("image", "mask", "caption")  # of a fingerprint's values, in this order, separated by spaces


def fingerprint(images: Iterable[ImageRecord]) -> dict[str, str]:
    """Each image's key → digests of its bytes, its mask and its caption. Equal dicts mean equal datasets.

    Holds no local path: a run may resume on another machine. It is part of a saved state, so its form is fixed.
    """
    prints = {}
    for image in images:
        prints[image.key] = f"{image.sha256} {image.mask_sha256 or '-'} {_caption_digest(image.caption)}"
    return prints


def fingerprint_differences(old: dict[str, str], new: dict[str, str], *, limit: int = 10) -> list[str]:
    """One line for each image that was added, removed or changed: at most `limit`, and then a count of the rest."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key not in new:
            lines.append(f"removed: {key}")
        elif key not in old:
            lines.append(f"added: {key}")
        elif old[key] != new[key]:
            digests = zip(PARTS, old[key].split(" "), new[key].split(" "), strict=False)
            changed = [part for part, before, after in digests if before != after]
            lines.append(f"changed: {key} ({', '.join(changed)})")
    if len(lines) > limit:
        return [*lines[:limit], f"and {len(lines) - limit} more"]
    return lines


def _caption_digest(caption: str | None) -> str:
    """An empty caption is not a missing one."""
    if caption is None:
        return "-"
    return hashlib.sha256(caption.encode()).hexdigest()
