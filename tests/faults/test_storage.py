"""C: a volume that is full, failing or slow. The job stops with 74, and goes on from its last whole state."""

import subprocess

import pytest

SAVES = {"kind": "system", "calls": ["fsync", "rename"], "times": 1000}


def sound(run):
    """No name has half a file, and the states read back."""
    from safetensors import safe_open

    from trainer.checkpoints import state_files

    for path in run.out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert all(file.get_tensor(key).isfinite().all() for key in file.keys())  # noqa: SIM118
    for name in run.states():
        state_files.read(run.out / "state" / name)


@pytest.fixture
def small_volume(run):
    """`small_volume(MiB)`: the output is on a volume of that size; again: another size."""
    run.out.mkdir(parents=True)

    def size(mib):
        how = "remount," if run.out.is_mount() else ""
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"{how}size={int(mib * 1024)}k", "tmpfs", run.out], capture_output=True
        )
        if done.returncode:
            pytest.skip("cannot mount a small volume here")

    yield size
    subprocess.run(["umount", "-l", run.out], check=False, capture_output=True)


def full_then_free(run, tiny, small_volume, mib):
    small_volume(mib)
    code = run()
    said = run.said()
    assert code == 74, said[-2000:]
    assert "No space left" in said or "os error 28" in said
    assert "Traceback" not in said
    sound(run)
    assert not (run.out / "x.safetensors").exists()
    small_volume(64)
    states = run.states()
    assert run() == 0 and run.final == tiny.reference, run.said()[-2000:]
    assert not states or "Resumed at step" in run.said()
    assert run.orphans() == []
    return said


def test_a_full_volume(run, tiny, small_volume):
    """C1. Room for a little more than one save: the oldest goes for the next, and then it is over."""
    said = full_then_free(run, tiny, small_volume, 3.0)
    assert "room for" in said, "warned before"


@pytest.mark.slow
@pytest.mark.parametrize("mib", [0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.5])
def test_a_volume_that_is_full_sooner_or_later(run, tiny, small_volume, mib):
    full_then_free(run, tiny, small_volume, mib)


@pytest.mark.slow
def test_a_volume_with_room_for_two_saves_only(run, tiny, small_volume):
    """Three are wished for; the job goes on with the newest alone, and says so."""
    small_volume(5.0)
    assert run() == 0 and run.final == tiny.reference, run.said()[-2000:]
    assert "to try again" in run.said() or "room for" in run.said()


def failing(run, tiny, errno, skip):
    assert run({**SAVES, "errno": errno, "step": 5, "skip": skip}) == 74, run.said()[-2000:]
    assert run.times_fired() >= 1 and "Traceback" not in run.said()
    sound(run)
    assert run() == 0 and run.final == tiny.reference
    assert run.orphans() == []


@pytest.mark.slow
@pytest.mark.parametrize(("errno", "skip"), [("EIO", 0), ("ENOSPC", 5)])
def test_a_failing_flush_or_rename(run, tiny, errno, skip):
    failing(run, tiny, errno, skip)


@pytest.mark.slow
@pytest.mark.parametrize("errno", ["EIO", "ENOSPC", "EROFS", "ESTALE"])
@pytest.mark.parametrize("skip", [1, 3, 7, 12, 20, 33])
def test_every_kind_of_failure_at_several_places(run, tiny, errno, skip):
    """C2, and a volume that vanished (ESTALE)."""
    failing(run, tiny, errno, skip)


@pytest.mark.slow
def test_a_single_failure_is_no_end(run, tiny):
    """One flush fails, as on a network volume that stumbles: the older states go, and the save is tried again."""
    once = {**SAVES, "errno": "EIO", "step": 9, "skip": 4, "times": 1}
    assert run(once) in (0, 74) and run.times_fired() == 1
    assert run() == 0 and run.final == tiny.reference


@pytest.mark.alone
def test_saving_lets_training_go_on(run, tiny):
    """The stall of a save is the time of the copies: at most 50 ms each, on a volume whose every flush takes 0.02 s.

    Slower ones, and a save of this tiny job, with some fifteen flushes, would not be over when the next begins twelve
    steps later, which has to wait for it: on a fast machine half a second.
    """
    slow = {"kind": "slow_sync", "step": 1, "seconds": 0.02, "times": 10_000}
    assert run(slow, output={"save_every": 12}) == 0, run.said()
    stalls = [
        float(line.split("training paused for ")[1].split()[0])
        for line in run.said().splitlines()
        if "training paused" in line
    ]
    print(f"\nstalls of the saves in ms: {stalls}")
    assert len(stalls) == 2 and max(stalls) <= 50
    times = [r["time"] for r in run.metrics()]
    flushes = 0.02 * 15
    assert times[12] - times[11] < flushes, "the step after a save did not wait for it"
    assert run.final == tiny.reference


@pytest.mark.parametrize(("step", "taken"), [(0, True), (1, False)])
def test_all_memory_for_saves_is_taken_before_the_first_step(run, step, taken):
    """Pinned memory takes long to get: the first save would let training wait for it."""
    assert run({"kind": "buffers", "step": step, "times": 10_000}, train={"max_steps": 5}) == 0, run.said()
    assert (run.times_fired() > 0) == taken and run.said().count("Saved step") == 2


@pytest.mark.slow
def test_the_background_shows_its_failure(run):
    """A save that fails while training goes on ends the job at the next step, not at the next save."""
    assert run({**SAVES, "errno": "ENOSPC", "step": 4, "skip": 0}, output={"save_every": 4}) == 74
    steps = [r["step"] for r in run.metrics()]
    assert 4 <= steps[-1] < 8
