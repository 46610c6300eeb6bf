"""A server that answers with raw bytes, so that it may do what no HTTP library would: never end, lie, lead anywhere.

A script gets the connection, after a request's head has been read, and that head. What it returns is sent, and the
connection closed. `drip` and `flood` send without end.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

Script = Callable[[socket.socket, str], Iterable[bytes] | bytes | None]
STILL_S = 30.0  # a script that sends for ever ends after this, should the client never close


class RawServer:
    """`with RawServer(script) as server:`; `server.heads` are the requests that came."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.heads: list[str] = []
        self.sent = 0
        self.ended = threading.Event()

    def __enter__(self) -> RawServer:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                piece = connection.recv(65536)
                if not piece:
                    return
                data += piece
            head = data.partition(b"\r\n\r\n")[0].decode("latin-1")
            self.heads.append(head)
            answer = self.script(connection, head)
            for block in [answer] if isinstance(answer, bytes) else answer or ():
                if self.ended.is_set():
                    return
                connection.sendall(block)
                self.sent += len(block)

    def paths(self) -> list[str]:
        return [head.split(" ")[1] for head in self.heads]


def answer(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer; `headers` in Python's spelling: content_type."""
    lines = [f"HTTP/1.1 {status}", "Connection: close"]
    if "content_length" not in headers and "transfer_encoding" not in headers:
        headers["content_length"] = str(len(body))
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items() if value != "-"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def drip(start: bytes, *, every: float, piece: bytes = b"x") -> Iterable[bytes]:
    """`start`, and then `piece` every so many seconds, without end."""
    yield start
    deadline = time.monotonic() + STILL_S
    while time.monotonic() < deadline:
        time.sleep(every)
        yield piece


def flood(start: bytes, piece: bytes) -> Iterable[bytes]:
    """`start`, and then `piece` as fast as it goes, without end."""
    yield start
    deadline = time.monotonic() + STILL_S
    while time.monotonic() < deadline:
        yield piece
