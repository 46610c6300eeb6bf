"""How many faults of one line the tests notice: `make mutants`, or `python tests/mutants/run.py --help`.

Every module of maths, state, cache keys and planning (`modules.py`) gets faults (`operators.py`), one at a time. A
fault is noticed when one of the tests that call the changed function fails, or does not come to an end. Survivors are
listed; those that change nothing that could be seen are in `equivalent.txt`, each with the reason, and do not count.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":  # before torch, a BLAS and the Hub's client are loaded
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a fork cannot use a GPU that its parent has looked at

from tests.mutants import warm
from tests.mutants.equivalents import equivalents, is_listed
from tests.mutants.modules import ROOT, module_files
from tests.mutants.warm import BROKEN, NOTICED, OURS, SURVIVED, TIMED_OUT, Mutant, Test

FACTOR = 6  # a fault's tests may take so much longer than without it
START_S = 10.0  # and this more
PROFILE_S = 900.0
KEPT = ROOT / ".mutants"


def main() -> int:
    sys.dont_write_bytecode = True  # nothing of a faulty module is kept
    options = _options()
    files = module_files()
    modules = [m for m in files if not options.module or any(m.startswith(name) for name in options.module)]
    chosen = _choose(modules, options)
    print(f"{len(chosen)} faults in {len(modules)} modules, seed {options.seed}", flush=True)
    began = time.monotonic()
    with_tests = sorted({file for mutant in chosen for file in files[mutant.module]})
    if options.tests:
        with_tests = [file for file in with_tests if file.startswith(tuple(options.tests))]
    results = _warm(chosen, files, with_tests, options)
    _report(chosen, results, time.monotonic() - began)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="which faults are drawn")
    parser.add_argument("--most", type=int, default=600, help="how many; 0: every fault there is")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--module", action="append", help="only modules whose path begins so; may be repeated")
    parser.add_argument("--tests", action="append", help="only test files whose path begins so; may be repeated")
    parser.add_argument("--quick", action="store_true", help="leave out faults that act while a module loads")
    parser.add_argument("--longest", type=float, default=8.0, help="tests that take longer (seconds) are left out")
    return parser.parse_args()


def _choose(modules: Sequence[str], options: argparse.Namespace) -> list[Mutant]:
    """The drawn faults, without those that are listed as equivalent."""
    known = equivalents()
    every = [mutant for module in modules for mutant in warm.mutants(module) if not is_listed(mutant, known)]
    if options.quick:
        every = [mutant for mutant in every if mutant.function]
    if options.most and len(every) > options.most:
        drawn = random.Random(options.seed).sample(range(len(every)), options.most)
        return [every[i] for i in sorted(drawn)]
    return every


# ---- the two processes that fork: one with our modules, and this one without


def _warm(
    chosen: list[Mutant], files: dict[str, tuple[str, ...]], with_tests: Sequence[str], options: argparse.Namespace
) -> dict[Mutant, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)  # pytest's report
        with os.fdopen(writer, "wb") as out:
            use = partial(_in_live_modules, chosen=chosen, files=files, options=options, out=out)
            os._exit(warm.collect(with_tests, use))
    os.close(writer)
    results: dict[Mutant, int] = {}
    again: list[tuple[Mutant, list[str], float]] = []
    with os.fdopen(reader, "rb") as answers:
        loaded = _received(answers)
        while (answer := _received(answers)) is not None:
            mutant, code, names, seconds = answer
            if code == BROKEN and options.quick:
                results[mutant] = SURVIVED
                _progress(len(results), mutant, SURVIVED)
            elif code == BROKEN:
                again.append((mutant, names, seconds))
            else:
                results[mutant] = code
                _progress(len(results), mutant, code)
    os.waitpid(child, 0)
    if loaded is None:
        raise SystemExit("The tests could not be collected, or fail without a fault.")
    if again:
        _run_anew(again, results, loaded, options)
    return results


def _run_anew(
    again: Sequence[tuple[Mutant, list[str], float]],
    results: dict[Mutant, int],
    loaded: Sequence[str],
    options: argparse.Namespace,
) -> None:
    """What could not be put into a live module, and once more what survived there. First without a fault."""
    warm.preload(loaded)
    every = sorted({name for _, names, _ in again for name in names})
    control = partial(warm.run_anew, None, _files_of(every), every)
    _check_without_a_fault(control, "modules that are loaded anew")
    tasks = [
        (START_S + FACTOR * seconds, partial(warm.run_anew, mutant, _files_of(names), names))
        for mutant, names, seconds in again
    ]
    for index, code in warm.in_forks(tasks, options.processes):
        mutant = again[index][0]
        results[mutant] = code
        _progress(len(results), mutant, code)


def _check_without_a_fault(control: Callable[[], int], where: str) -> None:
    """Otherwise whatever else makes a test fail would count as a fault that was noticed."""
    for _, code in warm.in_forks([(warm.LONGEST_S, control)], 1):
        if code != SURVIVED:
            print(f"WITHOUT A FAULT a test fails in {where}: the figures are too high.", file=sys.stderr, flush=True)


def _received(answers):  # type: ignore[no-untyped-def]
    try:
        return pickle.load(answers)
    except EOFError:
        return None


def _files_of(names: Sequence[str]) -> list[str]:
    return sorted({name.partition("::")[0] for name in names})


def _in_live_modules(session, *, chosen, files, options, out) -> int:  # type: ignore[no-untyped-def]
    """In the process that has collected the tests: first what each calls, then every fault in a fork."""

    def send(value: object) -> None:
        pickle.dump(value, out)
        out.flush()

    tests = _profiles(session, files, options)
    loaded = [name for name in sys.modules if name.split(".")[0] not in OURS]
    for test in tests.values():
        if test.failed:
            print(f"fails without a fault or takes too long, and is left out: {test.name}", file=sys.stderr)
    send(loaded)
    callers: dict[tuple[str, str], list[Test]] = defaultdict(list)
    for test in sorted(tests.values(), key=lambda one: one.seconds):
        if _is_used(test, options):
            for call in test.calls:
                callers[call].append(test)
    functions = warm.live_functions()
    tasks, plans = [], []
    for mutant in chosen:
        mapped = set(files[mutant.module])
        used = callers[(mutant.module, mutant.function)]
        if not mutant.function:
            used = _of_module(mutant.module, tests, callers)
        used = [test for test in used if test.name.partition("::")[0] in mapped]
        seconds = sum(test.seconds for test in used)
        names = [test.name for test in used]
        plans.append((mutant, names, seconds))
        tasks.append((START_S + FACTOR * seconds, partial(_one, session, mutant, functions, names)))
    wanted = {name for _, names, _ in plans for name in names}
    every = [test.name for test in sorted(tests.values(), key=lambda one: one.seconds) if test.name in wanted]
    control = partial(_one, session, None, functions, every)
    _check_without_a_fault(control, "live modules")
    for index, code in warm.in_forks(tasks, options.processes):
        mutant, names, seconds = plans[index]
        # A survivor is tried once more where the module is loaded with the fault: something may have been computed.
        send((mutant, BROKEN if code == SURVIVED and names else code, names, seconds))
    return 0


def _is_used(test: Test, options: argparse.Namespace) -> bool:
    return not test.failed and test.seconds <= options.longest


def _of_module(module: str, tests: dict[str, Test], callers: dict[tuple[str, str], list[Test]]) -> list[Test]:
    """The tests of what acts when a module loads: all that call one of its functions, and those of its own file."""
    own = f"/test_{Path(module).stem}.py::"
    found = {test.name: test for test in tests.values() if own in test.name and not test.failed}
    for (called, _), group in callers.items():
        if called == module:
            found |= {test.name: test for test in group}
    return sorted(found.values(), key=lambda test: test.seconds)


def _one(session, mutant, functions, names) -> int:  # type: ignore[no-untyped-def]
    warm.own_folder(session)
    if not names:
        return SURVIVED
    if mutant is not None and not (mutant.function and warm.replace_code(mutant, functions)):
        return BROKEN
    warm.clear_caches()
    return warm.run_until_one_fails(session, names)


def _profiles(session, files: dict[str, tuple[str, ...]], options: argparse.Namespace) -> dict[str, Test]:  # type: ignore[no-untyped-def]
    """What each test does without a fault, file by file in forks. A file's profile is kept in KEPT until that file, the
    code that tests share, or a module whose faults it is to notice changes.
    """
    by_file: dict[str, set[str]] = defaultdict(set)
    for item in session.items:
        if not warm.JOBS & set(item.fixturenames):
            by_file[item.nodeid.partition("::")[0]].add(item.nodeid)
    KEPT.mkdir(exist_ok=True)
    modules: dict[str, list[str]] = {}  # test file → the modules whose faults it is to notice
    outputs: dict[str, Path] = {}
    for file in by_file:
        modules[file] = [module for module, tests in files.items() if file in tests]
        outputs[file] = KEPT / _profile_key(file, modules[file], options.longest)
    new = [file for file, output in outputs.items() if not output.exists()]
    tasks = []
    for file in new:
        task = partial(_profile, session, by_file[file], modules[file], options.longest, outputs[file])
        tasks.append((PROFILE_S, task))
    for index, _ in warm.in_forks(tasks, options.processes):
        print(f"profiled {new[index]}", file=sys.stderr)
    tests: dict[str, Test] = {}
    for output in outputs.values():
        if output.exists():
            with output.open("rb") as answers:
                while (test := _received(answers)) is not None:
                    tests[test.name] = test
    return tests


def _profile_key(file: str, modules: Sequence[str], longest: float) -> str:
    """The name of a test file's profile: a hash of all that decides what the profile says."""
    shared = sorted((ROOT / "tests" / "support").rglob("*.py"))
    digest = hashlib.sha256(str(longest).encode())
    for path in (ROOT / file, *shared, *(ROOT / module for module in modules)):
        name = path.relative_to(ROOT).as_posix()
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()[:24]


def _profile(session, names: set[str], modules: Sequence[str], longest: float, path: Path) -> int:  # type: ignore[no-untyped-def]
    part = path.with_suffix(".part")
    with part.open("wb") as out:
        code = warm.profile(session, names, modules, longest, lambda test: pickle.dump(test, out))
    part.rename(path)
    return code


# ---- the report


def _progress(count: int, mutant: Mutant, code: int) -> None:
    if code == SURVIVED:
        print(f"{count:4} survived {mutant.module}:{mutant.line} {mutant.function}: {mutant.change}", flush=True)
    elif count % 25 == 0:
        print(f"{count:4}", flush=True)


def _report(chosen: Sequence[Mutant], results: dict[Mutant, int], seconds: float) -> None:
    print()
    by_module: dict[str, list[int]] = defaultdict(list)
    for mutant in chosen:
        by_module[mutant.module].append(results.get(mutant, BROKEN))
    for module, codes in by_module.items():
        noticed = sum(code in (NOTICED, TIMED_OUT) for code in codes)
        print(f"{100 * noticed / len(codes):5.1f} % {noticed:4} of {len(codes):4}  {module}")
    codes = [code for group in by_module.values() for code in group]
    noticed = sum(code in (NOTICED, TIMED_OUT) for code in codes)
    late = sum(code == TIMED_OUT for code in codes)
    share = 100 * noticed / max(len(codes), 1)
    print(f"{share:5.1f} % {noticed:4} of {len(codes):4}  all; {late} by the time limit; {seconds:.0f} s")
    for mutant in chosen:
        code = results.get(mutant, BROKEN)
        if code in (SURVIVED, BROKEN):
            what = "survived" if code == SURVIVED else "could not be tried"
            print(f"{what}: line {mutant.line}: {mutant.module} | {mutant.place} | {mutant.change}")


if __name__ == "__main__":
    sys.exit(main())
