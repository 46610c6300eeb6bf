"""Temporary files go where they can be written, and what cannot be used is named."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from trainer.process import scratch


def test_the_named_place_is_used_and_left_clean(tmp_path, caplog):
    environment = {"TMPDIR": str(tmp_path)}
    with scratch.folder(environment, tmp_path / "cache") as made:
        assert made.parent == tmp_path and environment["TMPDIR"] == str(made)
        (made / "file").touch()
    assert environment == {"TMPDIR": str(tmp_path)} and list(tmp_path.iterdir()) == [] and not caplog.text


@pytest.mark.parametrize("place", ["/nowhere", "/proc", "/sys", "/dev/null", "/dev/full", "\0"])
def test_a_place_that_cannot_be_written_is_named_and_another_used(tmp_path, caplog, place, monkeypatch):
    if place == "\0":
        place = str(tmp_path / ("long" * 100))
    monkeypatch.setattr(scratch, "USUAL", (str(tmp_path),))
    with scratch.folder({"TMPDIR": place}, tmp_path / "cache") as made:
        assert made.parent == tmp_path
    assert f"TMPDIR={place} cannot be used (" in caplog.text and f"temporary files go to {tmp_path}" in caplog.text


def test_where_no_place_works_the_cache_does(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(scratch, "USUAL", ("/proc", "/nowhere"))
    with scratch.folder({}, tmp_path / "cache") as made:
        assert made.parent == tmp_path / "cache" / "tmp"
    assert "/proc cannot be used" in caplog.text and "cache folder" in caplog.text
    with pytest.raises(OSError), scratch.folder({}, Path("/proc/cache")):
        pass


def test_a_full_place_is_found_out(tmp_path, caplog, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], capture_output=True).returncode:
        pytest.skip("needs to mount a volume")
    try:
        monkeypatch.setattr(scratch, "USUAL", (str(tmp_path),))
        with scratch.folder({"TMPDIR": str(small)}, tmp_path / "cache") as made:
            assert made.parent == tmp_path
        assert f"TMPDIR={small} cannot be used (No space left on device)" in caplog.text
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_python_itself_uses_the_place(tmp_path, monkeypatch):
    before = tempfile.gettempdir()
    monkeypatch.setattr(scratch, "USUAL", ("/proc",))
    with scratch.folder({}, tmp_path / "cache") as made:
        assert tempfile.gettempdir() == str(made)
    assert tempfile.gettempdir() == before
