"""A dataset's fingerprint: whether the dataset is still the one that a run started with."""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Iterable, Iterator

from trainer.data.records import ImageRecord
from trainer.spec.rules.resume_rules import Changes
from trainer.spec.values import printable
from trainer.storage import run_records
from trainer.storage.choose_run import ContentChanges
from trainer.storage.run_records import Run

# Of a fingerprint's values, in this order, separated by spaces. The last is there only where a folder's name says how
# often its images are repeated.
PARTS = ("image", "mask", "caption", "repeats in its folder's name")


# Images up to which a fingerprint has each by its name, which takes some 200 bytes of every state. Above, it has GROUPS
# sums: the names of a million images would be most of what a save writes.
MOST_NAMED = 50_000
GROUPS = 1024
COUNT = "images"  # a key of a fingerprint in groups. The keys of images have a /


def fingerprint(images: Iterable[ImageRecord]) -> dict[str, str]:
    """Each image's key → digests of its bytes, its mask and its caption. Equal dicts mean equal datasets.

    Of more than MOST_NAMED images, `in_groups` of that. Holds no local path: a run may resume on another machine. It is
    part of a saved state, so its form is fixed.
    """
    prints = _prints(images)
    named = dict(itertools.islice(prints, MOST_NAMED + 1))
    if len(named) <= MOST_NAMED:
        return named
    return in_groups(itertools.chain(named.items(), prints))


def in_groups(prints: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The number of images, and for each group of keys the sum of the digests of its images: whatever their order."""
    sums = [0] * GROUPS
    count = 0
    for key, text in prints:
        count += 1
        name = key.encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(name + b"\0" + text.encode("utf-8", "surrogatepass")).digest()
        sums[zlib.crc32(name) % GROUPS] += int.from_bytes(digest, "big")
    groups = {f"group {number}": f"{total % 2**256:064x}" for number, total in enumerate(sums)}
    return {COUNT: str(count), **groups}


def _prints(images: Iterable[ImageRecord]) -> Iterator[tuple[str, str]]:
    for image in images:
        digests = [image.sha256, image.mask_sha256 or "-", _caption_digest(image.caption)]
        if image.convention is not None:
            digests.append(image.convention)
        yield image.key, " ".join(digests)


def fingerprint_differences(old: dict[str, str], new: dict[str, str], *, limit: int = 10) -> list[str]:
    """One line for each image that was added, removed or changed: at most `limit`, and then a count of the rest.

    `old` and `new`: fingerprints; that of a run is in its states, as `data`.
    """
    if COUNT in old or COUNT in new:
        return _differing_groups(old, new)
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


def _differing_groups(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Names are not known of so many images."""
    before, now = (prints if COUNT in prints else in_groups(prints.items()) for prints in (old, new))
    differing = sum(before.get(key) != now[key] for key in now if key != COUNT)
    if not differing:
        return []
    counts = f"{before[COUNT]} images before, {now[COUNT]} now"
    return [f"images, masks or captions: {counts}; {differing} of {GROUPS} parts of the dataset differ"]


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
