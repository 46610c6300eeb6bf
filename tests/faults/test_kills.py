"""A: whatever is killed goes on, and ends with the bytes of a run that nobody disturbed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from trainer.storage import digests

KILLS = int(os.environ.get("KILLS", "200"))


def kill_often(run, tiny, count, seed):
    """Kill the job `count` times at random, starting it again each time; the kills that fell into a save.

    Every fourth waits for the next save and comes at a random moment of it.
    """
    dice, inside, finished = random.Random(seed), 0, 0
    shutil.rmtree(run.out, ignore_errors=True)
    began = time.monotonic()
    assert run() == 0, run.said()
    longest = 0.6 * (time.monotonic() - began)
    shutil.rmtree(run.out)
    for turn in range(count):
        number = run.start()
        code = run.wait(timeout=dice.uniform(0, longest))
        while turn % 4 == 3 and code is None and not saving(run):
            code = run.wait(timeout=0.001)
        if code is None:
            time.sleep(dice.uniform(0, 0.03) if turn % 4 == 3 else 0)
            os.kill(number, signal.SIGKILL)
            code = run.wait()
        if code == -signal.SIGKILL:
            inside += saving(run)
        else:
            finished += check(run, tiny, code)
            shutil.rmtree(run.out)
    finished += check(run, tiny, run())
    return inside, finished


def saving(run):
    """Whether files of a save are half there."""
    return bool([*run.out.glob(".x-step*.tmp*"), *run.out.glob("state/.step-*.tmp")])


def check(run, tiny, code):
    assert code == 0, run.said()[-3000:]
    assert run.final == tiny.reference
    assert [r["step"] for r in run.metrics()] == list(range(1, 25))
    assert run.orphans() == [] and not list(run.out.rglob("*.damaged"))
    return 1


def test_four_kills_end_bit_identical(run, tiny):
    kill_often(run, tiny, 4, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_200_random_kills_end_bit_identical(run, tiny):
    """A1. At least a tenth of them inside a save."""
    inside, finished = kill_often(run, tiny, KILLS, seed=2)
    print(f"\n{KILLS} kills, {inside} of them inside a save, {finished} runs finished, all with the same bytes")
    assert inside >= KILLS // 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_kill_before_each_call_that_changes_files(run, tiny):
    """A2, every EVERY-th of them (1 takes an hour)."""
    every, survived = int(os.environ.get("EVERY", "17")), 0
    for skip in range(0, 100_000, every):
        shutil.rmtree(run.out, ignore_errors=True)
        run.fired.unlink(missing_ok=True)
        if run({"kind": "kill_at", "skip": skip}) == 0:
            assert not run.times_fired()
            break
        assert run.times_fired() == 1
        survived += check(run, tiny, run())
    print(f"\n{survived} kills at calls that change files, each run finished with the same bytes")
    assert survived >= 3


def test_a_state_without_the_optimiser_gives_other_bytes(run, tiny):
    """A6: the comparison can fail."""
    number = run.start({"kind": "sleep", "step": 6, "seconds": 60})
    wait_for(lambda: run.times_fired() and run.states())  # it is written beside the steps
    os.kill(number, signal.SIGKILL)
    run.wait()
    run.fired.unlink()
    assert run.states() == ["step-00000004"]
    assert run({"kind": "forget"}) == 0 and run.times_fired() == 1
    assert "Resumed at step 4" in run.said() and run.final != tiny.reference


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def halfway(run):
    """Stopped by SIGTERM at step 10: states of steps 4, 8 and 10."""
    assert run({"kind": "signals", "step": 10, "signals": [signal.SIGTERM]}) == 143, run.said()
    assert run.states() == ["step-00000004", "step-00000008", "step-00000010"]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_state_is_left_for_the_one_before(halfway, tiny, name, damage):
    """A5. By step and not by time: the older states are made to look newer."""
    spoil(halfway.out / "state" / "step-00000010" / name, damage)
    for age, state in enumerate(halfway.states()):
        os.utime(halfway.out / "state" / state, (2e9 - age, 2e9 - age))
    assert halfway() == 0, halfway.said()
    assert "step-00000010 is damaged" in halfway.said() and "Resumed at step 8" in halfway.said()
    assert (halfway.out / "state" / "step-00000010.damaged").is_dir()
    assert halfway.final == tiny.reference


@pytest.mark.slow
def test_when_all_states_are_damaged_nothing_begins_anew(halfway):
    for state in halfway.states():
        spoil(halfway.out / "state" / state / "state.safetensors", "flip")
    assert halfway() == 74 and halfway() == 74
    assert halfway.said().count("All 3 states") == 2 and not (halfway.out / "x.safetensors").exists()


def spoil(path, damage):
    data = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(data[:-5])


def files_of(out):
    """Every file of the first run in `out`, but for those of the job that runs last."""
    current = ("status.json", "run.log", ".lock", ".lease", "crashes.json")
    paths = [p for p in out.rglob("*") if p.is_file() and "runs" not in p.relative_to(out).parts]
    return {p: p.read_bytes() for p in paths if p.name not in current and not p.name.startswith("x-2")}


@pytest.mark.slow
def test_a_changed_setting_begins_a_new_run_that_says_what_differs(halfway, tiny):
    """A8. Also what the run was made with is compared, but only said: a newer image may go on."""
    before = files_of(halfway.out)
    assert halfway(train={"seed": 7}) == 0, halfway.said()
    assert "New run x-2, beside x, because these differ: PARAMS_SEED: 42 → 7. " in halfway.said()
    assert halfway.out.joinpath("x-2.safetensors").is_file() and not halfway.out.joinpath("x.safetensors").exists()
    assert files_of(halfway.out).items() >= before.items(), "nothing of the old run is touched"
    path = halfway.out / "state" / "step-00000010" / "state.json"
    text = json.loads(path.read_text())["text"]
    other = re.sub(r'\["torch", "\d[^"]*"\]', '["torch", "1.0"]', text)
    assert other != text
    path.write_text(json.dumps({"sha256": digests.digest(other), "text": other}))
    assert halfway() == 0 and "torch 1.0" in halfway.said()
    assert halfway.final == tiny.reference


@pytest.mark.slow
def test_states_are_flushed_before_and_after_their_rename(run, tmp_path):
    """A3: file, folder, rename, and the folder above, in this order, as the kernel saw it."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    plan = tmp_path / "plan.json"
    run.start(train={"max_steps": 2}, output={"save_every": 1})
    assert run.wait() == 0
    shutil.rmtree(run.out)
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-y", "-e", "trace=fsync,rename,renameat,renameat2", "-o", trace]
    subprocess.run([*command, sys.executable, "-m", "trainer", plan], check=True, capture_output=True, timeout=280)
    calls = trace.read_text().splitlines()
    for step in ("step-00000001", "step-00000002"):
        at = next(i for i, c in enumerate(calls) if re.search(rf'rename\w*\(.*{step}\.kiln\.tmp", .*{step}"\)', c))
        before, after = "\n".join(calls[:at]), calls[at + 1 :]
        for name in ("state.safetensors>", "state.json>", ".tmp>"):
            assert re.search(rf"fsync\(\d+<[^>]*{step}[^>]*{re.escape(name)}", before), name
        assert any(re.search(r"fsync\(\d+<[^>]*/state>", c) for c in after)


@pytest.mark.slow
def test_what_was_not_flushed_may_be_lost(halfway, tiny):
    """A3: after a loss of power, a state that was being written is empty; the one before is used."""
    whole = halfway.out / "state" / "step-00000010"
    whole.rename(whole.with_name(".step-00000010.kiln.tmp"))
    for path in whole.with_name(".step-00000010.kiln.tmp").iterdir():
        path.write_bytes(b"")
    assert halfway() == 0 and "Resumed at step 8" in halfway.said()
    assert halfway.final == tiny.reference and halfway.orphans() == []


@pytest.mark.slow
def test_a_finished_job_is_left_alone_by_the_trainer(run, tiny):
    """A7 (with the entrypoint: tests/jobs/test_job.py)."""
    assert run() == 0
    before = {k: v.clone() for k, v in load_file(run.out / "x.safetensors").items()}
    assert run() == 0 and run.final == tiny.reference
    assert before.keys() == load_file(run.out / "x.safetensors").keys()


@pytest.mark.slow
@pytest.mark.parametrize("when", [1, 3, 5, 8, 12, 20, 40])
def test_a_new_run_may_be_killed_anywhere(halfway, tiny, when):
    """A8: before a call that changes a file, after `when` others. Both runs then end as if nothing had happened."""
    before = files_of(halfway.out)
    kill = {"kind": "kill_at", "skip": when}
    code = halfway(kill, train={"seed": 7})
    assert code == -9, halfway.said()
    assert files_of(halfway.out).items() >= before.items()
    assert halfway(train={"seed": 7}) == 0, halfway.said()
    names = sorted(path.name for path in halfway.out.glob("x*.safetensors") if "step" not in path.name)
    assert names == ["x-2-diffusers.safetensors", "x-2.safetensors"]
    assert halfway() == 0 and halfway.final == tiny.reference


def kill_at_random(run, dice, longest, **changes):
    """Start the job, kill it at a random moment of `longest` seconds, and start it again to its end."""
    number = run.start(**changes)
    if run.wait(timeout=dice.uniform(0, longest)) is None:
        os.kill(number, signal.SIGKILL)
        run.wait()
    assert run(**changes) == 0, run.said()


def seconds_of(job):
    began = time.monotonic()
    assert job() == 0
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_kills_while_a_finished_run_goes_on_for_more_steps(run, tiny, tmp_path):
    """A8: it ends as if it had been asked for all of them at once, and the LoRA of its first end stays."""
    assert run(train={"max_steps": 10}) == 0
    first_end = digests.sha256(run.out / "x.safetensors")
    shutil.copytree(run.out, tmp_path / "finished")
    longest = seconds_of(run)
    dice = random.Random(3)
    for _ in range(KILLS // 25):
        shutil.rmtree(run.out)
        shutil.copytree(tmp_path / "finished", run.out)
        kill_at_random(run, dice, longest)
        check(run, tiny, 0)
        assert digests.sha256(run.out / "x-step00000010.safetensors") == first_end
        assert not list(run.out.glob("x-2*")) and not (run.out / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_kills_while_a_new_run_begins(halfway, tiny, tmp_path):
    """A8: the new run ends with the bytes of one that nobody disturbed, and the old one is as it was."""
    old = files_of(halfway.out)
    shutil.copytree(halfway.out, tmp_path / "before")
    other = {"train": {"seed": 7}}
    longest = seconds_of(lambda: halfway(**other))
    undisturbed = digests.sha256(halfway.out / "x-2.safetensors")
    dice = random.Random(4)
    for _ in range(KILLS // 25):
        shutil.rmtree(halfway.out)
        shutil.copytree(tmp_path / "before", halfway.out)
        kill_at_random(halfway, dice, longest, **other)
        assert digests.sha256(halfway.out / "x-2.safetensors") == undisturbed
        assert [path.name for path in (halfway.out / "runs").iterdir()] == ["x-2"]
        assert files_of(halfway.out) == old
    assert halfway() == 0 and halfway.final == tiny.reference


@pytest.mark.slow
@pytest.mark.parametrize("when", [0, 2, 4, 6, 9, 14, 30])
def test_more_steps_may_be_killed_anywhere(run, tiny, when):
    """A8: before a call that changes a file, after `when` others."""
    assert run(train={"max_steps": 10}) == 0
    first_end = digests.sha256(run.out / "x.safetensors")
    assert run({"kind": "kill_at", "skip": when}) == -9, run.said()
    check(run, tiny, run())
    assert digests.sha256(run.out / "x-step00000010.safetensors") == first_end
