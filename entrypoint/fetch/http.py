"""Downloads that survive bad networks: retries with backoff, resumed transfers, verified content.

What a single answer may cost is bounded by `trainer.network`; here is what all tries together may cost. A try counts
as progress only if it brought more than ever before, and faster than `bounds.SLOWEST`: a server that gives a byte and
hangs up, or that sends the same part again and again, does not renew the budget.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from trainer.network.errors import HopelessError, TransientError
from trainer.spec.errors import DataError, SettingsError, UnreachableError
from trainer.storage.folders import storage_error

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)
T = TypeVar("T")
U = TypeVar("U")

CHUNK = 2**20  # bytes
TRANSIENT_STATUS = (408, 425, 429)  # and all from 500 on
MOST_TRIES = 1000  # of one request, even where each makes progress


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


def is_transient(status: int) -> bool:
    """Whether an answer with this status may be another one next time."""
    return status in TRANSIENT_STATUS or status >= 500


def check_status(response: httpx.Response, what: str) -> None:
    """Raises TransientError for a status that may pass; accepts all others."""
    if is_transient(response.status_code):
        raise TransientError(f"{what} answers {response.status_code}", wait=wait_asked(response.headers))


def wait_asked(headers: Mapping[str, str]) -> float | None:
    """Seconds from Retry-After, or from the RateLimit header ("name";r=remaining;t=seconds) if none remain."""
    after = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]+", after):
        return float(after)
    try:
        moment = parsedate_to_datetime(after)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        pass
    limit = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*([0-9]+)", headers.get("ratelimit", "")[:1000])
    return float(limit.group(1)) if limit else None


def parse_json(response: httpx.Response, what: str) -> Any:
    """The JSON of an answer. Raises TransientError for anything else: a captive portal's page, or what has no end."""
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError) as problem:
        raise TransientError(f"the answer is not one of {what} (a captive portal or proxy?)") from problem


def persist(
    action: Callable[[], T],
    *,
    what: str,
    retries: RetryPolicy,
    progressed: Callable[[], bool] = lambda: False,
    cancelled: threading.Event | None = None,
) -> T:
    """Call `action` until it raises no TransientError, waiting twice as long (with jitter) after each failure.

    httpx's errors count as what they mean (`trainer.network.client.errors_as_ours`). A server may ask for a longer
    wait, never for a shorter one. `progressed`: whether the last call made progress, which renews the budget. Raises
    UnreachableError when the budget is spent, or at once when the server asks for a longer wait than is left;
    SettingsError or UnreachableError where another try cannot help. Other errors of `action` are raised as they are.
    """
    from trainer.network.client import errors_as_ours

    cancelled = cancelled or retries.cancelled or threading.Event()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs addresses, signatures included
    began, wait, failures = time.monotonic(), retries.first_wait, 0
    while True:
        try:
            with errors_as_ours():
                return action()
        except TransientError as problem:
            failures += 1
            if progressed():
                began, wait = time.monotonic(), retries.first_wait
            budget = min(retries.budget, retries.unreached) if problem.unreached else retries.budget
            left = began + budget - time.monotonic()
            # The floor holds for Retry-After: 0 as well.
            pause = max(wait * random.uniform(0.5, 1.0), problem.wait or 0.0)
            if pause > left or failures >= MOST_TRIES:
                asked = f" and asks to wait {problem.wait:.0f} s" if problem.wait else ""
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
        except HopelessError as problem:
            raise problem.about(what) from problem


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
    version: str | None = None  # ETag or date: an answer with another one is of another file


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


class _Gain:
    """Whether a part grows, beyond its largest size so far, and faster than the slowest line."""

    def __init__(self, part: _Part) -> None:
        self.part, self.best, self.since = part, part.size, time.monotonic()

    def made(self) -> bool:
        from trainer.network.bounds import SLOWEST

        now = time.monotonic()
        if self.part.size - self.best < max(1.0, SLOWEST * (now - self.since)):
            return False
        self.best, self.since = self.part.size, now
        return True


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
    gain = _Gain(part)
    corrupt = 0

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
        digest = persist(attempt, what=job.what, retries=retries, progressed=gain.made, cancelled=cancelled)
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
    from trainer.network.client import CONTENT, Content, errors_as_ours

    if job.size is not None and part.size >= job.size:
        return
    headers = {**job.headers, "Accept-Encoding": "identity"}  # ranges must count bytes of the file itself
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
    options: dict[str, Any] = {"headers": headers, "timeout": timeout, "extensions": {CONTENT: Content()}}
    try:
        with errors_as_ours(), client.stream("GET", job.url, **options) as response:
            check_status(response, "the server")
            _check_content(job, part, response, refuse)
            for block in response.iter_raw():  # unbuffered: a buffer would be lost when the connection breaks
                if cancelled.is_set():
                    raise TransientError("stopped")
                part.append(block)
                progress.add(len(block))
                if job.size is not None and part.size > job.size:
                    return  # `_verified` refuses it: it is not the announced file
                if job.most is not None and part.size > job.most:
                    raise DataError(f"{job.what} is larger than {job.most / 2**30:g} GiB, the most that is accepted.")
    except TransientError as problem:
        where = f"{problem} after {part.size} bytes"
        raise TransientError(where, wait=problem.wait, unreached=problem.unreached) from problem


def _check_content(
    job: Download, part: _Part, response: httpx.Response, refuse: Callable[[httpx.Response], None]
) -> None:
    """Check that what follows belongs behind `part`, which is emptied where it must begin anew.

    Raises TransientError where another try is needed, and what `refuse` raises.
    """
    if response.status_code not in (200, 206, 416):
        refuse(response)
        raise SettingsError(f"{job.what}: the server answers {response.status_code} in the place of the file.")
    if response.status_code == 416 or (response.status_code == 206 and not _continues(response, part.size, job.size)):
        part.restart()
        raise TransientError("the server cannot resume here; starting again")
    version = response.headers.get("etag") or response.headers.get("last-modified")
    if job.version is not None and version is not None and _bare(version) != _bare(job.version):
        part.restart()
        raise TransientError("the file has changed on the server; starting again")
    if job.version is not None and version is None and response.status_code == 206 and part.size:
        part.restart()
        raise TransientError("the server no longer says which version of the file it has; starting again")
    if response.status_code == 200 and part.size:  # it ignores ranges
        part.restart()


def _bare(version: str) -> str:
    """An ETag as all servers write it: lists of some have it without quotes, and proxies call it weak."""
    return version.strip().removeprefix("W/").strip('"')


def _continues(response: httpx.Response, offset: int, size: int | None) -> bool:
    """Whether an answer with a range begins at `offset`, of a file of `size` bytes (None: unknown)."""
    said = response.headers.get("content-range", "").strip()
    found = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", said)
    if found is None:
        return False
    first, last, total = found.groups()
    if int(first) != offset or int(last) < offset:
        return False
    return size is None or total in ("*", str(size))


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
