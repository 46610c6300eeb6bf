"""The queue of what is to be told, and a thread for each address that empties it.

The queue is a file in OUTPUT_PATH: what a killed process could not tell, the next start tells, for a day. The file has
no addresses, which are secrets; each is known there by a digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from entrypoint.fetch import http
from entrypoint.notify import messages
from entrypoint.notify.events import CHECKPOINT, SAMPLED, Event
from entrypoint.report.samples import side_by_side
from trainer.network import addresses
from trainer.network.client import open_client
from trainer.network.errors import HopelessError, TransientError
from trainer.spec.errors import SettingsError, StorageError
from trainer.storage import folders, json_files

log = logging.getLogger("entrypoint.notify")
NAME = "notices.json"
MOST_WAITING = 50  # events for an address; of more, old samples and saves are dropped
LONGEST_AGE_S = 24 * 3600.0


@dataclass(frozen=True)
class Pace:
    """How long is waited, in seconds."""

    timeout: float = 10.0  # for an answer
    first: float = 2.0  # after a failure; doubled with each
    longest: float = 300.0
    longest_at_end: float = 5.0  # somebody waits for the end of the job


@dataclass
class Waiting:
    """An event, and the addresses (by digest) that are not told yet."""

    event: Event
    left: set[str]


@dataclass
class Queue:
    """What is to be told, by whom it is read from several threads, and the file that keeps it."""

    path: Path
    told: dict[str, Any] = field(default_factory=dict)  # of `events.Watch`
    waiting: list[Waiting] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    @staticmethod
    def opened(path: Path, known: set[str], now: float) -> Queue:
        """The queue of earlier starts, as far as its addresses are still `known`."""
        kept = json_files.read_object(path) or {}
        queue = Queue(path)
        if isinstance(kept.get("told"), dict) and {"run", "sampled", "saved"} <= kept["told"].keys():
            queue.told = kept["told"]
        with contextlib.suppress(TypeError, KeyError, AttributeError):
            for row in kept.get("events", ()):
                event = Event(**{**row["event"], "images": tuple(row["event"]["images"])})
                left = known & set(row["left"])
                if left and now - event.time < LONGEST_AGE_S:
                    queue.waiting.append(Waiting(event, left))
        return queue

    def add(self, event: Event, left: set[str]) -> None:
        with self.changed:
            self.waiting.append(Waiting(event, set(left)))
            if len(self.waiting) > MOST_WAITING:
                droppable = [row for row in self.waiting if row.event.type in (SAMPLED, CHECKPOINT)]
                self.waiting.remove((droppable or self.waiting)[0])
            self._write()
            self.changed.notify_all()

    def first_for(self, address: str) -> Event | None:
        """The oldest event that an address is not told of."""
        with self.changed:
            return next((row.event for row in self.waiting if address in row.left), None)

    def done(self, event: Event, address: str) -> None:
        """The address was told, or never will be."""
        with self.changed:
            for row in self.waiting:
                if row.event.id == event.id:
                    row.left.discard(address)
            self.waiting = [row for row in self.waiting if row.left]
            self._write()
            self.changed.notify_all()

    def is_empty(self) -> bool:
        with self.changed:
            return not self.waiting

    def _write(self) -> None:
        rows = [{"event": asdict(row.event), "left": sorted(row.left)} for row in self.waiting]
        with contextlib.suppress(StorageError, OSError):  # it is told all the same, as long as this process lives
            folders.write_text(self.path, json.dumps({"told": self.told, "events": rows}, indent=1) + "\n")


class _GoneError(HopelessError):
    """The address wants nothing more."""


def digest_of(url: str) -> str:
    return hashlib.sha256(url.encode("utf-8")).hexdigest()[:16]


class Teller:
    """Tells one address what the queue holds for it, in order, in a thread of its own."""

    def __init__(self, url: str, queue: Queue, *, secret: str, pace: Pace, ending: threading.Event) -> None:
        self._url, self._queue, self._secret, self._pace, self._ending = url, queue, secret, pace, ending
        self.kind = messages.kind_of(url)
        self.digest = digest_of(url)
        self._host = messages.without_secrets_in_path(url)
        self._failures = 0
        self._is_given_up = False

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            event = self._queue.first_for(self.digest)
            if event is None:
                with self._queue.changed:
                    self._queue.changed.wait(1.0)
                continue
            self._tell(event)

    def _tell(self, event: Event) -> None:
        """Try once; waits after a failure that may pass."""
        try:
            if self._is_given_up or time.time() - event.time > LONGEST_AGE_S:
                raise HopelessError("it was not reached for a day")
            self._send(event)
        except TransientError as problem:
            self._wait_after(problem)
        except (HopelessError, SettingsError) as problem:
            if not self._is_given_up:
                log.warning("WEBHOOK_URL: %s is not told of this: %s. Training is not affected.", *self._of(problem))
            self._is_given_up |= isinstance(problem, _GoneError)
            self._queue.done(event, self.digest)
        else:
            if self._failures:
                log.info("WEBHOOK_URL: %s answers again.", self._host)
            self._failures = 0
            self._queue.done(event, self.digest)

    def _wait_after(self, problem: TransientError) -> None:
        self._failures += 1
        if self._failures == 1:
            about = self._of(problem)
            log.warning("WEBHOOK_URL: %s is not told now (%s). It is tried again; the job goes on.", *about)
        wait = min(self._pace.first * 2 ** min(self._failures - 1, 20), self._pace.longest)
        wait = max(wait, min(problem.wait or 0.0, self._pace.longest))
        if self._ending.is_set():
            threading.Event().wait(min(wait, self._pace.longest_at_end))
        else:
            self._ending.wait(wait)

    def _of(self, problem: Exception) -> tuple[str, str]:
        """Without the address, which a library may have put into its message."""
        return self._host, str(problem).replace(self._url, self._host)

    def _send(self, event: Event) -> None:
        """Raises TransientError, HopelessError."""
        image = b""
        if event.images and self.kind in ("discord", "ntfy"):
            height, longest = messages.IMAGE_HEIGHT, messages.IMAGE_LONGEST
            image = side_by_side(messages.sheet_of(event), height=height, longest=longest)
        asked = messages.request_of(
            messages.cleaned(self._url), event, kind=self.kind, image=image, secret=self._secret, now=time.time()
        )
        if problem := addresses.problem_of(asked.url):
            raise HopelessError(problem)
        files = {"files[0]": (messages.IMAGE_NAME, asked.file, "image/jpeg")} if asked.file else None
        with open_client(timeout=self._pace.timeout) as client:
            answer = client.request(
                asked.method,
                asked.url,
                headers=asked.headers,
                content=asked.content,
                data=asked.form,
                files=files,
                # An event is not sent to where the address does not lead: a POST would become a GET there.
                follow_redirects=False,
            )
        self._check(answer.status_code, http.wait_asked(answer.headers))

    def _check(self, status: int, wait: float | None) -> None:
        if 200 <= status < 300:
            return
        if status == 410:
            raise _GoneError("it wants no more (410); it is left alone from here on")
        if status in (408, 425, 429) or status >= 500:
            raise TransientError(f"it answers {status}", wait=wait)
        if 300 <= status < 400:
            raise HopelessError(f"it leads elsewhere ({status}): write the address that it leads to")
        raise HopelessError(f"it answers {status}: is the address whole, and still valid?")
