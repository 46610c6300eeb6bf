"""The bytes of a pack and of its index.

A pack is a row of items: a mark, the item's key (SHA-256), the length of its bytes, and these. The index has the keys,
offsets and lengths again, and a digest of itself. Without an index, or where the pack is longer than its index says,
the items are found by going from one to the next. All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from trainer.storage import atomic
from trainer.storage.read import open_regular, read_regular

PACK_BYTES = 256 << 20  # a pack is closed when it has so many: some hundred images, and minutes of encoding
ENDING = ".pack"
INDEX_ENDING = ".index"
DAMAGED_ENDING = ".damaged"
LARGEST_INDEX = 1 << 30  # bytes: some twenty million items
MARK = b"KilnItm1"
KEY_BYTES = 32
HEAD_BYTES = len(MARK) + KEY_BYTES + 8
ROW = np.dtype([("key", f"V{KEY_BYTES}"), ("offset", "<u8"), ("length", "<u8")])  # offset of the item's own bytes
NO_ROWS = np.zeros(0, ROW)


class PackWriter:
    """Appends items to packs in `folder`, which it makes; a full one is closed, and the next begun."""

    def __init__(self, folder: Path, *, pack_bytes: int = PACK_BYTES) -> None:
        self._folder = folder
        self._pack_bytes = pack_bytes
        self._path: Path | None = None
        self._descriptor = -1
        self._rows: list[tuple[bytes, int, int]] = []
        self._end = 0

    def add(self, key: bytes, item: bytes) -> None:
        """Raises StorageError where the volume is full, read-only or failing."""
        try:
            if self._path is None:
                self._begin()
            assert self._path is not None
            data = memoryview(MARK + key + len(item).to_bytes(8, "little") + item)
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as problem:
            raise self._named(problem) from problem
        self._rows.append((key, self._end + HEAD_BYTES, len(item)))
        self._end += HEAD_BYTES + len(item)
        if self._end >= self._pack_bytes:
            self.close()

    def _named(self, problem: OSError) -> Exception:
        """The same with the folder's name, where the volume is full, read-only or failing."""
        return atomic.storage_error(problem, self._folder) if problem.errno in atomic.VOLUME_ERRORS else problem

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / f"{uuid.uuid4().hex[:16]}{ENDING}"
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._rows = []
        self._end = 0

    def close(self) -> None:
        """Bring what was added to the disk, and write the index. Raises what `add` raises."""
        if self._path is None:
            return
        path, self._path = self._path, None
        try:
            try:
                os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)
            write_index(path, np.array(self._rows, ROW), size=self._end)
        except OSError as problem:
            raise self._named(problem) from problem


def write_index(pack: Path, rows: np.ndarray, *, size: int) -> None:
    """`size`: bytes of the pack that the rows account for."""
    content = size.to_bytes(8, "little") + rows.tobytes()
    with atomic.replacing(pack.with_suffix(INDEX_ENDING), shared=True) as temporary:
        temporary.write_bytes(hashlib.sha256(content).digest() + content)


def read_rows(pack: Path) -> np.ndarray:
    """The items of a pack, without those that are listed as damaged. Raises OSError."""
    size = pack.stat().st_size
    rows, begin = _read_index(pack)
    if begin < size:  # its writer is at work, or was killed
        rows = np.concatenate([rows, _walk(pack, begin, size)])
    rows = rows[rows["offset"] + rows["length"] <= size]  # of a pack that was cut short
    damaged = _read_damaged(pack)
    if damaged:
        rows = rows[[row["key"].tobytes() not in damaged for row in rows]]
    return rows


def read_item(pack: Path, key: bytes, offset: int, length: int) -> bytes:
    """The bytes of an item. Raises ValueError where another item, or none, is in its place; OSError."""
    with open_regular(pack) as file:
        data = os.pread(file.fileno(), HEAD_BYTES + length, offset - HEAD_BYTES)
    if data[:HEAD_BYTES] != MARK + key + length.to_bytes(8, "little") or len(data) < HEAD_BYTES + length:
        raise ValueError(f"{pack} has another item at byte {offset}")
    return data[HEAD_BYTES:]


def list_damaged(pack: Path, keys: Iterable[bytes]) -> None:
    """Let the next start encode these items again. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(pack.with_suffix(DAMAGED_ENDING), flags, 0o666)
    try:
        os.write(descriptor, "".join(f"{key.hex()}\n" for key in keys).encode())
    finally:
        os.close(descriptor)


def _read_damaged(pack: Path) -> set[bytes]:
    try:
        data = read_regular(pack.with_suffix(DAMAGED_ENDING), limit=LARGEST_INDEX)
    except OSError:
        return set()
    lines = data.decode("ascii", "replace").splitlines()
    keys = set()
    for line in lines:
        if len(line) == 2 * KEY_BYTES and all(letter in "0123456789abcdef" for letter in line):
            keys.add(bytes.fromhex(line))
    return keys


def _read_index(pack: Path) -> tuple[np.ndarray, int]:
    """The rows of the index, and the bytes of the pack that they account for: none of an index that is damaged."""
    try:
        data = read_regular(pack.with_suffix(INDEX_ENDING), limit=LARGEST_INDEX)
    except OSError:
        return NO_ROWS, 0
    digest, content = data[:32], data[32:]
    if hashlib.sha256(content).digest() != digest or (len(content) - 8) % ROW.itemsize:
        return NO_ROWS, 0
    return np.frombuffer(content[8:], ROW), int.from_bytes(content[:8], "little")


def _walk(pack: Path, begin: int, size: int) -> np.ndarray:
    """The whole items from byte `begin` on; what follows the first that is none is unknown, and does not count."""
    rows = []
    with open_regular(pack) as file:
        while begin + HEAD_BYTES <= size:
            head = os.pread(file.fileno(), HEAD_BYTES, begin)
            length = int.from_bytes(head[-8:], "little")
            end = begin + HEAD_BYTES + length
            if not head.startswith(MARK) or end > size:
                break
            rows.append((head[len(MARK) : -8], begin + HEAD_BYTES, length))
            begin = end
    return np.array(rows, ROW)
