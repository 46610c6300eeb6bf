"""Install FlashAttention 4 for jobs that ask for it: from the package index into the cache, once.

The images do not include it, because the licence of its compiler (docs/docker.md) restricts redistribution.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrypoint.fetch.packages import pip_install
from entrypoint.system.private_folders import make_private
from trainer.spec.errors import SettingsError, UnreachableError
from trainer.storage.folders import build_folder, completed, locked, naming

log = logging.getLogger(__name__)
LOCK = Path(__file__).resolve().parent / "flash_4.lock"
INSTALL_BYTES = 420 * 2**20  # on disk, including the files that pip unpacks meanwhile
PIP_TIMEOUT_S = 900.0


def version() -> str | None:
    """The version installed in this environment, read from its metadata: importing the package takes seconds."""
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


def folder(cache: Path) -> Path:
    """The folder for the locked versions and this version of Python."""
    version = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]
    return cache / "flash_4" / f"{version}-{sys.implementation.cache_tag}"


def is_installed(cache: Path) -> bool:
    """Whether it is installed in this environment, or in a cache that nobody else can write to."""
    if version() is not None:
        return True
    place = folder(cache)
    return place.is_dir() and make_private(place.parent) is not None and completed(place) is not None


def install(cache: Path) -> None:
    """Install the packages of `LOCK` into the cache, unless they are there.

    Raises UnreachableError, StorageError; SettingsError where others can write to the cache.
    """
    if is_installed(cache):
        return
    log.info("Installing FlashAttention 4 into CACHE_PATH. Its compiler has a licence of its own (docs/docker.md).")
    place = folder(cache)
    if make_private(place.parent) is None and place.parent.is_dir():
        raise SettingsError(
            f"PARAMS_ATTENTION=flash_4: others can write to {place.parent} or a folder above it, and the programs "
            "there are run. Fix: set CACHE_PATH to a folder that only this user can write to, or "
            "PARAMS_ATTENTION=native."
        )
    with naming("CACHE_PATH"):
        build_folder(place, _fill)


def _fill(place: Path) -> dict[str, Any]:
    reason = pip_install(LOCK, place, seconds=PIP_TIMEOUT_S)
    if reason:
        raise UnreachableError(
            f"PARAMS_ATTENTION=flash_4: FlashAttention 4 could not be installed ({reason}). "
            "Let this machine reach a package index that has the locked files, or set PARAMS_ATTENTION=native, which "
            "is a little slower."
        )
    return {}


def environment(cache: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables by which a process finds it, and keeps the kernels that it compiles."""
    place = folder(cache)
    own: list[str] = []
    if version() is None:
        # In a normal installation, a .pth file adds dsl_packages to the path.
        own = [str(place), *map(str, place.glob("*/dsl_packages"))]
    # It locks each cached kernel, and fails on a volume without locks: there, it caches none.
    with naming("CACHE_PATH"), locked(place.parent / ".kernels.lock") as has_locks:
        kernels = {"CACHE_ENABLED": str(int(has_locks)), "CACHE_DIR": str(place.parent / "kernels")}
    path = os.pathsep.join(p for p in (*inherited.get("PYTHONPATH", "").split(os.pathsep), *own) if p)
    return {"PYTHONPATH": path, **{f"FLASH_ATTENTION_CUTE_DSL_{name}": value for name, value in kernels.items()}}
