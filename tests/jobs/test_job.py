"""The main job: environment in, LoRA out."""

import hashlib
import json
import re
import signal
import subprocess

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.programs import basic_environment
from trainer.spec.family import get_family


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_job_leaves_everything_that_the_readme_names(job):
    code, printed = job.run(
        PARAMS_SAMPLE_EVERY_N_STEPS="6",
        SAMPLE_PROMPTS=write(job, "prompts.txt", "a red spot --w 64 --h 64 --s 2 --d 7\n"),
    )
    assert code == 0, printed
    assert {p.name for p in job.out.iterdir()} >= {
        "x.safetensors", "x-step00000004.safetensors", "x-step00000008.safetensors", "x-step00000012.safetensors",
        "sample", "logs", "metrics.jsonl", "status.json", "plan.json", "run.log", "state", "dataset-report.txt",
    }  # fmt: skip
    status = job.status()
    assert status["phase"] == "done" and status["exit_code"] == 0 and status["step"] == 12
    assert {"loss", "eta_s", "images_per_second"} <= status.keys()
    assert [r["step"] for r in job.metrics() if "loss" in r] == list(range(1, 13))
    assert list((job.out / "logs").glob("events.out.tfevents.*"))
    assert "12/12" in (job.out / "run.log").read_text()
    assert (job.out / "x-diffusers.safetensors").is_file()
    assert not list(job.out.rglob("*.tmp*")) and not list(job.out.rglob("*.unverified"))

    with Image.open(job.out / "sample" / "step-00000006-00.png") as image:
        assert image.size == (64, 64)
        assert image.text["prompt_text"] == "a red spot" and image.text["step"] == "6" and image.text["seed"] == "7"
    with Image.open(job.out / "sample" / "contact-sheet.png") as sheet:
        assert sheet.width >= 3 * 64


def test_a_job_quotes_what_is_left_once_its_steps_are_measured(job):
    code, printed = job.run(PARAMS_MAX_STEPS="22", PRICE_PER_HOUR="3600")
    assert code == 0, printed
    assert printed.count("Quote: how long 22 steps take here is known after the first 20.") == 1
    (line,) = [line for line in printed.splitlines() if "Quote, measured" in line]
    said = re.search(r"this start takes (\d+) s in all and costs (\d+\.\d\d) at 3600 an hour", line)
    assert abs(int(said[1]) - float(said[2])) <= 0.51  # a unit of money is a second


def test_a_warning_of_the_plan_is_printed_once_and_is_in_the_log_of_the_run(job):
    said = "WARNING PARAMS_NUM_CYCLES=2 has no effect"
    code, printed = job.run("--check", PARAMS_NUM_CYCLES="2")
    assert code == 0 and printed.count(said) == 1, printed
    code, printed = job.run(PARAMS_NUM_CYCLES="2", PARAMS_MAX_STEPS="1")
    assert code == 0 and printed.count(said) == 1, printed
    log = (job.out / "run.log").read_text()
    assert log.count(said) == 1 and "INFO PARAMS_PRECISION: fp32" in log


def write(job, name, text):
    path = job.folder / name
    path.write_text(text)
    return str(path)


def test_the_header_says_what_tools_read(job):
    code, printed = job.run(PARAMS_MAX_STEPS="2", TRIGGER_WORD="zot")
    assert code == 0, printed
    with safe_open(job.out / "x.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_output_name"] == "x" and header["ss_network_dim"] == "4" and header["ss_steps"] == "2"
    assert header["modelspec.architecture"] == "flux-1-dev/lora" and header["modelspec.trigger_phrase"] == "zot"
    assert json.loads(header["ss_bucket_info"])["buckets"]
    assert json.loads(header["ss_tag_frequency"]) != {}
    assert header["ss_base_model_version"] == "flux1" and header["ss_optimizer"] == "prodigy"
    text = json.dumps(header)
    assert str(job.folder) not in text and str(job.environment["DATASET_NAME"]) not in text


def test_the_file_loads_in_diffusers_and_is_the_trained_model(job):
    """The final file applied to the plain base gives the sample that the job drew at its end."""
    from diffusers import FluxPipeline

    code, printed = job.run(
        PARAMS_SAMPLE_EVERY_N_STEPS="12",
        PARAMS_OPTIMIZER_TYPE="adamw",
        PARAMS_LEARNING_RATE="0.02",
        SAMPLE_PROMPTS=write(job, "prompts.txt", "a spot, number 2 --w 64 --h 64 --s 4 --d 7 --g 3.5\n"),
    )
    assert code == 0, printed
    folder = get_family("flux").FACTS.models["mini-flux"].source
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        length = min(512, pipe.tokenizer_2.model_max_length)
        image = pipe(
            "a spot, number 2",
            width=64,
            height=64,
            num_inference_steps=4,
            guidance_scale=3.5,
            max_sequence_length=length,
            generator=torch.Generator("cpu").manual_seed(7),
        ).images[0]
        return torch.tensor(list(image.getdata()), dtype=torch.float32)

    def sampled(step):
        with Image.open(job.out / "sample" / f"step-{step:08d}-00.png") as image:
            return torch.tensor(list(image.getdata()), dtype=torch.float32)

    assert (draw() - sampled(0)).abs().max() <= 2
    pipe.load_lora_weights(job.out / "x-diffusers.safetensors")
    after = draw()
    assert (after - sampled(12)).abs().max() <= 2
    assert (sampled(12) - sampled(0)).abs().mean() > 2


def test_the_same_job_twice_gives_the_same_file(job, tmp_path):
    """In an interpreter of its own, with its own seed of hashes, and forked as the jobs of the other tests are."""
    assert job.run(own_interpreter=True)[0] == 0
    code, printed = job.run(OUTPUT_PATH=str(tmp_path / "again"))
    assert code == 0, printed
    assert "in the cache" in printed
    assert sha(job.out / "x.safetensors") == sha(tmp_path / "again" / "x.safetensors")


def test_another_seed_gives_another_file(job, tmp_path):
    assert job.run()[0] == 0
    assert job.run(OUTPUT_PATH=str(tmp_path / "again"), PARAMS_SEED="43")[0] == 0
    a, b = load_file(job.out / "x.safetensors"), load_file(tmp_path / "again" / "x.safetensors")
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_a_finished_job_is_not_run_again(job):
    assert job.run()[0] == 0
    final = job.out / "x.safetensors"
    before = (sha(final), final.stat().st_mtime_ns)
    code, printed = job.run()
    assert code == 0 and "is done" in printed
    assert (sha(final), final.stat().st_mtime_ns) == before


SETUPS = {
    "prodigy": {},
    "ema, accumulation, dropout": {
        "PARAMS_EMA_DECAY": "0.9",
        "PARAMS_GRADIENT_ACCUMULATION": "2",
        "PARAMS_CAPTION_DROPOUT_RATE": "0.3",
        "PARAMS_BATCH_SIZE": "2",
    },
    "adamw8bit with cosine": {"PARAMS_OPTIMIZER_TYPE": "adamw8bit", "PARAMS_LEARNING_SCHEDULER": "cosine"},
    "schedule-free": {"PARAMS_OPTIMIZER_TYPE": "adamw-schedulefree"},
    "schedule-free prodigy, ema": {"PARAMS_OPTIMIZER_TYPE": "prodigy-schedulefree", "PARAMS_EMA_DECAY": "0.9"},
    "lion with restarts": {
        "PARAMS_OPTIMIZER_TYPE": "lion",
        "PARAMS_LEARNING_SCHEDULER": "cosine_with_restarts",
        "PARAMS_NUM_CYCLES": "2",
        "PARAMS_WARMUP_STEPS": "3",
    },
    "adafactor": {"PARAMS_OPTIMIZER_TYPE": "adafactor", "PARAMS_LEARNING_SCHEDULER": "polynomial"},
    "text encoders": {"PARAMS_TEXT_ENCODER_LR": "1", "PARAMS_CAPTION_DROPOUT_RATE": "0.3", "PARAMS_BATCH_SIZE": "2"},
}


OFTEN = ("prodigy", "ema, accumulation, dropout")  # in every run of the tests; the others are slow
INTERRUPTED = [
    pytest.param(setup, signal.SIGTERM, 143, marks=[] if setup in OFTEN else pytest.mark.slow) for setup in SETUPS
] + [pytest.param("prodigy", signal.SIGKILL, None, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("setup", "number", "code"), INTERRUPTED)
def test_an_interrupted_job_ends_bit_identical(job, tmp_path, setup, number, code):
    changes = {**SETUPS[setup], "PARAMS_MAX_STEPS": "40"}
    assert job.run(**changes, OUTPUT_PATH=str(tmp_path / "whole"))[0] == 0

    process = job.start(**changes)
    job.wait_for_step(process, 7)
    if number == signal.SIGKILL:
        subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=True)  # the program
    else:
        process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    reached = max(r["step"] for r in job.metrics())
    assert reached < 40, "the interruption must come before the end"
    assert process.returncode == (code or 75), printed
    if code:
        assert "resumes automatically" in printed and job.status()["phase"] == "stopped"

    again, printed = job.run(**changes)
    assert again == 0, printed
    assert "Resumed at step" in printed
    assert sha(job.out / "x.safetensors") == sha(tmp_path / "whole" / "x.safetensors")
    assert [r["step"] for r in job.metrics()] == list(range(1, 41))


def test_without_the_position_the_resumed_run_would_differ(job, tmp_path, programs):
    """The comparison above can fail: a state that forgets where it was gives another file."""
    assert job.run(PARAMS_MAX_STEPS="8", OUTPUT_PATH=str(tmp_path / "whole"))[0] == 0
    process = job.start(PARAMS_MAX_STEPS="8", PARAMS_SAVE_EVERY_N_STEPS="4")
    job.wait_for_step(process, 5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    code = (
        "import sys; from pathlib import Path; from trainer.checkpoints import state_files;"
        "f = Path(sys.argv[1]); s = state_files.latest(f); state_files.save(f, s.step - 1, s.tree);"
        "import shutil; shutil.rmtree(s.folder)"
    )
    assert programs.run("-c", code, str(job.out / "state"), environment=basic_environment()).returncode == 0
    assert job.run(PARAMS_MAX_STEPS="8")[0] == 0
    assert sha(job.out / "x.safetensors") != sha(tmp_path / "whole" / "x.safetensors")


def test_checkpoints_are_pruned_to_the_newest(job):
    assert job.run(KEEP_CHECKPOINTS="2")[0] == 0
    assert sorted(p.name for p in (job.out / "state").iterdir()) == ["step-00000008", "step-00000012"]
    assert sorted(p.name for p in job.out.glob("x-step*")) == [
        "x-step00000008-diffusers.safetensors",
        "x-step00000008.safetensors",
        "x-step00000012-diffusers.safetensors",
        "x-step00000012.safetensors",
    ]


def test_a_lora_file_begins_another_run(job, tmp_path):
    assert job.run()[0] == 0
    file = str(job.out / "x.safetensors")
    code, printed = job.run(OUTPUT_PATH=str(tmp_path / "next"), PARAMS_RESUME_FROM=file, PARAMS_MAX_STEPS="1")
    assert code == 0 and "Started from the weights" in printed, printed
    code, printed = job.run(OUTPUT_PATH=str(tmp_path / "wrong"), PARAMS_RESUME_FROM=file, PARAMS_NETWORK_DIM="8")
    assert code == 78 and "has rank 4" in printed and "PARAMS_NETWORK_DIM" in printed


def test_a_state_folder_resumes_everything_elsewhere(job, tmp_path):
    assert job.run()[0] == 0
    state = str(job.out / "state" / "step-00000008")
    code, printed = job.run(OUTPUT_PATH=str(tmp_path / "next"), PARAMS_RESUME_FROM=state)
    assert code == 0 and "Resumed at step 8" in printed, printed
    a, b = load_file(job.out / "x.safetensors"), load_file(tmp_path / "next" / "x.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_jobs_in_one_output_the_second_refuses(job):
    first = job.start(PARAMS_MAX_STEPS="400")
    job.wait_for_step(first, 1)
    code, printed = job.run(PARAMS_MAX_STEPS="400")
    assert code == 78 and "in use" in printed
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=60) == 130


def test_validation_uses_pictures_that_are_never_trained_on(job):
    config = {
        "general": {"resolution": 128, "enable_bucket": True, "min_bucket_reso": 64, "bucket_reso_steps": 16},
        "datasets": [{"validation_split": 0.3, "subsets": [{"image_dir": job.environment["DATASET_NAME"]}]}],
    }
    code, printed = job.run(DATASET_NAME="", DATASET_CONFIG=json.dumps(config), PARAMS_VALIDATE_EVERY_N_STEPS="6")
    assert code == 0, printed
    assert "2 images are held out" in printed
    assert [r["step"] for r in job.metrics() if "validation_loss" in r] == [6, 12]


@pytest.mark.slow
def test_twelve_sizes_are_compiled_once_for_each_kind_of_block_and_once_more(job, tmp_path, draw):
    """As compiled code says it, from the first size on; samples compile nothing."""
    folder = tmp_path / "many"
    folder.mkdir()
    sizes = [(64 + 16 * (i % 4), 64 + 16 * (i // 4)) for i in range(12)]
    for i, (width, height) in enumerate(sizes):
        draw(width, height, seed=i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red circle")
    general = {"resolution": 128, "enable_bucket": True, "bucket_no_upscale": True, "bucket_reso_steps": 16}
    config = {"general": general, "datasets": [{"subsets": [{"image_dir": str(folder)}]}]}
    code, printed = job.run(
        DATASET_NAME="", DATASET_CONFIG=json.dumps(config), PARAMS_COMPILE="true", PARAMS_MAX_STEPS="24",
        PARAMS_SAMPLE_EVERY_N_STEPS="12", PARAMS_SAVE_EVERY_N_STEPS="0", own_interpreter=True,
    )  # fmt: skip
    assert code == 0, printed
    assert printed.count("bucket ") == 12, printed
    compiled = [row["compiled"] for row in job.metrics() if "compiled" in row]
    assert len(compiled) == 24 and 0 < compiled[0] <= compiled[-1] <= compiled[0] + 2
