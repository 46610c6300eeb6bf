"""Files that are replaced in one step, whatever has their names, and what a message says of a volume."""

import errno
import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError

from trainer.spec.errors import StorageError
from trainer.spec.log_lines import RAW
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
    temporary = ".a.kiln.tmp.txt"
    assert order == [("flush", temporary), ("rename", temporary), ("flush", "new")]
    assert path.read_text() == "text" and [p.name for p in path.parent.iterdir()] == ["a.txt"]
    with atomic.replacing(path, shared=True) as other, atomic.replacing(path, shared=True) as another:
        assert re.fullmatch(r"\.a\.[0-9a-f]{8}\.kiln\.tmp\.txt", other.name) and other != another
        another.write_text("less")
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


def test_json_acts_on_no_terminal_and_loses_nothing(tmp_path):
    value = {"name": "a\x1b[2J\x9b\u202egnp\u200b\U000e0041\x7f", "other": "é 猫"}
    atomic.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and not RAW.search(text) and "é 猫" in text


@pytest.mark.parametrize("kind", ["folder", "pipe"])
@pytest.mark.parametrize("name", ["x.json", ".x.kiln.tmp.json"])
def test_what_is_no_file_is_set_aside_or_gone_and_never_written_to(tmp_path, name, kind):
    place = tmp_path / name
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
        (place / "mine").write_text("mine")
    atomic.write_json(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    if kind == "folder":
        assert (tmp_path / f"{name}.set-aside" / "mine").read_text() == "mine"


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / ".x.kiln.tmp.json").symlink_to("other")
    atomic.write_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "other").read_text() == "mine" and json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_a_link_in_the_place_of_the_file_goes_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / "x.json").symlink_to("other")
    atomic.write_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "other").read_text() == "mine" and not (tmp_path / "x.json").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "x.json"]


def test_only_leftovers_of_files_that_a_job_writes_are_removed(tmp_path):
    own = [".x.kiln.tmp.json", ".x.0123abcd.kiln.tmp.json"]
    mine = [".my.tmp.notes", ".x.tmp.json", ".y.kiln.tmp.json", ".x.notes.kiln.tmp.json", ".kiln.tmp", "x.json"]
    for name in (*own, *mine):
        (tmp_path / name).write_text(name)
    atomic.remove_leftovers(tmp_path, {"x.json"}.__contains__)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)
    atomic.remove_leftovers(tmp_path / "no such folder", {"x.json"}.__contains__)


def test_no_file_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        atomic.write_text(tmp_path / str(number), "text")
    assert len(os.listdir("/proc/self/fd")) == before
