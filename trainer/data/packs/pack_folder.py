"""The packs of a folder together: which of them has an item. Some 40 bytes of memory for each item."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.packs import pack_file
from trainer.storage.read import is_regular

ENTRY = np.dtype([("first", ">u8"), ("second", ">u8"), ("pack", "<u4"), ("offset", "<u8"), ("length", "<u8")])


@dataclass(frozen=True)
class PackedItem:
    """Where an item is."""

    pack: Path
    key: bytes
    offset: int
    length: int

    def read(self) -> bytes:
        """Its bytes. Raises ValueError where something else is in its place, and OSError."""
        return pack_file.read_item(self.pack, self.key, self.offset, self.length)


class PackFolder:
    """The items of all packs in `folder`. Several threads may ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._packs: list[Path] = []
        self._known: dict[str, int] = {}  # name of a closed pack, or of one that may grow → its size when it was read
        self._parts: list[np.ndarray] = []  # entries of each of `_packs`
        self._entries = np.zeros(0, ENTRY)  # of all, sorted
        self._firsts = np.zeros(0, "<u8")
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Take in what has been written since, also by other processes."""
        with self._lock:
            found = sorted(self.folder.glob(f"*{pack_file.ENDING}"))
            changed = False
            for pack in found:
                try:
                    if not is_regular(pack):
                        continue
                    size = pack.stat().st_size
                    if self._known.get(pack.name) != size:
                        self._add(pack, pack_file.read_rows(pack), size)
                        changed = True
                except OSError:  # removed meanwhile
                    continue
            if changed:
                self._sort()

    def _sort(self) -> None:
        entries = np.concatenate(self._parts)
        self._entries = entries[np.argsort(entries["first"], kind="stable")]
        self._firsts = self._entries["first"].astype("<u8")

    def _add(self, pack: Path, rows: np.ndarray, size: int) -> None:
        number = self._packs.index(pack) if pack in self._packs else len(self._packs)
        entries = np.zeros(len(rows), ENTRY)
        keys = np.frombuffer(rows["key"].tobytes(), ">u8").reshape(-1, pack_file.KEY_BYTES // 8)
        entries["first"], entries["second"] = keys[:, 0], keys[:, 1]
        entries["pack"], entries["offset"], entries["length"] = number, rows["offset"], rows["length"]
        if number == len(self._packs):
            self._packs.append(pack)
            self._parts.append(entries)
        else:
            self._parts[number] = entries
        self._known[pack.name] = size

    def find(self, key: bytes) -> PackedItem | None:
        """The item with this key, as far as it is known since the last `refresh`."""
        first, second = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:16], "big")
        firsts, entries = self._firsts, self._entries
        place = int(np.searchsorted(firsts, np.uint64(first)))
        while place < len(firsts) and firsts[place] == first:
            entry = entries[place]
            if entry["second"] == second:
                return PackedItem(self._packs[entry["pack"]], key, int(entry["offset"]), int(entry["length"]))
            place += 1
        return None

    def __len__(self) -> int:
        return len(self._entries)
