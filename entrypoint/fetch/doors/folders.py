"""All files below a name in a bucket, or in a folder that Google Drive shares, become a folder in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint.fetch import archive, http
from entrypoint.fetch.doors import buckets, drive_folders, hub_buckets, shares
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.doors.offer import Offer, refusal
from entrypoint.fetch.http import RetryPolicy
from trainer.network import addresses
from trainer.spec.errors import DataError, GatedError, StorageError, UnreachableError
from trainer.storage.atomic import human_size
from trainer.storage.folders import (
    build_folder,
    completed,
    locked,
    nearest_existing,
    read_json,
    storage_error,
    write_text,
)

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)
Listed = tuple[str, int, str]  # a file's name, bytes (below 0: the list does not say) and version
DATE = re.compile(r"\d{4}-\d\d-\d\dT")  # the beginning of a version that is no ETag
PARALLEL_FILES = 8
MOST_BYTES = archive.USUAL.total  # of a folder whose list has no sizes, as of an archive
PATIENCE_S = 10.0  # for a silent service, where the folder is here


def listing(named: str, location: str, keys: Keys, *, retries: RetryPolicy) -> list[Listed]:
    """The files below a name; with none of them, DataError. Raises what `buckets.listed` raises."""
    found = sorted(_listed(named, location, keys, retries))
    if not found:
        raise DataError(f"{named}: there is no file of this name, and none below it. Check the path.")
    return found


def _listed(named: str, location: str, keys: Keys, retries: RetryPolicy) -> Iterator[Listed]:
    """Each door tries again by itself: a long list has many pages, and what failed is one of them."""
    if hub_buckets.is_one(location):
        return hub_buckets.listed(named, hub_buckets.parse(named, location), keys.hub, retries=retries)
    if drive_folders.is_one(location):
        return drive_folders.listed(named, location, retries=retries)
    return buckets.listed(named, buckets.parse(named, location), keys.clouds)


def known(location: str, cache: Path, clouds: Mapping[str, str]) -> Path | None:
    """The folder of an earlier run."""
    record = read_json(_place(location, cache, clouds) / "known.json") or {}
    folder = cache / "datasets" / str(record.get("folder"))
    is_name = isinstance(record.get("folder"), str) and str(record["folder"]).isalnum()
    return folder if is_name and completed(folder) is not None else None


def missing(named: str, location: str, keys: Keys, *, cache: Path, retries: RetryPolicy) -> tuple[Path, list[Listed]]:
    """The folder for what is in the bucket now, and the files to download for it: none where it is complete.

    Where the bucket cannot be listed and an earlier run has brought it, that folder, and the log says so. Raises what
    `listing` raises.
    """
    before = known(location, cache, keys.clouds)
    try:
        policy = replace(retries, budget=min(PATIENCE_S, retries.budget)) if before else retries
        found = listing(named, location, keys, retries=policy)
    except (UnreachableError, GatedError) as problem:
        if before is None:
            raise
        logger.warning("%s Using what was downloaded before.", problem)
        return before, []
    content = [_identity(location, keys.clouds), found]
    folder = cache / "datasets" / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    return folder, [] if completed(folder) is not None else found


def bring(
    named: str,
    location: str,
    keys: Keys,
    *,
    cache: Path,
    retries: RetryPolicy,
    stream: Callable[[list[Listed]], Path | None] = lambda _: None,
) -> Path:
    """The folder with the files, downloaded unless the same ones are here.

    `stream`: gives the folder for files that are not to be downloaded now; None: they are. Each file that has come
    stays where a job is stopped. Raises DataError, GatedError, SettingsError, UnreachableError, StorageError.
    """
    place = _place(location, cache, keys.clouds)
    with locked(place / "lock") as has_lock:
        folder, found = missing(named, location, keys, cache=cache, retries=retries)
        if found and (streamed := stream(found)):
            return streamed
        if found:
            # Without locks, another job may be at work on files of the same names.
            staging = place / ("files" if has_lock else f"files-{uuid.uuid4().hex[:8]}")
            build_folder(folder, partial(_fill, named, location, found, keys, staging, retries))
            shutil.rmtree(staging, ignore_errors=True)
        write_text(place / "known.json", json.dumps({"folder": folder.name}))
    return folder


def _identity(location: str, clouds: Mapping[str, str]) -> str:
    if hub_buckets.is_one(location):
        return f"{location} {addresses.hub_endpoint(os.environ)}"
    if drive_folders.is_one(location):
        return location.partition("?")[0]  # without its resource key, which may be new for the same folder
    return f"{location} {buckets.endpoint(buckets.parse(location, location).service, clouds)}".rstrip()


def _place(location: str, cache: Path, clouds: Mapping[str, str]) -> Path:
    return cache / "downloads" / hashlib.sha256(_identity(location, clouds).encode()).hexdigest()[:16]


def _fill(
    named: str, location: str, found: list[Listed], keys: Keys, staging: Path, retries: RetryPolicy, target: Path
) -> dict[str, Any]:
    """Download the files into `staging`, where each stays until all are there, and put them into `target`.

    There they are named by their versions too, so that no file goes on with the bytes of another one.
    """
    from trainer.network.client import open_client

    cancelled = retries.cancelled or threading.Event()
    requests = Requests(named, location, keys, replace(retries, cancelled=cancelled))
    progress = http.Progress(named, sum(max(0, size) for _, size, _ in found))

    def one(row: Listed) -> None:
        staged = _staged(staging, row[0], row[2])
        requests.bring(client, row, path=staged, part=staged.with_suffix(".part"), progress=progress)

    with open_client(timeout=retries.timeout) as client:
        jobs = []
        for name, size, version in found:
            # Of an empty file there is nothing to ask for; some are the marks of empty folders.
            staged = _staged(staging, name, version)
            if size != 0 and not _is_here(staged, size):
                jobs.append(partial(one, (name, size, version)))
            elif size < 0:
                requests.take(staged.stat().st_size)
        http.in_parallel(jobs, workers=PARALLEL_FILES, cancelled=cancelled)
    try:
        for name, size, version in found:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if size != 0:
                _staged(staging, name, version).rename(target / name)
            else:
                (target / name).touch()
    except OSError as problem:
        raise storage_error(problem, target) from problem
    return {"files": len(found)}


class Requests:
    """How the files below a name are asked for, with the keys of their service."""

    def __init__(self, named: str, location: str, keys: Keys, retries: RetryPolicy) -> None:
        self._named, self._keys, self._retries = named, keys, retries
        self._hub: hub_buckets.HubPlace | None = None
        self._place: buckets.Place | None = None
        self._taken, self._lock = 0, threading.Lock()  # bytes of files whose sizes the list does not have
        if drive_folders.is_one(location):
            self._key = shares.KEY
        elif hub_buckets.is_one(location):
            self._hub, self._key = hub_buckets.parse(named, location), hub_buckets.KEY
        else:
            self._place = buckets.parse(named, location)
            self._key = buckets.KEY_OF[self._place.service]

    def bring(
        self, client: httpx.Client, row: Listed, *, path: Path, part: Path, progress: http.Progress | None = None
    ) -> None:
        """Download one of the files to `path`. Raises what `http.download` raises, and refusals."""
        name, size, _ = row
        what = f"{self._named}: {name}"

        def refuse(response: httpx.Response) -> None:
            raise refusal(what, response, key=self._key)

        offer = self._offer(row)
        most = None
        if size < 0:
            part, most = _part_of(offer, part), MOST_BYTES
            self.take(offer.size or 0)
            _check_room(what, offer, part)
        job = http.Download(
            offer.url, path, part, what, offer.headers, size=offer.size, version=offer.version, most=most
        )
        http.download(client, job, retries=self._retries, refuse=refuse, progress=progress)
        if size < 0 and offer.size is None:
            self.take(path.stat().st_size)

    def take(self, size: int) -> None:
        """Count a file of which only its server says how large it is. Raises DataError where they are too many."""
        with self._lock:
            self._taken += size
            if self._taken > MOST_BYTES:
                raise DataError(
                    f"{self._named}: the files are larger than {human_size(MOST_BYTES)} together, the most that is "
                    "accepted. Share fewer of them, or name a bucket."
                )

    def _offer(self, row: Listed) -> Offer:
        """A file as it is asked for: with the size and the version that the answer must have, where they are known.

        The list of a bucket has them. Of a file in Google Drive it has neither, and what stands for its version is its
        number there, which all its versions share: the file itself is asked.
        """
        name, size, version = row
        if self._hub is not None:
            headers = {"Authorization": f"Bearer {self._keys.hub}"} if self._keys.hub else {}
            return Offer(self._hub.below(name).address, headers, size=size)
        if self._place is None:
            return shares.ask(f"{self._named}: {name}", drive_folders.link_of(version), retries=self._retries)
        url = buckets.signed(self._named, self._place.below(name), "GET", self._keys.clouds)
        return Offer(url, size=size, version=None if DATE.match(version) else version)


def _part_of(offer: Offer, part: Path) -> Path:
    """Where a file is received that its list does not describe: a place for each version.

    Of a file of which no version is known, an earlier part may be one of another file, and is deleted.
    """
    own = hashlib.sha256(json.dumps([offer.version, offer.size]).encode()).hexdigest()[:16]
    part = part.with_name(f"{part.stem}-{own}.part")
    if offer.version is None:
        try:
            part.unlink(missing_ok=True)
        except OSError as problem:
            raise storage_error(problem, part) from problem
    return part


def _check_room(what: str, offer: Offer, part: Path) -> None:
    """Before the first byte of a file comes that no plan could count. Raises StorageError."""
    has_begun = part.stat().st_size if part.is_file() else 0
    place = nearest_existing(part)
    free = shutil.disk_usage(place).free
    missing = (offer.size or 0) - has_begun
    if missing > free:
        raise StorageError(
            f"{what}: {human_size(missing)} are needed on the volume of {place}, and {human_size(free)} are free. Free "
            "some space, or choose another volume."
        )


def _staged(staging: Path, name: str, version: str) -> Path:
    return staging / f"{hashlib.sha256(json.dumps([name, version]).encode()).hexdigest()[:32]}.whole"


def _is_here(path: Path, size: int) -> bool:
    """Whether a file has come: it gets this name when it is whole."""
    try:
        return path.stat().st_size == size or size < 0
    except OSError:
        return False
