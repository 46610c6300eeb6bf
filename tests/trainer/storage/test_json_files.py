"""Sealed files: one flipped bit anywhere shows."""

import json

import pytest

from trainer.storage import json_files

VALUES = {"name": "x", "files": ["x-step00000004.safetensors"], "used": 3, "done": False, "rate": 0.1}


def test_each_flipped_bit_of_a_sealed_file_is_noticed(tmp_path):
    path = tmp_path / "x.json"
    whole = json.dumps(json_files.sealed(VALUES)).encode()
    path.write_bytes(whole)
    assert json_files.read_sealed(path, unsealed=VALUES) == VALUES
    for position in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[position] ^= 1 << bit
            path.write_bytes(data)
            found = json_files.read_sealed(path, unsealed=VALUES)
            # In JSON, some bits change nothing: E for e, a blank for a tab.
            assert found is None or found == VALUES, (position, bit)


def test_a_file_of_an_older_version_has_no_seal(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"name": "x"}))
    assert json_files.read_sealed(path, unsealed=VALUES) == {"name": "x"}
    path.write_text(json.dumps({"name": "x", "notes": "mine"}))
    assert json_files.read_sealed(path, unsealed=VALUES) is None


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x.json"])
def test_a_name_as_long_as_names_may_be_is_set_aside_too(tmp_path, name):
    for content in ("one", "two"):
        (tmp_path / name).write_text(content)
        json_files.set_aside(tmp_path / name, "is odd")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"one", "two"}
