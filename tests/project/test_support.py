"""Tests stand on their own: what they share is in tests/support, and nothing else leans on it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def imported(path):
    """The dotted names that a file imports; of `from a import b` also "a.b"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def test_no_test_module_is_imported_by_another():
    modules = {path.stem for path in TESTS if path.name.startswith("test_")} | {"conftest"}
    assert len(modules) > 50
    found = {str(path): names for path in TESTS if (names := imported_modules(path) & modules)}
    assert found == {}


def imported_modules(path):
    """The last parts of the modules below tests/ that a file imports."""
    return {name.split(".")[-1] for name in imported(path) if name.split(".")[0] == "tests" or name.startswith(".")}


def test_what_tests_import_of_tests_is_support():
    found = {str(path): names for path in TESTS if (names := {n for n in imported(path) if beside_support(n)})}
    assert found == {}


def beside_support(name):
    parts = name.split(".")
    return parts[0] == "tests" and len(parts) > 1 and parts[1] not in ("support", "fuzz", "mutants")


@pytest.mark.parametrize("folder", ["bench", "entrypoint", "trainer", "runpod"])
def test_nothing_else_imports_tests(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [str(path) for path in files if any(name.split(".")[0] == "tests" for name in imported(path))] == []


def test_fixtures_of_several_folders_are_registered_in_one_place():
    text = {path: path.read_text(encoding="utf-8") for path in TESTS if path.name == "conftest.py"}
    assert [path for path, lines in text.items() if "pytest_plugins" in lines] == [ROOT / "tests" / "conftest.py"]
