"""Read files that users bring. A folder may hold anything: devices, FIFOs, sockets, sparse files of a terabyte."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

LONGEST_READ = 1 << 26  # bytes at once
LARGEST_TEXT = 1 << 26  # of a text that no other limit is known for
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def special_kind(mode: int) -> str | None:
    """What a file is (`st_mode`) if reading it would be wrong: "a FIFO" for example. None: a regular file."""
    if stat.S_ISREG(mode):
        return None
    return KINDS.get(stat.S_IFMT(mode), "not a regular file")


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file, open for reading. Never waits, as `open` does at a FIFO.

    Raises OSError, whose `strerror` is the reason: "a FIFO, not a file".
    """
    # O_NONBLOCK: opening a FIFO would wait for a writer. It changes nothing for a regular file.
    # O_NOCTTY: opening a terminal must not make it ours.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        kind = special_kind(os.fstat(descriptor).st_mode)
        if kind is not None:
            raise OSError(errno.EINVAL, f"{kind}, not a file", str(path))
        return os.fdopen(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def has_link(path: Path) -> bool:
    """Whether the file, or a folder on the way to it, is a symbolic link: it may lead anywhere."""
    return os.path.realpath(path) != str(path.absolute())


def open_unlinked(path: Path) -> io.BufferedReader:
    """As `open_regular`, and raises OSError (errno ELOOP) as well where `has_link`, also of a file that changes now."""
    file = open_regular(path)
    try:
        here, opened = os.lstat(path), os.fstat(file.fileno())
        if has_link(path) or (here.st_dev, here.st_ino) != (opened.st_dev, opened.st_ino):
            raise OSError(errno.ELOOP, "a link, not a file", str(path))
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path, *, limit: int, links: bool = True) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. `links`: whether its name may have a link in it.

    Raises OSError as `open_regular`; where the file is larger, "larger than 1 MiB" (errno EFBIG).
    """
    with open_regular(path) if links else open_unlinked(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise _too_large(path, limit)
        # One byte more than allowed: a file may grow meanwhile, and those of /proc have no size.
        data = _read(file.fileno(), limit + 1)
    if len(data) > limit:
        raise _too_large(path, limit)
    return data


def read_span(path: Path, offset: int, length: int) -> bytes:
    """`length` bytes of a regular file from `offset` on. Raises OSError; where there are fewer, too (errno EIO)."""
    with open_regular(path) as file:
        pieces = []
        while length > 0:
            piece = os.pread(file.fileno(), min(length, LONGEST_READ), offset)
            if not piece:
                raise OSError(errno.EIO, "the file is shorter than it was", str(path))
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
    return b"".join(pieces)


def files_below(folder: Path) -> list[Path]:
    """All regular files in a folder and in its folders, however deep; links to folders are not followed."""
    found = []
    folders = [str(folder)]
    for place in folders:  # pathlib's rglob calls itself once a level
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file():
                    found.append(Path(entry.path))
    return found


def read_text(path: Path, *, limit: int = LARGEST_TEXT) -> str:
    """A regular file as UTF-8. Raises OSError as `read_regular`, ValueError for other bytes."""
    return read_regular(path, limit=limit).decode("utf-8")


def is_regular(path: Path) -> bool:
    """Whether a name is, or leads to, a regular file. Unlike `Path.is_file`, never raises."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _read(descriptor: int, count: int) -> bytes:
    pieces = []
    while count > 0:
        piece = os.read(descriptor, min(count, LONGEST_READ))
        if not piece:
            break
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _too_large(path: Path, limit: int) -> OSError:
    size = f"{limit / 2**20:g} MiB" if limit < 1 << 30 else f"{limit / 2**30:g} GiB"
    return OSError(errno.EFBIG, f"larger than {size}", str(path))
