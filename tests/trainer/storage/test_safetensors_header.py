"""Damaged safetensors files of every kind: a ValueError that says what is wrong, and never another error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors

from tests.support.damaged_files import DAMAGES, TWO, made
from trainer.storage.safetensors_header import check_layout, read_header


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_with_what_is_wrong(tmp_path: Path, name: str) -> None:
    data, words = DAMAGES[name]
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        check_layout(read_header(tmp_path / "x.safetensors"))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = made(TWO, bytes(16))
    for end in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:end])
        with pytest.raises(ValueError):
            check_layout(read_header(tmp_path / "x"))


def test_a_sparse_file_of_a_terabyte_is_refused_at_once(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="not JSON"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (os.mkfifo, "a FIFO"),
        (Path.mkdir, "a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
    ],
)
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path, make: Callable[[Path], Any], what: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=what):
        read_header(tmp_path / "x")


def test_what_the_format_allows_is_read(tmp_path: Path) -> None:
    header = {"__metadata__": {"x": "y"}, "empty": {"dtype": "F16", "shape": [0, 4], "data_offsets": [0, 0]}}
    header |= {"one": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}
    header |= {"four bits": {"dtype": "F4", "shape": [8], "data_offsets": [4, 8]}}
    (tmp_path / "x").write_bytes(made(json.dumps(header).encode() + b"   "))
    found = read_header(tmp_path / "x")
    check_layout(found)
    assert found.metadata == {"x": "y"} and {name: entry.shape for name, entry in found.entries.items()} == {
        "empty": (0, 4),
        "one": (),
        "four bits": (8,),
    }


@pytest.mark.parametrize("text", ['{"a\\ud800": {}}', '{"__metadata__": {"k": "\\udc00"}}'])
def test_half_of_a_character_is_damage_as_the_library_says(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    with pytest.raises(ValueError, match="half of a character"):
        read_header(path)
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, "pt"):
        pass
