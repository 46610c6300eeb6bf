"""What a plan says and refuses, word for word, and what it keeps of the request: written by hand."""

import dataclasses
import hashlib
import json
from datetime import UTC, datetime

import pytest

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning import plan as planning
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from tests.support.machines import CPU, LARGE_GPU, NOW
from trainer.spec.errors import SettingsError
from trainer.spec.values import show


def plan(*, on=CPU, config=None, prompts=None, reasons=(), warnings=(), now=NOW, **variables):
    settings = read_settings({"BASE_MODEL": "mini-flux", "DATASET_NAME": "org/pictures", **variables})
    settings = dataclasses.replace(
        settings, reasons=(*settings.reasons, *reasons), warnings=(*settings.warnings, *warnings)
    )
    manifest = read_manifest(json.dumps(config) if config else None, json.dumps(prompts) if prompts else None)
    return make_plan(settings, manifest, on, now=now)


def refused(**options):
    """Each line of the refusal."""
    with pytest.raises(SettingsError) as caught:
        plan(**options)
    heading, *lines = str(caught.value).splitlines()
    assert heading == "This cannot be done:"
    return [line.removeprefix("  - ") for line in lines]


def test_the_reasons_of_a_plan_are_those_of_the_settings_and_its_own():
    token = "hf_" + "aB3" * 12
    made = plan(reasons=[f"it was {token}"], warnings=[f"not {token}"])
    first, *others = made.reasons
    assert first.startswith("it was ") and made.warnings[0].startswith("not ")
    assert token not in str((made.reasons, made.warnings))
    assert others == [
        "DATASET_NAME: org/pictures (a dataset of the Hub)",
        "PARAMS_RESOLUTION: 128 (the base model's)",
        "dataset.json: datasets[0]: min_bucket_reso 64, max_bucket_reso 256, bucket_reso_steps 16 "
        "(fits a resolution of 128x128)",
        "PARAMS_LEARNING_RATE: 1 (the default with prodigy)",
        "BACKEND: cpu (8 CPU cores (x86_64), 32 GiB)",
        "PARAMS_ATTENTION: native (torch picks the kernel)",
        "PARAMS_PRECISION: fp32 (best for 8 CPU cores (x86_64), 32 GiB)",
        "PARAMS_COMPILE: false (compiling takes longer than it saves on a CPU)",
        "PARAMS_TIMESTEP_SAMPLING: sigmoid (the default of mini-flux)",
    ]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PARAMS_OPTIMIZER_TYPE": "adamw"}, "PARAMS_LEARNING_RATE: 0.0001 (the default with adamw)"),
        ({"PARAMS_TIMESTEP_SAMPLING": "shift"}, "PARAMS_DISCRETE_FLOW_SHIFT: 3.1582 (the default of mini-flux)"),
        ({"BASE_MODEL": "mini-sdxl"}, "PARAMS_TIMESTEP_SAMPLING: uniform (the default of mini-sdxl)"),
        (
            {"PARAMS_LORA_TYPE": "dora"},
            "PARAMS_LORA_TYPE: dora (ComfyUI and Forge read <name>.safetensors, diffusers reads "
            "<name>-diffusers.safetensors; sd-scripts and older tools read neither)",
        ),
    ],
)
def test_a_default_is_said(variables, reason):
    assert plan(**variables).reasons.count(reason) == 1
    assert reason not in plan().reasons


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"PARAMS_LEARNING_RATE": "1"}, "PARAMS_LEARNING_RATE"),
        ({"PARAMS_TIMESTEP_SAMPLING": "shift", "PARAMS_DISCRETE_FLOW_SHIFT": "3"}, "PARAMS_DISCRETE_FLOW_SHIFT"),
        ({"PARAMS_TIMESTEP_SAMPLING": "uniform"}, "PARAMS_DISCRETE_FLOW_SHIFT"),
        ({"PARAMS_TIMESTEP_SAMPLING": "uniform"}, "PARAMS_TIMESTEP_SAMPLING"),
        ({"PARAMS_LORA_TYPE": "rslora"}, "PARAMS_LORA_TYPE"),
    ],
)
def test_what_is_set_or_not_used_is_not_said(variables, name):
    assert not [reason for reason in plan(**variables).reasons if reason.startswith(f"{name}:")]


def test_what_was_given_and_what_the_hardware_decides_are_kept():
    made = plan(PARAMS_SEED="7", CACHE_PATH="/cache")
    assert made.given == ("BASE_MODEL", "CACHE_PATH", "DATASET_NAME", "PARAMS_SEED")
    assert made.automatic == ("BACKEND", "PARAMS_PRECISION", "PARAMS_OFFLOAD")
    given = {"BACKEND": "cuda", "PARAMS_PRECISION": "bf16", "PARAMS_BATCH_SIZE": "auto"}
    assert plan(on=LARGE_GPU, **given).automatic == ("PARAMS_BATCH_SIZE", "PARAMS_OFFLOAD")
    given["PARAMS_BATCH_SIZE"] = "1"
    assert plan(on=LARGE_GPU, **given).automatic == ("PARAMS_OFFLOAD",)
    assert plan(on=LARGE_GPU, **given, PARAMS_OFFLOAD="none").automatic == ()


def test_a_name_is_made_of_what_decides_the_weights_and_of_the_time():
    """Eight digits of the SHA-256 of the essence as sorted JSON, as the names of earlier versions are."""
    made = plan(now=datetime(2026, 11, 5, 6, 7, 8, tzinfo=UTC))
    text = json.dumps(dict(sorted(made.essence().items())), sort_keys=True)
    assert made.output.name == f"{hashlib.sha256(text.encode()).hexdigest()[:8]}-20261105-060708"
    assert (made.output.requested, made.output.started) == ("", 1793858828)


ALLOWED = "Allowed: {}a folder in diffusers layout (with model_index.json), or a Hub repository like org/name."


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("name", "is neither a folder nor the name of a repository"),
        ("a b/c", "is neither a folder nor the name of a repository"),
        ("a/b/c", "is neither a folder nor the name of a repository"),
        ("/nothing", "is not an existing folder"),
        ("./nothing", "is not an existing folder"),
        ("/nothing.safetensors", "is not there"),
        (__file__, "is a file whose name does not end in .safetensors"),
    ],
)
def test_a_model_that_is_none_is_refused(path, problem):
    assert refused(MODEL_PATH=path) == [f"MODEL_PATH={path!r} {problem}. {ALLOWED.format('a .safetensors file, ')}"]


def test_revisions_and_configs_that_mean_nothing_are_refused(tmp_path):
    folder = str(tmp_path)
    assert refused(MODEL_CONFIG_PATH=folder) == [
        f"MODEL_CONFIG_PATH={folder!r} goes with a .safetensors file in MODEL_PATH only. Fix: remove it."
    ]
    assert refused(MODEL_PATH=folder, MODEL_REVISION="v1") == [
        f"MODEL_REVISION='v1': {folder} is a folder and has no revisions. Fix: remove it, or name a repository in "
        "MODEL_PATH."
    ]
    assert refused(MODEL_REVISION="v1")[0].endswith("name a repository in MODEL_PATH.")  # a miniature is a folder
    made = plan(on=LARGE_GPU, BASE_MODEL="flux", MODEL_REVISION="v1").model
    assert (made.source, made.revision, made.parts) == ("black-forest-labs/FLUX.1-dev", "v1", {})


def test_what_is_wrong_with_a_single_file_and_with_its_config_is_said(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"no header")
    about_file, about_config = refused(MODEL_PATH=str(file), MODEL_CONFIG_PATH="name")
    assert about_file.startswith(f"MODEL_PATH={show(str(file))} ")
    problem = "is neither a folder nor the name of a repository"
    assert about_config == f"MODEL_CONFIG_PATH='name' {problem}. {ALLOWED.format('')}"


def test_a_relative_folder_becomes_absolute(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert plan(MODEL_PATH="model").model.source == str(tmp_path / "model")
    assert plan(MODEL_PATH="org/model").model.source == "org/model"


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"PARAMS_WARMUP_STEPS": "10"},
            "PARAMS_WARMUP_STEPS=10: PARAMS_LEARNING_SCHEDULER=constant has no warm-up. Fix: "
            "PARAMS_LEARNING_SCHEDULER=constant_with_warmup.",
        ),
        (
            {"PARAMS_OPTIMIZER_TYPE": "adamw-schedulefree", "PARAMS_LEARNING_SCHEDULER": "cosine"},
            "PARAMS_LEARNING_SCHEDULER=cosine: adamw-schedulefree needs no schedule and takes none. Allowed: constant, "
            "constant_with_warmup.",
        ),
        (
            {"PARAMS_ZERO_TERMINAL_SNR": "true"},
            "PARAMS_ZERO_TERMINAL_SNR=true: mini-flux is trained by flow and not by denoising, which alone has this. "
            "Fix: remove it.",
        ),
        (
            {"PARAMS_MIN_SNR_GAMMA": "5"},
            "PARAMS_MIN_SNR_GAMMA=5.0: mini-flux is trained by flow and not by denoising, which alone has this. Fix: "
            "remove it.",
        ),
        (
            {"BASE_MODEL": "mini-sdxl", "PARAMS_LOSS_WEIGHTING": "cosmap"},
            "PARAMS_LOSS_WEIGHTING=cosmap: mini-sdxl is trained by denoising and not by flow, which alone has this. "
            "Fix: remove it.",
        ),
        (
            {"BASE_MODEL": "mini-sdxl", "PARAMS_ZERO_TERMINAL_SNR": "true", "PARAMS_PREDICTION_TYPE": "epsilon"},
            "PARAMS_ZERO_TERMINAL_SNR=true: with PARAMS_PREDICTION_TYPE=epsilon the last noise level teaches nothing. "
            "Fix: PARAMS_PREDICTION_TYPE=v_prediction, if that is what the model predicts; or remove it.",
        ),
        (
            {"PARAMS_VALIDATE_EVERY_N_STEPS": "10"},
            "PARAMS_VALIDATE_EVERY_N_STEPS=10: no images are held out. Fix: set validation_split in dataset.json, 0.1 "
            "for example.",
        ),
        (
            {"PARAMS_OPTIMIZER_ARGS": "lr=none"},
            "PARAMS_OPTIMIZER_ARGS: lr=none has a variable of its own. Fix: remove it and set "
            "PARAMS_LEARNING_RATE=none.",
        ),
        (
            {"PARAMS_OPTIMIZER_ARGS": "warmup_steps=(1,2)"},
            "PARAMS_OPTIMIZER_ARGS: warmup_steps=1,2 has a variable of its own. Fix: remove it and set "
            "PARAMS_WARMUP_STEPS=1,2.",
        ),
        (
            {"PARAMS_OPTIMIZER_ARGS": "maximize=true"},
            "PARAMS_OPTIMIZER_ARGS: maximize=true would train away from the images. Fix: remove it.",
        ),
        (
            {"PARAMS_OPTIMIZER_ARGS": "d_coef=1", "PARAMS_D_COEF": "2"},
            "PARAMS_OPTIMIZER_ARGS: d_coef=1 is set by PARAMS_D_COEF too. Fix: remove one of them.",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_fix(variables, line):
    assert line in refused(**variables)


@pytest.mark.parametrize(
    "variables",
    [
        {"PARAMS_OPTIMIZER_TYPE": "adamw-schedulefree", "PARAMS_WARMUP_STEPS": "10"},  # has a warm-up of its own
        {"PARAMS_OPTIMIZER_TYPE": "adamw", "PARAMS_LEARNING_SCHEDULER": "cosine", "PARAMS_WARMUP_STEPS": "10"},
        {"BASE_MODEL": "mini-sdxl", "PARAMS_ZERO_TERMINAL_SNR": "true", "PARAMS_PREDICTION_TYPE": "v_prediction"},
        {"BASE_MODEL": "mini-sdxl", "PARAMS_ZERO_TERMINAL_SNR": "false", "PARAMS_PREDICTION_TYPE": "epsilon"},
        {"PARAMS_LOSS_WEIGHTING": "cosmap", "PARAMS_DISCRETE_FLOW_SHIFT": "3"},
        {"PARAMS_OPTIMIZER_ARGS": "d_coef=1"},
    ],
)
def test_what_goes_together_is_planned(variables):
    assert plan(**variables)


def test_one_subset_that_holds_images_out_is_enough():
    datasets = [{"resolution": 64, "validation_split": split, "subsets": [{}]} for split in (0, 0.5)]
    made = plan(config={"datasets": datasets}, PARAMS_VALIDATE_EVERY_N_STEPS="10")
    assert made.output.validate_every == 10


def test_the_shift_and_the_dropout_have_defaults_where_nothing_is_said():
    train = plan().train
    assert (train.discrete_flow_shift, train.caption_dropout_rate) == (3.1582, 0.0)
    assert plan(BASE_MODEL="mini-sd3").train.discrete_flow_shift == 3.0


def test_values_in_words_are_short():
    assert planning._in_words([1, None, True, "a"]) == "1,none,true,a"
    assert len(planning._in_words("x" * 500)) <= 80


def test_the_trigger_word_is_before_our_prompts_alone():
    assert all(prompt.text.startswith("zot, ") for prompt in plan(TRIGGER_WORD="zot").prompts)
    assert [prompt.text for prompt in plan(TRIGGER_WORD="zot", prompts=["a cat"]).prompts] == ["a cat"]
    assert [f"zot, {prompt.text}" for prompt in plan().prompts] == [
        prompt.text for prompt in plan(TRIGGER_WORD="zot").prompts
    ]


def test_prompts_have_the_size_of_the_first_dataset():
    datasets = [{"resolution": side, "subsets": [{}]} for side in (64, 96)]
    (prompt,) = plan(config={"datasets": datasets}, prompts=["a cat"]).prompts
    assert (prompt.width, prompt.height) == (64, 64)


def test_a_place_to_go_on_from_that_is_none_is_refused_once():
    (line,) = refused(PARAMS_RESUME_FROM="/nothing")
    assert "PARAMS_RESUME_FROM" in line


@pytest.mark.parametrize(("epochs", "cycles"), [("2", 1), ("3", 1), ("6", 2), ("11", 3)])
def test_a_cycle_takes_three_epochs(epochs, cycles):
    restarts = {"PARAMS_LEARNING_SCHEDULER": "cosine_with_restarts", "PARAMS_OPTIMIZER_TYPE": "adamw"}
    assert plan(**restarts, PARAMS_MAX_EPOCHS=epochs).optim.num_cycles == cycles
    assert plan(PARAMS_MAX_EPOCHS=epochs).optim.num_cycles == 1


def test_values_that_are_unusual_are_warned_of():
    (warning,) = plan(PARAMS_OPTIMIZER_TYPE="adamw", PARAMS_LEARNING_RATE="1").warnings
    assert "PARAMS_LEARNING_RATE=1" in warning
