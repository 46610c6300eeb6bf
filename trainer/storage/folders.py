"""Folders that outlive the process: a download or an unpacked archive is complete under its name, or not there.

`build_folder` fills a folder under a temporary name beside its place and renames it. A marker in it says how many files
and bytes it was left with, so that a folder that lost some (a power cut, a user's `rm`) is built again. A lock makes
sure that of several jobs with one cache only one builds it; volumes without locks (some network file systems) get
unique temporary names instead.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.spec.errors import StorageError
from trainer.storage import atomic, json_files, locks
from trainer.storage.atomic import storage_error

logger = logging.getLogger(__name__)

MARKER = ".kiln-complete.json"  # in every folder that `build_folder` made


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`, waiting for another holder; the kernel frees it when the process dies.

    Yields False where the volume knows no locks: then nothing is held, and the caller must not share names.
    Raises StorageError if the file cannot be made.
    """

    def log_wait() -> None:
        logger.info("Another process is at work on %s: waiting for it.", path.stem)

    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(locks.file_lock(path, log_wait))
        except OSError as problem:
            raise storage_error(problem, path) from problem
        yield held


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text` in one step, flushed. Raises StorageError."""
    # Not by the process's number: in containers that share a volume these are the same.
    writer = uuid.uuid4().hex[:8]
    try:
        with atomic.replacing(path, writer=writer) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise storage_error(problem, path) from problem


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if the file is missing or damaged."""
    return json_files.read_object(path)


def _measure(folder: Path) -> tuple[int, int]:
    """Number and total bytes of the files below `folder`, without the marker."""
    files = 0
    size = 0
    for path in folder.rglob("*"):
        if path.is_file() and path.name != MARKER:
            files += 1
            size += path.lstat().st_size
    return files, size


def completed(folder: Path) -> dict[str, Any] | None:
    """What `fill` returned for a folder of `build_folder`; None if the folder is missing, or not as it was left.

    Files are counted instead of flushed one by one, which would take minutes: what a power cut lost is built again.
    """
    marker = read_json(folder / MARKER)
    if marker is None or (marker.get("files"), marker.get("bytes")) != _measure(folder):
        return None
    record = marker.get("facts")
    return record if isinstance(record, dict) else None


def build_folder(final: Path, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Make the folder `final` by calling `fill` on an empty one beside it, once among all processes.

    Returns what `fill` returned (JSON: where the files came from), now or in an earlier run. If `fill` raises, nothing
    is left behind. Raises StorageError if the volume fails.
    """
    with locked(final.parent / f".{final.name}.lock") as has_lock:
        record = completed(final)
        if record is not None:
            return record
        temporary = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            if has_lock:  # else another process may be filling one of these
                for stale in [final, *final.parent.glob(f".{final.name}.*.tmp")]:
                    shutil.rmtree(stale, ignore_errors=True)
            temporary.mkdir(parents=True)
            record = fill(temporary)
            files, size = _measure(temporary)
            write_text(temporary / MARKER, json.dumps({"files": files, "bytes": size, "facts": record}))
            _rename_unless_there(temporary, final)
        except OSError as problem:
            raise storage_error(problem, final) from problem
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return record


def _rename_unless_there(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError:
        # Without locks, another process may have been faster: its folder is as good.
        if completed(final) is None:
            raise


@contextlib.contextmanager
def naming(variable: str) -> Iterator[None]:
    """Put the variable that chose the volume before the message of a StorageError."""
    try:
        yield
    except StorageError as problem:
        raise StorageError(
            f"{variable}: {problem} Free some room or choose another place with {variable}."
        ) from problem
