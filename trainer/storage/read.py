"""Read files that users bring. A folder may hold anything: devices, FIFOs, sockets, sparse files of a terabyte."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

LONGEST_READ = 1 << 26  # bytes at once
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


def read_regular(path: Path, *, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. Never waits, as `read_bytes` does at a FIFO.

    Raises OSError, whose `strerror` is the reason: "a FIFO, not a file", or "larger than 1 MiB" (errno EFBIG).
    """
    # O_NONBLOCK: opening a FIFO would wait for a writer. It changes nothing for a regular file.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        kind = special_kind(status.st_mode)
        if kind is not None:
            raise OSError(errno.EINVAL, f"{kind}, not a file", str(path))
        if status.st_size > limit:
            raise _too_large(path, limit)
        # One byte more than allowed: a file may grow meanwhile, and those of /proc have no size.
        data = _read(descriptor, limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise _too_large(path, limit)
    return data


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
