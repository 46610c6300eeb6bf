"""Folders that outlive the process: a download or an unpacked archive is complete under its name, or not there.

`build_folder` fills a folder under a temporary name beside its place and renames it. A marker in it lists the files
with their digests, so that what a folder has lost (a power cut, a user's `rm`), or has otherwise, is brought again. A
lock makes sure that of several jobs with one cache only one builds it; volumes without locks (some network file
systems) get unique temporary names instead.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.spec.errors import StorageError
from trainer.storage import atomic, digests, json_files, locks
from trainer.storage.atomic import storage_error
from trainer.storage.read import is_regular

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
    try:
        atomic.write_text(path, text, shared=True)
    except OSError as problem:
        raise storage_error(problem, path) from problem


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if the file is missing or damaged."""
    return json_files.read_object(path)


def mark(folder: Path, names: Sequence[str]) -> None:
    """Write into a folder that is filled bit by bit how its files `names` are now. Raises StorageError."""
    _mark(folder, names, {})


def set_aside_changed(folder: Path) -> None:
    """Set aside the files of a folder that are not as `mark` found them; the log says so."""
    marker = json_files.read_sealed(folder / MARKER, unsealed=()) or {}
    for name, row in marker.get("list", {}).items():
        if not _is_as_left(folder / name, row):
            json_files.set_aside_unless(folder / name, lambda _: False, "has changed since it was made")


def _names(folder: Path) -> list[str]:
    """Every file below `folder` but the marker, relative to it."""
    paths = [path for path in folder.rglob("*") if is_regular(path) and path.name != MARKER]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _mark(folder: Path, names: Sequence[str], facts: dict[str, Any]) -> None:
    """Write into the folder how it was left: of each file the size, the times of its last changes, and the digest."""
    listed = {}
    for name in names:
        listed[name] = [*_stamp(folder / name), digests.sha256(folder / name)]
    write_text(folder / MARKER, json.dumps(json_files.sealed({"facts": facts, "list": listed})))


def _stamp(path: Path) -> list[int]:
    found = path.lstat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _is_as_left(path: Path, row: list[Any]) -> bool:
    """Whether a file is as `_mark` found it. It is read only where its times have changed."""
    try:
        *stamp, sha256 = row
        now = _stamp(path)
        return now == stamp or (now[0] == stamp[0] and digests.sha256(path) == sha256)
    except (OSError, LookupError, TypeError):
        return False


def completed(folder: Path) -> dict[str, Any] | None:
    """What `fill` returned for a folder of `build_folder`; None if the folder is missing, or not as it was left.

    Files are not flushed one by one, which would take minutes: what a power cut lost is brought again. Further files
    are a user's, and stay.
    """
    marker = json_files.read_sealed(folder / MARKER, unsealed=("files", "bytes", "facts")) or {}
    record = marker.get("facts")
    listed = marker.get("list")
    if not isinstance(record, dict):
        return None
    if listed is None:  # of an older version
        sizes = [path.lstat().st_size for path in folder.rglob("*") if is_regular(path) and path.name != MARKER]
        return record if (marker.get("files"), marker.get("bytes")) == (len(sizes), sum(sizes)) else None
    if isinstance(listed, dict) and all(_is_as_left(folder / name, row) for name, row in listed.items()):
        return record
    return None


def build_folder(final: Path, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Make the folder `final` by calling `fill` on an empty one beside it, once among all processes.

    Returns what `fill` returned (JSON: where the files came from), now or in an earlier run. Where `final` is there and
    not as it was left, what is missing is brought again, and what has changed is set aside. If `fill` raises, nothing
    is left behind. Raises StorageError if the volume fails.
    """
    with locked(final.parent / f".{final.name}.lock") as has_lock:
        record = completed(final)
        if record is not None:
            _renew_times(final, record)
            return record
        writer = "" if has_lock else f"{uuid.uuid4().hex[:8]}."
        temporary = final.parent / f".{final.name}.{writer}kiln.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
            temporary.mkdir(parents=True)
            record = fill(temporary)
            _mark(temporary, _names(temporary), record)
            _put_in_place(temporary, final, record)
        except OSError as problem:
            raise storage_error(problem, final) from problem
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return record


def _renew_times(folder: Path, facts: dict[str, Any]) -> None:
    """Note the times anew where they have changed, as in a copy of the volume: else each start reads all files."""
    listed = (read_json(folder / MARKER) or {}).get("list") or {}
    if any(_stamp(folder / name) != row[:-1] for name, row in listed.items()):
        _mark(folder, list(listed), facts)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _put_in_place(temporary: Path, final: Path, facts: dict[str, Any]) -> None:
    """Rename the folder; where `final` is there, move the files into it that it lacks, or has otherwise."""
    json_files.set_aside_unless(final, _is_folder, "is not a folder")
    if not final.exists():
        try:
            temporary.rename(final)
            return
        except OSError:
            # Without locks, another process may have been faster.
            if not final.is_dir():
                raise
    if completed(final) is not None:
        return
    logger.warning("%s is not as it was left. It is put right, and what has changed in it is set aside.", final)
    names = _names(temporary)
    for name in names:
        _put_file_in_place(temporary / name, final, name)
    json_files.set_aside_unless(final / MARKER, is_regular, "is not a file")
    _mark(final, names, facts)


def _put_file_in_place(file: Path, final: Path, name: str) -> None:
    target = final / name
    if is_regular(target) and digests.sha256(target) == digests.sha256(file):
        return
    for folder in reversed(PurePosixPath(name).parents[:-1]):
        json_files.set_aside_unless(final / folder, _is_folder, "is not a folder")
    json_files.set_aside_unless(target, lambda _: False, "has changed")
    target.parent.mkdir(parents=True, exist_ok=True)
    file.rename(target)


@contextlib.contextmanager
def naming(variable: str) -> Iterator[None]:
    """Put the variable that chose the volume before the message of a StorageError."""
    try:
        yield
    except StorageError as problem:
        raise StorageError(
            f"{variable}: {problem} Free some room or choose another place with {variable}."
        ) from problem


def nearest_existing(place: Path) -> Path:
    """`place`, or the nearest folder above it that exists, where it will be made. It makes nothing and never raises."""
    place = Path(os.path.expanduser(place)).absolute()  # noqa: PTH111 (Path's raises for an unknown user)
    while not os.path.exists(place):  # noqa: PTH110 (Path's raises where a name is too long, or a folder is closed)
        place = place.parent
    return place
