"""Atomic writes: a file is written beside its place, flushed, and renamed. A name is never half a file.

The order is what survives a power cut: the bytes are on the disk before the name is, and the folder, which holds the
name, is flushed last.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trainer.spec.errors import StorageError
from trainer.spec.log_lines import RAW
from trainer.storage import json_files

# The volume's fault, not the program's: full, over quota, failing, read-only.
VOLUME_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
NO_RENAME = (errno.ENOTSUP, errno.ENOSYS)  # mounts of a bucket that keep only whole, new files
# Folders of some network volumes and buckets cannot be flushed: there a name is as safe as the volume makes it.
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
TEMPORARY = re.compile(r"\.(?P<stem>.+?)(\.[0-9a-f]{8,16})?\.kiln\.tmp(?P<suffix>(\.[^.]+)?)", re.DOTALL)
GIB = 2**30
MIB = 2**20


@contextlib.contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix); flushed and renamed over `path` if the body succeeds.

    Makes the folder if needed. Sets aside what has the name and is no file. `shared`: other processes may write the
    same file at the same time; elsewhere a lock keeps them out. Raises StorageError where the volume is full, read-only
    or failing.
    """
    # Not by the process's number: in containers that share a volume these are the same.
    temporary = temporary_of(path, writer=uuid.uuid4().hex[:8] if shared else "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_room(temporary)
        yield temporary
        flush(temporary)
        json_files.set_aside_unless(path, _may_be_replaced, "is not a file")
        temporary.rename(path)
        flush(path.parent)
    except SafetensorError as problem:  # the library's writer hides the error number
        raise StorageError(f"{path}: {problem}.") from problem
    except OSError as problem:
        if problem.errno in VOLUME_ERRORS:
            raise storage_error(problem, path) from problem
        if problem.errno in NO_RENAME:
            text = f"{path}: {problem.strerror}. This volume cannot rename files, and without that no save is safe."
            raise StorageError(f"{text} Fix: put OUTPUT_PATH and CACHE_PATH on another (docs/engines.md).") from problem
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_of(path: Path, *, writer: str = "") -> Path:
    """The name under which `path` is written. A user gives no file such a name, and it says whose place it is."""
    return path.with_name(f".{path.stem}.{writer}{'.' if writer else ''}kiln.tmp{path.suffix}")


def remove_leftovers(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove the temporary files that a killed process left in `folder` of the files that it was to write.

    `is_ours`: whether a job writes a file of this name there. Only for the process that holds the folder's lock: those
    of a running process would go too.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208 (names are all that is needed)
    except OSError:
        return
    for name in names:
        match = TEMPORARY.fullmatch(name)
        if match and is_ours(match["stem"] + match["suffix"]):
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def _may_be_replaced(path: Path) -> bool:
    """Whether a rename puts a file in the place of what is there: of a link it replaces the link alone."""
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def _make_room(temporary: Path) -> None:
    """Free the name of a temporary file. Nothing is written into what stands there: it may be a link, or a FIFO."""
    try:
        temporary.unlink(missing_ok=True)
    except OSError:
        if not temporary.is_dir():
            raise
        json_files.set_aside(temporary, "is not a file")


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Replace the file `path` by `text` (UTF-8) in one step. `shared`: see `replacing`."""
    with replacing(path, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Replace the file `path` by these texts (UTF-8), one after the other, which bring their own ends of lines.

    What UTF-8 has no bytes for becomes `?`. All of it is never in memory: a report may name a million images.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace", newline="") as file:
        file.writelines(lines)


def write_json(path: Path, value: Any) -> None:
    """Replace the file `path` by `value` as JSON in one step, which a terminal may show."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # JSON's own escapes, so that nothing is lost. UTF-8 has none for a lone half of a letter, which another program's
    # JSON may have.
    write_text(path, RAW.sub(lambda found: json.dumps(found[0])[1:-1], text) + "\n")


def flush(path: Path) -> None:
    """Force a file or folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in NO_FLUSH or not path.is_dir():
            raise
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
