"""Which checkpoints stay: the newest, and everything that the run did not write."""

import logging
import re
import shutil
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoints import state_files
from trainer.checkpoints.retention import CheckpointRetention
from trainer.spec.errors import StorageError
from trainer.storage.run_records import RunRecord


@pytest.fixture
def folder(tmp_path):
    """Four saves of the run x, and files of somebody else."""
    record = RunRecord(tmp_path)
    for step in (4, 8, 12, 16):
        name = f"x-step{step:08d}.safetensors"
        record.own(name)
        record.own_state(step)
        (tmp_path / name).write_bytes(b"LoRA")
        state_files.save(tmp_path / "state", step, {"a": torch.zeros(1)})
    for name in (
        "x-step00000001-my-favourite.safetensors",
        "x-step00000002.safetensors",
        "x-2-step00000004.safetensors",
    ):
        (tmp_path / name).write_bytes(b"mine")
    return tmp_path


def left(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


MINE = ["x-2-step00000004.safetensors", "x-step00000001-my-favourite.safetensors", "x-step00000002.safetensors"]


def test_only_what_the_run_wrote_is_removed(folder):
    retention = CheckpointRetention(folder, folder, RunRecord(folder), keep_states=2, keep_loras=2)
    assert retention.prune(2, 2) == 4
    assert left(folder) == sorted([*MINE, "x-step00000012.safetensors", "x-step00000016.safetensors"])
    assert RunRecord(folder).files == ["x-step00000012.safetensors", "x-step00000016.safetensors"]


def test_a_save_that_was_asked_for_pushes_no_scheduled_one_out(folder):
    record = RunRecord(folder)
    for step in (13, 14, 15):
        record.own(f"x-step{step:08d}.safetensors")
        (folder / f"x-step{step:08d}.safetensors").write_bytes(b"LoRA")
    CheckpointRetention(folder, folder, record, keep_states=2, keep_loras=2, every=4).prune(2, 2)
    kept = [f"x-step{step:08d}.safetensors" for step in (12, 14, 15, 16)]
    assert left(folder) == sorted([*MINE, *kept])


def test_all_lora_files_and_two_states_may_stay(folder):
    retention = CheckpointRetention(folder, folder, RunRecord(folder), keep_states=2, keep_loras=0)
    assert retention.prune(2, 0) == 2
    assert len(left(folder)) == 4 + len(MINE) and retention.saved_steps() == [4, 8, 12, 16]
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["step-00000012", "step-00000016"]


def test_the_end_of_a_run_that_was_asked_for_more_stays(folder):
    record = RunRecord(folder)
    record.update({"finished": [8]})
    CheckpointRetention(folder, folder, record, keep_states=1, keep_loras=1).prune(1, 1)
    assert left(folder) == sorted([*MINE, "x-step00000008.safetensors", "x-step00000016.safetensors"])


def test_a_full_disk_loses_the_older_saves_and_nothing_else(folder):
    retention = CheckpointRetention(folder, folder, RunRecord(folder), keep_states=2, keep_loras=0)
    tries = []

    def write():
        tries.append(1)
        if len(tries) == 1:
            raise StorageError("full")

    retention.write(write, 16)
    assert left(folder) == sorted([*MINE, "x-step00000016.safetensors"])


# ---- against the rule, over any folder


def make_state(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text("{}")


SUFFIXES = ("", "-diffusers", "-comfyui")
STRANGERS = ("x-step00000004-mine.safetensors", "y-step00000008.safetensors", "notes.txt", ".x-step00000099.1.txt")


@settings(max_examples=60)
@given(
    saves=st.dictionaries(st.integers(1, 12), st.sets(st.sampled_from(SUFFIXES), min_size=1), max_size=7),
    states=st.sets(st.integers(1, 12), max_size=6),
    finished=st.sets(st.integers(1, 12), max_size=2),
    vanished=st.sets(st.integers(1, 12), max_size=1),
    keep_states=st.integers(0, 4),
    keep_loras=st.integers(0, 4),
    in_subfolder=st.booleans(),
    resumed=st.booleans(),
)
def test_what_stays_is_what_the_rule_says(
    saves, states, finished, vanished, keep_states, keep_loras, in_subfolder, resumed, tmp_path_factory
):
    """The rule: the newest `keep` states, and all files of the newest `keep` saves of this run (0: all); never the end
    of a run that was asked for more, never the final file, never another run's or anybody else's.
    """
    out = tmp_path_factory.mktemp("out")
    home = out / "runs" / "x" if in_subfolder else out
    record, mine = RunRecord(home), {}
    for step, suffixes in saves.items():
        for suffix in suffixes:
            mine[f"x-step{step:08d}{suffix}.safetensors"] = step
    for name, step in mine.items():
        if step not in vanished:  # somebody has moved it away
            (out / name).write_bytes(b"LoRA")
    record.update({"files": [*mine, "x.safetensors"], "finished": sorted(finished)})
    for name in ("x.safetensors", *STRANGERS):
        (out / name).write_bytes(b"kept")
    (out / ".x.kiln.tmp.safetensors").write_bytes(b"half")  # of a killed process, of this run
    (out / ".y.kiln.tmp.safetensors").write_bytes(b"half")  # of another
    for step in states:
        record.own_state(step)
        make_state(home / "state" / f"step-{step:08d}")
    make_state(home / "state" / "step-00000099")  # of another run, brought here by the user
    (home / "state" / ".step-00000012.kiln.tmp").mkdir(parents=True)
    if resumed:
        record = RunRecord(home)
    retention = CheckpointRetention(out, home, record, keep_states=keep_states, keep_loras=keep_loras)
    removed = retention.prune(keep_states, keep_loras)

    candidates = sorted(set(saves) - finished)
    outdated = set(candidates[: max(len(candidates) - keep_loras, 0)]) if keep_loras else set()
    stay = {name for name, step in mine.items() if step not in outdated}
    there = {name for name in stay if mine[name] not in vanished}
    kept_states = sorted(states)[-keep_states:] if keep_states else sorted(states)
    stay_states = [f"step-{step:08d}" for step in (*kept_states, 99)]
    found = {path.name for path in out.iterdir() if path.is_file() and path.name != "run.json"}
    assert found == there | {"x.safetensors", *STRANGERS, ".y.kiln.tmp.safetensors"}
    assert sorted(path.name for path in (home / "state").iterdir()) == stay_states
    assert sorted(RunRecord(home).states) == stay_states[:-1]
    assert set(RunRecord(home).files) == stay | {"x.safetensors"}
    assert retention.saved_steps() == sorted({mine[name] for name in there})
    gone = {name for name in mine if name not in stay and mine[name] not in vanished}
    assert removed == len(gone) + len(states) - len(kept_states)
    shutil.rmtree(out)


@settings(max_examples=30)
@given(keep=st.integers(0, 4), every=st.integers(1, 4), total=st.integers(1, 14), stop=st.integers(1, 14))
def test_saves_over_a_whole_run_also_with_a_resume_and_one_on_the_last_step(keep, every, total, stop, tmp_path_factory):
    """As the writer calls it, after each save; the run is stopped once and goes on."""
    out = tmp_path_factory.mktemp("out")
    done = []
    for first, last in ((0, min(stop, total)), (min(stop, total), total)):
        retention = CheckpointRetention(out, out, RunRecord(out), keep_states=keep, keep_loras=keep)
        for step in range(first + 1, last + 1):
            if step % every and step != last:
                continue

            def write(step=step, record=retention.record):
                record.own(f"x-step{step:08d}.safetensors")
                (out / f"x-step{step:08d}.safetensors").write_bytes(b"LoRA")
                record.own_state(step)
                make_state(out / "state" / f"step-{step:08d}")

            retention.write(write, step)
            done.append(step)
    expected = done[-keep:] if keep else done
    assert CheckpointRetention(out, out, RunRecord(out), keep_states=0, keep_loras=0).saved_steps() == expected
    assert sorted(int(path.name[-8:]) for path in (out / "state").iterdir()) == expected
    shutil.rmtree(out)


# ---- a full disk


def test_a_full_disk_with_nothing_to_remove_is_an_error(tmp_path):
    state_files.save(tmp_path / "state", 4, {"a": torch.zeros(1)})
    retention = CheckpointRetention(tmp_path, tmp_path, RunRecord(tmp_path), keep_states=2, keep_loras=0)
    tries = []

    def write():
        tries.append(1)
        raise StorageError("full")

    with pytest.raises(StorageError, match="full"):
        retention.write(write, 8)
    assert len(tries) == 1 and [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000004"]


def test_a_full_disk_loses_damaged_states_first_and_says_how_many_went(folder, caplog):
    damaged = folder / "state" / "step-00000002.damaged"
    make_state(damaged)
    mine = folder / "state" / "step-00000003.damaged"
    make_state(mine)
    record = RunRecord(folder)
    record.own_state(2)
    retention = CheckpointRetention(folder, folder, record, keep_states=3, keep_loras=3)
    tries = []

    def write():
        tries.append(damaged.exists())
        if len(tries) == 1:
            raise StorageError("The disk is full.")

    retention.write(write, 16)
    assert tries == [True, False]
    assert sorted(path.name for path in (folder / "state").iterdir()) == [mine.name, "step-00000016"]
    assert "The disk is full. Removed 6 older files and states to try again." in caplog.text


@pytest.mark.parametrize(("free", "warns"), [(2.99, True), (3.0, False), (3.01, False), (0.5, True)])
def test_the_log_warns_when_fewer_than_three_saves_fit(folder, free, warns, caplog, monkeypatch):
    """A save: its LoRA files in all formats, and its state."""
    record = RunRecord(folder)
    record.own("x-step00000016-comfyui.safetensors")
    (folder / "x-step00000016.safetensors").write_bytes(bytes(3 * 2**20))
    (folder / "x-step00000016-comfyui.safetensors").write_bytes(bytes(2**20))
    state = sum(path.stat().st_size for path in (folder / "state" / "step-00000016").iterdir())
    one = 4 * 2**20 + state
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, int(free * one)))
    retention = CheckpointRetention(folder, folder, record, keep_states=0, keep_loras=0)
    with caplog.at_level(logging.WARNING):
        retention.write(lambda: None, 16)
    assert bool(caplog.text) == warns
    if warns:
        assert re.search(rf"takes {one / 2**20:.1f} MiB and .* room for {int(free)} more", caplog.text)


def test_each_save_leaves_as_many_states_and_as_many_files_as_each_was_to_have(folder):
    CheckpointRetention(folder, folder, RunRecord(folder), keep_states=1, keep_loras=3).write(lambda: None, 16)
    assert [path.name for path in (folder / "state").iterdir()] == ["step-00000016"]
    assert RunRecord(folder).files == [f"x-step{step:08d}.safetensors" for step in (8, 12, 16)]


def test_the_room_for_further_saves_counts_the_file_and_both_of_the_state(folder, monkeypatch, caplog):
    usage = namedtuple("usage", "total used free")
    state = folder / "state" / "step-00000016"
    needed = 4 + sum(path.stat().st_size for path in state.iterdir())
    assert len(list(state.iterdir())) == 2
    retention = CheckpointRetention(folder, folder, RunRecord(folder), keep_states=2, keep_loras=2)
    for free, told in ((3 * needed, None), (3 * needed - 1, "room for 2 more"), (needed - 1, "room for 0 more")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(free, 0, free))
        caplog.clear()
        retention.write(lambda: None, 16)
        assert [told in line for line in caplog.messages] == ([True] if told else [])
