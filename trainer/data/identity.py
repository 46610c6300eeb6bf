"""A dataset's fingerprint: whether the dataset is still the one that a run started with."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable

from trainer.data.records import ImageRecord
from trainer.spec.rules.resume_rules import Changes
from trainer.spec.values import printable
from trainer.storage import run_records
from trainer.storage.choose_run import ContentChanges
from trainer.storage.run_records import Run

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


def content_changes(prints: dict[str, str], model: str | None, training_adapter: str | None = None) -> ContentChanges:
    """For `choose_run.choose`: what differs between a run and a job in images, captions and weights, wherever they are.

    `model`: a digest of the base model's files; None where they are not at hand, and not compared. `training_adapter`:
    likewise of PARAMS_TRAINING_ADAPTER.
    """

    def changed(run: Run, found: Changes) -> list[str]:
        lines: list[str] = []
        began_with = _prints_of(run)
        differences = fingerprint_differences(began_with, prints) if began_with is not None else []
        if differences:
            lines += [*found.places, *differences]
        if found.model and model is not None and run.record.get("model") != model:
            lines += found.model
        if training_adapter is not None and run.record.get("training_adapter") != training_adapter:
            lines.append("the file of PARAMS_TRAINING_ADAPTER has changed")
        return lines

    return changed


def _prints_of(run: Run) -> dict[str, str] | None:
    """The fingerprint of the dataset that a run began with; None if it is not known."""
    prints = run.record.get("data")
    if prints is None:
        state = run_records.newest_state(run.home)
        prints = state.tree.get("data") if state else None
    if not isinstance(prints, dict) or not all(isinstance(value, str) for value in prints.values()):
        return None
    return prints


def _caption_digest(caption: str | None) -> str:
    """An empty caption is not a missing one."""
    if caption is None:
        return "-"
    return hashlib.sha256(caption.encode()).hexdigest()
