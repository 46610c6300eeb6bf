"""Files that are replaced in one step, whatever has their names."""

import json
import os

import pytest

from trainer.spec.log_lines import RAW
from trainer.storage import atomic


def test_a_lone_half_of_a_letter_is_written_as_an_escape(tmp_path):
    atomic.write_json(tmp_path / "x.json", {"name": "a\ud800b", "other": "é"})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"name": "a\ud800b", "other": "é"}
    atomic.write_json(tmp_path / "x.json", {"other": "é"})
    assert "é" in (tmp_path / "x.json").read_text(encoding="utf-8")


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


def test_only_leftovers_of_files_that_a_job_writes_are_removed(tmp_path):
    own = [".x.kiln.tmp.json", ".x.0123abcd.kiln.tmp.json"]
    mine = [".my.tmp.notes", ".x.tmp.json", ".y.kiln.tmp.json", ".x.notes.kiln.tmp.json", ".kiln.tmp", "x.json"]
    for name in (*own, *mine):
        (tmp_path / name).write_text(name)
    atomic.remove_leftovers(tmp_path, {"x.json"}.__contains__)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)
    atomic.remove_leftovers(tmp_path / "no such folder", {"x.json"}.__contains__)
