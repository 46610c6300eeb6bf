"""Which state a job resumes from, and what it says where another device or version made it."""

import dataclasses

import pytest
import torch

from trainer.checkpoints import resume, state_files
from trainer.spec.errors import SettingsError

PRINTS = {"0.0/a.png": "image - caption", "0.0/b.png": "image2 - -"}


@pytest.fixture
def plan(job_plan):
    return job_plan("flux")


def saved(folder, plan, step=7, **changed):
    tree = {
        "essence": plan.essence(),
        "data": PRINTS,
        "made_by": resume.made_by(plan.engine.attention),
        "a": torch.ones(1),
        **changed,
    }
    return state_files.save(folder, step, tree)


def asks(plan, folder, **output):
    return dataclasses.replace(
        plan,
        lora=dataclasses.replace(plan.lora, resume_from=str(folder)),
        output=dataclasses.replace(plan.output, **output),
    )


def test_the_newest_state_of_the_run_comes_before_the_one_that_is_named(plan, tmp_path):
    home = tmp_path / "home"
    named = saved(tmp_path / "elsewhere", plan, 99)
    assert resume.resumable_state(plan, home, PRINTS) is None
    assert resume.resumable_state(asks(plan, named), home, PRINTS).step == 99
    for step in (8, 4):
        saved(home / "state", plan, step)
    assert resume.resumable_state(asks(plan, named), home, PRINTS).step == 8
    assert resume.resumable_state(plan, home, PRINTS).step == 8


def test_a_file_of_weights_is_no_state(plan, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"LoRA")
    assert resume.resumable_state(asks(plan, path), tmp_path / "home", PRINTS) is None


def test_a_named_folder_that_is_no_state_is_refused(plan, tmp_path):
    folder = saved(tmp_path, plan)
    data = bytearray((folder / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "state.safetensors").write_bytes(data)
    with pytest.raises(SettingsError, match=rf"PARAMS_RESUME_FROM {folder} is not a complete state"):
        resume.resumable_state(asks(plan, folder), tmp_path / "home", PRINTS)


def test_a_named_state_of_other_images_is_refused_by_their_names_or_taken_if_asked(plan, tmp_path):
    folder = saved(tmp_path, plan)
    other = {**PRINTS, "0.0/a.png": "image - other"}
    with pytest.raises(SettingsError, match=r"another dataset:\n  changed: 0\.0/a\.png \(caption\)\n"):
        resume.resumable_state(asks(plan, folder), tmp_path / "home", other)
    going_on = asks(plan, folder, resume_with_changes=True)
    assert resume.resumable_state(going_on, tmp_path / "home", other).step == 7


def test_a_named_state_of_other_settings_is_refused(plan, tmp_path):
    folder = saved(tmp_path, plan)
    changed = dataclasses.replace(plan, train=dataclasses.replace(plan.train, seed=plan.train.seed + 1))
    with pytest.raises(SettingsError, match="PARAMS_SEED"):
        resume.resumable_state(asks(changed, folder), tmp_path / "home", PRINTS)
    # Images elsewhere, but the same ones, are no other settings.
    places = {key: "elsewhere" if key.endswith("source.location") else v for key, v in plan.essence().items()}
    moved = saved(tmp_path / "moved", plan, essence=places)
    assert resume.resumable_state(asks(plan, moved), tmp_path / "home", PRINTS).step == 7


@pytest.mark.parametrize("key", ["torch", "device", "PARAMS_ATTENTION", "NUM_GPUS"])
def test_each_thing_that_decides_the_last_bits_is_named_where_it_differs(plan, tmp_path, key, caplog):
    made_by = resume.made_by(plan.engine.attention)
    assert made_by.keys() == {"torch", "device", "PARAMS_ATTENTION"} and all(made_by.values())
    saved(tmp_path / "state", plan)
    resume.resumable_state(plan, tmp_path, PRINTS)
    assert caplog.text == ""
    essence = plan.essence()
    if key == "NUM_GPUS":
        essence["engine.num_gpus"] = 4
    else:
        made_by[key] = "another"
    saved(tmp_path / "state", plan, 8, made_by=made_by, essence=essence)
    resume.resumable_state(plan, tmp_path, PRINTS)
    (line,) = caplog.messages
    now = {**resume.made_by(plan.engine.attention), "NUM_GPUS": 1}[key]
    then = 4 if key == "NUM_GPUS" else "another"
    assert line == f"The state was made with {key} {then}, and this is {now}: the result will not be bit-identical."


def test_a_state_of_a_version_for_one_gpu_names_no_number_of_gpus(plan, tmp_path, caplog):
    older = {key: value for key, value in plan.essence().items() if key != "engine.num_gpus"}
    saved(tmp_path / "state", plan, essence=older)
    two = dataclasses.replace(plan, engine=dataclasses.replace(plan.engine, num_gpus=2))
    resume.resumable_state(plan, tmp_path, PRINTS)
    assert caplog.messages == []
    resume.resumable_state(two, tmp_path, PRINTS)
    (line,) = caplog.messages
    assert "made with NUM_GPUS 1, and this is 2:" in line


@pytest.mark.parametrize(
    ("processor", "gpu", "device"), [("EPYC", None, "EPYC"), ("", None, "x86_64"), ("EPYC", "H200", "H200")]
)
def test_the_device_is_the_gpu_or_else_the_processor_by_the_best_name_there_is(monkeypatch, processor, gpu, device):
    monkeypatch.setattr(resume.platform, "processor", lambda: processor)
    monkeypatch.setattr(resume.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    assert resume.made_by("auto") == {"torch": torch.__version__, "device": device, "PARAMS_ATTENTION": "auto"}


@pytest.mark.parametrize(
    ("tree", "steps"),
    [
        ({"total": 12, "essence": {"train.max_steps": 5}}, 12),
        ({"essence": {"train.max_steps": 5, "train.max_epochs": 3}}, 5),
        ({"essence": {"train.max_steps": None, "train.max_epochs": 3}}, 21),
        ({"total": None, "essence": {}}, 0),
    ],
)
def test_how_many_steps_the_run_was_to_have(tree, steps, tmp_path):
    assert resume.total_steps(state_files.State(1, tmp_path, tree), steps_per_epoch=7) == steps
