"""Names that come from outside, before they become paths: of files in archives, repositories, datasets, states.

Every such name goes through `safe_path`; a list of them, through `Names`, which also finds two that clash.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from trainer.spec.errors import DataError

LONGEST_PART = 255  # bytes, on all usual volumes
LONGEST = 1024


@dataclass
class Names:
    """The names seen so far, compared as a file system that ignores case would, unless `ignores_case` is False."""

    ignores_case: bool = True
    seen: dict[str, tuple[str, bool]] = field(default_factory=dict)  # folded → spelling, is a folder

    def add(self, name: str, *, folder: bool) -> PurePosixPath:
        """The safe relative path for `name`. Raises DataError."""
        path = safe_path(name)
        for parent in list(path.parents)[:-1]:
            self._claim(str(parent), folder=True)
        self._claim(str(path), folder=folder)
        return path

    def _claim(self, place: str, *, folder: bool) -> None:
        folded = unicodedata.normalize("NFC", place).casefold() if self.ignores_case else place
        before = self.seen.get(folded)
        if before is None:
            self.seen[folded] = place, folder
        elif not folder or before != (place, True):  # only a folder may be named twice
            raise DataError(f"{before[0]!r} and {place!r} are the same name, at least on a volume that ignores case")


def safe_path(name: str) -> PurePosixPath:
    """`name` as a relative path that stays inside its folder. Raises DataError if it is anything else."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise DataError(f"{name[:60]!r} is an absolute path")
    if ".." in parts:
        raise DataError(f"{name[:60]!r} leads out of the folder")
    if "\\" in name or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise DataError(f"{name[:60]!r} has a backslash or a character that no file name should have")
    if not parts or any(len(part.encode()) > LONGEST_PART for part in parts) or len(name.encode()) > LONGEST:
        raise DataError(f"{name[:60]!r} is empty or too long for a file name")
    return PurePosixPath(*parts)


def is_safe(name: object) -> bool:
    """Whether `name` is a text that `safe_path` accepts."""
    if not isinstance(name, str):
        return False
    try:
        safe_path(name)
    except DataError:
        return False
    return True
