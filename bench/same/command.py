"""`python -m bench same BASE`: records what is not recorded yet, compares, reports."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import bench.same as package
from bench.same import compare, report, trees
from bench.same.data import write_data
from bench.same.jobs import Job, all_jobs
from bench.same.record import BEGUN_BY_BASE, Place, Recording, record_all

HERE = trees.ROOT / ".same"  # ignored by git
CONCEPT = trees.ROOT / "trainer" / "families" / "miniatures" / "concept"
# What decides a recording besides the tree: these files of the recorder.
DECIDING = ("bad_input.py", "data.py", "jobs.py", "normalise.py", "outputs.py", "record.py")
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "torchao", "bitsandbytes", "numpy", "pillow")
USAGE = 64


def main(arguments: list[str]) -> None:
    """Exit code 0: the same, but for words; 1: results differ, or a job did not run as it should; 64: wrong usage."""
    parser = argparse.ArgumentParser(
        "python -m bench same", description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", default="", metavar="BASE", help="a commit to compare the working tree with")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="these jobs (flux-default, or bad-* in quotes), and those that they need",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the jobs")
    parser.add_argument("--strict-words", action="store_true", help="changed sentences fail as well")
    parser.add_argument("--again", action="store_true", help="record BASE anew")
    asked = parser.parse_args(arguments)
    if asked.list:
        print("\n".join(f"{job.name:32} {job.about}" for job in all_jobs()))
        return
    if not asked.base:
        print("BASE is missing: name the commit to compare with, as in: make same BASE=main", file=sys.stderr)
        sys.exit(USAGE)
    try:
        sha, jobs = trees.commit(asked.base), chosen(asked.only)
    except (trees.NoSuchCommitError, LookupError) as problem:
        print(problem.args[0], file=sys.stderr)
        sys.exit(USAGE)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is temporary is removed
    with _alone():
        failed = _same(sha, jobs, strict=asked.strict_words, again=asked.again)
    sys.exit(1 if failed else 0)


def chosen(patterns: Sequence[str] | None) -> list[Job]:
    """The jobs that match, and those that they need, in their order. Raises LookupError for a pattern without any."""
    known = {job.name: job for job in all_jobs()}
    wanted: list[str] = []
    for pattern in patterns or ["*"]:
        matching = fnmatch.filter(known, pattern)
        if not matching:
            raise LookupError(f"{pattern!r} is no job; --list has their names.")
        wanted += matching
    for name in wanted:
        wanted += [need for need in known[name].needs if need not in wanted]
    return [job for job in known.values() if job.name in wanted]


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One recorder at a time in `.same`."""
    HERE.mkdir(exist_ok=True)
    with (HERE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another run of this command is using {HERE}.", file=sys.stderr)
            sys.exit(USAGE)
        yield


def _same(sha: str, jobs: list[Job], *, strict: bool, again: bool) -> bool:
    """Record, compare and print; whether the command fails."""
    shutil.rmtree(HERE / "data", ignore_errors=True)
    write_data(HERE / "data", CONCEPT)
    kept = HERE / f"{sha[:12]}-{key()}"
    for old in HERE.glob(f"{sha[:12]}-*"):
        if again or old != kept:  # made by another state of the recorder
            shutil.rmtree(old)
    mine = HERE / "working-tree"
    shutil.rmtree(mine, ignore_errors=True)
    try:
        missing = lacking(jobs, kept)
        if missing:
            trees.copy_commit(sha, HERE / "tree")
            _record(missing, kept, f"{sha[:12]} (BASE)", stopped=kept / "stopped", is_base=True)
        trees.copy_working_tree(HERE / "tree")
        _record(jobs, mine, "the working tree", stopped=kept / "stopped", is_base=False)
    finally:
        for name in ("tree", "run"):
            shutil.rmtree(HERE / name, ignore_errors=True)
    before, now = _read(kept), _read(mine)
    for job in jobs:
        if job.kill_at:  # whoever began it, the end must be the same
            before[job.name + BEGUN_BY_BASE] = before[job.name]
    differences = compare.compare({name: before.get(name, {}) for name in now}, now)
    wrong = [f"{name}: {line}" for name, one in now.items() for line in one["problems"]]
    (HERE / "last.json").write_text(report.as_json(differences))
    if wrong:
        print("\n".join(["", "NOT AS EXPECTED, in the working tree:", *(f"  {line}" for line in wrong)]))
    print(f"\n{report.text(differences)}")
    print(f"\n{len(now)} jobs compared with {sha[:12]}; all differences are in {HERE / 'last.json'}.")
    return bool(wrong or differences.results or (strict and differences.sentences))


def lacking(jobs: Sequence[Job], kept: Path) -> list[Job]:
    """The jobs that have no recording yet, and those whose output folders these need."""
    missing = [job.name for job in jobs if not _file(kept, job.name).is_file()]
    return chosen(missing) if missing else []


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _read(folder: Path) -> dict[str, Recording]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        found[path.stem] = json.loads(path.read_text())
    return found


def _record(jobs: Sequence[Job], folder: Path, tree: str, *, stopped: Path, is_base: bool) -> None:
    """Record `jobs` of the tree in `.same/tree` into `folder`, and print how long each took."""
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(tree=HERE / "tree", run=HERE / "run", data=HERE / "data", stopped=stopped)
    shutil.rmtree(place.run, ignore_errors=True)
    place.run.mkdir()
    total = len(jobs) + (0 if is_base else sum(job.kill_at > 0 for job in jobs))
    print(f"Recording {tree}: {total} jobs.", flush=True)
    started, before, count, lock = time.monotonic(), os.times(), 0, threading.Lock()

    def done(job: Job, recording: Recording, seconds: float) -> None:
        nonlocal count
        with lock:
            count += 1
            number = count
        _file(folder, job.name).write_text(json.dumps(recording))
        note = f"  NOT AS EXPECTED: {recording['problems'][0]}" if recording["problems"] else ""
        print(f"  [{number}/{total}] {job.name}, {seconds:.1f} s{note}", flush=True)

    record_all(jobs, place, done, is_base=is_base)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"Recorded {tree} in {time.monotonic() - started:.0f} s, with {used:.0f} s of CPU time.", flush=True)


def key() -> str:
    """Of all that decides a recording of a tree: the recorder, its input files, this machine, and the libraries."""
    content = hashlib.sha256()
    here = Path(__file__).parent
    for path in [here / name for name in DECIDING]:
        content.update(path.read_bytes())
    for path in sorted((HERE / "data").rglob("*")):
        if path.is_file():
            content.update(f"{path.relative_to(HERE)}\n".encode() + path.read_bytes())
    about = [platform.machine(), platform.python_version(), str(os.cpu_count()), str(HERE), sys.prefix]
    about += [f"{name} {version(name)}" for name in LIBRARIES]
    about.append(f"{os.sysconf('SC_PHYS_PAGES')} pages of memory")  # plans go by what may be pinned
    content.update("\n".join(about).encode())
    return content.hexdigest()[:12]
