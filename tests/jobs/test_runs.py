"""The same output folder, other settings: what goes on, and what begins beside it."""

import hashlib
import json
import re
import shutil
import signal

import pytest
from PIL import Image
from safetensors import safe_open

ADAMW = {"PARAMS_OPTIMIZER_TYPE": "adamw", "PARAMS_LEARNING_RATE": "0.01"}
CURRENT = ("status.json", "run.log", ".lock", ".lease")  # of the job that ran last


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(job, *, but="x-2"):
    paths = [path for path in job.out.rglob("*") if path.is_file() and path.name not in CURRENT]
    return {path: (sha(path), path.stat().st_mtime_ns) for path in paths if but not in str(path.relative_to(job.out))}


def first_line(printed):
    return next(line for line in printed.splitlines() if " INFO " in line)


def rates(job, **changes):
    folder = job.out / changes.get("folder", "")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["lr"] for row in rows if "lr" in row}


def test_other_settings_begin_a_new_run_and_leave_the_old_one(job):
    prompts = job.folder / "prompts.txt"
    prompts.write_text("a red spot --w 64 --h 64 --s 1")
    samples = {"PARAMS_SAMPLE_EVERY_N_STEPS": "4", "SAMPLE_PROMPTS": str(prompts)}
    assert job.run(**samples)[0] == 0
    before = files(job)
    code, printed = job.run(**samples, PARAMS_SEED="1", PARAMS_LEARNING_SCHEDULER="cosine")
    assert code == 0, printed
    first = first_line(printed)
    assert "New run x-2, beside x" in first and "PARAMS_SEED: 42 → 1" in first and "train." not in first
    assert "PARAMS_LEARNING_SCHEDULER: constant → cosine" in first
    assert f"PARAMS_RESUME_FROM={job.out}/x.safetensors" in first and "RESUME_WITH_CHANGES=true" in first
    assert files(job) == before
    status = job.status()
    assert (status["run"], status["run_folder"], status["output"]) == ("x-2", "runs/x-2", "x-2.safetensors")
    home = job.out / "runs" / "x-2"
    assert {p.name for p in home.iterdir()} >= {"state", "sample", "logs", "metrics.jsonl", "plan.json", "run.json"}
    assert sorted(p.name for p in (home / "sample").glob("step-*")) == [
        f"step-{step:08d}-00.png" for step in (0, 4, 8, 12)
    ]
    with safe_open(job.out / "x-2.safetensors", "pt") as file:
        assert file.metadata()["ss_output_name"] == "x-2"
    for changes, name in (({}, "x"), ({"PARAMS_SEED": "1", "PARAMS_LEARNING_SCHEDULER": "cosine"}, "x-2")):
        code, printed = job.run(**samples, **changes)
        assert code == 0 and f"This job is done: {job.out}/{name}.safetensors" in printed
    assert files(job) == before


def test_a_finished_lora_is_never_replaced_by_another_job(job):
    (job.out).mkdir()
    (job.out / "x.safetensors").write_bytes(b"of somebody else")
    code, printed = job.run(PARAMS_SAVE_EVERY_N_STEPS="0", PARAMS_MAX_STEPS="2")
    assert code == 0 and "this run is called x-2" in printed, printed
    made = sha(job.out / "x-2.safetensors")
    code, printed = job.run(PARAMS_SAVE_EVERY_N_STEPS="0", PARAMS_MAX_STEPS="2", BASE_MODEL="mini-sdxl")
    assert code == 0 and "BASE_MODEL: mini-flux → mini-sdxl" in printed, printed
    assert (job.out / "x-3.safetensors").is_file()
    assert sha(job.out / "x-2.safetensors") == made
    assert (job.out / "x.safetensors").read_bytes() == b"of somebody else"


@pytest.mark.parametrize(
    "setup",
    [
        ADAMW,
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({**ADAMW, "PARAMS_EMA_DECAY": "0.9"}, marks=pytest.mark.slow),
        pytest.param({"PARAMS_OPTIMIZER_TYPE": "adamw-schedulefree"}, marks=pytest.mark.slow),
    ],
)
def test_a_finished_run_that_is_asked_for_more_ends_as_if_it_had_been_asked_at_once(job, tmp_path, setup):
    assert job.run(**setup, PARAMS_MAX_STEPS="20", OUTPUT_PATH=str(tmp_path / "whole"))[0] == 0
    assert job.run(**setup)[0] == 0
    code, printed = job.run(**setup, PARAMS_MAX_STEPS="20", KEEP_CHECKPOINTS="1")
    assert code == 0 and "now ends at step 20" in printed, printed
    assert sha(job.out / "x.safetensors") == sha(tmp_path / "whole" / "x.safetensors")
    assert (job.out / "x-step00000012.safetensors").is_file(), "the end of the shorter run stays"
    assert sorted(row["step"] for row in job.metrics()) == list(range(1, 21))
    code, printed = job.run(**setup, PARAMS_MAX_STEPS="12")
    assert code == 0 and f"Its LoRA of step 12 is {job.out}/x-step00000012.safetensors" in printed, printed
    assert job.status()["step"] == 20 and job.status()["phase"] == "done"


def test_a_schedule_is_stretched_to_the_new_end(job, tmp_path):
    cosine = {**ADAMW, "PARAMS_LEARNING_SCHEDULER": "cosine", "PARAMS_WARMUP_STEPS": "2"}
    assert job.run(**cosine, PARAMS_MAX_STEPS="24", OUTPUT_PATH=str(tmp_path / "whole"))[0] == 0
    whole = [json.loads(line)["lr"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert job.run(**cosine)[0] == 0
    code, printed = job.run(**cosine, PARAMS_MAX_STEPS="24")
    assert code == 0 and "The cosine schedule is stretched to the new end" in printed, printed
    found = rates(job)
    assert [found[step] for step in range(13, 25)] == pytest.approx(whole[12:])
    assert found[12] < found[13]


def test_more_steps_of_a_run_that_was_interrupted(job):
    process = job.start(PARAMS_MAX_STEPS="400")
    job.wait_for_step(process, 5)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    reached = max(row["step"] for row in job.metrics())
    assert process.returncode == 130
    line = next(line for line in printed.splitlines() if "Stopped by" in line)
    assert f"INFO Stopped by Ctrl-C at step {reached}; it is saved. Start the same command again" in line, printed
    assert "ERROR" not in printed
    status = job.status()
    assert (status["phase"], status["step"], status["saved_step"]) == ("stopped", reached, reached)
    code, printed = job.run(PARAMS_MAX_STEPS=str(reached + 3))
    assert code == 0 and f"Resumed at step {reached} of {reached + 3}" in printed, printed


def test_a_run_goes_on_with_changes_where_its_state_fits(job):
    assert job.run(**ADAMW)[0] == 0
    changes = {**ADAMW, "PARAMS_LEARNING_RATE": "0.002", "PARAMS_MAX_STEPS": "16", "RESUME_WITH_CHANGES": "true"}
    code, printed = job.run(**changes)
    assert code == 0, printed
    assert "run x goes on with PARAMS_LEARNING_RATE: 0.01 → 0.002" in first_line(printed)
    assert rates(job)[12] == pytest.approx(0.01) and rates(job)[13] == pytest.approx(0.002)
    record = json.loads((job.out / "run.json").read_text())
    assert record["changed"] == [{"step": 12, "changes": ["PARAMS_LEARNING_RATE: 0.01 → 0.002"]}]
    del changes["RESUME_WITH_CHANGES"]
    code, printed = job.run(**changes)
    assert code == 0 and "is done" in printed
    code, printed = job.run(**changes, RESUME_WITH_CHANGES="true", PARAMS_NETWORK_DIM="8")
    assert code == 78 and "PARAMS_NETWORK_DIM: 4 → 8" in printed and "Phase" not in printed


def test_other_images_begin_a_new_run_and_the_same_elsewhere_do_not(job, tmp_path, images):
    shutil.copytree(images, tmp_path / "copy")
    assert job.run(DATASET_NAME=str(tmp_path / "copy"))[0] == 0
    (tmp_path / "copy").rename(tmp_path / "moved")
    code, printed = job.run(DATASET_NAME=str(tmp_path / "moved"))
    assert code == 0 and "This job is done" in printed and "The same content is elsewhere" in printed, printed
    shutil.copy(tmp_path / "moved" / "3.png", tmp_path / "moved" / "new.png")
    (tmp_path / "moved" / "4.txt").write_text("something else")
    code, printed = job.run(DATASET_NAME=str(tmp_path / "moved"))
    assert code == 0, printed
    line = next(line for line in printed.splitlines() if "New run x-2, beside x" in line)
    assert "added: 0.0/new.png" in line and "4.png (caption)" in line
    assert (job.out / "x-2.safetensors").is_file() and job.status()["run"] == "x-2"


def test_changed_prompts_are_drawn_from_there_on_and_no_old_image_keeps_their_name(job):
    prompts = job.folder / "prompts.txt"
    prompts.write_text("a red spot --w 64 --h 64 --s 1\na blue spot --w 64 --h 64 --s 1")
    asked = {"PARAMS_SAMPLE_EVERY_N_STEPS": "4", "SAMPLE_PROMPTS": str(prompts)}
    assert job.run(**asked, PARAMS_MAX_STEPS="8")[0] == 0
    prompts.write_text("a green spot --w 64 --h 64 --s 1\na blue spot --w 64 --h 64 --s 1")
    code, printed = job.run(**asked)
    assert code == 0 and "prompts.txt has changed: 3 images" in printed, printed
    folder = job.out / "sample"
    names = sorted(path.name for path in folder.glob("step-*-00.png"))
    assert names == ["step-00000008-00.png", "step-00000012-00.png"]
    for name in names:
        with Image.open(folder / name) as image:
            assert image.text["prompt_text"] == "a green spot"
    assert len(list(folder.glob("step-*-01.png"))) == 4 and len(list((folder / "earlier").iterdir())) == 3


def test_defaults_make_saves_and_samples_meet_and_keep_the_loras(job):
    prompts = job.folder / "prompts.txt"
    prompts.write_text("a red spot --w 64 --h 64 --s 1")
    asked = {"PARAMS_SAMPLE_EVERY_N_STEPS": "auto", "PARAMS_SAVE_EVERY_N_STEPS": "", "KEEP_CHECKPOINTS": "auto"}
    code, printed = job.run(**asked, PARAMS_MAX_STEPS="40", SAMPLE_PROMPTS=str(prompts))
    assert code == 0 and "every 10 steps, and at the end." in printed, printed
    assert "keeps the LoRA files of all 4 saves" in printed
    drawn = {path.name[5:13] for path in (job.out / "sample").glob("step-*")}
    saved = {path.stem[-8:] for path in job.out.glob("x-step*.safetensors") if "diffusers" not in path.name}
    assert saved == {"00000010", "00000020", "00000030", "00000040"} and drawn == {"00000000", *saved}
    assert len(list((job.out / "state").iterdir())) == 2


def test_without_a_length_the_images_decide(job):
    process = job.start(PARAMS_MAX_STEPS="", PARAMS_MAX_EPOCHS="auto")
    job.wait_for_step(process, 3)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert (
        "PARAMS_MAX_EPOCHS: auto, 1,000 steps (each of 6 images, with repeats, is seen 167 times, 1 a step)" in printed
    )
    record = json.loads((job.out / "run.json").read_text())
    assert record["automatic_steps"] == 1000 == job.status().get("total_steps", 1000)
    code, printed = job.run("--check", PARAMS_MAX_STEPS="", PARAMS_MAX_EPOCHS="auto")
    assert code == 0 and re.search(r"Run x goes on: it is at step \d", printed), printed


ODD = ("status.json", "crashes.json", "upload.json", "metrics.jsonl", "plan.json")


@pytest.mark.parametrize("content", [b"\xff\x00 binary", b"[1, 2]", b"[" * 3000])
def test_odd_files_of_a_former_job_are_set_aside_and_named(job, content):
    job.out.mkdir()
    for name in ODD:
        (job.out / name).write_bytes(content + b"\nand more")
    code, printed = job.run(PARAMS_MAX_STEPS="1")
    assert code == 0 and "Traceback" not in printed, printed
    for name in ODD:
        assert (job.out / f"{name}.set-aside").read_bytes() == content + b"\nand more"
        assert f"{name}.set-aside" in printed
