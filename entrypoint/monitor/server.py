"""The socket and the server on it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator

import uvicorn

from entrypoint.monitor.access import Access
from entrypoint.monitor.actions import Actions
from entrypoint.monitor.app import make_app
from entrypoint.monitor.live import Live
from trainer.spec.errors import UnreachableError

log = logging.getLogger("entrypoint.monitor")
FIRST_TO_BE_KILLED = b"1000"  # proc(5)
MOST_CONNECTIONS = 256  # twenty viewers have six each; further ones are answered with 503
LARGEST_HEADERS = 1 << 14  # bytes
IDLE_S = 5  # how long a connection waits for its next request


class Server(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections. Raises UnreachableError where the port is taken, or not to be had."""
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as problem:
        raise UnreachableError(
            f"The monitor page cannot listen on port {port} of {host}: {problem.strerror}. Fix: choose another port."
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
    config = uvicorn.Config(
        make_app(live, Access(token, port=port), actions),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        loop="asyncio",
        http="h11",
        ws="none",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=IDLE_S,
        h11_max_incomplete_event_size=LARGEST_HEADERS,
    )
    Server(config).run(sockets=[listening])
