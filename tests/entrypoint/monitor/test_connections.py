"""Strangers at the port of the monitor page: they cannot take all places, and none of them waits for ever."""

import contextlib
import http.client
import json
import socket
import time

import pytest

from entrypoint.monitor import server
from tests.support.finished_runs import finished_run
from tests.support.monitor import TOKEN, WITH_TOKEN, serving

HEAD = f"Host: x\r\nAuthorization: Bearer {TOKEN}\r\n"


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "REQUEST_S", 1.0)
    finished_run(tmp_path)
    with serving(tmp_path) as running:
        running.folder = tmp_path
        yield running


def connect(page):
    return socket.create_connection(("127.0.0.1", page.port), timeout=20)


def is_closed_within(connection, seconds, *, trickle=b""):
    """Whether the server ends it. `trickle`: is sent again and again meanwhile."""
    connection.settimeout(0.1)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            if trickle:
                connection.sendall(trickle)
            if connection.recv(1 << 16) == b"":
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


@pytest.mark.parametrize(
    ("begun", "trickle"),
    [
        (b"", b""),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ", b"y"),
        (b"POST /enter HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n", b"y"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n", b"y"),
        (b"GET /page/enter.js HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nX: ", b"y"),
    ],
    ids=["silent", "headers", "body", "body of a page", "second request"],
)
def test_a_request_that_is_not_complete_in_time_is_cut_off(page, begun, trickle):
    with connect(page) as connection:
        connection.sendall(begun)
        assert is_closed_within(connection, 4, trickle=trickle)


def test_an_answer_that_takes_longer_than_a_request_may_is_not_cut_off(page):
    with connect(page) as connection:
        connection.sendall(f"GET /events HTTP/1.1\r\n{HEAD}\r\n".encode())
        assert not is_closed_within(connection, 2.5)


def test_a_connection_serves_one_request_after_another(page):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
    connection.connect()
    socket_of_all = connection.sock
    for _ in range(4):
        time.sleep(0.5)
        connection.request("GET", "/health", headers=WITH_TOKEN)
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read() and connection.sock is socket_of_all
    connection.close()


def test_strangers_cannot_take_the_places_of_the_owner(tmp_path):
    """As many silent connections as there are places, each for as long as it may be."""
    finished_run(tmp_path)
    with serving(tmp_path) as page, contextlib.ExitStack() as stack, connect(page) as own:
        own.sendall(f"GET /events HTTP/1.1\r\n{HEAD}\r\n".encode())
        assert own.recv(100).startswith(b"HTTP/1.1 200")
        for _ in range(server.MOST_CONNECTIONS + 44):
            stack.enter_context(connect(page))
        body = json.dumps({"token": TOKEN}).encode()
        assert page.ask("/enter", method="POST", body=body, headers={}).status == 204
        assert page.ask("/health").status == 200
        assert not is_closed_within(own, 1)


def test_a_client_that_does_not_read_is_cut_off(page, monkeypatch):
    monkeypatch.setattr(server, "STALLED_S", 1.0)
    with (page.folder / "x.safetensors").open("wb") as file:
        file.truncate(1 << 26)  # more than sockets hold
    with connect(page) as connection:
        connection.sendall(f"GET /file/x.safetensors HTTP/1.1\r\n{HEAD}\r\n".encode())
        time.sleep(2.5)
        received = 0
        with contextlib.suppress(OSError):
            while piece := connection.recv(1 << 20):
                received += len(piece)
        assert received < 1 << 26
