"""JSON files that people, other programs and failing disks may have changed: read without trust.

A file whose content decides what a job does is sealed: one of its values is the digest of the others, so that a single
flipped bit shows. What Kiln did not write, or is damaged, is set aside: renamed, so that its name is free and its
content is kept.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from trainer.spec.errors import StorageError
from trainer.storage import digests
from trainer.storage.read import read_text

log = logging.getLogger(__name__)
LARGEST_BYTES = 256 * 2**20  # run.json of a million images; a larger file is not one that Kiln wrote
SEAL = "sha256"
LONGEST_NAME_BYTES = 255  # of a file on the file systems that are in use


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None where it is missing, damaged, huge, no regular file, or another kind of JSON."""
    try:
        value = json.loads(read_text(path, limit=LARGEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the digest of all of them."""
    values = {key: value for key, value in values.items() if key != SEAL}
    return {**values, SEAL: digests.digest(values)}


def read_sealed(path: Path, *, unsealed: Collection[str]) -> dict[str, Any] | None:
    """The values of a sealed file, without the seal; None where `read_object` has none, or one is not what was written.

    `unsealed`: the keys that a file may have which an older version has written, without a seal.
    """
    values = read_object(path)
    if not values:
        return None
    seal = values.pop(SEAL, None)
    if seal is None:
        return values if values.keys() <= set(unsealed) else None
    return values if seal == digests.digest(values) else None


def set_aside(path: Path, why: str) -> None:
    """Rename `path`, so that its name is free and its content is kept; the log says so.

    Raises StorageError where it cannot be renamed: a mount point, or a folder that may not be written.
    """
    aside = free_aside_name(path)
    try:
        path.rename(aside)
    except OSError as problem:
        raise StorageError(
            f"{path} {why}, and it cannot be renamed: {problem.strerror}. Remove it, or choose another folder."
        ) from problem
    log.warning("%s %s. It was renamed to %s.", path, why, aside.name)


def free_aside_name(path: Path) -> Path:
    """The first name for what is set aside from `path` that nothing has."""
    number = 1
    aside = _aside_name(path, "set-aside")
    while os.path.lexists(aside):
        number += 1
        aside = _aside_name(path, f"set-aside-{number}")
    return aside


def _aside_name(path: Path, ending: str) -> Path:
    """`path` with an ending; without the end of its own name where that is as long as a name may be."""
    name = os.fsencode(path.name)[: LONGEST_NAME_BYTES - len(ending) - 1]
    return path.with_name(f"{name.decode('utf-8', 'ignore')}.{ending}")


def set_aside_unless(path: Path, is_ours: Callable[[Path], bool], why: str = "") -> None:
    """Set `path` aside if something is there that is not what `is_ours` expects."""
    if os.path.lexists(path) and not is_ours(path):
        set_aside(path, why or "is not a file that Kiln wrote, or is damaged")


def set_aside_unless_object(path: Path) -> None:
    """Set `path` aside if something is there that `read_object` does not take."""
    set_aside_unless(path, lambda found: read_object(found) is not None)
