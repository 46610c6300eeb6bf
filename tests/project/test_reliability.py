"""The matrix of docs/reliability.md and the threat model of docs/security.md name tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    line.split("|")[1:5]
    for line in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| ([A-H]\d[^|]*|soak) \|", line)
]


SECURITY = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
ACTORS = re.split(r"^## ", SECURITY, flags=re.MULTILINE)[1:]  # a part of the page for each
THREATS = [
    line.split("|")[1:4]
    for line in SECURITY.splitlines()
    if line.startswith("| ") and not re.match(r"\| (---|threat) ", line)
]


def assert_tests_exist(cell):
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", cell)
    assert named
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_every_row_has_its_tests(row):
    assert_tests_exist(row[3])


@pytest.mark.parametrize("row", THREATS, ids=lambda row: row[0].strip()[:60])
def test_every_threat_has_what_holds_it_and_its_tests(row):
    assert row[0].strip() and row[1].strip()
    assert_tests_exist(row[2])


def test_everybody_who_may_want_something_is_in_the_threat_model():
    titles = [part.splitlines()[0] for part in ACTORS if "| threat |" in part]
    for who in ("owner", "request", "dataset", "model", "network", "output", "volume", "image", "release"):
        assert any(who in title.lower() for title in titles), who
    assert len(THREATS) > 30


def test_all_rows_are_there():
    rows = {name for row in ROWS for name in re.findall(r"[A-H]\d", row[0])}
    counts = {"A": 8, "B": 7, "C": 4, "D": 9, "E": 5, "F": 3, "G": 2, "H": 3}
    assert rows >= {f"{letter}{i + 1}" for letter, count in counts.items() for i in range(count)}
