"""B6: a job that stands still is ended, by itself or by the process that started it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import faults
from tests.support.faults import moments
from tests.support.programs import basic_environment
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
    watchdog.others_take(50.0)
    assert watchdog.limit == 1000.0 and watchdog.deadline == clock[0] + 1000.0
    watchdog.others_take(500.0)
    assert watchdog.limit == OUTSIDE_STEPS_TIMEOUT_S
    watchdog.others_take(0.1)
    assert watchdog.limit == MIN_STEP_TIMEOUT_S
    hasty = Watchdog(4.0)
    hasty.others_take(0.1)
    assert hasty.limit == 4.0
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


@pytest.mark.alone
def test_a_trainer_that_is_killed_is_said_so_and_the_job_goes_on(job):
    """What the kernel does when memory runs out: nothing in the trainer can say it."""
    process = job.start(PARAMS_MAX_STEPS="30", PARAMS_SAVE_EVERY_N_STEPS="2")
    job.wait_for_step(process, 4)
    trainer = [n for n in moments.descendants(process.pid) if moments.arguments_of(n)[2:3] == [b"trainer"]]
    os.kill(trainer[0], signal.SIGKILL)
    assert process.wait(timeout=30) == 75, process.printed()
    message = job.status()["message"]
    assert job.status()["phase"] == "failed" and job.status()["exit_code"] == 75
    assert "The trainer was killed (SIGKILL)" in message and "The machine has" in message and "Fix: " in message
    assert message in process.printed() and "[exit 75]" in process.printed()
    code, printed = job.run(PARAMS_MAX_STEPS="30", PARAMS_SAVE_EVERY_N_STEPS="2")
    assert code == 0 and "Resumed at step" in printed


def limited_group():
    """A control group of its own below that of the tests, with a limit that a trainer cannot keep; None if not here."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.strip().split(":", 2)
        top = "/sys/fs/cgroup" if not controllers else f"/sys/fs/cgroup/{controllers}"
        limit = "memory.max" if not controllers else "memory.limit_in_bytes"
        folder = f"{top}{path}/kiln-{os.getpid()}"
        if controllers in ("", "memory"):
            try:
                os.mkdir(folder)
                with open(f"{folder}/{limit}", "w") as file:
                    file.write(str(350 * 2**20))
                return folder
            except OSError:
                continue
    return None


@pytest.mark.alone
@pytest.mark.slow
def test_a_trainer_that_the_kernel_kills_for_memory(job):
    """The real thing, where control groups can be made."""
    folder = limited_group()
    if folder is None:
        pytest.skip("needs to make a control group with a limit of memory")
    code = f"import os, runpy, sys; open({folder + '/cgroup.procs'!r}, 'w').write(str(os.getpid()))\n"
    code += "os.execv(sys.executable, [sys.executable, '-m', 'entrypoint'])"
    environment = {"OMP_NUM_THREADS": "1", **basic_environment(), **job.environment}
    done = job.programs.run("-c", code, environment=environment, own_interpreter=True)
    os.rmdir(folder)
    assert done.returncode == 75, done.stderr
    assert (
        "was killed by the kernel for memory: the container's limit of 0.3 GiB was reached" in job.status()["message"]
    )
