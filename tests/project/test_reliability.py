"""The matrix of docs/reliability.md names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROWS = [
    line.split("|")[1:5]
    for line in (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| ([A-H]\d[^|]*|soak) \|", line)
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_every_row_has_its_tests(row):
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", row[3])
    assert named
    for file, name in named:
        path = TESTS.parent / file
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_all_rows_are_there():
    rows = {name for row in ROWS for name in re.findall(r"[A-H]\d", row[0])}
    counts = {"A": 8, "B": 7, "C": 4, "D": 9, "E": 5, "F": 3, "G": 2, "H": 3}
    assert rows >= {f"{letter}{i + 1}" for letter, count in counts.items() for i in range(count)}
