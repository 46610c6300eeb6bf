"""B6: a job that stands still is ended, by itself or by the process that started it."""

import json
import subprocess
import time

import pytest

from tests.support import faults
from trainer.job.watchdog import MIN_STEP_TIMEOUT_S, OUTSIDE_STEPS_TIMEOUT_S, Watchdog

LIMIT = 4.0  # seconds


@pytest.mark.alone
def test_a_step_that_sleeps_is_ended_with_its_stack(run):
    fault = {"kind": "sleep", "step": 7, "seconds": 600}
    assert run(fault, engine={"step_timeout_s": LIMIT}) == 75, run.said()
    fired = float(run.fired.read_text().split()[-1])
    assert time.monotonic() - fired < LIMIT * 1.1 + 1.5  # for the process to be waited for
    stacks = (run.out / "hang.txt").read_text()
    assert "in wrapped" in stacks and "in train" in stacks and stacks.count("Thread 0x") >= 2
    assert run.status()["exit_code"] == 75 and "hangs" in run.status()["message"]
    assert json.loads((run.out / "crashes.json").read_text())["count"] == 1


@pytest.mark.slow
def test_a_job_ten_times_slower_is_no_hang(run):
    """By the usual time of a step, with a floor far below it."""
    assert run({"kind": "sleep", "step": 3, "seconds": 0.5, "times": 1000}, train={"max_steps": 8}) == 0, run.said()
    assert run.times_fired() == 6


def test_the_limit_follows_the_usual_step(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("trainer.job.watchdog.time.monotonic", lambda: clock[0])
    watchdog = Watchdog(None)
    assert watchdog.limit == OUTSIDE_STEPS_TIMEOUT_S, "loading and compiling take long"
    for _ in range(9):
        watchdog.step()
        clock[0] += 30.0
    assert watchdog.limit == 600.0
    watchdog.heartbeat()
    assert watchdog.limit == OUTSIDE_STEPS_TIMEOUT_S
    clock[0] += 900.0  # a long sample is no step
    watchdog.step()
    assert watchdog.limit == 600.0
    quick = Watchdog(None)
    for _ in range(9):
        quick.step()
        clock[0] += 0.1
    assert quick.limit == MIN_STEP_TIMEOUT_S


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hold_lock", "stop_process"])
def test_the_entrypoint_ends_a_trainer_that_cannot(job, tmp_path, kind):
    """Python's lock is held, so that no thread of it runs; or the process is stopped."""
    fired = tmp_path / "fired.txt"
    fault = {"kind": kind, "step": 3, "fired": str(fired)}
    process = job.start(PYTHONPATH=faults.PLACE, KILN_FAULT=json.dumps(fault), PARAMS_STEP_TIMEOUT=str(LIMIT))
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 75, printed
    assert fired.read_text().count("\n") == 1
    assert "not even its watchdog answers" in printed
    if kind == "hold_lock":
        assert "most recent call first" in printed and "in train" in printed
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    assert children == ""
    fired.unlink()
    code, printed = job.run()
    assert code == 0, printed
