"""Runs the jobs in one tree and writes down what came of each: one JSON file a job."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.same.jobs import CHECK, COMMANDS, COMMON, PLAN, REFUSED, TRAIN, Job
from bench.same.normalise import normal_lines
from bench.same.outputs import read_folder, read_help, read_plan

AT_ONCE = 2  # jobs; one for each core of a small machine
LONGEST_S = 900.0  # of one job
TRIES = 3  # to kill a job at its step, before another one is reached
BUG = 70  # the exit code of an unexpected error
BEGUN_BY_BASE = "-begun-by-BASE"

# Runs several command lines in one process. Each is what `python -m NAME ARGUMENTS` would be; logging is reset between
# them, because it is set up once in a process.
DRIVER = """
import contextlib, io, json, logging, runpy, sys
for module, *arguments in json.load(sys.stdin):
    printed, sys.argv, code = io.StringIO(), [module, *arguments], 0
    logging.getLogger().handlers.clear()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps({"exit code": code or 0, "printed": printed.getvalue()}), file=sys.__stdout__, flush=True)
"""

Recording = dict[str, Any]  # "results" and "words" of one job, and "problems": a list of what went wrong in the run


@dataclass(frozen=True)
class Place:
    """Where a tree is recorded. The paths are the same for both trees: several results contain them."""

    tree: Path
    run: Path  # has a folder for each job
    data: Path
    stopped: Path  # what jobs of BASE left when they were killed

    def folder(self, job: Job) -> Path:
        return self.run / (job.folder or job.name)

    def labels(self, job: Job) -> dict[str, str]:
        """Folders → the labels that stand for them in recordings."""
        return {
            str(self.tree): "<tree>",
            str(self.run): "<run>",
            str(self.data): "<data>",
            str(self.folder(job)): "<job>",
            sys.prefix: "<python>",
        }

    def filled(self, text: str, job: Job) -> str:
        """`text` with folders for their labels."""
        for folder, label in self.labels(job).items():
            text = text.replace(label, folder)
        return text


def record_all(
    jobs: Sequence[Job], place: Place, done: Callable[[Job, Recording, float], None], *, is_base: bool
) -> None:
    """Run `jobs`, two at a time, and hand each recording with its seconds to `done`.

    A job waits for those that it needs. They come before it in `jobs`, so that they have begun when it begins.
    """
    ended: dict[str, Future[None]] = {}

    def work(job: Job) -> None:
        for name in job.needs:
            if name in ended:
                ended[name].result()
        started = time.monotonic()
        for name, recording in _record(job, place, is_base=is_base).items():
            renamed = Job(name, job.about) if name != job.name else job
            done(renamed, recording, time.monotonic() - started)

    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for job in jobs:
            ended[job.name] = pool.submit(work, job)
        for future in ended.values():
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # where the run is interrupted, what has not begun stays undone


def _record(job: Job, place: Place, *, is_base: bool) -> dict[str, Recording]:
    """The recordings of one job by their names; a killed job has a second one in the working tree."""
    folder = place.folder(job)
    if not job.folder:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    if job.kind == COMMANDS:
        return {job.name: _commands(job, place)}
    if not job.kill_at:
        return {job.name: _entrypoint(job, place)}
    kill(job, place)
    if is_base:
        _copy(folder, place.stopped / folder.name)
    found = {job.name: _entrypoint(job, place)}
    if not is_base:
        _copy(place.stopped / folder.name, folder)
        found[job.name + BEGUN_BY_BASE] = _entrypoint(job, place)
    return found


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def environment(job: Job, place: Place) -> dict[str, str]:
    """All that a job's process knows of its surroundings."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    given = {**COMMON, **job.variables}
    if job.kind == PLAN:
        stand_ins = place.data / "stand-ins"
        kept["PATH"] = f"{stand_ins / 'bin'}{os.pathsep}{kept.get('PATH', '')}"
        given |= {"PYTHONPATH": str(stand_ins / "lib"), "SAME_PLAN": "<job>/plan.json"}
    filled = {name: place.filled(value, job) for name, value in given.items()}
    return {**kept, "HOME": str(place.run / "home"), **filled}


def _command(job: Job) -> list[str]:
    return [sys.executable, "-m", "entrypoint", *(["--check"] if job.kind == CHECK else [])]


def _entrypoint(job: Job, place: Place) -> Recording:
    """Run `python -m entrypoint` to its end."""
    ran = subprocess.run(
        _command(job),
        cwd=place.tree,
        env=environment(job, place),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=LONGEST_S,
        check=False,
    )
    labels, out = place.labels(job), place.folder(job) / "out"
    results: dict[str, Any] = {"exit code": ran.returncode}
    printed = normal_lines(ran.stdout, labels, timed=job.kind == TRAIN)
    # Saves are written beside training, so that their lines come at any place: the order counts only without training.
    words = {"printed": sorted(printed) if job.kind == TRAIN else printed}
    if job.kind == PLAN:
        path = place.folder(job) / "plan.json"
        results["plan.json"] = read_plan(path, labels)[0] if path.is_file() else {}
    elif out.is_dir() and not job.folder:
        more, other_words = read_folder(out, labels)
        results |= more
        words |= other_words
        words["plan.json, reasons"] = _not_said(words.get("plan.json, reasons", []), printed)
        if (out / "run.log").is_file():
            logged = normal_lines((out / "run.log").read_text(), labels, timed=True)
            words["run.log"] = _not_said(logged, printed)
    return {"results": results, "words": words, "problems": problems(job, ran.returncode, ran.stdout)}


def _not_said(lines: Sequence[str], printed: Sequence[str]) -> list[str]:
    """Those of `lines` that were not printed as well, with a level before them or without."""
    said = {*printed, *(line.partition(" ")[2] for line in printed)}
    return [line for line in lines if line not in said]


def problems(job: Job, code: int, printed: str) -> list[str]:
    """Why a job did not run as the table says. Two trees that fail in the same way prove nothing."""
    found = []
    if job.expects == REFUSED and code in (0, BUG):
        found.append(f"exit code {code}, where a refusal was expected")
    if job.expects != REFUSED and code != job.expects:
        found.append(f"exit code {code}, where {job.expects} was expected")
    if "Traceback (most recent call last)" in printed:
        found.append("a traceback")
    if found:
        found.append(f"its last lines: {' / '.join(printed.splitlines()[-3:])}")
    return found


def kill(job: Job, place: Place) -> None:
    """Start a job and kill all its processes as soon as the state of its step is there, whole."""
    states = place.folder(job) / "out" / "state"
    for _ in range(TRIES):
        shutil.rmtree(place.folder(job))
        place.folder(job).mkdir(parents=True)
        with (place.folder(job) / "killed.log").open("w") as log:
            process = subprocess.Popen(
                _command(job),
                cwd=place.tree,
                env=environment(job, place),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + LONGEST_S
        while not (states / f"step-{job.kill_at:08d}").is_dir() and process.poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if [path.name for path in states.glob("step-*")] == [f"step-{job.kill_at:08d}"]:
            return
    text = (place.folder(job) / "killed.log").read_text()
    raise RuntimeError(f"{job.name} could not be killed at step {job.kill_at}:\n{text[-2000:]}")


def _commands(job: Job, place: Place) -> Recording:
    """Run all command lines of a job in one process."""
    out, labels = place.folder(job) / "out", place.labels(job)
    out.mkdir()
    wanted = [[place.filled(word, job) for word in command] for command in job.commands]
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=place.tree,
        env=environment(job, place),
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    found: list[str] = []
    if len(answers) != len(wanted):
        found.append(f"{len(answers)} of {len(wanted)} command lines ended: {ran.stderr[-1000:]}")
    results, words = read_folder(out, labels)
    for command, answer in zip(job.commands, answers, strict=False):
        title, printed = " ".join(command), answer["printed"]
        results[f"{title}: exit code"] = answer["exit code"]
        rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        for index, row in enumerate(rows):
            results[f"{title}: row {index + 1}"] = figures(row)
        lines = [line for line in printed.splitlines() if not line.startswith("{")]
        texts = [f"{key}: {value}" for row in rows for key, value in row.items() if is_sentence(value)]
        words[title] = normal_lines("\n".join([*lines, *texts]), labels, timed=False)
        if "--help-env" in command:
            results |= {f"{title}: {name}": value for name, value in read_help(printed).items()}
    return {"results": results, "words": words, "problems": found}


def is_sentence(value: object) -> bool:
    """Whether a value of a row is for people: a name like fp8 is a result, words with spaces between are not."""
    return isinstance(value, str) and " " in value


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """The values of a printed row that are no sentences."""
    return {key: value for key, value in row.items() if not is_sentence(value)}
