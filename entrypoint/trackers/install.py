"""The libraries of trackers come from the package index into the cache, once, by a lock with hashes for each.

The images have none of them: they are large (wandb 100 MB, trackio 170 MB, mlflow's client 120 MB, all of mlflow 830
MB), few jobs use one, and their own dependencies differ from the image's (trackio needs an older Pillow). So each has a
folder of its own, which only the process that tracks looks into.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import sys
from pathlib import Path

from entrypoint.fetch.packages import pip_install
from entrypoint.system.private_folders import make_private
from trainer.spec.errors import SettingsError, UnreachableError
from trainer.storage.folders import build_folder, completed, naming
from trainer.storage.read import read_regular

log = logging.getLogger("entrypoint.trackers")
LOCKS = Path(__file__).resolve().parent
LARGEST_LOCK = 1 << 22  # bytes
PIP_TIMEOUT_S = 900.0


def folder(tracker: str, cache: Path) -> Path:
    """The folder for the locked versions and this version of Python."""
    version = hashlib.sha256(read_regular(LOCKS / f"{tracker}.lock", limit=LARGEST_LOCK)).hexdigest()[:12]
    return cache / "trackers" / f"{tracker}-{version}-{sys.implementation.cache_tag}"


def installed(tracker: str, cache: Path) -> list[str]:
    """The folders to look for the library in, after it was installed where needed; none where Python has it already.

    Raises UnreachableError, StorageError; SettingsError where others can write to the cache.
    """
    if importlib.util.find_spec(tracker) is not None:
        return []
    place = folder(tracker, cache)
    if make_private(place.parent) is None:
        raise SettingsError(
            f"LOG_WITH={tracker}: others can write to {place.parent} or a folder above it, and the programs there are "
            "run. Fix: set CACHE_PATH to a folder that only this user can write to."
        )
    if completed(place) is None:
        log.info("Installing %s into CACHE_PATH, for LOG_WITH.", tracker)

    def fill(new: Path) -> dict[str, str]:
        reason = pip_install(LOCKS / f"{tracker}.lock", new, seconds=PIP_TIMEOUT_S)
        if reason:
            raise UnreachableError(
                f"LOG_WITH={tracker}: it could not be installed ({reason}). Let this machine reach a package index "
                "that has the locked files."
            )
        return {}

    with naming("CACHE_PATH"):
        build_folder(place, fill)
    return [str(place)]
