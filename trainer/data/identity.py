"""A dataset's fingerprint: whether it is still the one that a run began with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from trainer.data.records import ImageRecord


def fingerprint(images: Iterable[ImageRecord]) -> dict[str, str]:
    """ImageRecord's key → digests of its content and caption; equal means equal datasets. Holds no local path."""
    return {p.key: f"{p.sha256} {p.mask_sha256 or '-'} {_digest(p.caption)}" for p in images}


def fingerprint_differences(old: dict[str, str], new: dict[str, str], *, limit: int = 10) -> list[str]:
    """One line for each picture added, removed or changed, at most `limit` and then a count."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key not in new:
            lines.append(f"removed: {key}")
        elif key not in old:
            lines.append(f"added: {key}")
        elif old[key] != new[key]:
            parts = zip(("picture", "mask", "caption"), old[key].split(" "), new[key].split(" "), strict=False)
            lines.append(f"changed: {key} ({', '.join(what for what, a, b in parts if a != b)})")
    return lines if len(lines) <= limit else [*lines[:limit], f"and {len(lines) - limit} more"]


def _digest(caption: str | None) -> str:
    return "-" if caption is None else hashlib.sha256(caption.encode()).hexdigest()
