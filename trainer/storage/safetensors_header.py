"""Read the header of a safetensors file without torch: the one reader of headers.

Damaged and hostile files raise ValueError (tests/fuzz), whose text completes a sentence about the file: "x.safetensors
cannot be used: it was cut off". The format: 8 bytes with the length of a JSON text, little-endian; that text, which
gives each tensor's dtype, shape and place; the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.spec.values import printable
from trainer.storage.read import special_kind

LENGTH_BYTES = 8  # of the number at the start of a file
MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
OUTLINE = "kiln_outline"  # a key of __metadata__: the file has a header, and a hole in the place of its tensors
MOST_DIGITS = 30  # of a number in a header
MOST_SIDES = 8  # of a tensor; a convolution's weight has four
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


def parse_header(path: Path, *, size: int | None = None) -> Header:
    """`read_header` for callers that report failing volumes themselves: raises ValueError, and OSError as it is.

    `size`: of the whole file in bytes, where only its beginning is in `path`.
    """
    # O_NONBLOCK: opening a FIFO would wait for a writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if kind := special_kind(status.st_mode):
            raise ValueError(f"it is {kind} and not a file")
        size = status.st_size if size is None else size
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise ValueError("it is not a safetensors file, or it was cut off")
        text = file.read(length)
    data_begin = LENGTH_BYTES + length
    entries = {}
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles, parse_int=_whole_number)
        if not isinstance(raw, dict):
            raise ValueError("its safetensors header is no JSON object")
        metadata = raw.pop("__metadata__", {})
        for name, value in raw.items():
            entries[name] = _entry(name, value, data_begin)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as problem:
        raise ValueError("its safetensors header is damaged: it is not JSON, or nested too deeply") from problem
    beyond = [name for name, entry in entries.items() if entry.end > size]
    if beyond:
        raise ValueError(f"it was cut off: it ends before its tensor {printable(beyond[0])}")
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise ValueError("its safetensors header is damaged: __metadata__ is no table of texts")
    return Header(path, metadata, entries, data_begin)


def _whole_number(digits: str) -> int:
    """Raises ValueError for a number that no file needs; Python refuses those of 4,300 digits in other words."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"its safetensors header is damaged: it has a number of {len(digits)} digits")
    return int(digits)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that is there twice, of which readers take different ones."""
    found = dict(pairs)
    if len(found) != len(pairs):
        count = Counter(name for name, _ in pairs)
        raise ValueError(f"its safetensors header has {printable(max(count, key=lambda name: count[name]))} twice")
    for text in (*found, *found.values()):
        if isinstance(text, str) and not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("its safetensors header is damaged: it has half of a character")
    return found


def check_is_here(header: Header) -> None:
    """Raises ValueError for an outline, whose header may be planned with, and whose tensors are zeros."""
    if OUTLINE in header.metadata:
        raise ValueError("it was never downloaded: only its header is here. Fix: name its address again")


def check_layout(header: Header) -> None:
    """Raises ValueError where the tensors do not fill the file one after the other, as the format demands.

    The safetensors library refuses such a file too, but says neither which tensor it is nor how much is too much.
    """
    end = header.data_begin
    before = ""
    for name, entry in sorted(header.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.dtype not in BITS:
            raise ValueError(f"its tensor {printable(name)} is of the unknown type {printable(entry.dtype[:20])}")
        size, odd_bits = divmod(math.prod(entry.shape) * BITS[entry.dtype], 8)
        if odd_bits:
            raise ValueError(f"its tensor {printable(name)} of {entry.dtype} does not end with a byte")
        if entry.end - entry.begin != size:
            raise ValueError(
                f"its tensor {printable(name)} has {entry.end - entry.begin} bytes, and {list(entry.shape)} of "
                f"{entry.dtype} take {size}"
            )
        if entry.begin < end:
            raise ValueError(f"its tensors {printable(before)} and {printable(name)} overlap")
        if entry.begin > end:
            extra = entry.begin - end
            raise ValueError(f"it has {extra} bytes before its tensor {printable(name)} that belong to no tensor")
        end = entry.end
        before = name
    after = header.path.stat().st_size - end
    if after:
        raise ValueError(f"it has {after} bytes after its last tensor: it is damaged, or not only a safetensors file")


def _entry(name: str, value: Any, data_begin: int) -> Entry:
    """Raises ValueError for a value that describes no tensor."""
    damaged = f"its safetensors header is damaged: its tensor {printable(name)} has no"
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        raise ValueError(f"{damaged} type")
    if not _are_sizes(value.get("shape"), MOST_SIDES):
        raise ValueError(f"{damaged} shape of whole numbers")
    offsets: Any = value.get("data_offsets")
    if not _are_sizes(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{damaged} place in the file")
    return Entry(value["dtype"], tuple(value["shape"]), data_begin + offsets[0], data_begin + offsets[1])


def _are_sizes(numbers: Any, most: int) -> bool:
    """Whether a value is a list of at most `most` whole numbers that fit into 64 bits and are not negative."""
    if not isinstance(numbers, list) or len(numbers) > most:
        return False
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)
