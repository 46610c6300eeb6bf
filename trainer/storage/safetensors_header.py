"""Read the header of a safetensors file without torch: the one reader of headers.

Damaged and hostile files raise ValueError (tests/fuzz), whose text completes a sentence about the file: "x.safetensors
cannot be used: it was cut off". The format: 8 bytes with the length of a JSON text, little-endian; that text, which
gives each tensor's dtype, shape and place; the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LENGTH_BYTES = 8  # of the number at the start of a file
MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
BITS = {  # of one value of each type that the format has
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # byte of the file
    end: int


@dataclass(frozen=True)
class Header:
    """The header of one file."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]
    data_begin: int  # the byte of the file where the header ends and the tensors begin

    def read(self, entry: Entry, begin: int, size: int) -> bytes:
        """At most `size` bytes of a tensor, starting at its byte `begin`."""
        with self.path.open("rb") as file:
            file.seek(entry.begin + begin)
            return file.read(max(0, min(size, entry.end - entry.begin - begin)))


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises ValueError for a damaged file, and for one that cannot be read."""
    try:
        return parse_header(path)
    except OSError as problem:
        raise ValueError(f"it cannot be read: {problem.strerror}") from problem


def parse_header(path: Path) -> Header:
    """`read_header` for callers that report failing volumes themselves: raises ValueError, and OSError as it is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise ValueError("it is not a safetensors file, or it was cut off")
        text = file.read(length)
    data_begin = LENGTH_BYTES + length
    entries = {}
    try:
        raw = json.loads(text)
        metadata = raw.pop("__metadata__", {})
        for name, value in raw.items():
            entries[name] = _entry(value, data_begin)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, AttributeError, KeyError, TypeError) as problem:
        raise ValueError("its safetensors header is damaged") from problem
    if any(entry.end > size for entry in entries.values()):
        raise ValueError("it was cut off")
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise ValueError("its safetensors header is damaged")
    return Header(path, metadata, entries, data_begin)


def check_layout(header: Header) -> None:
    """Raises ValueError where the tensors do not fill the file one after the other, as the format demands.

    The safetensors library refuses such a file too, but says neither which tensor it is nor how much is too much.
    """
    end = header.data_begin
    before = ""
    for name, entry in sorted(header.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.dtype not in BITS:
            raise ValueError(f"its tensor {name} is of the unknown type {entry.dtype[:20]}")
        size = (math.prod(entry.shape) * BITS[entry.dtype] + 7) // 8
        if entry.end - entry.begin != size:
            raise ValueError(
                f"its tensor {name} has {entry.end - entry.begin} bytes, and {list(entry.shape)} of {entry.dtype} "
                f"take {size}"
            )
        if entry.begin < end:
            raise ValueError(f"its tensors {before} and {name} overlap")
        if entry.begin > end:
            raise ValueError(f"it has {entry.begin - end} bytes before its tensor {name} that belong to no tensor")
        end = entry.end
        before = name
    extra = header.path.stat().st_size - end
    if extra:
        raise ValueError(f"it has {extra} bytes after its last tensor: it is damaged, or not only a safetensors file")


def _entry(value: dict[str, Any], data_begin: int) -> Entry:
    """Raises KeyError or TypeError for a value that describes no tensor."""
    offsets = [data_begin + offset for offset in value["data_offsets"]]
    entry = Entry(value["dtype"], tuple(value["shape"]), *offsets)
    if not isinstance(entry.dtype, str):
        raise TypeError("a type that is no text")
    for number in (*entry.shape, *offsets):
        if type(number) is not int or number < 0:
            raise TypeError("a size that is not a whole number")
    return entry
