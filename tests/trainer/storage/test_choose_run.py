"""Which run of a folder a plan goes on with: by its settings, and by names that nothing else has."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from tests.support.plans import job_plan as make_plan
from trainer.spec.errors import SettingsError
from trainer.spec.plan import AUTO
from trainer.spec.rules.resume_rules import Changes
from trainer.storage import choose_run, digests, json_files, run_records
from trainer.storage.choose_run import already_trained, choose
from trainer.storage.run_records import Run, RunRecord


@pytest.fixture
def plan(tmp_path):
    return make_plan(tmp_path, "flux", PARAMS_MAX_STEPS="12")


@pytest.fixture
def out(plan):
    folder = Path(plan.output.path)
    folder.mkdir()
    return folder


def leave(choice, *, step=8, done=False, files=True, record=None):
    """What a run leaves in its folder."""
    home, plan = choice.home, choice.plan
    home.mkdir(parents=True, exist_ok=True)
    (home / "plan.json").write_text(plan.to_json())
    names = [f"{plan.output.name}-step{step:08d}.safetensors"] if files else []
    names += [f"{plan.output.name}.safetensors"] if done else []
    for name in names:
        (Path(plan.output.path) / name).write_bytes(b"LoRA")
    if step:
        folder = home / "state" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        tree = {"dict": [["essence", {"dict": list(map(list, plan.essence().items()))}]]}
        text = json.dumps({"step": step, "tree": encoded(tree)})
        (folder / "state.json").write_text(json.dumps({"text": text, "sha256": digests.digest(text)}))
    used = len(run_records.known_runs(Path(plan.output.path)))
    RunRecord(home).update({"name": plan.output.name, "files": names, "done": done, "used": used, **(record or {})})


def encoded(tree):
    """Dicts inside the essence, as trainer.checkpoints.state_files writes them."""
    rows = dict(tree["dict"])["essence"]["dict"]
    for row in rows:
        if isinstance(row[1], dict):
            row[1] = {"dict": list(map(list, row[1].items()))}
    return tree


def other(plan, **values):
    return dataclasses.replace(plan, train=dataclasses.replace(plan.train, **values))


def asked(plan, **values):
    return dataclasses.replace(plan, output=dataclasses.replace(plan.output, **values))


def test_an_empty_folder_gets_its_first_run_at_the_top(plan):
    choice = choose(plan)
    assert (choice.run, choice.plan.output.name, choice.plan.output.folder) == (None, "x", "")
    assert choice.describe() is None


def test_the_same_settings_go_on(plan, out):
    leave(choose(plan))
    choice = choose(plan)
    assert choice.run.step == 8 and choice.home == out and choice.describe() is None and choice.done is None


def test_other_settings_are_a_new_run_beside_it_and_the_old_ones_the_old_run_again(plan, out):
    leave(choose(plan))
    choice = choose(other(plan, seed=1))
    assert choice.plan.output.name == "x-2" and choice.home == out / "runs" / "x-2"
    text = choice.describe()
    assert text.startswith(
        "New run x-2, beside x, because these differ: PARAMS_SEED: 42 → 1. x stays as it is, at step 8."
    )
    assert f"PARAMS_RESUME_FROM={out}/x-step00000008.safetensors" in text and "RESUME_WITH_CHANGES=true" in text
    assert choose(choice.plan).plan == choice.plan, "the trainer comes to the same answer"
    leave(choice)
    assert choose(other(plan, seed=1)).run.name == "x-2"
    assert choose(plan).run.name == "x"
    assert choose(other(plan, seed=2)).plan.output.name == "x-3"


def test_more_steps_are_the_same_run(plan, out):
    leave(choose(plan), step=12, done=True)
    assert choose(plan).done == out / "x.safetensors"
    more = choose(other(plan, max_steps=20))
    assert more.run.name == "x" and more.done is None and more.found.steps == ("PARAMS_MAX_STEPS: 12 → 20",)


def test_more_steps_of_a_run_without_a_state_are_a_new_run(plan):
    leave(choose(plan), step=0, done=True, record={"total": 12})
    choice = choose(other(plan, max_steps=20))
    assert choice.plan.output.name == "x-2" and "no state was kept" in choice.describe()
    assert choose(other(plan, max_steps=6)).run.name == "x"


def test_what_a_run_left_nothing_of_is_used_again(plan, out):
    leave(choose(plan), step=0, files=False)
    choice = choose(other(plan, seed=1))
    assert (choice.plan.output.name, choice.home, choice.describe()) == ("x", out, None)
    leave(choose(plan))
    leave(choose(other(plan, seed=1)), step=0, files=False)
    again = choose(other(plan, seed=2))
    assert again.plan.output.name == "x-2" and again.home == out / "runs" / "x-2"


def test_of_two_runs_that_left_nothing_the_later_one_is_used_again(plan, out):
    leave(choose(plan), step=0, files=False)
    second = dataclasses.replace(plan.output, folder="runs/y", name="y")
    leave(choose_run.Choice(dataclasses.replace(other(plan, seed=1), output=second), None), step=0, files=False)
    assert [run.name for run in run_records.known_runs(out)] == ["y", "x"]
    again = choose(asked(other(plan, seed=2), requested="y"))
    assert again.home == out / "runs" / "y" and again.plan.output.name == "y"


@pytest.mark.parametrize(
    "name",
    ["x.safetensors", "x-diffusers.safetensors", "x-step00000100.safetensors", "x-step00000100-mine.safetensors"],
)
def test_a_file_of_somebody_else_keeps_its_name(plan, out, name):
    (out / name).write_bytes(b"mine")
    choice = choose(plan)
    assert choice.plan.output.name == "x-2" and choice.home == out
    assert choice.describe() == "OUTPUT_PATH already has files named x that no run wrote: this run is called x-2."
    leave(choice)
    assert choose(plan).run.name == "x-2"


def test_a_new_name_renames_the_run(plan):
    leave(choose(plan))
    choice = choose(asked(plan, name="y", requested="y"))
    assert choice.run.name == "x" and choice.plan.output.name == "y" and choice.plan.output.folder == ""


@pytest.mark.parametrize("name", ["", ".hidden", "a/b"])
def test_a_run_whose_record_has_no_name_that_a_file_can_have_gets_the_one_of_the_plan(plan, name):
    leave(choose(plan), record={"name": name})
    again = choose(plan)
    assert again.run.step == 8 and again.plan.output.name == "x"


def test_the_name_that_a_run_has_already_is_free_for_it(plan, out):
    """It began as x, which a file of somebody else had; then the name that it got is asked for."""
    (out / "x.safetensors").write_bytes(b"mine")
    began = choose(asked(plan, requested="x"))
    leave(began, files=False)
    again = choose(asked(plan, requested="x-2"))
    assert began.plan.output.name == again.plan.output.name == "x-2" and again.run.name == "x-2"


def test_a_run_goes_on_with_changes_if_asked_and_if_its_state_fits(plan):
    leave(choose(plan))
    choice = choose(asked(other(plan, seed=1), resume_with_changes=True))
    assert choice.run.name == "x" and choice.changes == ("PARAMS_SEED: 42 → 1",)
    assert "goes on with PARAMS_SEED: 42 → 1" in choice.describe()
    rank = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, rank=8))
    with pytest.raises(SettingsError, match=r"at step 8 does not fit (?s:.*)PARAMS_NETWORK_DIM: 32 → 8"):
        choose(asked(rank, resume_with_changes=True))


def test_a_wish_to_go_on_that_cannot_be_met_is_named(plan, out):
    leave(choose(plan), step=0, done=True)
    wish = asked(other(plan, seed=1), resume_with_changes=True)
    assert choose(wish).describe().endswith("RESUME_WITH_CHANGES=true does not apply: x has no state.")
    leave(choose(plan), done=True)
    start = dataclasses.replace(wish, lora=dataclasses.replace(wish.lora, resume_from=str(out / "x.safetensors")))
    text = choose(start).describe()
    assert "RESUME_WITH_CHANGES=true does not apply: x did not begin with this PARAMS_RESUME_FROM." in text
    assert "goes on with its state" not in text


def test_a_place_to_start_from_is_not_ignored_beside_it(plan, out):
    leave(choose(plan))
    start = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, resume_from=str(out / "x.safetensors")))
    choice = choose(asked(start, resume_with_changes=True))
    assert choice.run is None and choice.plan.output.name == "x-2"


def test_content_decides_where_images_are_elsewhere(plan):
    leave(choose(plan))
    moved = plan.map_sources(lambda source, _: dataclasses.replace(source, location="/elsewhere"))
    assert choose(moved).run.name == "x" and choose(moved).found.places
    assert choose(moved, content_changes=lambda run, found: []).run.name == "x"
    choice = choose(moved, content_changes=lambda run, found: [*found.places, "added: 0.0/new.png"])
    assert choice.plan.output.name == "x-2" and "DATASET_NAME" in choice.describe() and "new.png" in choice.describe()


def test_images_are_not_compared_with_a_run_of_other_settings(plan):
    leave(choose(plan))
    choice = choose(other(plan, seed=7), content_changes=lambda run, found: ["added: 0.0/new.png"])
    assert choice.plan.output.name == "x-2" and choice.changes == (f"PARAMS_SEED: {plan.train.seed} → 7",)


def test_a_finished_job_looks_at_its_images_again_when_their_folder_has_changed(plan, out):
    leave(choose(plan), step=12, done=True, record={"listing": run_records.listing_digest(plan)})
    assert choose(plan).done == out / "x.safetensors"
    images = Path(plan.data.datasets[0].subsets[0].source.location)
    (images / "new.png").write_bytes(b"")
    assert choose(plan).done is None and choose(plan).run.name == "x"
    (images / "new.png").unlink()
    assert choose(plan).done
    text = images / "0.txt"
    os.utime(text, ns=(1, 1))
    assert choose(plan).done is None


def test_a_run_of_a_version_without_records_is_known_by_its_plan_and_status(plan, out):
    leave(choose(plan), step=12, done=True)
    (out / "run.json").unlink()
    (out / "status.json").write_text('{"phase": "done"}')
    assert choose(plan).done == out / "x.safetensors"
    assert choose(other(plan, seed=1)).plan.output.name == "x-2"


def test_a_run_without_a_plan_is_known_by_its_state(plan, out):
    leave(choose(plan))
    (out / "plan.json").write_text("[]")
    (out / "run.json").unlink()
    assert choose(plan).run.step == 8
    assert choose(other(plan, seed=1)).home == out / "runs" / choose(other(plan, seed=1)).plan.output.name


def test_too_many_steps_name_the_save_that_was_asked_for(tmp_path):
    (tmp_path / "x-step00000008.safetensors").write_bytes(b"")
    assert f"Its LoRA of step 8 is {tmp_path}/x-step00000008.safetensors." in already_trained(
        tmp_path, "x", trained=12, wanted=8
    )
    text = already_trained(tmp_path, "x", trained=12, wanted=6)
    assert "No LoRA of step 6 was kept; there are x-step00000008.safetensors" in text


@pytest.mark.parametrize("place", ["x" * 300, "file/x", "loop"])
def test_a_folder_that_cannot_even_be_looked_at_has_no_run(plan, tmp_path, place):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("mine")
    elsewhere = dataclasses.replace(plan, output=dataclasses.replace(plan.output, path=str(tmp_path / place)))
    assert choose(elsewhere).run is None


ODD = {
    "binary": lambda path: path.write_bytes(b"\xff\x00\x81"),
    "list": lambda path: path.write_text("[1]"),
    "number": lambda path: path.write_text("1e999"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "digits": lambda path: path.write_text("9" * 10_000),
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["status.json", "plan.json", "run.json"])
def test_odd_files_are_no_run(plan, out, name, kind):
    ODD[kind](out / name)
    assert choose(plan).run is None
    assert json_files.read_object(out / name) is None
    json_files.set_aside_unless_object(out / name)
    assert not os.path.lexists(out / name) and os.path.lexists(out / f"{name}.set-aside")


@pytest.mark.parametrize(
    "values",
    [
        {"files": 3},
        {"files": ["../a.safetensors", 4, None]},
        {"used": "x"},
        {"done": 1},
        {"finished": {}},
        {"data": [1]},
    ],
)
def test_odd_values_in_a_record_are_not_believed(plan, values):
    choice = choose(plan)
    leave(choice, record=values)
    run = choose(plan).run
    assert run.name == "x" and run.done is False
    assert {path.name for path in run.lora_files()} <= {"x-step00000008.safetensors"}
    assert RunRecord(choice.home).finished == []


@pytest.mark.parametrize(
    ("run_has", "asked", "is_new"),
    [
        ({}, {"max_steps": 13}, True),
        ({}, {"max_steps": 12}, False),
        ({}, {"max_steps": 11}, False),
        ({}, {"max_steps": None, "max_epochs": 3}, True),  # how many that are is not known
        ({}, {"max_steps": None, "max_epochs": AUTO}, False),
        ({"done": False}, {"max_steps": 13}, False),
        ({"step": 8}, {"max_steps": 13}, False),
        ({"record": {}}, {"max_steps": 12}, True),  # of a version that did not record how many it has
    ],
)
def test_only_a_finished_run_without_a_state_cannot_go_on(plan, out, run_has, asked, is_new):
    run = Run(out, "", "x", "", {}, None, {"total": 12}, step=0, done=True)
    run = dataclasses.replace(run, **run_has)
    wanted = dataclasses.replace(plan, train=dataclasses.replace(plan.train, **asked))
    found = choose_run._unreachable_steps(run, Changes(steps=("PARAMS_MAX_STEPS: 12 → 13",)), wanted)
    words = "PARAMS_MAX_STEPS: 12 → 13 (and no state was kept: PARAMS_SAVE_EVERY_N_STEPS=0)"
    assert found == ([words] if is_new else [])
    assert choose_run._unreachable_steps(run, Changes(), wanted) == []
