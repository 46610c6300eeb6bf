"""Files that outlive the process: written beside their place, flushed, and renamed. A name is never half a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trainer.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix); flushed and renamed over `path` if the body succeeds.

    Raises StorageError where the volume is full, read-only or failing.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        temporary.rename(path)
        flush(path.parent)
    except (OSError, SafetensorError) as problem:
        if isinstance(problem, SafetensorError):
            raise StorageError(f"{path}: {problem}.") from problem
        if problem.errno in FULL:
            raise StorageError(f"{path}: {problem.strerror}.") from problem
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left of files that it was writing, here and one folder down. For its owner alone."""
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
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Force a file or folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free(path: Path) -> str:
    """The room on the volume of `path`, in words."""
    try:
        return f"{shutil.disk_usage(path).free / 2**20:.0f} MiB"
    except OSError:
        return "unknown room"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value in its canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def weights_digest(folder: Path) -> str:
    """A fingerprint of the safetensors and JSON files in `folder`, in milliseconds even for 10 GB of weights.

    Hashes each header (names, shapes, offsets) and the first and last 512 bytes of every tensor, which another
    training of the same architecture does not share.
    """
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt", ".model")):
        total.update(f"{path.relative_to(folder)}:{path.stat().st_size}\n".encode())
        if path.suffix == ".safetensors":
            _feed(path, total)
        else:
            total.update(path.read_bytes())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """The same fingerprint of one safetensors file."""
    total = hashlib.sha256()
    _feed(path, total)
    return total.hexdigest()


def _feed(path: Path, total: hashlib._Hash) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        total.update(header)
        for name, entry in sorted(json.loads(header).items()):
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                file.seek(begin)
                total.update(file.read(min(512, end - begin)))
                file.seek(max(begin, end - 512))
                total.update(file.read(min(512, end - begin)))
