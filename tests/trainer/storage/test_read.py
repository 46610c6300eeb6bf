"""Files of users: only regular ones are read, and none without end."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from trainer.storage.read import read_regular


def refusal(path: Path, limit: int = 100) -> str | None:
    with pytest.raises(OSError) as caught:
        read_regular(path, limit=limit)
    return caught.value.strerror


def test_a_regular_file_is_read_up_to_the_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * (1 << 20))
    assert read_regular(tmp_path / "a", limit=1 << 20) == b"x" * (1 << 20)
    (tmp_path / "a").write_bytes(b"x" * (1 + (1 << 20)))
    assert refusal(tmp_path / "a", 1 << 20) == "larger than 1 MiB"
    assert read_regular(Path("/proc/self/stat"), limit=1 << 20)  # its size is 0


def test_nothing_else_is_read_and_nothing_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert refusal(tmp_path / "socket") == "No such device or address"
    (tmp_path / "round").symlink_to("round")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    assert refusal(tmp_path / "fifo") == "a FIFO, not a file"
    assert refusal(Path("/dev/zero")) == "a device, not a file"
    assert refusal(tmp_path) == "a folder, not a file"
    assert refusal(tmp_path / "round") == "Too many levels of symbolic links"
    assert refusal(tmp_path / "sparse", 1 << 30) == "larger than 1 GiB"
