"""JSON files that people and other programs may have changed: read without trust, and set aside where they are odd."""

from __future__ import annotations

import json
import logging
import stat
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
LARGEST_BYTES = 256 * 2**20  # run.json of a million images; a larger file is not one that Kiln wrote


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None where it is missing, damaged, huge, no regular file, or another kind of JSON."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_BYTES:  # a pipe would be waited for
            return None
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def set_aside(path: Path, why: str) -> None:
    """Rename `path`, so that its name is free and its content is kept; the log says so."""
    number = 1
    aside = path.with_name(f"{path.name}.set-aside")
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"{path.name}.set-aside-{number}")
    path.rename(aside)
    log.warning("%s %s. It was renamed to %s.", path, why, aside.name)


def set_aside_unless_object(path: Path) -> None:
    """Set `path` aside if something is there that `read_object` does not take."""
    if (path.exists() or path.is_symlink()) and read_object(path) is None:
        set_aside(path, "is not a file that Kiln wrote, or is damaged")
