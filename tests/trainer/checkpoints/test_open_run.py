"""Opening the run that a job is: a kill at any moment of it changes nothing that another run has."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.support.plans import job_plan as make_plan
from trainer.checkpoints import state_files
from trainer.checkpoints.open_run import adopt_older_run, open_run, remove_leftovers
from trainer.data.identity import fingerprint
from trainer.data.records import ImageRecord
from trainer.spec.plan import AUTO
from trainer.storage import digests, run_records

IMAGE = ImageRecord("a.png", Path("/a.png"), "1" * 64, 64, 48, 0, 0, "a cat")


class Killed(BaseException):
    """In place of SIGKILL."""


@pytest.fixture
def plan(tmp_path):
    return make_plan(tmp_path, "flux", PARAMS_MAX_STEPS="12")


def other(plan, **values):
    return dataclasses.replace(plan, train=dataclasses.replace(plan.train, **values))


def kill_before(monkeypatch, number):
    """The call `number` (from 0) that changes a name raises Killed."""
    left = [number]

    def killing(call):
        def called(*arguments, **keywords):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return call(*arguments, **keywords)

        return called

    for name in ("rename", "unlink", "mkdir", "fsync"):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))


def test_what_a_run_that_left_nothing_had_chosen_is_not_taken_over_by_the_next(plan, tmp_path, monkeypatch):
    """Its place is used again; killed before any call that changes a file."""
    first = open_run(plan, [])
    first.record.update({"automatic_steps": 1000})
    out = Path(plan.output.path)
    shutil.copytree(out, tmp_path / "before")
    kills = 0
    for number in range(100):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "before", out)
        with monkeypatch.context() as patched:
            kill_before(patched, number)
            try:
                open_run(other(plan, seed=7), [])
                break
            except Killed:
                kills += 1
        adopt_older_run(out)
        opened = open_run(other(plan, seed=7), [])
        assert (opened.plan.output.name, opened.home) == ("x", out)
        assert not {"automatic_steps", "automatic_epochs"} & opened.record.values.keys()
    assert kills >= 4


def test_a_new_run_keeps_its_name_wherever_it_was_killed(plan, tmp_path, monkeypatch):
    open_run(plan, []).record.own("x.safetensors")
    out = Path(plan.output.path)
    (out / "x.safetensors").write_bytes(b"LoRA")
    shutil.copytree(out, tmp_path / "before")
    kills = 0
    for number in range(100):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "before", out)
        with monkeypatch.context() as patched:
            kill_before(patched, number)
            try:
                open_run(other(plan, seed=7), [])
                break
            except Killed:
                kills += 1
        opened = open_run(other(plan, seed=7), [])
        assert opened.plan.output.name == "x-2" and opened.home == out / "runs" / "x-2"
        for path in (tmp_path / "before").rglob("*"):
            kept = out / path.relative_to(tmp_path / "before")
            assert path.is_dir() or kept.read_bytes() == path.read_bytes()
    assert kills >= 4


def record_of(opened):
    """What run.json says, without the digest of it."""
    values = json.loads((opened.home / "run.json").read_text())
    values.pop("sha256", None)
    return values


def test_the_record_says_what_the_run_began_with(plan):
    """Each is compared when the folder is opened again."""
    named = dataclasses.replace(plan, output=dataclasses.replace(plan.output, requested="x"))
    opened = open_run(named, [IMAGE])
    assert record_of(opened) == {
        "name": "x",
        "requested": "x",
        "started": plan.output.started,
        "used": 1,
        "data": fingerprint([IMAGE]),
        "model": digests.weights_digest(Path(plan.model.path)),
        "listing": run_records.listing_digest(plan),
        "essence": plan.essence(),
        "states": [],
    }
    assert json.loads((opened.home / "plan.json").read_text()) == json.loads(opened.plan.to_json())
    assert not opened.was_done and opened.home == opened.out == Path(plan.output.path)
    assert record_of(open_run(named, [IMAGE]))["used"] == 2


def test_samples_stay_with_their_run_and_leave_the_place_that_another_gets(plan):
    opened = open_run(plan, [])
    sample = opened.home / "sample" / "step-00000004-00.png"
    sample.parent.mkdir()
    sample.write_bytes(b"sample")
    (sample.parent / "mine.png").write_bytes(b"mine")
    open_run(plan, [])  # goes on
    assert sample.read_bytes() == b"sample"
    another = open_run(other(plan, seed=7), [])  # the first left nothing to go on from, so that its place is free
    assert another.home == opened.home and [path.name for path in sample.parent.iterdir()] == ["mine.png"]
    assert (opened.home / "sample.set-aside" / sample.name).read_bytes() == b"sample"


def test_weights_that_cannot_be_read_have_no_digest(plan):
    gone = dataclasses.replace(plan, model=dataclasses.replace(plan.model, path=str(Path(plan.output.path) / "gone")))
    Path(gone.model.path).mkdir(parents=True)
    (Path(gone.model.path) / "a.safetensors").write_bytes(b"no weights")
    assert record_of(open_run(gone, []))["model"] == ""


def test_what_changed_is_added_to_the_history_with_its_step(plan):
    opened = open_run(plan, [])
    for step, seed in ((4, 7), (8, 9)):
        state_files.save(opened.home / "state", step, {"essence": opened.plan.essence(), "data": {}})
        asked = other(plan, seed=seed)
        asked = dataclasses.replace(asked, output=dataclasses.replace(asked.output, resume_with_changes=True))
        before = opened.plan.train.seed
        opened = open_run(asked, [])
        assert record_of(opened)["changed"][-1] == {"step": step, "changes": [f"PARAMS_SEED: {before} → {seed}"]}
    assert len(record_of(opened)["changed"]) == 2 and opened.home == Path(plan.output.path)


@pytest.mark.parametrize(
    ("done", "total", "state", "trained"),
    [(True, 12, 8, 12), (True, 12, 20, 20), (True, None, 8, 8), (False, 12, 8, 8), (True, "12", 8, 8)],
)
def test_how_many_steps_a_run_has_behind_it(plan, done, total, state, trained):
    opened = dataclasses.replace(open_run(plan, []), was_done=done)
    opened.record.update({"total": total})
    assert opened.trained(state) == trained


def test_a_run_of_a_version_without_records_is_adopted_with_its_files(plan):
    opened = open_run(plan, [])
    out = opened.out
    (out / "run.json").unlink()
    state_files.save(out / "state", 4, {"essence": plan.essence(), "data": {}})
    for name in ("x-step00000004.safetensors", "x.safetensors", "x-step00000004-mine.safetensors"):
        (out / name).write_bytes(b"LoRA")
    (out / "status.json").write_text('{"phase": "done"}')
    adopt_older_run(out)
    assert record_of(opened) == {
        "name": "x",
        "done": True,
        "files": ["x-step00000004.safetensors", "x.safetensors"],
        "finished": [4],
        "total": 4,
        "automatic_epochs": plan.train.max_epochs,
    }
    run_records.RunRecord(out).update({"name": "y", "files": ["y.safetensors"], "done": False, "finished": [2]})
    before = record_of(opened)
    adopt_older_run(out)
    assert record_of(opened) == before  # one that is there stays


def test_an_older_run_that_was_not_done_has_no_end(plan):
    opened = open_run(plan, [])
    (opened.out / "run.json").unlink()
    state_files.save(opened.out / "state", 4, {"essence": plan.essence(), "data": {}})
    automatic = other(plan, max_epochs=AUTO)
    (opened.out / "plan.json").write_text(automatic.to_json())
    adopt_older_run(opened.out)
    assert record_of(opened) == {"name": "x", "done": False, "files": []}


def test_an_older_run_that_was_done_and_kept_no_state_has_no_number_of_steps(plan):
    opened = open_run(plan, [])
    (opened.out / "run.json").unlink()
    (opened.out / "x.safetensors").write_bytes(b"LoRA")
    (opened.out / "status.json").write_text('{"phase": "done"}')
    adopt_older_run(opened.out)
    assert record_of(opened).keys() == {"name", "done", "files", "automatic_epochs"} and record_of(opened)["done"]


def test_an_older_run_without_a_plan_is_adopted_by_its_state(plan):
    opened = open_run(plan, [])
    for name in ("run.json", "plan.json"):
        (opened.out / name).unlink()
    run = {"name": "x", "requested": ""}
    state_files.save(opened.out / "state", 4, {"essence": plan.essence(), "data": {}, "run": run})
    adopt_older_run(opened.out)
    assert record_of(opened) == {"name": "x", "done": False, "files": []}


def test_what_a_killed_process_was_writing_is_removed_from_every_run(plan):
    first = open_run(plan, [IMAGE])
    state_files.save(first.home / "state", 4, {"essence": first.plan.essence(), "data": {}})
    second = open_run(other(plan, seed=1), [IMAGE])
    assert first.home != second.home
    for home in (first.home, second.home):
        for name in (".step-00000008.kiln.tmp", ".step-00000002.kiln.old", "mine"):
            (home / "state" / name).mkdir(parents=True)
    remove_leftovers(first.out)
    found = [sorted(path.name for path in (home / "state").iterdir()) for home in (first.home, second.home)]
    assert found == [["mine", "step-00000004"], ["mine"]]
