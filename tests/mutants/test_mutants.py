"""The faults that `make mutants` seeds, and the list of those that no test can notice."""

import ast
import os
import sys
import time
import types

import pytest

from tests.mutants import warm
from tests.mutants.equivalents import equivalents, is_listed
from tests.mutants.modules import MODULES, ROOT, module_files
from tests.mutants.operators import faults

EXAMPLE = '''
"""A docstring with 3 words."""
import logging
LIMIT = 64
def f(a: int, b: int, *, c=True) -> int:
    """Not touched: 1."""
    log.info("a < b %d", 7)
    if a < b and c:
        raise ValueError(f"{a} is 1 too small")
    g.x = h(a, b, key=a)
    g.close()
    return [i for i in range(a) if i][1:b]
'''


def test_every_kind_of_fault_is_found_and_texts_are_left_alone():
    found = [(fault.line, fault.function, fault.change) for fault in faults(ast.parse(EXAMPLE))]
    assert found == [
        (4, "", "64 → 65"),
        (4, "", "64 → 63"),
        (5, "", "True → False"),
        (8, "f", "if a < b and c → if not (a < b and c)"),
        (8, "f", "a < b and c → a < b or c"),
        (8, "f", "a < b and c → c"),
        (8, "f", "a < b and c → a < b"),
        (8, "f", "a < b → a <= b"),
        (8, "f", "a < b → a >= b"),
        (8, "f", "a → b"),
        (8, "f", "b → a"),
        (9, "f", "raise ValueError(f'{a} is 1 too small') → nothing"),
        (10, "f", "g.x = h(a, b, key=a) → nothing"),
        (10, "f", "h(a, b, key=a) → h(b, a, key=a)"),
        (10, "f", "h(a, b, key=a) → h(a, b)"),
        (10, "f", "a → b"),
        (10, "f", "b → a"),
        (10, "f", "a → b"),
        (11, "f", "g.close() → nothing"),
        (12, "f", "return [i for i in range(a) if i][1:b] → return None"),
        (12, "f", "[i for i in range(a) if i] → [i for i in range(a)]"),
        (12, "f", "a → b"),
        (12, "f", "1:b → 1:b + 1"),
        (12, "f", "1 → 2"),
        (12, "f", "1 → 0"),
        (12, "f", "b → a"),
    ]


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("x = a // b + c", {"a // b + c → a // b - c", "a // b → a * b"}),
        ("x = [a] + b", {"[a] + b → [a]", "[a] + b → b"}),
        ("x = folder / name", set()),
        ("x = f'{a}' + b", set()),
        ("x = min(a, b)", {"min(a, b) → max(a, b)"}),
        ("x = sorted(a, key=f)", {"sorted(a, key=f) → list(a)", "sorted(a, key=f) → sorted(a)"}),
        ("x = t.sum()", {"t.sum() → t.mean()"}),
        ("x = not a", {"not a → a"}),
        ("x = -a if b else c", {"-a if b else c → c if b else -a", "-a → a"}),
        ("x += y", {"x += y → nothing", "x += y → x -= y"}),
        ("x = {'a': b, 'c d': e}", {"{'a': b, 'c d': e} → {'c d': e}", "{'a': b, 'c d': e} → {'a': b}", "'a' → 'a_'"}),
        ("x = 0.5", {"0.5 → 1.0", "0.5 → 0.25"}),
        ("for a in b:\n    continue", {"continue → nothing"}),
        ("x = a is None", {"a is None → a is not None"}),
        ("x = d < a <= b", {f"d < a <= b → {new}" for new in ("d <= a <= b", "d >= a <= b", "d < a < b", "d < a > b")}),
        ("assert a == 1", set()),
    ],
)  # fmt: skip
def test_what_may_stand_in_the_place_of_an_expression(code, changes):
    assert {fault.change for fault in faults(ast.parse(code))} == changes


def test_every_fault_of_every_module_is_another_program_that_compiles():
    """Of a few modules each fault; a fault is put into a tree of its own."""
    for module in ("trainer/training/ema.py", "trainer/training/step_guard.py", "trainer/data/buckets.py"):
        text = (ROOT / module).read_text(encoding="utf-8")
        before = ast.dump(ast.parse(text))
        for mutant in warm.mutants(module):
            tree = mutant.tree()
            compile(tree, module, "exec")
            assert ast.dump(tree) != before, mutant


def test_the_modules_and_their_tests_are_there():
    assert all((ROOT / name).exists() for name in MODULES)
    for module, tests in module_files().items():
        assert tests and all((ROOT / test).is_file() for test in tests), module


def test_what_is_called_equivalent_still_is_in_the_code_and_has_a_reason():
    known = equivalents()
    for module in {one.module for one in known}:
        listed = [one for one in known if one.module == module]
        there = {(mutant.place, mutant.change) for mutant in warm.mutants(module)}
        assert [one for one in listed if (one.place, one.change) not in there or len(one.reason) < 10] == []
        assert any(is_listed(mutant, listed) for mutant in warm.mutants(module))


@pytest.fixture
def live(tmp_path, monkeypatch):
    """A module with a function that another module has imported by name."""
    monkeypatch.setattr(warm, "ROOT", tmp_path)
    (tmp_path / "maths.py").write_text("def double(x):\n    def inner():\n        return x * 2\n    return inner()\n")
    module = types.ModuleType("maths")
    exec(compile((tmp_path / "maths.py").read_text(), str(tmp_path / "maths.py"), "exec"), module.__dict__)
    return module


def test_a_live_function_gets_the_fault_for_everyone_who_has_imported_it(live):
    double = live.double
    (mutant,) = [m for m in warm.mutants("maths.py") if m.change == "x * 2 → x / 2"]
    assert mutant.function == "double" and double(4) == 8
    assert warm.replace_code(mutant, warm.live_functions())
    assert double(4) == 2 and live.double(4) == 2


def test_a_module_is_loaded_with_its_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "ROOT", tmp_path)
    (tmp_path / "faulty_table.py").write_text("LIMIT = 64\n")
    mutant = next(m for m in warm.mutants("faulty_table.py") if m.change == "64 → 65")
    monkeypatch.setattr(sys, "meta_path", [warm.Faulty(mutant), *sys.meta_path])
    import faulty_table

    assert faulty_table.LIMIT == 65
    del sys.modules["faulty_table"]


def test_forks_end_with_their_codes_and_one_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(warm, "PATIENCE", 1)

    def fails():
        raise RuntimeError("a fault")

    def hangs():
        while True:
            pass

    began = time.monotonic()
    tasks = [(30.0, lambda: warm.SURVIVED), (30.0, lambda: warm.NOTICED), (30.0, fails), (0.2, hangs)]
    codes = dict(warm.in_forks(tasks, processes=2))
    assert codes == {0: warm.SURVIVED, 1: warm.NOTICED, 2: warm.BROKEN, 3: warm.TIMED_OUT}
    assert time.monotonic() - began < 25 and os.getpid()
