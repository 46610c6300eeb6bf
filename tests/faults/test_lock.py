"""C4: one job in an output folder, also where the volume knows no locks. In processes that import no torch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import fcntl, os, pathlib, sys, time
from trainer.storage import locks
from trainer.spec.errors import SettingsError
folder, seconds, kind = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
locks.RENEW_INTERVAL_S, locks.WATCH_DURATION_S = 0.2, 1.0
if kind == "no locks":
    def refuse(*_): raise OSError(37, "No locks available")
    fcntl.flock = refuse
if kind == "another machine":
    locks._machine = lambda: f"that of {os.getpid()}"
    fcntl.flock = lambda *_: None
try:
    with locks.locked(folder):
        print("holds", flush=True)
        time.sleep(seconds)
except SettingsError as problem:
    print(problem, flush=True)
    sys.exit(78)
"""


def begin(folder, seconds=0.0, kind="locks"):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds), kind]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def owner(folder, kind="locks"):
    process = begin(folder, 60, kind)
    assert process.stdout.readline() == "holds\n"
    return process


def end(process):
    process.kill()
    process.communicate()


@pytest.mark.parametrize("kind", ["locks", "no locks"])
def test_of_two_at_once_one_holds(tmp_path, kind):
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        both = [begin(folder, 2.5, kind) for _ in range(2)]
        codes = sorted(p.wait(timeout=60) for p in both)
        said = [p.stdout.read() for p in both]
        assert codes == [0, 78], said
        assert sum("is in use by process" in text for text in said) == 1, said


@pytest.mark.parametrize("kind", ["locks", "no locks", "another machine"])
def test_a_living_owner_is_respected(tmp_path, kind):
    first = owner(tmp_path, kind)
    try:
        second = begin(tmp_path, 0, kind)
        assert second.wait(timeout=60) == 78
        assert f"is in use by process {first.pid} on " in second.stdout.read()
    finally:
        end(first)


@pytest.mark.parametrize(("kind", "seconds"), [("locks", 0.0), ("no locks", 1.0)])
def test_what_a_killed_owner_held_is_taken_over(tmp_path, kind, seconds):
    first = owner(tmp_path, kind)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    started = time.monotonic()
    second = begin(tmp_path, 0, kind)
    assert second.wait(timeout=60) == 0
    assert time.monotonic() - started >= seconds
    assert not (tmp_path / ".lease").exists()


def test_a_dead_owner_on_another_machine_is_waited_for_and_taken_over(tmp_path):
    first = owner(tmp_path, "another machine")
    end(first)
    second = begin(tmp_path, 0, "locks")
    assert second.wait(timeout=60) == 0 and (tmp_path / ".lock").exists()


@pytest.mark.slow
def test_two_jobs_fill_one_cache_at_the_same_time(job, tmp_path):
    """Neither waits for ever, reads what is half there, or leaves something behind."""
    together = {"CACHE_PATH": str(tmp_path / "both"), "PARAMS_MAX_STEPS": "3"}
    folders = [tmp_path / "one", tmp_path / "two"]
    jobs = [job.start(**together, OUTPUT_PATH=str(folder)) for folder in folders]
    for process in jobs:
        printed, _ = process.communicate(timeout=250)
        assert process.returncode == 0, printed
    code, printed = job.run(
        CACHE_PATH=str(tmp_path / "alone"), PARAMS_MAX_STEPS="3", OUTPUT_PATH=str(tmp_path / "three")
    )
    assert code == 0, printed
    made = [(folder / "x.safetensors").read_bytes() for folder in (*folders, tmp_path / "three")]
    assert made[0] == made[1] == made[2]
    names = [sorted(p.name for p in (tmp_path / c).rglob("*.safetensors")) for c in ("both", "alone")]
    assert names[0] == names[1] and not [p for p in (tmp_path / "both").rglob("*") if ".tmp" in p.name]
