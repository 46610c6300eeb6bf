"""Shards of a place that do not all fit the volume: they are brought while the job trains, and go again.

What is here when is the trainer's to say (`trainer.data.shards.stream`), since it knows the order. Here it is done,
beside the trainers, for these have neither network nor keys.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoint.fetch import http
from entrypoint.fetch.doors.folders import Listed, Requests
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.http import RetryPolicy
from trainer.data.folder_listing import SHARD
from trainer.data.folders import formats
from trainer.data.shards.stream import ShardStream
from trainer.spec.errors import KilnError, StorageError
from trainer.spec.plan import Plan, Source
from trainer.spec.values import many
from trainer.storage.atomic import human_size
from trainer.storage.folders import naming, nearest_existing
from trainer.storage.read import files_below

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)
PARALLEL = 4  # shards
LOOK_S = 0.2
USED_SHARE = 0.7  # of what is free at CACHE_PATH: the encoded images need room as well
PARTS = "parts"


def are_needed(found: Sequence[Listed], cache: Path, *, most: int | None) -> bool:
    """Whether a place holds shards that are too many to be here all at once. False where it does not say their sizes.

    `most`: bytes that images and what is encoded of them may take (MAX_CACHE_GIB); None: what is free.
    """
    names = [name.lower() for name, _, _ in found]
    if any(size < 0 for _, size, _ in found):
        return False
    if any(name.endswith(tuple(formats.READABLE_SUFFIXES)) for name in names):
        return False
    total = sum(size for name, size, _ in found if name.lower().endswith(SHARD))
    room = shutil.disk_usage(nearest_existing(cache)).free * USED_SHARE if most is None else most
    return total > room


def begin(source: Source, found: Sequence[Listed], *, cache: Path, most: int | None, owner: str) -> Path | None:
    """The folder of a source's stream, which is that of one job: `owner` is its OUTPUT_PATH. None: it needs none."""
    if not are_needed(found, cache, most=most):
        return None
    key = hashlib.sha256(json.dumps([source.location, owner]).encode()).hexdigest()[:16]
    shards = tuple(row for row in found if row[0].lower().endswith(SHARD))
    with naming("CACHE_PATH"):
        stream = ShardStream(cache / "streams" / key, shards)
        stream.root.mkdir(parents=True, exist_ok=True)
        stream.write()
    size = human_size(sum(size for _, size, _ in shards))
    logger.info("%s: %s, %s: they come while the job works, and are deleted again.", source.public,
                many(len(shards), "shard"), size)  # fmt: skip
    return stream.folder


@contextlib.contextmanager
def serving(plan: Plan, keys: Keys, *, retries: RetryPolicy = http.USUAL) -> Iterator[None]:
    """Inside, the shards that the trainers want are brought, and the others deleted."""
    cancelled = threading.Event()
    threads = []
    for source in {subset.source.path: subset.source for subset in plan.data.subsets}.values():
        stream = ShardStream.of(Path(source.path))
        if stream is not None:
            server = _Server(stream, source, keys, replace(retries, cancelled=cancelled), cancelled)
            threads.append(threading.Thread(target=server.serve, name="shards", daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        cancelled.set()
        for thread in threads:
            thread.join()


@dataclass
class _Server:
    stream: ShardStream
    source: Source
    keys: Keys
    retries: RetryPolicy
    cancelled: threading.Event
    under_way: dict[str, Future[None]] = field(default_factory=dict)
    has_failed: bool = False  # so that not even a problem can be told: the volume fails

    def serve(self) -> None:
        """Until the job ends. A sign of life tells the trainers that waiting makes sense."""
        from trainer.network.client import open_client

        rows = {row[0]: row for row in self.stream.shards}
        requests = Requests(self.source.public, self.source.location, self.keys, self.retries)
        with open_client(timeout=self.retries.timeout) as client, ThreadPoolExecutor(PARALLEL) as pool:
            while not self.cancelled.wait(LOOK_S) and not self.has_failed:
                try:
                    self.stream.show_life()
                    wanted = self.stream.wanted()
                    self._delete_unwanted(set(wanted))
                except OSError as problem:
                    logger.error("%s: %s. No more shards come.", self.stream.folder, problem.strerror)
                    return
                for name, future in list(self.under_way.items()):
                    if future.done():
                        del self.under_way[name]
                for name in wanted:
                    is_here = (self.stream.root / name).exists() or self.stream.problem_file(name).exists()
                    if not is_here and name not in self.under_way and len(self.under_way) < PARALLEL:
                        self.under_way[name] = pool.submit(self._bring, client, requests, rows[name])

    def _bring(self, client: httpx.Client, requests: Requests, row: Listed) -> None:
        name = row[0]
        part = self.stream.folder / PARTS / hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16]
        try:
            with naming("CACHE_PATH"):
                requests.bring(client, row, path=self.stream.root / name, part=part)
        except KilnError as problem:
            if not self.cancelled.is_set():
                logger.warning("%s", problem)
                self._tell(name, problem)

    def _tell(self, name: str, problem: KilnError) -> None:
        try:
            self.stream.tell(name, problem)
        except (OSError, StorageError):
            self.has_failed = True

    def _delete_unwanted(self, wanted: set[str]) -> None:
        for path in files_below(self.stream.root):
            if path.relative_to(self.stream.root).as_posix() not in wanted:
                path.unlink(missing_ok=True)
        parts = self.stream.folder / PARTS
        if not self.under_way and not wanted and parts.exists():
            shutil.rmtree(parts, ignore_errors=True)
