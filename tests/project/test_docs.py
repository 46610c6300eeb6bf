"""The user documents say what the code says: every key, variable, exit code and shape letter is in its document."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from entrypoint.dataset_config.manifest import LEVELS
from entrypoint.processes import launch
from entrypoint.settings.variables import NAMES
from trainer.spec import errors
from trainer.spec.plan import Dataset, Subset

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
USERS = ("tutorial", "dataset-json", "settings-guide", "troubleshooting", "glossary")  # the documents for users
# Variables that no table has, and a name of the code.
OTHERS = {"SOURCE_DATE_EPOCH", "HEALTH_PATIENCE_MINUTES", "HF_HUB_OFFLINE", "WEIGHT_FORMATS"}
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
    from entrypoint.dataset_config.manifest import read_manifest

    examples = re.findall(r"```json\n(.*?)```", text("dataset-json.md"), re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        assert read_manifest(example, '["a"]').datasets


# ---- all of them


def anchors(document: str) -> set[str]:
    """What links may name after #, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.+)$", document, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", USERS)
def test_every_variable_that_a_document_names_exists(name):
    named = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", text(f"{name}.md")))
    assert named - {*NAMES} - OTHERS == set()


@pytest.mark.parametrize("name", USERS)
def test_every_link_inside_the_repository_leads_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text(f"{name}.md")):
        file, _, anchor = target.partition("#")
        path = DOCS / file if file else DOCS / f"{name}.md"
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


# ---- troubleshooting.md


def exit_codes() -> set[int]:
    """All that a job may end with: of the errors, of the command line, and of the signals that are passed on."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.KilnError)]
    stopped = {128 + signal for signal in launch.FORWARDED}
    return {0, 64} | {kind.exit_code for kind in kinds} | stopped


def test_every_exit_code_is_explained():
    named = {int(number) for number in re.findall(r"\b\d{1,3}\b", " ".join(rest("troubleshooting.md")))}
    assert exit_codes() <= named


def rest(name: str) -> list[str]:
    """The headings of a document, and the lines that begin with a number."""
    return [line for line in text(name).splitlines() if re.match(r"#+ |\d", line)]


SOURCES = "".join(
    path.read_text(encoding="utf-8")
    for folder in ("entrypoint", "trainer")
    for path in sorted((ROOT / folder).rglob("*.py"))
)
CODE = re.sub(r'"\s*\n\s*f?"', "", SOURCES)  # as one reads a text that is written in several pieces
OF_OTHERS = ("No space left on device", "Input/output error", "Failed to load …torchao…", "/datasets/")


def test_every_message_that_is_quoted_is_one_of_the_code():
    cells = [cells[0] for header in ("message", "what you see") for cells in rows("troubleshooting.md", header)]
    quoted = {quote for cell in cells for quote in re.findall(r'"([^"]+)"', cell)} - {*OF_OTHERS, "Room on the volume"}
    assert len(quoted) > 80
    assert [quote for quote in sorted(quoted) if quote not in CODE] == []


# ---- glossary.md

SHAPED = re.compile(r"[a-z][a-z0-9_]*_([A-Z0-9]*[A-Z][A-Z0-9]*)")
OF_PEFT = {"lora_A", "lora_B"}  # names of its matrices


def identifiers(path: Path) -> Iterator[str]:
    """Every name that a module gives to a value."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute):
            yield node.attr


def test_every_shape_letter_of_the_trainer_is_in_the_legend():
    names = {name for path in (ROOT / "trainer").rglob("*.py") for name in identifiers(path)} - OF_PEFT
    letters = {letter for name in names if (found := SHAPED.fullmatch(name)) for letter in re.sub(r"\d", "", found[1])}
    legend = [cells[0] for cells in rows("glossary.md", "letter")]
    assert len(letters) > 8
    assert letters <= set(legend)
    assert len(legend) == len(set(legend))


def test_a_term_of_the_glossary_stands_once_and_is_explained():
    found = [(cells[0], cells[1]) for cells in rows("glossary.md", "term")]
    assert len({term for term, _ in found}) == len(found) > 80
    assert all(len(meaning.split()) >= 3 for _, meaning in found)
