"""All files below a name in a bucket become a folder in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint.fetch import http
from entrypoint.fetch.doors import buckets
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.doors.offer import refusal
from entrypoint.fetch.http import RetryPolicy
from trainer.spec.errors import DataError, GatedError, UnreachableError
from trainer.storage.folders import build_folder, completed, read_json, storage_error, write_text

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)
PARALLEL_FILES = 8
PATIENCE_S = 10.0  # for a silent service, where the folder is here


def listing(named: str, location: str, keys: Keys, *, retries: RetryPolicy) -> list[tuple[str, int]]:
    """Names and bytes of the files; with none of them, DataError. Raises what `buckets.listed` raises."""
    found = sorted(http.persist(partial(_listed, named, location, keys), what=named, retries=retries))
    if not found:
        raise DataError(f"{named}: there is no file of this name, and none below it. Check the path in the bucket.")
    return found


def _listed(named: str, location: str, keys: Keys) -> list[tuple[str, int]]:
    return list(buckets.listed(named, buckets.parse(named, location), keys.clouds))


def known(location: str, cache: Path) -> Path | None:
    """The folder of an earlier run."""
    record = read_json(_place(location, cache) / "known.json") or {}
    folder = cache / "datasets" / str(record.get("folder"))
    is_name = isinstance(record.get("folder"), str) and str(record["folder"]).isalnum()
    return folder if is_name and completed(folder) is not None else None


def bring(named: str, location: str, keys: Keys, *, cache: Path, retries: RetryPolicy) -> Path:
    """The folder with the files, downloaded unless the same ones are here.

    Each file that has come stays where a job is stopped. Raises DataError, GatedError, SettingsError, UnreachableError,
    StorageError.
    """
    before = known(location, cache)
    try:
        policy = replace(retries, budget=min(PATIENCE_S, retries.budget)) if before else retries
        found = listing(named, location, keys, retries=policy)
    except (UnreachableError, GatedError) as problem:
        if before is None:
            raise
        logger.warning("%s Using what was downloaded before.", problem)
        return before
    name = hashlib.sha256(json.dumps([location, found]).encode()).hexdigest()[:32]
    folder = cache / "datasets" / name
    if completed(folder) is None:
        build_folder(folder, partial(_fill, named, location, found, keys, cache, retries))
    write_text(_place(location, cache) / "known.json", json.dumps({"folder": name}))
    return folder


def _place(location: str, cache: Path) -> Path:
    return cache / "downloads" / hashlib.sha256(location.encode()).hexdigest()[:16]


def _fill(
    named: str, location: str, found: list[tuple[str, int]], keys: Keys, cache: Path, retries: RetryPolicy, target: Path
) -> dict[str, Any]:
    """Download the files beside their folder, where each stays until all are there, and put them into `target`."""
    from trainer.network.client import open_client

    place, staging = buckets.parse(named, location), _place(location, cache)
    cancelled = retries.cancelled or threading.Event()
    progress = http.Progress(named, sum(size for _, size in found))

    def refuse(response: httpx.Response) -> None:
        raise refusal(named, response, key=buckets.KEY_OF[place.service])

    def one(name: str, size: int) -> None:
        url = buckets.signed(named, place.below(name), "GET", keys.clouds)
        part = staging / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.part"
        job = http.Download(url, staging / "files" / name, part, f"{named}: {name}", size=size)
        http.download(client, job, retries=retries, refuse=refuse, progress=progress, cancelled=cancelled)

    with open_client(timeout=retries.timeout) as client:
        missing = [(name, size) for name, size in found if not _is_here(staging / "files" / name, size)]
        jobs = [partial(one, name, size) for name, size in missing]
        http.in_parallel(jobs, workers=PARALLEL_FILES, cancelled=cancelled)
    try:
        for name, _ in found:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / "files" / name).rename(target / name)
    except OSError as problem:
        raise storage_error(problem, target) from problem
    return {"files": len(found)}


def _is_here(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
