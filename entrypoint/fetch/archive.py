"""Unpack zip and tar files of unknown origin: nothing lands outside the folder, and nothing fills the disk.

The archive's own headers are not trusted: bytes are counted as they come out, and every name is checked. A single
violation refuses the whole archive.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import itertools
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

from trainer.spec.errors import DataError
from trainer.storage.safe_names import Names, safe_path

CHUNK = 2**20  # bytes
LONGEST_READ = 2**24  # bytes; a tar header that asks for more at once is an attack
DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError, struct.error),
    *(ValueError, NotImplementedError, OverflowError),  # from parsers fed garbage, or an unknown compression
)
OPENERS: dict[bytes, Callable[[BinaryIO], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
FOREIGN = (  # first bytes of what is often named .zip or .tar, and what it is
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"PK\7\x08", "a part of a zip of several files"),
    *((start, "a web page: the address leads to it and not to the file") for start in (b"<!", b"<html", b"<HTML")),
    (b"version https://git-lfs", "a pointer of Git LFS: the file itself was not fetched (git lfs pull)"),
)
REPACK = "Unpack it and name the folder, or pack it again as .zip or .tar."


class ForeignError(DataError):
    """The file is none of the archives that are read."""


@dataclass(frozen=True)
class Limits:
    """Above these limits an archive is taken for an attack, not for a dataset."""

    entries: int = 200_000
    total: int = 100 * 2**30  # bytes, unpacked
    ratio: int = 200  # unpacked bytes for each byte of the archive


USUAL = Limits()
HEAD_BYTES = 512  # of a tar's first entry


@dataclass
class Budget:
    """Counts entries and bytes that an archive of `size` bytes has yielded."""

    size: int
    limits: Limits
    entries: int = 0
    total: int = 0

    def entry(self) -> None:
        self.entries += 1
        if self.entries > self.limits.entries:
            raise DataError(f"it has more than {self.limits.entries:,} entries")

    def take(self, count: int) -> None:
        self.total += count
        if self.total > self.limits.total:
            raise DataError(f"it unpacks to more than {self.limits.total / 2**30:g} GiB")
        if self.total > self.limits.ratio * max(self.size, 1):
            raise DataError(f"it unpacks to more than {self.limits.ratio} times its size (a bomb?)")


def is_litter(path: PurePosixPath) -> bool:
    """Whether a file only serves macOS' Finder or Windows' Explorer."""
    return path.parts[0] == "__MACOSX" or path.name.startswith("._") or path.name in (".DS_Store", "Thumbs.db")


@dataclass(frozen=True)
class Entry:
    """A file or folder in an archive; `open` works until the next entry is requested."""

    name: str
    is_folder: bool
    open: Callable[[], IO[bytes] | io.RawIOBase]


def extract(archive: Path, target: Path, *, limits: Limits = USUAL) -> int:
    """Unpack the files of `archive` into the empty folder `target`; returns how many.

    Archives inside it stay packed. Raises DataError if the archive is refused or damaged (delete `target` then),
    OSError if the volume fails.
    """
    count = 0
    names = Names()
    with _refusing(archive):
        for entry in entries(archive, limits=limits):
            path = names.add(entry.name, folder=entry.is_folder)
            place = target / path
            if entry.is_folder:
                place.mkdir(parents=True, exist_ok=True)
            elif not is_litter(path):
                place.parent.mkdir(parents=True, exist_ok=True)
                with entry.open() as stream, place.open("xb") as file:
                    shutil.copyfileobj(stream, file, CHUNK)
                count += 1
    return count


def has_file(archive: Path, suffixes: tuple[str, ...], *, most: int = 5000, limits: Limits = USUAL) -> bool:
    """Whether one of the first `most` entries ends in one of `suffixes` (lower case). Raises DataError, OSError."""
    with _refusing(archive):
        for entry in itertools.islice(entries(archive, limits=limits), most):
            path = safe_path(entry.name)
            if not entry.is_folder and not is_litter(path) and path.name.lower().endswith(suffixes):
                return True
    return False


def first_names(archive: Path, *, most: int = 5000, limits: Limits = USUAL) -> list[str]:
    """The names of the first `most` files in it. Raises DataError, OSError."""
    with _refusing(archive):
        names = []
        for entry in itertools.islice(entries(archive, limits=limits), most):
            path = safe_path(entry.name)
            if not entry.is_folder and not is_litter(path):
                names.append(str(path))
    return names


def content_root(folder: Path) -> Path:
    """`folder`, or its only subfolder: archives often hold one folder with everything in it."""
    inside = [p for p in folder.iterdir() if not p.name.startswith(".")]
    return content_root(inside[0]) if len(inside) == 1 and inside[0].is_dir() else folder


def entries(archive: Path, *, limits: Limits) -> Iterator[Entry]:
    """The entries of an archive in order, counted against `limits`. Links and devices are refused."""
    with archive.open("rb") as file:
        budget = Budget(archive.stat().st_size, limits)
        magic = file.read(6)
        file.seek(0)
        head = file.read(64).lstrip()
        file.seek(0)
        for start, what in FOREIGN:
            if head.startswith(start):
                raise ForeignError(what)
        if magic.startswith((b"PK\3\4", b"PK\5\6")):
            yield from _zip_entries(file, budget)
            return
        opener = next((o for start, o in OPENERS.items() if magic.startswith(start)), None)
        stream = cast(BinaryIO, opener(file)) if opener else file
        yield from _tar_entries(_Metered(stream, budget), budget)


def _zip_entries(file: BinaryIO, budget: Budget) -> Iterator[Entry]:
    if _announced(file, budget.size) > budget.limits.entries:  # before zipfile reads the whole list into memory
        raise DataError(f"it has more than {budget.limits.entries:,} entries")
    with zipfile.ZipFile(file) as container:
        for info in container.infolist():
            budget.entry()
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"{info.filename!r} is a link or a device")
            if info.flag_bits & 1:
                raise DataError(f"{info.filename!r} is encrypted; make the archive without a password")
            if "\0" in info.orig_filename:
                raise DataError(f"{info.filename!r} hides a part of its name")
            yield Entry(info.filename, info.filename.endswith("/"), partial(_unzipped, container, info, budget))


def _unzipped(container: zipfile.ZipFile, info: zipfile.ZipInfo, budget: Budget) -> _Metered:
    return _Metered(container.open(info), budget)


def _announced(file: BinaryIO, size: int) -> int:
    """How many entries the zip's end record announces; 0 without one."""
    start = max(0, size - 22 - 65535)
    file.seek(start)
    tail = file.read()
    file.seek(0)
    end = tail.rfind(b"PK\5\6")
    count = struct.unpack_from("<H", tail, end + 10)[0] if 0 <= end <= len(tail) - 22 else 0
    if count == 0xFFFF and tail[end - 20 : end - 16] == b"PK\6\7":
        file.seek(struct.unpack_from("<Q", tail, end - 12)[0])
        record = file.read(56)
        file.seek(0)
        return int(struct.unpack_from("<Q", record, 32)[0])
    return int(count)


def _tar_entries(stream: _Metered, budget: Budget) -> Iterator[Entry]:
    # tarfile only reads here. Its own extraction would apply links, owners and modes.
    with tarfile.open(fileobj=stream, mode="r:") as container:
        for member in container:
            budget.entry()
            if not (member.isreg() or member.isdir()) or member.issparse():
                raise DataError(f"{member.name!r} is a link, a device or a sparse file")
            if member.isdir() and member.name.strip("/") in ("", "."):
                continue  # the packed folder itself
            yield Entry(member.name, member.isdir(), partial(_untarred, container, member))


def _untarred(container: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    return cast(IO[bytes], container.extractfile(member))  # None only for entries that are not files


class _Metered(io.RawIOBase):
    """A forward-only stream that counts its bytes against a budget and reads in small pieces."""

    def __init__(self, stream: IO[bytes], budget: Budget) -> None:
        self.stream, self.budget, self.position = stream, budget, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LONGEST_READ:
            raise DataError("its headers are too large")
        data = self.stream.read(size)
        self.position += len(data)
        self.budget.take(len(data))
        return data

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self.position:
            raise DataError("its entries overlap")
        while self.position < offset and self.read(min(CHUNK, offset - self.position)):
            pass
        return self.position

    def close(self) -> None:
        if not self.closed:
            self.stream.close()
        super().close()


@contextmanager
def _refusing(archive: Path) -> Iterator[None]:
    """Turns every error about an archive into a DataError that names it."""
    try:
        yield
    except ForeignError as problem:
        raise DataError(f"{archive.name} is {problem}. {REPACK}") from problem
    except DataError as problem:
        raise DataError(
            f"{archive.name} is refused: {problem}. Nothing of it is used. Pack it again without that."
        ) from problem
    except DAMAGE as problem:
        raise DataError(
            f"{archive.name} is not a complete zip or tar ({type(problem).__name__}: {problem})."
        ) from problem
    except OSError as problem:
        # bz2 reports damage without an errno; a damaged offset makes seek fail with EINVAL.
        if problem.errno not in (None, errno.EINVAL):
            raise
        raise DataError(f"{archive.name} is not a complete archive ({problem}).") from problem
