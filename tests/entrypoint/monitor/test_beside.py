"""What the job's log says of its page: the address once it can be opened, and why it cannot."""

import errno
import logging
import os
import re
import socket
import time

import pytest

from entrypoint.monitor import beside, server
from trainer.spec.errors import SettingsError, UnreachableError


def said(caplog, pattern, *, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := re.search(pattern, caplog.text):
            return found
        time.sleep(0.05)
    raise AssertionError(caplog.text)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def showing(port, tmp_path):
    return beside.showing(port, None, os.environ, out=tmp_path, price=None)


def test_the_address_is_logged_once_and_can_be_opened_then(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    port = free_port()
    with showing(port, tmp_path):
        said(caplog, rf"http://localhost:{port}/#[\w-]{{20,}}")
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
    assert caplog.text.count("The monitor page of this job") == 1


def test_no_address_is_logged_where_the_port_is_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with showing(port, tmp_path):
            said(caplog, f"MONITOR_PORT={port} is taken by another program")
    assert "#" not in caplog.text and "The monitor page of this job" not in caplog.text


def test_a_process_that_ends_is_named_once_with_its_last_line(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(beside, "FIRST_PAUSE_S", 0.01)
    job = beside.Job(str(tmp_path), 99999, "a-token-of-a-test-1")  # no such port
    keeper = beside.Keeper(job, os.environ, "address")
    keeper.start()
    try:
        said(caplog, r"has ended \(70\): This is a bug in Kiln .*\[exit 70\]\. It is started again")
        time.sleep(3)
    finally:
        keeper.close()
    assert caplog.text.count("has ended") == 1 and "a-token-of-a-test-1" not in caplog.text


@pytest.mark.parametrize(
    ("number", "port", "kind", "words"),
    [
        (errno.EADDRINUSE, 8675, UnreachableError, "another program has it"),
        (errno.EACCES, 80, SettingsError, "below 1024"),
        (errno.EADDRNOTAVAIL, 8675, SettingsError, "no such address"),
    ],
)
def test_why_a_port_cannot_be_had_is_told_apart(monkeypatch, number, port, kind, words):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(kind, match=words):
        server.listen("127.0.0.1", port)


def test_an_address_of_another_machine_cannot_be_had():
    with pytest.raises(SettingsError, match=r"192\.0\.2\.1: this machine has no such address"):
        server.listen("192.0.2.1", 0)
