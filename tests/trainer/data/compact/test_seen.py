"""Images that one command has read already are read again only if they have changed."""

import os
from pathlib import Path

from trainer.data.compact.examined import FileInfo
from trainer.data.compact.seen import SeenFiles


class Reader:
    """Reads files as they are asked for, and knows which."""

    def __init__(self):
        self.read: list[str] = []

    def __call__(self, files):
        for file in files:
            self.read.append(file.name)
            text = file.read_text() if file.is_file() else None
            yield FileInfo(text, 1, 1, has_alpha=False, looks=None) if text else f"no image: {file.name}"


def _names(found):
    return [info if isinstance(info, str) else info.sha256 for info in found]


def test_only_what_is_new_or_has_changed_is_read_and_the_order_stays(tmp_path: Path):
    files = [tmp_path / name for name in "abcd"]
    for file in files:
        file.write_text(f"text of {file.name}")
    files[2].write_text("")  # no image
    seen, reader = SeenFiles(), Reader()
    assert _names(seen.examined(files[:3], reader)) == ["text of a", "text of b", "no image: c"]
    assert reader.read == ["a", "b", "c"]
    files[1].write_text("another")
    assert _names(seen.examined([files[3], *files[:3]], reader)) == [
        *("text of d", "text of a", "another"),
        "no image: c",
    ]
    assert reader.read == ["a", "b", "c", "d", "b"]


def test_a_file_of_the_same_size_and_time_that_took_its_place_is_read(tmp_path: Path):
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_text("one")
    other.write_text("two")
    stamp = file.stat().st_mtime_ns
    seen, reader = SeenFiles(), Reader()
    assert _names(seen.examined([file], reader)) == ["one"]
    other.rename(file)
    os.utime(file, ns=(stamp, stamp))
    assert _names(seen.examined([file], reader)) == ["two"]


def test_a_file_that_is_gone_is_asked_for_each_time(tmp_path: Path):
    seen, reader = SeenFiles(), Reader()
    for _ in range(2):
        assert _names(seen.examined([tmp_path / "x"], reader)) == ["no image: x"]
    assert reader.read == ["x", "x"]
