"""FlashAttention 4 for those who ask for it: from the package index into the cache, once.

It is not in the images: it needs a compiler whose licence (docs/docker.md) does not let everybody pass it on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrypoint.system.environment import child_environment
from entrypoint.system.folders import build_folder, completed, locked, naming
from trainer.spec.errors import UnreachableError

log = logging.getLogger(__name__)
LOCK = Path(__file__).resolve().parent / "flash_4.lock"
BYTES = 420 * 2**20  # what the packages take, with the files that pip unpacks
WAIT_S = 900.0


def version() -> str | None:
    """Of the package in this environment, found without importing it, which takes seconds."""
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


def folder(cache: Path) -> Path:
    """Where these versions are, for this version of Python."""
    version = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]
    return cache / "flash_4" / f"{version}-{sys.implementation.cache_tag}"


def is_installed(cache: Path) -> bool:
    """Whether it is there: in this environment, or in the cache."""
    return version() is not None or completed(folder(cache)) is not None


def install(cache: Path) -> None:
    """Bring what `LOCK` names into the cache, unless it is there. Raises UnreachableError, StorageError."""
    if is_installed(cache):
        return
    log.info("FlashAttention 4 is brought to CACHE_PATH, with a compiler under a licence of its own (docs/docker.md).")
    with naming("CACHE_PATH"):
        build_folder(folder(cache), _fill)


def _fill(place: Path) -> dict[str, Any]:
    # What Python would compile when it is first imported would make the folder another than it was left.
    how = ("--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:", "--no-cache-dir", "--compile")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *how, "--target", str(place)]
    command += ["-r", str(LOCK)]
    try:
        with tempfile.TemporaryDirectory(dir=place) as room:  # /tmp may be small
            own = child_environment(os.environ) | {"TMPDIR": room}
            done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=WAIT_S, check=False)  # noqa: S603
        said = done.stderr.strip()  # first that it tries again, then why it does not
        why = "" if done.returncode == 0 else (said.partition("ERROR: ")[2] or said or f"pip: {done.returncode}")[:500]
    except subprocess.TimeoutExpired:
        why = f"pip did not end in {WAIT_S:.0f} s"
    if why:
        raise UnreachableError(
            f"PARAMS_ATTENTION=flash_4: FlashAttention 4 could not be brought ({why}). "
            "Fix: let this machine reach a package index with the locked files, or set PARAMS_ATTENTION=native, which "
            "is a little slower."
        )
    return {}


def environment(cache: Path, given: Mapping[str, str]) -> dict[str, str]:
    """What a process needs to find it, and to keep the kernels that it compiles."""
    place = folder(cache)
    own = [] if version() else [str(place), *map(str, place.glob("*/dsl_packages"))]  # the second: by a .pth, elsewhere
    # It locks each kernel that it keeps, and gives up where it cannot.
    with naming("CACHE_PATH"), locked(place.parent / ".kernels.lock") as there:
        kernels = {"CACHE_ENABLED": str(int(there)), "CACHE_DIR": str(place.parent / "kernels")}
    path = os.pathsep.join(p for p in (*given.get("PYTHONPATH", "").split(os.pathsep), *own) if p)
    return {"PYTHONPATH": path, **{f"FLASH_ATTENTION_CUTE_DSL_{name}": value for name, value in kernels.items()}}
