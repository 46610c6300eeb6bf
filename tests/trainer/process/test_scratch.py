"""Temporary files go where they can be written, and what cannot be used is named."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from trainer.process import scratch
from trainer.process.vitals import VARIABLE, Vitals


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


@pytest.fixture
def guarded(monkeypatch):
    """What the parent of this process would see, and the environment by which this process finds it."""
    vitals, path = Vitals.make()
    monkeypatch.setenv(VARIABLE, path)
    yield vitals
    vitals.close()


def test_the_parent_knows_the_folder_before_it_is_there(tmp_path, guarded, monkeypatch):
    """A stop that comes between the two would leave it behind."""
    seen = []
    make = Path.mkdir

    def watched(self, *given, **named):
        seen.append((guarded.read_scratch(), str(self), self.exists()))
        make(self, *given, **named)

    monkeypatch.setattr(Path, "mkdir", watched)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with scratch.folder(os.environ, tmp_path / "cache") as made:
        assert seen == [(str(made), str(made), False)] and made.stat().st_mode & 0o777 == 0o700


def test_the_parent_knows_the_place_that_was_taken_after_all(tmp_path, guarded, monkeypatch):
    """It is shorter than the one that could not be written."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("a" * 200) / "missing"))
    monkeypatch.setattr(scratch, "USUAL", (str(tmp_path),))
    with scratch.folder(os.environ, tmp_path / "cache") as made:
        assert made.parent == tmp_path and guarded.read_scratch() == str(made)


def test_a_path_that_is_too_long_is_not_cut_to_that_of_another_folder(guarded):
    guarded.write_scratch("/tmp/" + "a/" * 3000)
    assert guarded.read_scratch() == ""
