"""Files that are replaced in one step, and what a message says of a volume."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError

from trainer.spec.errors import StorageError
from trainer.storage import atomic


def test_a_lone_half_of_a_letter_is_written_as_an_escape(tmp_path):
    atomic.write_json(tmp_path / "x.json", {"name": "a\ud800b", "other": "é"})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"name": "a\ud800b", "other": "é"}
    atomic.write_json(tmp_path / "x.json", {"other": "é"})
    assert "é" in (tmp_path / "x.json").read_text(encoding="utf-8")
    for letter in ("\ud800", "\udfff"):
        atomic.write_json(tmp_path / "x.json", {"é": letter})
        assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"é": letter}
    atomic.write_json(tmp_path / "x.json", {"a": [1], "é": "\ue000"})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "a": [\n    1\n  ],\n  "é": "\ue000"\n}\n'


def test_the_bytes_are_flushed_before_the_name_and_the_folder_after_it(tmp_path, monkeypatch):
    """The order survives a power cut."""
    order, opened = [], {}
    plain_open, rename = os.open, Path.rename

    def opens(path, flags, *rest, **keys):
        descriptor = plain_open(path, flags, *rest, **keys)
        opened[descriptor] = Path(path).name
        return descriptor

    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append(("flush", opened[descriptor])))
    monkeypatch.setattr(Path, "rename", lambda self, to: order.append(("rename", self.name)) or rename(self, to))
    path = tmp_path / "new" / "a.txt"
    atomic.write_text(path, "text")
    temporary = f".a.{os.getpid()}.tmp.txt"
    assert order == [("flush", temporary), ("rename", temporary), ("flush", "new")]
    assert path.read_text() == "text" and [p.name for p in path.parent.iterdir()] == ["a.txt"]
    with atomic.replacing(path, writer="me") as other:
        assert other == path.with_name(".a.me.tmp.txt")
        other.write_text("more")
    assert path.read_text() == "more"


@pytest.mark.parametrize("number", atomic.VOLUME_ERRORS)
def test_an_error_of_the_volume_is_named_and_the_old_file_stays(tmp_path, number):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(StorageError, match=rf"{path}: {os.strerror(number)}; .* are free there\."):
        with atomic.replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(number, os.strerror(number))
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_another_error_is_left_as_it_is(tmp_path):
    with pytest.raises(PermissionError), atomic.replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(StorageError, match="the library's words"), atomic.replacing(tmp_path / "a"):
        raise SafetensorError("the library's words")
    assert list(tmp_path.iterdir()) == []
    assert set(atomic.VOLUME_ERRORS) == {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}


def test_only_temporary_files_are_leftovers_here_and_one_folder_down(tmp_path):
    kept = ("a.txt", ".hidden", "x.tmp", "sub/b.txt", "sub/.c", "sub/deep/.d.1.tmp")
    gone = (".a.1.tmp.txt", ".b.2.tmp", "sub/.c.3.tmp.json")
    for name in (*kept, *gone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".state.4.tmp" / "inner").mkdir(parents=True)
    atomic.remove_leftovers(tmp_path)
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == set(kept) and not (tmp_path / ".state.4.tmp").exists()


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 MiB"),
        (2**20, "1 MiB"),
        (512 * 2**20, "512 MiB"),
        (2**30 - 2**20, "1023 MiB"),
        (2**30, "1.0 GiB"),
        (3.25 * 2**30, "3.2 GiB"),
        (250 * 2**30, "250.0 GiB"),
    ],
)
def test_sizes_are_in_gib_from_one_on(size, words):
    assert atomic.human_size(size) == words


def test_free_space_is_that_of_the_volume_of_a_path_that_may_not_be_there_yet(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(9, 9, 2**31))
    assert atomic.free_space(tmp_path) == atomic.free_space(tmp_path / "new") == "2.0 GiB are free there"
    assert asked == [tmp_path, tmp_path]
    monkeypatch.undo()
    assert atomic.free_space(tmp_path / "no" / "folder") == "the volume does not answer"
