"""How the nodes find each other: the first listens, the others try until it does."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from entrypoint.nodes.cluster import Place
from entrypoint.nodes.terms import Terms
from entrypoint.nodes.wire import Connection, LostError
from trainer.spec.errors import UnreachableError

log = logging.getLogger(__name__)
VERSION = 1  # of the messages
RETRY_S = 1.0
CONNECT_S = 5.0
SAID_EVERY_S = 60.0


def listen(place: Place, *, timeout_s: float) -> socket.socket:
    """The first node's socket, on all its addresses. Waits for a port that an earlier job still holds.

    Raises UnreachableError.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", place.port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", place.port))
        except OSError as problem:
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"MASTER_PORT={place.port}: this port cannot be listened on: {problem.strerror}. Another program "
                    "has it, such as torchrun's own rendezvous. Fix: another MASTER_PORT on all nodes."
                ) from problem
            time.sleep(RETRY_S)


def accept(server: socket.socket, greet: Callable[[Connection, dict[str, Any]], None]) -> None:
    """Call `greet` for each node that comes, until the socket is closed. Others that connect are left alone."""
    while True:
        try:
            sock, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=_welcome, args=(Connection(sock), greet), name="nodes", daemon=True).start()


def _welcome(link: Connection, greet: Callable[[Connection, dict[str, Any]], None]) -> None:
    try:
        hello, _ = link.receive()
    except LostError:
        link.close()
        return
    types = (type(hello.get("rank")), type(hello.get("terms")))
    if hello.get("kiln") == VERSION and types == (int, dict):
        greet(link, hello)
    else:
        link.close()


def connect(place: Place, terms: Terms, *, deadline: float, timeout_s: float) -> Connection:
    """A connection to the first node, which has our terms. Raises UnreachableError."""
    said = time.monotonic()
    while True:
        try:
            sock = socket.create_connection((place.address, place.port), timeout=CONNECT_S)
            link = Connection(sock)
            link.send({"kiln": VERSION, "rank": place.rank, "terms": terms})
            return link
        except (OSError, LostError) as problem:  # also a name that is not known yet
            now = time.monotonic()
            if now > deadline:
                raise UnreachableError(
                    f"NODES={place.count}: node 0 cannot be reached at {place.address}:{place.port} (MASTER_ADDR, "
                    f"MASTER_PORT): {problem}. Waited NODES_TIMEOUT={timeout_s:g} s."
                ) from problem
            if now > said + SAID_EVERY_S:
                said = now
                log.info("Node 0 does not answer yet at %s:%d: %s.", place.address, place.port, problem)
        time.sleep(RETRY_S)
