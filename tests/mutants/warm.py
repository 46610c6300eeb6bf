"""A process that has imported torch, the modules and their tests once, and forks for every fault.

In the fork, the faulty function's code replaces that of the live function, so every module that has imported it by name
has the fault too, and the tests that call the function run until one fails. What acts only while a module loads (a
table, a default) cannot be put into a live module: for that, a process without our modules forks, and the fork imports
the faulty module in place of ours and collects its tests anew.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.mutants.modules import ROOT
from tests.mutants.operators import faults

OURS = ("trainer", "entrypoint", "tests", "bench")
PYTEST_ARGUMENTS = ("-s", "-p", "no:xdist", "-m", "not gpu and not slow and not container and not alone")
LONGEST_S = 900.0  # of all tests without a fault
PATIENCE = 10  # a fork's limit is of the processor's time; by the clock it may take so much longer
JOBS = {"job", "programs", "all_programs", "shared_cache"}  # fixtures of whole jobs, which are other programs
MORE_BYTES = 4 * 2**30  # of address space that a faulty program may take in addition
NOTICED, SURVIVED, TIMED_OUT, BROKEN = 1, 0, 2, 3  # exit codes of forks


@dataclass(frozen=True)
class Mutant:
    """The fault of that number in a module. The rest names it for people, wherever its line is."""

    module: str
    number: int
    line: int
    function: str
    change: str
    nth: int  # of the faults of the function with this change, from 1

    @property
    def place(self) -> str:
        """The function; and which of its faults it is, where several change the same."""
        return self.function if self.nth == 1 else f"{self.function}#{self.nth}"

    def tree(self) -> ast.Module:
        """The faulty module."""
        tree = ast.parse((ROOT / self.module).read_text(encoding="utf-8"))
        for number, fault in enumerate(faults(tree)):
            if number == self.number:
                fault.apply()
                return ast.fix_missing_locations(tree)
        raise LookupError(f"{self.module} has no fault {self.number}")


@dataclass
class Test:
    """What one test did without a fault. `calls`: (module, qualified name of an outermost function)."""

    name: str
    seconds: float = 0.0
    failed: bool = False
    calls: set[tuple[str, str]] = field(default_factory=set)


def mutants(module: str) -> list[Mutant]:
    """Every fault of a module."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for number, fault in enumerate(faults(tree)):
        name = (fault.function, fault.change)
        seen[name] += 1
        found.append(Mutant(module, number, fault.line, *name, seen[name]))
    return found


# ---- forks


def in_forks(tasks: Sequence[tuple[float, Callable[[], int]]], processes: int) -> Iterator[tuple[int, int]]:
    """Run each task in a fork, with a limit in seconds; yields (the task's index, its exit code) as they end."""
    running: dict[int, tuple[int, float, Path]] = {}  # process → index, end, folder
    waiting = list(enumerate(tasks))[::-1]
    while waiting or running:
        while waiting and len(running) < processes:
            index, (limit, task) = waiting.pop()
            folder = Path(tempfile.mkdtemp(prefix="mutant-"))
            process = os.fork()
            if process == 0:
                _be(task, limit, folder)
            running[process] = (index, time.monotonic() + PATIENCE * limit, folder)
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended in running:
            index, _, folder = running.pop(ended)
            _end_group(ended)
            shutil.rmtree(folder, ignore_errors=True)
            code = os.waitstatus_to_exitcode(status)
            yield index, code if code >= 0 else TIMED_OUT
            continue
        for process, (_, end, _) in running.items():
            if time.monotonic() > end:
                _end_group(process)
        time.sleep(0.005)


def _end_group(process: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)


def _be(task: Callable[[], int], limit: float, folder: Path) -> None:
    """In a fork: do `task` quietly and end. What goes wrong outside of the tests is BROKEN, and not noticed."""
    code = BROKEN
    try:
        os.setpgid(0, 0)
        silent = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silent, descriptor)
        os.environ["TMPDIR"] = str(folder)
        tempfile.tempdir = str(folder)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 2))
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES, used + MORE_BYTES))
        code = task()
    finally:
        os._exit(code)


# ---- tests


class Collected:
    """A plugin of pytest: instead of running what was collected, it hands it to `use`."""

    def __init__(self, use: Callable[[pytest.Session], int]) -> None:
        self.use = use
        self.code = BROKEN

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("tests could not be collected")
        self.code = self.use(session)
        return True


def collect(files: Sequence[str], use: Callable[[pytest.Session], int]) -> int:
    """Collect the tests of `files` and hand them to `use`; its result, NOTICED if they cannot be collected."""
    plugin = Collected(use)
    arguments = [*PYTEST_ARGUMENTS, f"--basetemp={tempfile.mkdtemp(prefix='mutants-')}/tests", f"--rootdir={ROOT}"]
    pytest.main([*arguments, *(str(ROOT / file) for file in files)], plugins=[plugin])
    return NOTICED if plugin.code == BROKEN else plugin.code


def run_until_one_fails(session: pytest.Session, names: Sequence[str]) -> int:
    """Run these tests in this order; NOTICED as soon as one fails, or if one is missing."""
    known = {item.nodeid: item for item in session.items}
    if not all(name in known for name in names):
        return NOTICED
    items = [known[name] for name in names]
    for item, following in zip(items, [*items[1:], None], strict=True):
        try:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        except BaseException:  # noqa: BLE001 (pytest lets a few through)
            return NOTICED
        if session.testsfailed:
            return NOTICED
    return SURVIVED


def own_folder(session: pytest.Session) -> None:
    """Temporary files of this process go to its own folder."""
    factory: Any = session.config._tmp_path_factory  # type: ignore[attr-defined]
    factory._given_basetemp = Path(tempfile.gettempdir()) / "tests"
    factory._basetemp = None


def profile(
    session: pytest.Session, names: set[str], modules: Iterable[str], longest: float, send: Callable[[Test], None]
) -> int:
    """Run the tests without a fault and send what each called. One that computes longer than `longest` fails."""
    signal.signal(signal.SIGPROF, _too_long)
    own_folder(session)
    calls: set[tuple[str, str]] = set()
    functions = live_functions()
    for module in modules:
        _note_calls(module, functions, calls)
    clear_caches()
    items = [item for item in session.items if item.nodeid in names]
    for item, following in zip(items, [*items[1:], None], strict=True):
        calls.clear()
        failed = session.testsfailed
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, longest)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(Test(item.nodeid, time.process_time() - began, session.testsfailed > failed, set(calls)))
    return 0


def _too_long(*_: object) -> None:
    raise TimeoutError("too long a test for this")


def _note_calls(module: str, functions: LiveFunctions, calls: set[tuple[str, str]]) -> None:
    """Every outermost function of a module begins with a note that it was called."""
    path = str(ROOT / module)
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    names = []

    def mark(body: Sequence[ast.stmt], scope: tuple[str, ...]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                mark(node.body, (*scope, node.name))
            elif isinstance(node, ast.FunctionDef):
                name = ".".join((*scope, node.name))
                note = ast.parse(f"__calls__.add(({module!r}, {name!r}))").body[0]
                for part in ast.walk(note):
                    ast.copy_location(part, node.body[0])
                node.body.insert(0, note)
                names.append(name)

    mark(tree.body, ())
    code = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)
    for name in names:
        for function in functions.get((path, name), []):
            function.__globals__["__calls__"] = calls
        _put_code(code, path, name, functions)


# ---- faults in live modules


LiveFunctions = dict[tuple[str, str], list[types.FunctionType]]  # by file and qualified name


def live_functions() -> LiveFunctions:
    """(file, qualified name) → the functions with that code."""
    gc.unfreeze()  # tests/conftest.py freezes what was collected
    found: LiveFunctions = {}
    for thing in gc.get_objects():
        if type(thing) is types.FunctionType and thing.__code__.co_filename.startswith(str(ROOT)):
            found.setdefault((thing.__code__.co_filename, thing.__code__.co_qualname), []).append(thing)
    return found


def clear_caches() -> None:
    """Forget results that our functions kept while the tests were collected."""
    for thing in gc.get_objects():
        if type(thing) is functools._lru_cache_wrapper and thing.__module__.split(".")[0] in OURS:
            thing.cache_clear()


def replace_code(mutant: Mutant, functions: LiveFunctions) -> bool:
    """Put the fault into the live function; False where that cannot be done."""
    path = str(ROOT / mutant.module)
    return _put_code(compile(mutant.tree(), path, "exec", dont_inherit=True), path, mutant.function, functions)


def _put_code(code: types.CodeType, path: str, name: str, functions: LiveFunctions) -> bool:
    """Give the live functions of that name the code that a module's code has for them."""
    live = functions.get((path, name), [])
    new = {c.co_firstlineno: c for c in _all_code(code) if c.co_qualname == name}
    if not live or not {function.__code__.co_firstlineno for function in live} <= new.keys():
        return False
    for function in live:
        replacement = new[function.__code__.co_firstlineno]
        if len(replacement.co_freevars) != len(function.__code__.co_freevars):
            return False
        function.__code__ = replacement
    return True


def _all_code(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all_code(constant)


# ---- faults in modules that are not loaded yet


class Faulty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module from a faulty tree."""

    def __init__(self, mutant: Mutant) -> None:
        self.path = str(ROOT / mutant.module)
        self.name = mutant.module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        self.code = compile(mutant.tree(), self.path, "exec", dont_inherit=True)

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        is_package = self.path.endswith("__init__.py")
        locations = [str(Path(self.path).parent)] if is_package else None
        return importlib.util.spec_from_file_location(
            fullname, self.path, loader=self, submodule_search_locations=locations
        )

    def exec_module(self, module: types.ModuleType) -> None:
        exec(self.code, module.__dict__)


def run_anew(mutant: Mutant | None, files: Sequence[str], names: Sequence[str]) -> int:
    """In a fork of a process without our modules: load the faulty module and run the tests. None: without a fault."""
    if mutant is not None:
        sys.meta_path.insert(0, Faulty(mutant))
    return collect(files, lambda session: run_until_one_fails(session, names))


def preload(names: Sequence[str]) -> None:
    """Import what the tests need of other packages, in the order in which they did."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(BaseException):
                importlib.import_module(name)
