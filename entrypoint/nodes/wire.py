"""Messages between the entrypoints of several machines: one line of JSON, and after it as many bytes as it says.

Both ends send a message at least every `PING_S`. An end that hears nothing for `SILENT_S` takes the other for lost:
a machine that is switched off, or a network that is cut, sends no word of it. Standard library only, no pickle. Nobody
is asked who he is: the network between the nodes must be private (docs/security.md).
"""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

PING_S = 2.0
SILENT_S = 30.0
LARGEST_LINE = 1 << 22  # bytes
LARGEST_FILE = 1 << 34


class LostError(Exception):
    """The other end has gone, or does not answer."""


class Connection:
    """One end. `send` may be called by any thread, `receive` by one."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(SILENT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._input = sock.makefile("rb")
        self._sending = threading.Lock()

        self.own_address = _plain(sock.getsockname()[0])
        self.peer_address = _plain(sock.getpeername()[0])

    def send(self, message: dict[str, Any], content: bytes = b"") -> None:
        """Raises LostError."""
        line = json.dumps({**message, "bytes": len(content)} if content else message).encode() + b"\n"
        try:
            with self._sending:
                self._socket.sendall(line)
                if content:
                    self._socket.sendall(content)
        except OSError as problem:
            raise LostError(str(problem)) from problem

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next message. Raises LostError at the end, in silence, and for what is no message."""
        try:
            line = self._input.readline(LARGEST_LINE)
            if not line.endswith(b"\n"):
                raise LostError("the connection has ended")
            message = json.loads(line)
            size = message.get("bytes", 0)
            if not isinstance(size, int) or not 0 <= size <= LARGEST_FILE:
                raise LostError("not a message of Kiln")
            content = self._input.read(size) if size else b""
        except TimeoutError as problem:
            raise LostError(f"no word for {SILENT_S:.0f} s") from problem
        except (OSError, ValueError, AttributeError) as problem:
            raise LostError(str(problem)) from problem
        if len(content) != size:
            raise LostError("the connection has ended")
        return message, content

    def close(self) -> None:
        """Both directions end at once, also for a thread that waits in `receive`."""
        for end in (lambda: self._socket.shutdown(socket.SHUT_RDWR), self._socket.close):
            try:
                end()
            except OSError:  # it has ended already
                continue


def _plain(address: str) -> str:
    """Without what a socket for both kinds of addresses puts before one of IPv4."""
    return address.removeprefix("::ffff:")
