"""What Kiln itself writes. It may lie in a dataset's folder, and never becomes a source of images."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

# In OUTPUT_PATH. A folder is recognised by plan.json and one of the others.
MARKS = ("status.json", "run.log", "metrics.jsonl", "state", "dataset-report.txt")
OUTPUT_NAMES = re.compile(
    r"(sample|samples|state|logs|runs|tracking)([.-].*)?"
    r"|(plan|status|upload|crashes|run|pod|notices|tracking)\.json|metrics\.jsonl|run\.log|hang\.txt"
    r"|dataset-report\.(txt|csv)|report\.html|README\.md"
    r"|.*\.safetensors(\.unverified)?"
)
# In CACHE_PATH. A folder is recognised by the first two.
CACHE_MARKS = ("latents", "text")
CACHE_NAMES = (*CACHE_MARKS, "class-pictures", "datasets", "downloads", "models", "flash_4", "trackers")
UNPACKED_MARK = ".kiln-complete.json"  # in archives and Hub datasets that were unpacked
HUB_FOLDER = re.compile(r"(models|datasets|spaces)--.+")
OTHER_JOB = "what another Kiln job wrote there"
IN_ROOT = "a Kiln job writes this into the folder"

Identity = tuple[int, int]  # of a folder: the same by whatever path it is reached


@dataclass(frozen=True)
class Written:
    """The folders that this job writes to, by the variable that names each."""

    folders: dict[str, Path] = field(default_factory=dict)

    def identities(self) -> dict[Identity, str]:
        """The variable of each folder that exists, by the folder's identity."""
        found: dict[Identity, str] = {}
        for variable, folder in self.folders.items():
            try:
                status = folder.stat()
            except OSError:
                continue
            found.setdefault((status.st_dev, status.st_ino), variable)
        return found

    def holds(self, real_path: str) -> str | None:
        """The variable of the folder that `real_path` (without links) is in; None if it is in none."""
        for variable, folder in self.folders.items():
            place = os.path.realpath(folder)
            if real_path == place or real_path.startswith(place.rstrip("/") + "/"):
                return variable
        return None

    def holds_output(self, real_path: str) -> str | None:
        """Where this job writes, as "OUTPUT_PATH/sample", if `real_path` is there or below it."""
        if "OUTPUT_PATH" not in self.folders:
            return None
        place = os.path.realpath(self.folders["OUTPUT_PATH"]).rstrip("/") + "/"
        first = real_path.removeprefix(place).split("/")[0]
        if real_path.startswith(place) and OUTPUT_NAMES.fullmatch(first):
            return f"OUTPUT_PATH/{first}"
        return None


def names_written(names: Collection[str], variable: str | None) -> frozenset[str]:
    """Which of the `names` in a folder a Kiln job has written.

    `variable`: of this job, where it names the folder. Otherwise the marks of a job tell.
    """
    written: set[str] = set()
    if variable == "OUTPUT_PATH" or is_output(names):
        written |= {name for name in names if OUTPUT_NAMES.fullmatch(name)}
    if variable == "CACHE_PATH" or is_cache(names):
        written |= {name for name in names if name in CACHE_NAMES}
    return frozenset(written)


def is_output(names: Collection[str]) -> bool:
    """Whether a folder with these `names` in it is the OUTPUT_PATH of some job."""
    return "plan.json" in names and any(mark in names for mark in MARKS)


def is_cache(names: Collection[str]) -> bool:
    """Whether a folder with these `names` in it is the CACHE_PATH of some job."""
    return all(mark in names for mark in CACHE_MARKS)


def whole_reason(name: str, inside: Iterable[str]) -> str | None:
    """Why nothing below a folder `name` with the names `inside` is a source; None: it may be."""
    names = frozenset(inside)
    if HUB_FOLDER.fullmatch(name) and names & {"blobs", "refs", "snapshots"}:
        return "a cache of the Hub"
    if UNPACKED_MARK in names:
        return "a dataset that Kiln unpacked"
    if is_cache(names):
        return "the cache of a Kiln job"
    return None
