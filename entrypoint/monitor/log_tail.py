"""The end of run.log, read on as it grows. The whole file can be downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.storage.read import open_unlinked

MOST_KEPT = 1 << 17  # bytes


class LogTail:
    """The last lines of a log. `end` is the place in bytes up to which it is known; `begin` that of what is kept."""

    def __init__(self) -> None:
        self.generation = 0
        self.begin = self.end = 0
        self._inode = -1
        self._kept = b""

    def read_on(self, path: Path) -> bool:
        """Read what is new in `path`; whether anything is."""
        try:
            with open_unlinked(path) as file:
                found = os.fstat(file.fileno())
                is_other = found.st_ino != self._inode or found.st_size < self.end
                if is_other:
                    self.generation += self._inode != -1
                    self._inode = found.st_ino
                    self._kept = b""
                    self.begin = self.end = max(0, found.st_size - MOST_KEPT)
                file.seek(self.end)
                data = file.read(MOST_KEPT)
        except OSError:
            return False
        data = data[: data.rfind(b"\n") + 1]
        if is_other and self.begin:  # in the middle of a line
            cut = data.find(b"\n") + 1
            self.begin += cut
            self.end += cut
            data = data[cut:]
        self._kept += data
        self.end += len(data)
        if len(self._kept) > 2 * MOST_KEPT:
            cut = self._kept.find(b"\n", len(self._kept) - MOST_KEPT) + 1
            self._kept = self._kept[cut:]
            self.begin += cut
        return is_other or bool(data)

    def since(self, place: int) -> str:
        """The lines after `place`; all that is kept where that is no longer known."""
        skipped = place - self.begin
        if not 0 <= skipped <= len(self._kept):
            skipped = 0
        return self._kept[skipped:].decode("utf-8", "replace")
