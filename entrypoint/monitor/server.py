"""The socket, the server on it, and what a connection may take.

Strangers reach the port as well. uvicorn itself waits for ever for a request that was begun, so a few hundred silent
connections would take every place. Here a request has to be complete within `REQUEST_S`, an answer has to be read, and
strangers have only some of the places: where those are taken, the oldest of them gives way to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator

import uvicorn
from starlette.datastructures import Headers
from uvicorn.protocols.http.h11_impl import H11Protocol

from entrypoint.monitor.access import Access
from entrypoint.monitor.actions import Actions
from entrypoint.monitor.app import make_app
from entrypoint.monitor.live import Live
from trainer.spec.errors import SettingsError, UnreachableError

log = logging.getLogger("entrypoint.monitor")
FIRST_TO_BE_KILLED = b"1000"  # proc(5)
MOST_CONNECTIONS = 256  # twenty viewers have six each; further ones are answered with 503
MOST_STRANGERS = 160  # of these connections, that have not shown the token; the others are its owner's
REQUEST_S = 10.0  # from the first byte, or the opening of the connection, to the end of the body
STALLED_S = 60.0  # that an answer waits for a client which does not read
LARGEST_HEADERS = 1 << 14  # bytes
IDLE_S = 5  # how long a connection waits for its next request


class Server(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Connection(H11Protocol):
    """A connection that cannot wait for ever. uvicorn makes one of each; `access` tells whose it is."""

    access: Access

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.is_owners = False
        self.opened = self.loop.time()
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._arm()
        self._make_room()

    def _make_room(self) -> None:
        strangers = [other for other in self.connections if isinstance(other, Connection) and not other.is_owners]
        if len(strangers) > MOST_STRANGERS:
            min(strangers, key=lambda other: other.opened).end()

    def end(self) -> None:
        """Close at once, without what was not sent yet: whoever is at the other end does not read it."""
        self.connections.discard(self)  # its place is free now, not when the loop comes to it
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and not self._is_answering():
            self._arm()
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.headers:
            self.is_owners = bool(self.access.allows(Headers(raw=self.headers)))
        if self._is_answering():
            self._disarm()

    def _is_answering(self) -> bool:
        """Whether a request is complete, and its answer is not."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(REQUEST_S, self.end)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_S, self.end)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)
        if self._stalled is not None:
            self._stalled.cancel()


def connections_with(access: Access) -> type[Connection]:
    """The kind of connection that knows who may look."""

    class OwnConnection(Connection):
        pass

    OwnConnection.access = access
    return OwnConnection


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections.

    Raises UnreachableError where the port is taken, SettingsError where this port or address can never be had.
    """
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as problem:
        place = f"The monitor page cannot listen on port {port} of {host}"
        if problem.errno == errno.EADDRINUSE:
            raise UnreachableError(f"{place}: another program has it. Fix: choose another port.") from problem
        if problem.errno in (errno.EACCES, errno.EPERM):
            below = "ports below 1024 are for the administrator" if port < 1024 else "this user may not"
            raise SettingsError(f"{place}: {below}. Fix: choose a port of 1024 or above.") from problem
        raise SettingsError(
            f"{place}: this machine has no such address ({problem.strerror}). Fix: choose 127.0.0.1 or 0.0.0.0."
        ) from problem


def give_way() -> None:
    """Where memory runs out, this process is the one to be killed."""
    with contextlib.suppress(OSError):
        descriptor = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        try:
            os.write(descriptor, FIRST_TO_BE_KILLED)
        finally:
            os.close(descriptor)


def serve(listening: socket.socket, live: Live, token: str, actions: Actions | None = None) -> None:
    """Serve until the process ends."""
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # else strangers could fill the job's log
    port = listening.getsockname()[1]
    access = Access(token, port=port)
    config = uvicorn.Config(
        make_app(live, access, actions),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        loop="asyncio",
        http=connections_with(access),
        ws="none",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=IDLE_S,
        h11_max_incomplete_event_size=LARGEST_HEADERS,
    )
    Server(config).run(sockets=[listening])
