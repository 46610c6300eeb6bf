"""Atomic writes: a file is written beside its place, flushed, and renamed. A name is never half a file.

The order is what survives a power cut: the bytes are on the disk before the name is, and the folder, which holds the
name, is flushed last.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trainer.spec.errors import StorageError

# The volume's fault, not the program's: full, over quota, failing, read-only.
VOLUME_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
GIB = 2**30
MIB = 2**20


@contextlib.contextmanager
def replacing(path: Path, *, writer: str | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix); flushed and renamed over `path` if the body succeeds.

    Makes the folder if needed. `writer` tells the temporary files of several writers apart; None: by the number of the
    process, which is enough where a lock keeps other machines out. Raises StorageError where the volume is full,
    read-only or failing.
    """
    temporary = path.with_name(f".{path.stem}.{writer or os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        temporary.rename(path)
        flush(path.parent)
    except SafetensorError as problem:  # the library's writer hides the error number
        raise StorageError(f"{path}: {problem}.") from problem
    except OSError as problem:
        if problem.errno in VOLUME_ERRORS:
            raise storage_error(problem, path) from problem
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a process that was killed, here and one folder down.

    Only for the process that holds the folder's lock: those of a running process would go too.
    """
    for orphan in [*folder.glob(".*.tmp*"), *folder.glob("*/.*.tmp*")]:
        if orphan.is_dir():
            shutil.rmtree(orphan, ignore_errors=True)
        else:
            orphan.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text` (UTF-8) in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace the file `path` by `value` as JSON in one step."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        # A lone half of a letter, from JSON that somebody else wrote: UTF-8 has none, an escape has.
        text = json.dumps(value, indent=2)
    write_text(path, text + "\n")


def flush(path: Path) -> None:
    """Force a file or folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(problem: OSError, path: Path) -> StorageError:
    """An error of the system as a StorageError that names `path` and the free space there."""
    return StorageError(f"{path}: {problem.strerror or problem}; {free_space(path)}.")


def free_space(path: Path) -> str:
    """For messages: "3.2 GiB are free there", of the volume of `path` or of its folder."""
    try:
        free = shutil.disk_usage(path if path.exists() else path.parent).free
    except OSError:
        return "the volume does not answer"
    return f"{human_size(free)} are free there"


def human_size(size: float) -> str:
    """`size` in bytes as a message gives it: "3.2 GiB" or "512 MiB"."""
    if size >= GIB:
        return f"{size / GIB:.1f} GiB"
    return f"{size / MIB:.0f} MiB"
