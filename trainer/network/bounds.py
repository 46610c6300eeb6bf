"""How long a server may take and how much it may send, measured where bytes arrive.

The timeouts of HTTP libraries are for one read: a server that sends a byte a second never meets them, neither in its
headers nor in the body. So the streams below add up the time that is spent waiting in reads, and what came of it. Time
that the reader spends elsewhere (a slow disk) does not count.

Everything scales with the timeout of a request, so that tests need not wait:

| what | bound | with the usual timeout of 10 s |
| --- | --- | --- |
| silence | timeout | 10 s |
| the head of an answer, everything before it (1xx, a proxy's own head) included | 3 timeouts, 256 KiB | 30 s |
| throughput of a body | SLOWEST bytes/s, over 3 timeouts of waiting | 4 KiB/s over 30 s |
| the whole answer to a question (JSON) | 30 timeouts, 64 MiB when unpacked | 300 s |
| a redirect or a refusal | 1 MiB | |
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx

SLOWEST = 4096  # bytes/s: less than a telephone line
WINDOW_TIMEOUTS = 3  # over which throughput is measured, and within which a head must come
ANSWER_TIMEOUTS = 30
MOST_HEAD = 2**18  # bytes
MOST_ANSWER = 2**26
MOST_ASIDE = 2**20  # of an answer that is not what was asked for: a redirect, a refusal
PIECE = 2**16


class OutOfBoundsError(httpx.RemoteProtocolError):
    """The server sends more, or more slowly, than is accepted. Asking again would not help."""


class Head(threading.local):
    """Whether this thread waits for the head of an answer, since when, and how much has come."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.received = 0

    @contextmanager
    def awaited(self) -> Iterator[None]:
        self.restart()
        try:
            yield
        finally:
            self.began = None

    def restart(self) -> None:
        """Count from now: the request is still being sent."""
        self.began, self.received = time.monotonic(), 0


class _Stream(httpcore.NetworkStream):
    """A connection whose reads are measured."""

    def __init__(self, inner: httpcore.NetworkStream, head: Head, slowest: int) -> None:
        self.inner, self.head, self.slowest = inner, head, slowest
        self.waited, self.received = 0.0, 0  # in the current window

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        began = time.monotonic()
        data = self.inner.read(max_bytes, timeout)
        now = time.monotonic()
        if timeout is None:
            return data
        window = WINDOW_TIMEOUTS * timeout
        if self.head.began is not None:
            self.head.received += len(data)
            if self.head.received > MOST_HEAD:
                raise httpcore.RemoteProtocolError(f"its headers are larger than {MOST_HEAD // 2**10} KiB")
            if now - self.head.began > window:
                raise httpcore.ReadTimeout(f"its headers take longer than {window:.0f} s")
            return data
        self.waited += now - began
        self.received += len(data)
        if self.waited > window:
            if self.received < self.slowest * self.waited:
                raise httpcore.ReadTimeout(f"it sends less than {self.slowest} bytes/s for {window:.0f} s")
            self.waited, self.received = 0.0, 0
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.waited, self.received = 0.0, 0
        self.inner.write(buffer, timeout)
        if self.head.began is not None:
            self.head.restart()

    def close(self) -> None:
        self.inner.close()

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> _Stream:
        return _Stream(self.inner.start_tls(ssl_context, server_hostname, timeout), self.head, self.slowest)

    def get_extra_info(self, info: str) -> Any:
        return self.inner.get_extra_info(info)


class Backend(httpcore.SyncBackend):
    """Opens connections whose reads are measured."""

    def __init__(self, head: Head, slowest: int) -> None:
        self.head, self.slowest = head, slowest

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> _Stream:
        try:
            inner = super().connect_tcp(host, port, timeout, local_address, socket_options)
        except (ValueError, OverflowError) as problem:  # no name of a host, no number of a port
            raise httpcore.ConnectError(f"{type(problem).__name__}: {problem}") from problem
        return _Stream(inner, self.head, self.slowest)


class Body(httpx.SyncByteStream):
    """The body of an answer: at most `most` bytes, until `deadline`; `packed`: it is gzip, and unpacked here.

    httpx would unpack as much as a server likes, several times over.
    """

    def __init__(
        self, inner: Iterable[bytes], *, most: int | None, deadline: float | None, packed: bool = False
    ) -> None:
        self.inner, self.most, self.deadline = inner, most, deadline
        self.unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32) if packed else None

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in self._pieces():
            size += len(piece)
            if self.most is not None and size > self.most:
                raise OutOfBoundsError(f"its answer is larger than {self.most / 2**20:g} MiB")
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise OutOfBoundsError("its answer takes too long")
            yield piece

    def _pieces(self) -> Iterator[bytes]:
        if self.unpacker is None:
            yield from self.inner
            return
        for packed in self.inner:
            rest = packed
            while rest:
                try:
                    piece = self.unpacker.decompress(rest, PIECE)
                except zlib.error as problem:
                    raise httpx.DecodingError("its answer is no gzip") from problem
                rest = self.unpacker.unconsumed_tail
                if piece:
                    yield piece
                if self.unpacker.eof:
                    break

    def close(self) -> None:
        close = getattr(self.inner, "close", None)
        if close is not None:
            close()
