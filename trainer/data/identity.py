"""A dataset's fingerprint: whether the dataset is still the one that a run started with."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable

from trainer.data.records import ImageRecord, printable

# Of a fingerprint's values, in this order, separated by spaces. The last is there only where a folder's name says how
# often its images are repeated.
PARTS = ("image", "mask", "caption", "repeats in its folder's name")


def fingerprint(images: Iterable[ImageRecord]) -> dict[str, str]:
    """Each image's key → digests of its bytes, its mask and its caption. Equal dicts mean equal datasets.

    Holds no local path: a run may resume on another machine. It is part of a saved state, so its form is fixed.
    """
    prints = {}
    for image in images:
        digests = [image.sha256, image.mask_sha256 or "-", _caption_digest(image.caption)]
        if image.convention is not None:
            digests.append(image.convention)
        prints[image.key] = " ".join(digests)
    return prints


def fingerprint_differences(old: dict[str, str], new: dict[str, str], *, limit: int = 10) -> list[str]:
    """One line for each image that was added, removed or changed: at most `limit`, and then a count of the rest.

    `old` and `new`: fingerprints; that of a run is in its states, as `data`.
    """
    lines = []
    moved = _moved(old, new)
    for key in sorted(old.keys() | new.keys()):
        name = printable(key)
        if key in moved:
            lines.append(f"renamed: {name} → {printable(moved[key])}")
        elif key not in new:
            lines.append(f"removed: {name}")
        elif key not in old and key not in moved.values():
            lines.append(f"added: {name}")
        elif key in old and old[key] != new[key]:
            digests = itertools.zip_longest(PARTS, old[key].split(" "), new[key].split(" "))
            changed = [part for part, before, after in digests if before != after]
            lines.append(f"changed: {name} ({', '.join(changed)})")
    if len(lines) > limit:
        return [*lines[:limit], f"and {len(lines) - limit} more"]
    return lines


def _moved(old: dict[str, str], new: dict[str, str]) -> dict[str, str]:
    """Old key → new key of images with the same content under another name."""
    names: dict[str, list[str]] = {}
    for key in sorted(new.keys() - old.keys(), reverse=True):
        names.setdefault(new[key], []).append(key)
    moved = {}
    for key in sorted(old.keys() - new.keys()):
        if names.get(old[key]):
            moved[key] = names[old[key]].pop()
    return moved


def _caption_digest(caption: str | None) -> str:
    """An empty caption is not a missing one."""
    if caption is None:
        return "-"
    return hashlib.sha256(caption.encode()).hexdigest()
