"""Read the header of a safetensors file without torch. Damaged and hostile files raise ValueError."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

MAX_HEADER = 100_000_000  # bytes, as in the safetensors library


# ---- what a file is, from its header


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # byte of the file
    end: int


@dataclass(frozen=True)
class Header:
    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]

    def read(self, entry: Entry, begin: int, size: int) -> bytes:
        """`size` bytes of a tensor at most, from its byte `begin` on."""
        with self.path.open("rb") as file:
            file.seek(entry.begin + begin)
            return file.read(max(0, min(size, entry.end - entry.begin - begin)))


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises ValueError with what is wrong with it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError("it is not a safetensors file, or it was cut off")
            raw = json.loads(file.read(length))
        metadata = raw.pop("__metadata__", {})
        entries = {
            key: Entry(e["dtype"], tuple(e["shape"]), *(8 + length + offset for offset in e["data_offsets"]))
            for key, e in raw.items()
        }
        if any(type(n) is not int or n < 0 for e in entries.values() for n in (*e.shape, e.begin, e.end)):
            raise TypeError("a size that is not a whole number")
    except OSError as problem:
        raise ValueError(f"it cannot be read: {problem.strerror}") from problem
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, AttributeError, KeyError, TypeError) as problem:
        raise ValueError("its safetensors header is damaged") from problem
    if any(e.end > size for e in entries.values()):
        raise ValueError("it was cut off")
    return Header(path, metadata, entries)
