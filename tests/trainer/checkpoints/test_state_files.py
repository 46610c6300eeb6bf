"""States on disk: complete or absent."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from entrypoint.planning import starting_point
from trainer.checkpoints import state_files
from trainer.spec.errors import SettingsError, StorageError
from trainer.storage import run_records
from trainer.training import random_state


def tree(value):
    return {"a": torch.full((3,), value), "b": {0: [torch.arange(4), None, True, 1.5, "text"]}, "empty": {}}


def test_a_state_reads_back_as_it_was_written(tmp_path):
    state_files.save(tmp_path, 7, tree(1.0))
    state = state_files.latest(tmp_path)
    assert state.step == 7
    assert torch.equal(state.tree["a"], torch.ones(3))
    assert torch.equal(state.tree["b"][0][0], torch.arange(4))
    assert state.tree["b"][0][1:] == [None, True, 1.5, "text"] and state.tree["empty"] == {}


def test_a_text_is_never_taken_for_a_tensor(tmp_path):
    """Names of pictures and trigger words are part of a state."""
    texts = {"a": torch.ones(1), "b": "tensor:0", "tensor": "0", "tuple": [1], "dict": [["a", 1]]}
    state_files.save(tmp_path, 1, texts)
    back = state_files.latest(tmp_path).tree
    assert torch.equal(back.pop("a"), texts.pop("a")) and back == texts


def test_what_a_state_began_with_is_read_without_torch(tmp_path, job_plan):
    plan = job_plan("flux", PARAMS_OPTIMIZER_ARGS="betas=0.9,0.99")
    folder = state_files.save(tmp_path, 7, {"essence": plan.essence(), "data": {"a": "b"}, **tree(1.0)})
    header = run_records.read_state_header(folder)
    assert header.step == 7 and header.tree == {"essence": plan.essence(), "data": {"a": "b"}}
    (folder / "state.json").write_text("{damaged")
    assert run_records.read_state_header(folder) is None  # the trainer looks closer


def test_a_changed_plan_is_refused_with_the_state_that_was_asked_for(tmp_path, job_plan):
    plan = job_plan("flux")
    folder = str(state_files.save(tmp_path / "elsewhere", 7, {"essence": plan.essence()}))
    asked = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, resume_from=folder))
    starting_point.check_state(asked)
    changed = dataclasses.replace(asked, optim=dataclasses.replace(asked.optim, name="adamw"))
    named = rf"PARAMS_RESUME_FROM={folder} (?s:.*)PARAMS_OPTIMIZER_TYPE: prodigy → adamw\n"
    with pytest.raises(SettingsError, match=named):
        starting_point.check_state(changed)
    going_on = dataclasses.replace(changed, output=dataclasses.replace(changed.output, resume_with_changes=True))
    with pytest.raises(SettingsError, match="does not fit"):
        starting_point.check_state(going_on)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_state_is_renamed_and_the_one_before_is_used(tmp_path, name, damage):
    for step in (10, 20):
        state_files.save(tmp_path, step, tree(float(step)))
    victim = tmp_path / "step-00000020" / name
    data = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    else:
        data[len(data) // 2] ^= 1
        victim.write_bytes(data if damage == "flip" else data[:-3])
    assert state_files.latest(tmp_path).step == 10
    assert (tmp_path / "step-00000020.damaged").is_dir()


def test_when_all_states_are_damaged_it_is_an_error(tmp_path):
    state_files.save(tmp_path, 10, tree(1.0))
    (tmp_path / "step-00000010" / "state.json").write_text("{}")
    with pytest.raises(StorageError, match="damaged"):
        state_files.latest(tmp_path)


def test_the_newest_states_are_kept_and_orphans_removed(tmp_path):
    (tmp_path / ".step-00000099.1.tmp").mkdir(parents=True)
    for step in (10, 20, 30, 40):
        state_files.save(tmp_path, step, tree(1.0))
    assert state_files.prune(tmp_path, 2) == [30, 40]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000030", "step-00000040"]


def test_random_generators_continue_after_a_restore(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    draw()
    state_files.save(tmp_path, 1, {"random": random_state.random_state()})
    expected = draw()
    draw()
    random_state.set_random_state(state_files.latest(tmp_path).tree["random"])
    assert draw() == expected
