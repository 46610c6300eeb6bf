"""Live events (server-sent events, HTML standard): documents that have changed, new numbers, new lines of the log.

An event's id says what its reader has by then. A browser that was cut off sends the last one, and gets what came
since. Proxies cut an answer after a while (RunPod's after 100 s): each stream ends before that by itself, and the
browser comes back.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from anyio import to_thread

from entrypoint.monitor.live import Live

TICK_S = 1.0  # between two looks at the folder
LONGEST_S = 80.0  # of one answer
COME_BACK_MS = 500  # what the browser waits before it asks again
MOST_STREAMS = 64
MOST_ROWS = 2000  # that a viewer who was away gets one by one; for more, the whole history is thinned again
_ID = re.compile(r"([0-9a-f]{16})\.(\d{1,12})\.(\d{1,9})\.(\d{1,12})\.(\d{1,9})\.(\d{1,15})")


@dataclass
class Viewer:
    """What one reader has: documents by version, numbers by generation and row, the log by generation and byte.

    `instance`: of the `Live` that counts so. Another server knows nothing of what the reader has.
    """

    instance: str
    version: int = 0
    generation: int = -1
    rows: int = 0
    log_generation: int = -1
    log_end: int = 0

    @classmethod
    def of(cls, last_event_id: str, instance: str) -> Viewer:
        match = _ID.fullmatch(last_event_id)
        if match is None or match[1] != instance:
            return cls(instance)
        return cls(instance, *map(int, match.groups()[1:]))

    @property
    def id(self) -> str:
        places = (self.version, self.generation, self.rows, self.log_generation, self.log_end)
        return ".".join((self.instance, *map(str, places)))


class Streams:
    """The streams of one server. The folder is looked at only while there is one, or when somebody asks."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._looked = 0.0
        self._looking = asyncio.Lock()
        self._newest = (-1, -1)  # generation and rows of the numbers that `_encoded` is of
        self._encoded: dict[int, tuple[str, bytes]] = {}  # by the rows that a viewer has: one text serves all of them
        self.count = 0

    async def look(self) -> None:
        """Look at the folder, unless somebody has just done so. In a thread: a volume may not answer."""
        async with self._looking:
            if time.monotonic() - self._looked < 0.9 * TICK_S:
                return
            await to_thread.run_sync(self._live.look)
            self._looked = time.monotonic()

    @property
    def is_full(self) -> bool:
        return self.count >= MOST_STREAMS

    async def events(self, last_event_id: str) -> AsyncIterator[bytes]:
        """What a reader who has come as far as `last_event_id` is to know, until it has to come back."""
        viewer = Viewer.of(last_event_id, self._live.instance)
        ends = time.monotonic() + LONGEST_S
        self.count += 1
        try:
            yield f"retry: {COME_BACK_MS}\n\n".encode()
            while time.monotonic() < ends:
                await self.look()
                news = self._news(viewer)
                yield news or b": nothing new\n\n"
                await asyncio.sleep(TICK_S)
        finally:
            self.count -= 1

    def _news(self, viewer: Viewer) -> bytes:
        """All that `viewer` does not have yet; it has it then. A look that takes long is not waited for."""
        live = self._live
        if not live.lock.acquire(blocking=False):
            return b""
        try:
            parts = []
            for name, (version, data) in live.documents.items():
                if version > viewer.version:
                    parts.append((name, data))
            viewer.version = live.versions
            parts += self._numbers(viewer)
            parts += self._log(viewer)
        finally:
            live.lock.release()
        events = [_event(name, data) for name, data in parts]
        if events:  # whoever is cut off before the last one gets all of them again
            events[-1] = b"id: " + viewer.id.encode() + b"\n" + events[-1]
        return b"".join(events)

    def _numbers(self, viewer: Viewer) -> list[tuple[str, bytes]]:
        numbers = self._live.numbers
        is_same = viewer.generation == numbers.generation and viewer.rows <= numbers.rows
        if is_same and viewer.rows == numbers.rows:
            return []
        has = viewer.rows if is_same and numbers.rows - viewer.rows <= MOST_ROWS else 0
        viewer.generation, viewer.rows = numbers.generation, numbers.rows
        newest = (numbers.generation, numbers.rows)
        if self._newest != newest:
            self._newest, self._encoded = newest, {}
        if has not in self._encoded:
            name, document = ("rows", numbers.since(has)) if has else ("history", numbers.history())
            self._encoded[has] = name, json.dumps(document, separators=(",", ":")).encode()
        return [self._encoded[has]]

    def _log(self, viewer: Viewer) -> list[tuple[str, bytes]]:
        log = self._live.log
        is_same = viewer.log_generation == log.generation and log.begin <= viewer.log_end <= log.end
        if is_same and viewer.log_end == log.end:
            return []
        text = log.since(viewer.log_end if is_same else -1)
        viewer.log_generation, viewer.log_end = log.generation, log.end
        document = {"text": text, "is_whole": not is_same}
        return [("log", json.dumps(document, separators=(",", ":")).encode())]


def _event(name: str, data: bytes) -> bytes:
    """JSON has no line breaks, so the data are one line."""
    return b"".join((b"event: ", name.encode(), b"\ndata: ", data, b"\n\n"))
