"""Which checkpoints stay: the newest, and everything that the run did not write."""

import pytest
import torch

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
