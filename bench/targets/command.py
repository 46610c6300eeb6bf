"""`python -m bench targets`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

from bench.report import Report
from bench.targets.limits import TARGETS, Usage, fault

PROCESSES = 2
FAULT_CHARACTERS = 300  # of a compiler's message


def main(arguments: list[str]) -> None:
    """Print a row for each kernel and target. Exits with 1 if there is a fault."""
    parser = argparse.ArgumentParser(
        prog="python -m bench targets",
        description="Compile our Triton kernels for accelerators that need not be there.",
    )
    parser.add_argument("--all", action="store_true", help="every distinct launch of every published model")
    parser.add_argument("--family", nargs="+", help="with --all, the models of these families alone")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--markdown", type=Path, help="a file for the table")
    asked = parser.parse_args(arguments)
    report = Report("Triton kernels on each target", asked.markdown)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # a cache within this run, and no result of another one
        for row in _rows(asked.target, everything=asked.all, families=asked.family):
            report.row(row)
    if any("fault" in row for row in report.rows):
        raise SystemExit(1)


def _rows(names: list[str], *, everything: bool, families: list[str] | None) -> list[dict[str, Any]]:
    from bench.targets import launches

    launches.import_kernels()
    from bench.targets import engine

    every = engine.all_cases(families or engine.FAMILIES)
    known: dict[Any, set[launches.Launch]] = {}
    tasks: list[tuple[launches.Launch, str]] = []
    for name in names:
        cases = every if everything else engine.SAMPLE
        found = engine.launches_on(TARGETS[name], cases, known)
        tasks += [(launch, name) for launch in (sorted(found, key=str) if everything else _heaviest(found))]
    # Forked, because the recording has imported everything already.
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        results = pool.map(_compiled, tasks, chunksize=1)
    return _summed(tasks, results)


def _heaviest(found: set[Any]) -> list[Any]:
    """One launch of each kernel, and of each in another type."""
    by_kernel: dict[Any, Any] = {}
    for launch in sorted(found, key=str):
        kind = launch.kernel, launch.has_fp8
        if kind not in by_kernel or launch.weight > by_kernel[kind].weight:
            by_kernel[kind] = launch
    return list(by_kernel.values())


def _compiled(task: tuple[Any, str]) -> Usage | str:
    """What the launch uses on the target, or why it cannot be compiled."""
    from bench.targets.compiling import usage

    launch, name = task
    try:
        return usage(launch, TARGETS[name])
    except Exception as problem:  # noqa: BLE001 (whatever a compiler raises is the result)
        return f"{type(problem).__name__}: {problem}"[:FAULT_CHARACTERS]


def _summed(tasks: list[tuple[Any, str]], results: list[Usage | str]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for (launch, name), result in zip(tasks, results, strict=True):
        row = rows.setdefault(
            (name, launch.kernel),
            {
                "target": name,
                "kernel": launch.kernel.lstrip("_"),
                "launches": 0,
                "registers": 0,
                "spills": 0,
                "shared": 0,
            },
        )
        row["launches"] += 1
        wrong = result if isinstance(result, str) else fault(TARGETS[name], result)
        if wrong:
            row["fault"] = f"{wrong}; in {launch}"
        if isinstance(result, Usage):
            row["registers"] = max(row["registers"], result.registers)
            row["spills"] = max(row["spills"], result.spills)
            row["shared"] = max(row["shared"], result.shared_bytes)
    return list(rows.values())
