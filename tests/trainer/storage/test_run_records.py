"""What an output folder says of its runs: names that are free, files that are a run's own, and what has changed."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from trainer.storage import run_records
from trainer.storage.run_records import Run, RunRecord


@pytest.fixture
def plan(job_plan):
    return job_plan("flux")


def run(out, name="x", folder="", **record):
    return Run(out, folder, name, "", {}, None, record, step=0, done=False)


@pytest.mark.parametrize(
    ("files", "is_free"),
    [
        ([], True),
        (["x.safetensors"], False),
        (["x-diffusers.safetensors"], False),
        (["x-comfyui.safetensors"], False),
        (["x-other.safetensors"], True),
        (["x-step00000004.safetensors"], False),
        (["x-step00000004-comfyui.safetensors"], False),
        (["x-step00000004.png"], False),
        (["x-step4.safetensors", "xx-step00000004.safetensors", "x-step000000041.safetensors"], True),
        (["runs/x/plan.json"], False),
        (["runs/x/.plan.4711.tmp.json"], True),  # of a killed process
        (["runs/y/plan.json"], True),
        (["runs/x"], False),  # a file where the folder would be
    ],
)
def test_a_name_is_free_where_no_file_and_no_run_has_it(tmp_path, files, is_free):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert run_records.is_free(tmp_path, "x", []) == is_free
    assert run_records.is_free(tmp_path, "x", [], reused="runs/x") == (is_free or files[0].startswith("runs/x"))
    assert not run_records.is_free(tmp_path, "x", [run(tmp_path)])
    assert run_records.is_free(tmp_path / "none", "x", [])


def test_the_first_free_number_is_taken(tmp_path):
    assert run_records.free_name(tmp_path, "x", []) == "x"
    assert run_records.free_name(tmp_path, "x", [run(tmp_path)]) == "x-2"
    (tmp_path / "x-2.safetensors").write_text("x")
    assert run_records.free_name(tmp_path, "x", [run(tmp_path), run(tmp_path, "x-3")]) == "x-4"
    (tmp_path / "a.b+c.safetensors").write_text("x")
    (tmp_path / "aXb+c-step00000001.safetensors").write_text("x")
    assert run_records.free_name(tmp_path, "a.b+c", []) == "a.b+c-2"


def test_states_are_counted_by_their_step(tmp_path):
    assert run_records.state_steps(tmp_path) == []
    for name in ("step-00000100", "step-00000020", "step-7", "step-00000030.damaged", ".step-00000040.1.tmp"):
        (tmp_path / "state" / name).mkdir(parents=True)
        (tmp_path / "state" / name / "state.json").write_text("{}")
    (tmp_path / "state" / "step-00000050").mkdir()  # holds no file of a state
    assert run_records.state_steps(tmp_path) == [20, 100]


@pytest.mark.parametrize(
    ("files", "own"),
    [
        (["a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"]),
        (["../a.safetensors", "sub/a.safetensors", "a.txt", 7, None, "b.safetensors"], ["b.safetensors"]),
        ("a.safetensors", []),
        (None, []),
    ],
)
def test_names_in_a_record_that_no_job_writes_are_not_its_own(files, own):
    assert run_records.own_names({"files": files}) == own


def test_files_of_an_older_run_are_known_by_its_name_and_its_states(tmp_path):
    for name in (
        "x-step00000004.safetensors",
        "x-step00000004-comfyui.safetensors",
        "x.safetensors",
        "x-mine.safetensors",
    ):
        (tmp_path / name).write_text("x")
    saves = ["x-step00000004.safetensors", "x-step00000004-comfyui.safetensors"]
    assert run_records.written_names(tmp_path, "x", steps=[4, 8], final=False) == saves
    assert run_records.written_names(tmp_path, "x", steps=[4], final=True) == [*saves, "x.safetensors"]


def test_the_latest_lora_with_kohyas_keys_comes_last(tmp_path):
    names = ["x.safetensors", "x-step00000008.safetensors", "x-step00000004.safetensors", "x-comfyui.safetensors",
             "x-step00000008-diffusers.safetensors", "its-earlier-name.safetensors",
             "x-step00000016.safetensors"]  # fmt: skip
    for name in names[:-1]:  # the last is gone
        (tmp_path / name).write_text("x")
    one = run(tmp_path, files=names)
    assert [path.name for path in one.lora_files()] == [
        "x-step00000004.safetensors", "x-step00000008.safetensors", "x.safetensors"
    ]  # fmt: skip
    assert not one.is_barren and run(tmp_path / "none").is_barren
    assert not dataclasses.replace(run(tmp_path / "none"), step=4).is_barren
    assert dataclasses.replace(one, folder="runs/x").home == tmp_path / "runs/x"


def test_a_record_is_written_only_where_something_changes(tmp_path):
    record = RunRecord(tmp_path)
    record.update({})
    assert not (tmp_path / "run.json").exists() and record.files == [] and record.finished == []
    record.own("a.safetensors")
    record.own("b.safetensors")
    before = (tmp_path / "run.json").stat().st_mtime_ns
    record.own("a.safetensors")
    record.disown(["c.safetensors"])
    assert (tmp_path / "run.json").stat().st_mtime_ns == before
    record.disown(["a.safetensors"])
    assert RunRecord(tmp_path).files == ["b.safetensors"]
    record.update({"finished": [4, "8", None, 12]})
    assert RunRecord(tmp_path).finished == [4, 12] and RunRecord(tmp_path).values["files"] == ["b.safetensors"]
    record.update({"finished": 4})
    assert record.finished == []


def test_the_run_that_was_used_last_comes_first(tmp_path, plan):
    for folder, used in (("", 2), ("runs/a", 3), ("runs/b", "9"), ("runs/c", 1)):
        home = tmp_path / folder
        home.mkdir(parents=True, exist_ok=True)
        named = dataclasses.replace(plan, output=dataclasses.replace(plan.output, name=folder[-1:] or "x"))
        (home / "plan.json").write_text(named.to_json())
        (home / "run.json").write_text(json.dumps({"used": used}))
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "file").write_text("no folder")
    assert [one.name for one in run_records.known_runs(tmp_path)] == ["a", "x", "c", "b"]
    assert run_records.known_runs(tmp_path / "none") == []


# ---- the look at local files that spares a finished job the look into each image


@pytest.fixture
def folder(plan):
    (dataset,) = plan.data.datasets
    return Path(dataset.subsets[0].source.location)


def test_a_local_training_adapter_counts_too(plan, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x")
    named = dataclasses.replace(plan, model=dataclasses.replace(plan.model, training_adapter=str(path)))
    before = run_records.listing_digest(named)
    assert before != run_records.listing_digest(plan)
    path.write_bytes(b"xy")
    assert run_records.listing_digest(named) != before


def test_every_file_counts_with_its_name_its_size_and_its_time(plan, folder):
    before = run_records.listing_digest(plan)
    path = folder / "0.txt"
    text, time = path.read_text(), path.stat().st_mtime_ns

    def stamp(when=time):
        os.utime(path, ns=(when, when))
        return run_records.listing_digest(plan)

    assert stamp() == before != stamp(time + 1_000_000)
    path.write_text(text + "!")
    assert stamp() != before
    path.write_text(text)
    assert stamp() == before
    path.rename(folder / "2.txt")
    assert run_records.listing_digest(plan) != before
    (folder / "2.txt").rename(path)
    (folder / "sub").mkdir()
    assert stamp() == before
    (folder / "sub" / "new.png").write_bytes(b"x")
    assert stamp() != before


def test_the_jobs_own_folders_do_not_count(plan, folder):
    inside = dataclasses.replace(
        plan, output=dataclasses.replace(plan.output, path=str(folder / "out"), cache=str(folder / "cache"))
    )
    before = run_records.listing_digest(inside)
    for name in ("out", "cache"):
        (folder / name).mkdir()
        (folder / name / "new.png").write_bytes(b"x")
    assert run_records.listing_digest(inside) == before != run_records.listing_digest(plan)


def test_tables_and_masks_count_and_what_is_elsewhere_does_not(plan, tmp_path):
    (dataset,) = plan.data.datasets
    (subset,) = dataset.subsets

    def listed(**values):
        source = {key: values.pop(key) for key in ("kind", "location") if key in values}
        changed = dataclasses.replace(subset, source=dataclasses.replace(subset.source, **source), **values)
        data = dataclasses.replace(plan.data, datasets=(dataclasses.replace(dataset, subsets=(changed,)),))
        return run_records.listing_digest(dataclasses.replace(plan, data=data))

    table, masks = tmp_path / "captions.csv", tmp_path / "masks"
    masks.mkdir()
    table.write_text("a")
    (masks / "a.png").write_bytes(b"a")
    for values, changed in (
        ({"metadata_file": str(table)}, table),
        ({"conditioning_data_dir": str(masks)}, masks / "a.png"),
    ):
        before = listed(**values)
        assert before != listed()
        changed.write_bytes(b"more")
        assert listed(**values) != before
    address = listed(kind="archive", location="https://a.example/b.zip")
    assert address == listed(kind="hub", location="some/dataset")
    assert listed(kind="archive", location=str(table)) != address


def test_only_names_that_a_job_gives_are_read_from_the_lists_of_a_record(tmp_path):
    record = RunRecord(tmp_path)
    assert record.states == [] and record.unverified == []
    record.own_unverified("x.unverified")
    record.own_unverified("x.unverified")
    record.own_state(4)
    record.own_state(12)
    again = RunRecord(tmp_path)
    assert again.unverified == ["x.unverified"] and again.states == ["step-00000004", "step-00000012"]
    again.disown_states(["step-00000004"])
    assert RunRecord(tmp_path).states == ["step-00000012"]
    again.update(
        {
            "states": ["step-00000004", "step-4", "mine", 4, None],
            "unverified": ["a.unverified", "a", "b/c.unverified", 4],
        }
    )
    assert again.states == ["step-00000004"] and again.unverified == ["a.unverified"]
    again.update({"states": "step-00000004", "unverified": "a.unverified"})
    assert again.states == [] and again.unverified == []


def test_what_a_record_says_of_its_run_counts_in_its_type_alone():
    right = {"name": "x", "requested": "y", "essence": {"a": 1}}
    assert run_records._known({**right, "used": 3}) == right
    assert run_records._known({"name": 1, "requested": None, "essence": []}) == {} == run_records._known(["name"])


def test_a_file_that_is_gone_is_listed_without_size_and_time(tmp_path):
    assert run_records._row(tmp_path / "sub" / "gone.png", tmp_path) == ["sub/gone.png", 0, 0]
