"""The user documents say what the code says: every key, variable, exit code and shape letter is in its document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from entrypoint.manifest import LEVELS
from trainer.plan import Dataset, Subset

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LETTERS = {"general": "G", "a dataset": "D", "a subset": "S"}  # levels of dataset.json, as its document names them


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(name: str, header: str) -> Iterator[list[str]]:
    """The cells of each row of every table in a document whose header begins with the column `header`."""
    inside = False
    for line in text(name).splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            inside = False
        elif cells[0] == header:
            inside = True
        elif inside and set(cells[0]) != {"-"}:
            yield cells


# ---- dataset-json.md

KEY_ROWS = {cells[0].strip("`"): cells for cells in rows("dataset-json.md", "key")}
KNOWN_KEYS = {name: key for keys in LEVELS.values() for name, key in keys.items()}
DEFAULTS = {  # those that no plan chooses
    field.name: field.default
    for kind in (Dataset, Subset)
    for field in fields(kind)
    if field.name in KNOWN_KEYS and field.default not in (MISSING, None)
}


def test_every_key_of_dataset_json_has_a_row_and_no_other():
    assert set(KEY_ROWS) == set(KNOWN_KEYS)


@pytest.mark.parametrize("name", sorted(KNOWN_KEYS))
def test_a_key_stands_at_the_levels_that_its_row_names(name):
    levels = [LETTERS[level] for level, keys in LEVELS.items() if name in keys]
    assert KEY_ROWS[name][1].split() == levels


@pytest.mark.parametrize("name", sorted(KNOWN_KEYS))
def test_the_range_of_a_key_is_in_its_row(name):
    key, kind = KNOWN_KEYS[name], KEY_ROWS[name][2]
    words = {"integer": "whole number", "number": "number", "boolean": "true or false", "text": "text", "size": "width"}
    assert ", ".join(key.choices) in kind if key.choices else words[key.kind] in kind
    limits = [f"{limit:.12g}" for limit in (key.low, key.high) if limit is not None]
    assert re.findall(r"[\d.]+", kind) == limits


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_the_default_of_a_key_is_in_its_row(name):
    default = DEFAULTS[name]
    written = str(default).lower() if isinstance(default, bool) else str(default)
    assert KEY_ROWS[name][3].strip("`") == written.removesuffix(".0")


def test_json_examples_of_dataset_json_are_accepted():
    from entrypoint.manifest import read_manifest

    examples = re.findall(r"```json\n(.*?)```", text("dataset-json.md"), re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        assert read_manifest(example, '["a"]').datasets
