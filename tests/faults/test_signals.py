"""B: signals in every phase, and more of them than one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.faults import moments
from tests.support.faults.moments import Campaign, Figures
from tests.support.programs import basic_environment, wait_for

KILLS = int(os.environ.get("KILLS", "200"))
PROCESSES = int(os.environ.get("PROCESSES", "1"))  # campaigns at the same time
LOAD = int(os.environ.get("LOAD", "10"))  # processes besides them that want a core
PHASES = ["reading the dataset", "encoding", "loading the model", "training", "sampling"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_in_each_phase(run, tiny, phase):
    """B1: 143 within 4 s, and the next start ends with the same bytes."""
    fault = {"kind": "signals", "phase": phase, "signals": [signal.SIGTERM]}
    changes = {"output": {"sample_every": 8 if phase == "sampling" else 0}}
    assert run(fault, **changes) == 143, run.said()
    ended = time.monotonic()
    assert ended - float(run.fired.read_text().split()[-1]) < 4
    assert run.status()["phase"] == "stopped" and "Traceback" not in run.said()
    assert run() == 0 and run.final == tiny.reference


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", PHASES)
def test_a_resumed_job_that_is_stopped_names_its_last_step(run, phase, number):
    """B1: whatever it was doing. The step is that of its newest state."""
    assert run({"kind": "signals", "step": 10, "signals": [signal.SIGTERM]}) == 143, run.said()
    run.fired.unlink()
    changes = {"output": {"sample_every": 4 if phase == "sampling" else 0}}
    assert run({"kind": "signals", "phase": phase, "signals": [number]}, **changes) == 128 + number, run.said()
    assert run.times_fired() == 1
    step = int(run.states()[-1].removeprefix("step-"))
    assert step == max(row["step"] for row in run.metrics()) and (phase == "sampling" or step in (10, 11))
    status = run.status()
    assert (status["phase"], status["step"], status["saved_step"]) == ("stopped", step, step), run.said()


@pytest.mark.slow
def test_sigterm_while_the_end_is_written(run, tiny):
    """All steps are done: the LoRA is finished, which takes less time than saving would."""
    assert run({"kind": "signals", "phase": "exporting", "signals": [signal.SIGTERM]}) == 0
    assert run.times_fired() == 1 and run.final == tiny.reference


def test_several_signals_are_one_stop(run, tiny):
    """B4."""
    several = [signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    assert run({"kind": "signals", "step": 6, "signals": several}) == 143
    assert run.states() == ["step-00000004", "step-00000006"]
    assert run.said().count("Saved step 6") == 1 and "Traceback" not in run.said()
    assert state_came_first(run, 6) and not state_came_first(run, 4), "a stop leaves few seconds"
    assert run() == 0 and run.final == tiny.reference


def state_came_first(run, step):
    state = run.out / "state" / f"step-{step:08d}" / "state.safetensors"
    return state.stat().st_mtime_ns < (run.out / f"x-step{step:08d}.safetensors").stat().st_mtime_ns


@pytest.mark.slow
def test_a_kill_five_seconds_after_sigterm_on_a_slow_disk(run, tiny):
    """B2: each flush takes three seconds, so that the save is not done in time. What was saved before stays."""
    number = run.start({"kind": "slow_sync", "step": 9, "seconds": 3, "times": 1000})
    deadline = time.monotonic() + 60
    while not run.states() or '"step": 9' not in (run.out / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(number, signal.SIGTERM)
    if run.wait(timeout=5) is None:
        os.kill(number, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    assert run.times_fired() >= 1
    assert run() == 0 and run.final == tiny.reference
    assert "Resumed at step 4" in run.said() or "Resumed at step 8" in run.said()


@pytest.mark.alone
@pytest.mark.slow
def test_the_first_process_of_a_container_forwards_signals(job):
    """B3: process 1 of a namespace of its own ignores signals that it has no handler for."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-pf", "true"]).returncode:
        pytest.skip("needs to make process namespaces")
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")} | job.environment
    process = subprocess.Popen(
        ["unshare", "-pf", "--mount-proc", "--kill-child", sys.executable, "-m", "entrypoint"],
        cwd=os.getcwd(),
        env={**environment, "OMP_NUM_THREADS": "1", "PARAMS_MAX_STEPS": "400"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    job.wait_for_step(process, 3)
    first = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[0]
    sent = time.time()
    os.kill(int(first), signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143, printed
    status = job.status()  # written when the state is; the interpreter takes its time to end
    assert status["phase"] == "stopped" and status["updated"] - sent < 4


@pytest.fixture
def silent_hub():
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.alone
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", ["train", "check"])
def test_a_stop_while_the_hub_does_not_answer(job, silent_hub, command, number, code):
    """B1: no traceback, whatever the client's libraries do with an exception in their midst."""
    program = job.start(command, DATASET_NAME="someone/pictures", HF_ENDPOINT=silent_hub)
    wait_for(lambda: "To fetch for the model" in program.printed())
    assert program.poll() is None
    sent = time.monotonic()
    program.send_signal(number)
    assert program.wait(timeout=10) == code and time.monotonic() - sent < 4
    lines = program.printed().splitlines()
    assert lines[-1].endswith(f"[exit {code}]") and "Traceback" not in program.printed()
    assert sum("Stopped by" in line for line in lines) == 1
    if command == "train":
        assert (job.status()["phase"], job.status()["exit_code"]) == ("stopped", code)
    else:
        assert not job.out.exists()


# ---- whole jobs, from the start of their first process to the end of the last


def whole(tiny, programs, folder, **asked):
    """The tiny job as a user starts it, with its encoded images, and how long it takes undisturbed."""
    environment = {**basic_environment(), **tiny.environment}
    campaign = Campaign(programs, folder, environment, tiny.reference, span=0, **asked)
    began = time.monotonic()
    campaign.end()
    campaign.span = time.monotonic() - began
    return campaign


@pytest.mark.alone
def test_signals_at_twelve_moments_of_a_job(tiny, programs, tmp_path):
    """B1: the sibling of the test below."""
    campaign = whole(tiny, programs, tmp_path, kinds=("SIGTERM", "SIGTERM", "SIGINT", "SIGHUP"), seed=3)
    print(f"\n{campaign.run(12).line()}")


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(KILLS * 120)
def test_signals_and_kills_at_random_moments_of_jobs_on_a_busy_machine(tiny, all_programs, tmp_path):
    """B1: KILLS of them, in PROCESSES jobs at the same time, while LOAD other processes want a core."""
    figures = Figures()
    with moments.load(LOAD), ThreadPoolExecutor(PROCESSES) as pool:

        def campaign(number):
            return whole(tiny, all_programs, tmp_path / str(number), seed=number).run(-(-KILLS // PROCESSES))

        for found in pool.map(campaign, range(PROCESSES)):
            figures.add(found)
    print(f"\n{figures.line()}")
