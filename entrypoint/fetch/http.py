"""Downloads that survive bad networks: retries with backoff, resumed transfers, verified content."""

from __future__ import annotations

import concurrent.futures
import hashlib
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, TypeVar

from trainer.spec.errors import DataError, UnreachableError
from trainer.storage.folders import storage_error

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)
T = TypeVar("T")
U = TypeVar("U")

CHUNK = 2**20  # bytes
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class RetryPolicy:
    """How long to wait for a failing service. All times in seconds."""

    budget: float = 120.0  # without any progress, before giving up
    unreached: float = 10.0  # the same, where not even a connection is made
    first_wait: float = 1.0  # doubled with each failure
    longest_wait: float = 30.0
    timeout: float = 10.0  # to connect, and between two pieces of a response
    cancelled: threading.Event | None = None  # set it to stop waiting


USUAL = RetryPolicy()


class TransientError(Exception):
    """A failure that may pass. `wait`: seconds that the server asked us to wait, if it did.

    `unreached`: there was no connection at all, as on a machine without a network.
    """

    def __init__(self, message: str, *, wait: float | None = None, unreached: bool = False) -> None:
        super().__init__(message)
        self.wait = wait
        self.unreached = unreached


class CorruptError(TransientError):
    """The content is not what was announced. It has been deleted."""


class Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass
class Progress:
    """Counts the bytes of one or more downloads, and logs every `every` seconds."""

    what: str
    total: int | None = None  # bytes
    every: float = 10.0  # seconds
    done: int = 0
    _logged: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now - self._logged < self.every:
                return
            self._logged = now
            of = f" of {self.total / 2**20:,.0f}" if self.total else ""
        logger.info("%s: %.0f%s MiB", self.what, self.done / 2**20, of)


def check_status(response: httpx.Response, what: str) -> None:
    """Raises TransientError for a status that may pass; accepts all others."""
    if response.status_code in TRANSIENT_STATUS:
        raise TransientError(f"{what} answers {response.status_code}", wait=_wait_asked(response.headers))


def _wait_asked(headers: Mapping[str, str]) -> float | None:
    """Seconds from Retry-After, or from the RateLimit header ("name";r=remaining;t=seconds) if none remain."""
    after = headers.get("retry-after", "").strip()
    if after.isdecimal():
        return float(after)
    limit = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return float(limit.group(1)) if limit else None


def persist(
    action: Callable[[], T],
    *,
    what: str,
    retries: RetryPolicy,
    progressed: Callable[[], bool] = lambda: False,
    cancelled: threading.Event | None = None,
) -> T:
    """Call `action` until it raises no TransientError, waiting twice as long (with jitter) after each failure.

    `progressed`: whether the last call made progress, which renews the budget. Raises UnreachableError when the
    budget is spent, or at once when the server asks for a longer wait than is left.
    """
    cancelled = cancelled or retries.cancelled or threading.Event()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs addresses, signatures included
    began, wait, failures = time.monotonic(), retries.first_wait, 0
    while True:
        try:
            return action()
        except TransientError as problem:
            failures += 1
            if progressed():
                began, wait = time.monotonic(), retries.first_wait
            budget = min(retries.budget, retries.unreached) if problem.unreached else retries.budget
            left = began + budget - time.monotonic()
            pause = problem.wait if problem.wait is not None else wait * random.uniform(0.5, 1.0)
            if pause > left:
                asked = f" and asks to wait {problem.wait:.0f} s" if problem.wait is not None else ""
                raise UnreachableError(
                    f"{what}: {problem}{asked}; gave up after {failures} attempts in "
                    f"{time.monotonic() - began:.0f} s without progress. Check the network of this machine."
                ) from problem
            logger.warning(
                *("%s: %s; attempt %d in %.1f s, gives up in %.0f s", what, problem, failures + 1, pause, left)
            )
            if cancelled.wait(pause):
                raise UnreachableError(f"{what}: stopped because another download failed.") from problem
            wait = min(wait * 2, retries.longest_wait)


@dataclass(frozen=True)
class Download:
    """One file to download, and what is known about it."""

    url: str
    path: Path
    part: Path  # on the same volume; survives a kill
    what: str  # for messages
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold a token
    size: int | None = None  # bytes
    digest: str | None = None  # expected hexdigest of `new_hash`
    new_hash: Callable[[], Hash] = hashlib.sha256
    most: int | None = None  # bytes; a larger file is refused


def feed(stream: IO[bytes], digest: Hash, *, cancelled: threading.Event) -> int:
    """Hash the rest of `stream`; returns its length. Raises UnreachableError once `cancelled` is set, OSError."""
    size = 0
    while block := stream.read(CHUNK):
        if cancelled.is_set():
            raise UnreachableError("Stopped because another download failed.")
        digest.update(block)
        size += len(block)
    return size


class _Part:
    """The received part of a download: a file that survives a kill, its length and its running hash."""

    def __init__(self, path: Path, new_hash: Callable[[], Hash], cancelled: threading.Event) -> None:
        self.path, self.new_hash, self.hash, self.size = path, new_hash, new_hash(), 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+b", buffering=0)
            self.file.seek(0)
            self.size = feed(self.file, self.hash, cancelled=cancelled)
        except OSError as problem:
            raise storage_error(problem, path) from problem

    def append(self, block: bytes) -> None:
        try:
            rest = memoryview(block)
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as problem:
            raise storage_error(problem, self.path) from problem
        self.hash.update(block)
        self.size += len(block)

    def restart(self) -> None:
        self.file.truncate(0)
        self.hash, self.size = self.new_hash(), 0


def download(
    client: httpx.Client,
    job: Download,
    *,
    retries: RetryPolicy,
    refuse: Callable[[httpx.Response], None],
    progress: Progress | None = None,
    cancelled: threading.Event | None = None,
) -> str:
    """Download `job` to its path, resuming an earlier attempt; returns the digest of the content.

    The caller holds a lock on the path. `refuse` gets each response that is neither content nor worth a retry, and must
    raise. Raises UnreachableError, DataError (larger than `most`), StorageError, and what `refuse` raises.
    """
    cancelled = cancelled or retries.cancelled or threading.Event()
    part = _Part(job.part, job.new_hash, cancelled)
    progress = progress or Progress(job.what, job.size)
    progress.add(part.size)
    seen = part.size
    corrupt = 0

    def progressed() -> bool:
        nonlocal seen
        before, seen = seen, part.size
        return part.size > before

    def attempt() -> str:
        nonlocal corrupt
        try:
            _receive(
                client, job, part=part, refuse=refuse, progress=progress, timeout=retries.timeout, cancelled=cancelled
            )
            return _verified(job, part)
        except CorruptError as problem:
            corrupt += 1
            if corrupt > 1:
                raise UnreachableError(f"{job.what}: {problem} twice; both were deleted.") from problem
            raise

    try:
        digest = persist(attempt, what=job.what, retries=retries, progressed=progressed, cancelled=cancelled)
    finally:
        part.file.close()
    try:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        part.path.rename(job.path)
    except OSError as problem:
        raise storage_error(problem, job.path) from problem
    return digest


def _receive(
    client: httpx.Client,
    job: Download,
    *,
    part: _Part,
    refuse: Callable[[httpx.Response], None],
    progress: Progress,
    timeout: float,
    cancelled: threading.Event,
) -> None:
    """Append the missing bytes to `part`, with one request."""
    import httpx

    if job.size is not None and part.size >= job.size:
        return
    headers = {**job.headers, "Accept-Encoding": "identity"}  # ranges must count bytes of the file itself
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
    try:
        with client.stream("GET", job.url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            check_status(response, "the server")
            if response.status_code not in (200, 206, 416):
                refuse(response)
            if response.status_code == 416 or (response.status_code == 206 and not _continues(response, part.size)):
                part.restart()
                raise TransientError("the server cannot resume here; starting again")
            if response.status_code == 200 and part.size:  # it ignores ranges, or the file has changed
                part.restart()
            for block in response.iter_bytes():  # unbuffered: a buffer would be lost when the connection breaks
                if cancelled.is_set():
                    raise TransientError("stopped")
                part.append(block)
                progress.add(len(block))
                if job.most is not None and part.size > job.most:
                    raise DataError(f"{job.what} is larger than {job.most / 2**30:g} GiB, the most that is accepted.")
    except httpx.RequestError as problem:
        raise TransientError(f"{type(problem).__name__} ({problem}) after {part.size} bytes") from problem


def _continues(response: httpx.Response, offset: int) -> bool:
    return response.headers.get("content-range", "").startswith(f"bytes {offset}-")


def _verified(job: Download, part: _Part) -> str:
    """The digest of a complete part. Raises TransientError if it is too short; empties it and raises CorruptError if
    wrong.
    """
    if job.size is not None and part.size < job.size:
        raise TransientError(f"the connection ended after {part.size} of {job.size} bytes")
    digest, size = part.hash.hexdigest(), part.size
    if (job.size is not None and size > job.size) or (job.digest is not None and digest != job.digest):
        part.restart()
        raise CorruptError(
            f"the received file ({size} bytes, {digest[:12]}…) is not the announced one ({(job.digest or '')[:12]}…)"
        )
    return digest


def in_parallel(jobs: Sequence[Callable[[], object]], *, workers: int, cancelled: threading.Event) -> None:
    """Run all `jobs` in threads. The first error, or a signal handler that raises, sets `cancelled`, which ends the
    others.
    """
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    complete = False
    try:
        for done in concurrent.futures.as_completed([pool.submit(job) for job in jobs]):
            done.result()
        complete = True
    finally:
        if not complete:
            cancelled.set()
        pool.shutdown(wait=False, cancel_futures=True)


def both(aside: Callable[[], T], here: Callable[[], U], *, cancelled: threading.Event) -> tuple[T, U]:
    """Run `aside` in a thread and `here` in this one, and return both results. Both must watch `cancelled`.

    An error in one ends the other. Raises the first error, or what a signal handler raises.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1)
    other = pool.submit(aside)
    other.add_done_callback(lambda done: cancelled.set() if done.exception() else None)
    try:
        mine = here()
        return other.result(), mine
    except UnreachableError:
        if other.done():
            other.result()  # it failed first, and ended this one
        raise
    finally:
        cancelled.set()
        pool.shutdown(wait=False)
