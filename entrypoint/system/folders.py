"""Folders and locks that outlive the process: made beside their place and renamed, never half there."""

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
from trainer.storage import atomic, locks
from trainer.storage.atomic import human_size as human  # noqa: F401 (for the messages of modules that import it here)
from trainer.storage.atomic import storage_error

logger = logging.getLogger(__name__)

MARKER = ".kiln-complete.json"  # in every folder that `build_folder` made; holds what it was made from


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
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def contents(folder: Path) -> tuple[int, int]:
    """Number and total bytes of the files below `folder`, the marker aside."""
    sizes = [p.lstat().st_size for p in folder.rglob("*") if p.is_file() and p.name != MARKER]
    return len(sizes), sum(sizes)


def completed(folder: Path) -> dict[str, Any] | None:
    """The facts that `build_folder` stored for `folder`; None if it is missing or not as it was left.

    Sizes are compared instead of flushing each file when it is written: what a power cut lost is made again.
    """
    marker = read_json(folder / MARKER)
    if marker is None or (marker.get("files"), marker.get("bytes")) != contents(folder):
        return None
    facts = marker.get("facts")
    return facts if isinstance(facts, dict) else None


def build_folder(final: Path, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Make the folder `final` by calling `fill` on an empty one beside it, once among all processes.

    Returns the facts that `fill` returned, now or in an earlier run. Whatever `fill` raises leaves nothing behind.
    Raises StorageError where the volume fails.
    """
    with locked(final.parent / f".{final.name}.lock") as alone:
        if (facts := completed(final)) is not None:
            return facts
        temporary = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            if alone:  # then nobody is using these
                for stale in [final, *final.parent.glob(f".{final.name}.*.tmp")]:
                    shutil.rmtree(stale, ignore_errors=True)
            temporary.mkdir(parents=True)
            facts = fill(temporary)
            files, size = contents(temporary)
            write_text(temporary / MARKER, json.dumps({"files": files, "bytes": size, "facts": facts}))
            _rename_unless_there(temporary, final)
        except OSError as problem:
            raise storage_error(problem, final) from problem
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return facts


def _rename_unless_there(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError:
        if completed(final) is None:  # else another process was faster, where there are no locks: its folder is as good
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
