"""Where the files of a tar are. Its headers come from anyone: nothing in them is believed before it is checked."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from trainer.spec.errors import DataError
from trainer.storage.read import open_regular
from trainer.storage.safe_names import safe_path

LONGEST_HEADER = 1 << 24  # bytes; a header that is larger is an attack
MOST_MEMBERS = 2_000_000  # of one shard
HEAD_BYTES = 512  # of a member, and of the mark at the end


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar. `offset`: of its first byte there."""

    name: str
    offset: int
    length: int


@dataclass
class Members:
    """The files of a tar in their order; what is left out, with the reason; and what is damaged, if something is."""

    files: list[Member] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    damage: str = ""


def read_members(path: Path) -> Members:
    """All that can be read of a tar's headers; what follows damage is not known. Raises OSError."""
    found = Members()
    names: set[str] = set()
    with open_regular(path) as file:
        bounded = _Bounded(file)
        try:
            with tarfile.open(fileobj=bounded, mode="r:") as container:
                for header in container:
                    container.members = []  # type: ignore[attr-defined]  # or it would keep all of them
                    _add(header, found, names)
                    if len(names) > MOST_MEMBERS:
                        raise DataError(f"it has more than {MOST_MEMBERS:,} files")
                end = container.offset
            file.seek(end)
            found.damage = _what_follows(file.read(HEAD_BYTES), is_first=end == 0)
        except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, DataError) as problem:
            found.damage = f"it is damaged after {len(found.files)} files ({problem})"
    return found


def _add(header: tarfile.TarInfo, found: Members, names: set[str]) -> None:
    if header.isdir():
        return
    if not header.isreg() or header.issparse():
        found.left_out.append((header.name, "a link, a device or a sparse file"))
        return
    try:
        name = str(safe_path(header.name))
    except DataError as problem:
        found.left_out.append((header.name[:60], str(problem)))
        return
    if name in names:
        found.left_out.append((name, "the shard has this name twice; the first is used"))
        return
    names.add(name)
    found.files.append(Member(name, header.offset_data, header.size))


def _what_follows(block: bytes, *, is_first: bool) -> str:
    """The damage, by the bytes after the last file. tarfile takes a header that is no header for the end."""
    if is_first:
        return "it is empty, or no tar"
    if len(block) < HEAD_BYTES:
        return "it is cut short: its end mark is missing"
    return "what follows its last file is no tar" if block.strip(b"\0") else ""


class _Bounded(io.RawIOBase):
    """A file of which no more is read at once than a header takes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LONGEST_HEADER:
            raise DataError("its headers are too large")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
