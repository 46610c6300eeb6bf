"""FlashAttention 4 for those who ask for it: from the package index into the cache, once.

It is not in the images: it needs NVIDIA's CUTLASS DSL, whose licence does not let everybody pass it on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrypoint.files import build_folder, completed, naming
from trainer.errors import UnreachableError

log = logging.getLogger(__name__)
LOCK = Path(__file__).resolve().parent / "flash_4.lock"
LICENCE = "https://docs.nvidia.com/cutlass/latest/media/docs/pythonDSL/license.html"
BYTES = 420 * 2**20  # what the packages take, with what pip keeps meanwhile
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
    log.info("FlashAttention 4 is brought to CACHE_PATH, with a compiler under a licence of its own: %s", LICENCE)
    with naming("CACHE_PATH"):
        build_folder(folder(cache), _fill)


def _fill(place: Path) -> dict[str, Any]:
    how = ("--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *how, "--target", str(place), "-r", str(LOCK)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)  # noqa: S603
        why = "" if done.returncode == 0 else done.stderr.strip()[-500:] or f"pip ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        why = f"pip did not end in {WAIT_S:.0f} s"
    if why:
        raise UnreachableError(
            f"PARAMS_ATTENTION=flash_4: FlashAttention 4 could not be brought ({why}). "
            "Fix: let this machine reach a package index, or set PARAMS_ATTENTION=native, which is a little slower."
        )
    return {}


def environment(cache: Path, given: Mapping[str, str]) -> dict[str, str]:
    """What a process needs to find it, and to keep the kernels that it compiles."""
    place = folder(cache)
    own = [] if version() else [str(place), str(place / "nvidia_cutlass_dsl" / "dsl_packages")]
    kernels = {"CACHE_ENABLED": "1", "CACHE_DIR": str(cache / "flash_4" / "kernels")}
    path = os.pathsep.join(p for p in (*given.get("PYTHONPATH", "").split(os.pathsep), *own) if p)
    return {"PYTHONPATH": path, **{f"FLASH_ATTENTION_CUTE_DSL_{name}": value for name, value in kernels.items()}}
