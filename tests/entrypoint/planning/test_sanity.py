"""The table of sanity checks: what makes no sense is a warning with the usual value, and the defaults make sense."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from typing import Any

import pytest

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning import sanity
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from entrypoint.settings.variables import NAMES
from entrypoint.system.hardware import Hardware
from tests.support.machines import CPU, LARGE_GPU, NOW
from trainer.spec.family import base_models
from trainer.spec.optimizers import OPTIMIZERS
from trainer.spec.plan import Plan
from trainer.spec.rules import sanity as steps_sanity
from trainer.spec.rules.sanity import Length


def plan(*, on: Hardware = CPU, config: Any = None, prompts: Any = None, **variables: str) -> Plan:
    settings = read_settings({"BASE_MODEL": "mini-flux", "DATASET_NAME": "org/images", **variables})
    manifest = read_manifest(
        json.dumps(config) if config else None, json.dumps(prompts) if prompts is not None else None
    )
    return make_plan(settings, manifest, on, now=NOW)


def warnings(**options: Any) -> str:
    return "\n".join(plan(**options).warnings)


def of_steps(length: Length, **options: Any) -> str:
    return "\n".join(steps_sanity.warnings(plan(**options), length))


def config(subset: dict[str, Any] | None = None, **dataset: Any) -> dict[str, Any]:
    return {"datasets": [{"resolution": 128, **dataset, "subsets": [subset or {}]}]}


# ---- what makes sense


@pytest.mark.parametrize("base", base_models())
def test_the_defaults_of_a_model_make_sense(base):
    caution = base_models()[base][1].caution
    assert [caution in warning for warning in plan(on=LARGE_GPU, BASE_MODEL=base).warnings] == [True] * bool(caution)


def test_a_distilled_base_is_warned_of_unless_other_weights_are_named():
    found = warnings(on=LARGE_GPU, BASE_MODEL="z-image-turbo")
    assert "BASE_MODEL=z-image-turbo is distilled" in found and "Fix: PARAMS_TRAINING_ADAPTER=ostris/" in found
    adapter = re.search(r"PARAMS_TRAINING_ADAPTER=(\S+),", found)
    assert adapter and warnings(on=LARGE_GPU, BASE_MODEL="z-image-turbo", PARAMS_TRAINING_ADAPTER=adapter[1]) == ""
    assert warnings(on=LARGE_GPU, BASE_MODEL="z-image-turbo", MODEL_PATH="someone/z-image-de-turbo") == ""


def test_the_advice_about_turbo_without_distillation_gives_it_the_samples_of_such_a_model():
    found = warnings(on=LARGE_GPU, BASE_MODEL="z-image-turbo")
    advice = re.search(r"BASE_MODEL=(\S+) with MODEL_PATH=the file of a Turbo without distillation", found)
    assert advice
    drawn = plan(on=LARGE_GPU, BASE_MODEL=advice[1], MODEL_PATH="ostris/Z-Image-De-Turbo", prompts=["a fox"])
    assert [(prompt.steps > 20, prompt.cfg > 1) for prompt in drawn.prompts] == [(True, True)]


@pytest.mark.parametrize(
    ("name", "distilled"),
    [
        ("black-forest-labs/FLUX.2-klein-4B", True),
        ("org/flux-2-klein-9b-fp8", True),
        ("org/flux2_klein_9b", True),
        ("org/FLUX.2.klein.4B", True),
        ("org/flux2_klein_base_9b", False),
        ("black-forest-labs/FLUX.2-klein-base-4B", False),
        ("org/flux-2-klein-base-9b-fp8", False),
    ],
)
def test_distilled_weights_under_the_bases_name_are_warned_of(name, distilled):
    found = warnings(on=LARGE_GPU, BASE_MODEL="flux2-klein-4b", MODEL_PATH=name)
    assert (f"MODEL_PATH={name} is distilled to few steps" in found) == distilled
    assert ("Fix: the weights of black-forest-labs/FLUX.2-klein-base-4B" in found) == distilled
    assert "distilled" not in warnings(on=LARGE_GPU, BASE_MODEL="z-image", MODEL_PATH=name)


@pytest.mark.parametrize(
    ("base", "path", "distilled"),
    [
        ("flux2-dev", "org/FLUX.2-dev-Turbo", True),
        ("flux2-dev", "org/flux2-dev-8steps-fp8", True),
        ("flux2-dev", "org/flux2_dev_fp8mixed", False),
        ("krea2", "krea/Krea-2-Turbo", True),
        ("krea2", "someone/krea2_turbo_fp8_scaled", True),
        ("krea2", "someone/krea-2-finetune", False),
        ("z-image", "Tongyi-MAI/Z-Image-Turbo", True),
        ("z-image", "someone/z_image_turbo_bf16", True),
        ("z-image", "someone/zimageTurbo_fp8", True),
        ("z-image", "someone/z_image_8steps", True),
        ("z-image", "someone/z_image_3000steps", False),
        ("z-image", "ostris/Z-Image-De-Turbo", False),
        ("z-image", "someone/z_image_de_turbo_v1_bf16", False),
        ("z-image", "someone/zImageDeturbo", False),
        ("z-image", "someone/z_image_turbo_de-distilled", False),
        ("z-image", "someone/z_image_bf16", False),
    ],
)
def test_turbo_under_the_bases_name_is_warned_of(base, path, distilled):
    found = warnings(on=LARGE_GPU, BASE_MODEL=base, MODEL_PATH=path)
    assert (f"MODEL_PATH={path} is distilled to few steps" in found) == distilled
    assert (f"Fix: the weights of {base_models()[base][1].source}" in found) == distilled


@pytest.mark.parametrize("base", ["z-image-turbo", "krea2-turbo"])
def test_a_file_of_turbo_under_turbos_name_is_warned_of_as_its_own_weights_are(base):
    path = f"someone/{base}_bf16"
    caution = base_models()[base][1].caution
    adapter = re.search(r"PARAMS_TRAINING_ADAPTER=(\S+\.safetensors)", caution)
    assert warnings(on=LARGE_GPU, BASE_MODEL=base, MODEL_PATH=path) == f"MODEL_PATH={path} {caution}."
    assert adapter
    with_adapter = {"MODEL_PATH": path, "PARAMS_TRAINING_ADAPTER": adapter[1]}
    assert warnings(on=LARGE_GPU, BASE_MODEL=base, **with_adapter) == ""


def test_another_warning_of_a_name_is_not_hidden_by_the_models_own():
    found = warnings(on=LARGE_GPU, BASE_MODEL="krea2-turbo", MODEL_PATH="someone/krea2_edit")
    assert "MODEL_PATH=someone/krea2_edit is a model that edits images" in found


def test_krea_2_turbos_own_weights_are_warned_of_unless_an_adapter_holds_its_distillation():
    alone = warnings(on=LARGE_GPU, BASE_MODEL="krea2-turbo")
    assert "BASE_MODEL=krea2-turbo is distilled to few steps" in alone and "Fix: BASE_MODEL=krea2, whose" in alone
    named = re.search(r"PARAMS_TRAINING_ADAPTER=(\S+\.safetensors),", alone)
    assert named and warnings(on=LARGE_GPU, BASE_MODEL="krea2-turbo", PARAMS_TRAINING_ADAPTER=named[1]) == ""


@pytest.mark.parametrize("distilled", [True, False])
def test_a_folder_says_itself_whether_it_is_distilled(tmp_path, distilled):
    folder = tmp_path / "flux-2-klein-4b"
    shutil.copytree(base_models()["mini-flux2"][1].source, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"is_distilled": distilled}))
    found = warnings(on=LARGE_GPU, BASE_MODEL="flux2-klein-4b", MODEL_PATH=str(folder))
    assert ("is distilled to few steps, which training undoes, by its model_index.json" in found) == distilled


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("Qwen/Qwen-Image-Edit-2509", "edits images"),
        ("someone/Qwen-Image-Lightning-merged", "distilled to few steps"),
        ("someone/qwen-image-finetune", None),
        ("someone/qwen_image_edit_2509_fp8", "edits images"),
        ("someone/qwenImageEdit2511", "edits images"),
        ("someone/qwen_image_8steps", "distilled to few steps"),
        ("someone/qwen-image-4-step-merge", "distilled to few steps"),
        ("someone/qwen-image-20000steps", None),
        ("someone/qwen_image_film_credits", None),
        ("someone/qwen-image-special-edition", None),
        ("edit/qwen-image", None),
    ],
)
def test_a_file_whose_name_alone_tells_it_from_a_base_model_is_warned_of(path, what):
    found = warnings(on=LARGE_GPU, BASE_MODEL="qwen-image", MODEL_PATH=path)
    assert (f"MODEL_PATH={path} is " in found) == (what is not None)
    assert what is None or what in found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_of_an_optimizer_is_usual(name):
    spec = OPTIMIZERS[name]
    assert spec.usual_rates[0] <= spec.learning_rate <= spec.usual_rates[1]
    assert warnings(PARAMS_OPTIMIZER_TYPE=name, PARAMS_LEARNING_RATE=f"{spec.learning_rate:g}") == ""


# ---- values that are far from the usual ones


@pytest.mark.parametrize(
    ("optimizer", "rate", "says"),
    [
        ("prodigy", "1e-4", "10,000 times more slowly. Usual: 1,"),
        ("prodigy", "10", "10 times faster. Usual: 1,"),
        ("prodigy-schedulefree", "1e-4", "Usual: 1,"),
        ("adamw", "1", "likely to diverge. Usual: 0.0001, from 1e-05 to 0.001"),
        ("adamw8bit", "1", "likely to diverge"),
        ("lion", "1e-2", "likely to diverge. Usual: 3e-05"),
        ("lion8bit", "1", "likely to diverge"),
        ("adafactor", "1", "likely to diverge"),
        ("adamw-schedulefree", "1", "likely to diverge. Usual: 0.001"),
        ("adamw", "1e-9", "learns very slowly"),
    ],
)
def test_a_learning_rate_of_another_optimizer(optimizer, rate, says):
    text = warnings(PARAMS_OPTIMIZER_TYPE=optimizer, PARAMS_LEARNING_RATE=rate)
    assert f"PARAMS_LEARNING_RATE={float(rate):g} with PARAMS_OPTIMIZER_TYPE={optimizer}" in text and says in text


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"PARAMS_OPTIMIZER_TYPE": "adamw", "PARAMS_TEXT_ENCODER_LR": "1"}, "PARAMS_TEXT_ENCODER_LR=1 is unusual"),
        ({"PARAMS_D_COEF": "100"}, "PARAMS_D_COEF=100"),
        ({"PARAMS_OPTIMIZER_ARGS": "d_coef=100"}, "PARAMS_D_COEF=100"),
        ({"PARAMS_WEIGHT_DECAY": "10"}, "PARAMS_WEIGHT_DECAY=10"),
        (
            {"PARAMS_WARMUP_STEPS": "10", "PARAMS_LEARNING_SCHEDULER": "constant_with_warmup"},
            "safeguard_warmup=true",
        ),
        ({"PARAMS_NETWORK_ALPHA": "512", "PARAMS_NETWORK_DIM": "16"}, "makes the LoRA count 32 times"),
        ({"PARAMS_NETWORK_DIM": "1024", "PARAMS_NETWORK_ALPHA": "1"}, "PARAMS_NETWORK_DIM=1024"),
        ({"PARAMS_CAPTION_DROPOUT_RATE": "1"}, "no caption is ever trained"),
        ({"PARAMS_CAPTION_DROPOUT_RATE": "0.9"}, "90% of the captions are left out"),
        ({"PARAMS_RESOLUTION": "1024"}, "A resolution of 1024 × 1024 is far from the 128 × 128"),
        ({"PARAMS_RESOLUTION": "32"}, "A resolution of 32 × 32"),
        ({"PARAMS_NOISE_OFFSET": "2"}, "PARAMS_NOISE_OFFSET=2"),
        ({"PARAMS_EMA_DECAY": "0.5"}, "PARAMS_EMA_DECAY=0.5 averages over 2 steps only"),
        ({"PARAMS_NUM_REPEATS": "100000"}, "num_repeats=100000"),
        ({"PARAMS_MAX_EPOCHS": "1000000"}, "PARAMS_MAX_EPOCHS=1000000"),
        ({"PARAMS_GRADIENT_ACCUMULATION": "1000"}, "PARAMS_GRADIENT_ACCUMULATION=1000"),
        ({"BASE_MODEL": "mini-sdxl", "PARAMS_MIN_SNR_GAMMA": "0.05"}, "PARAMS_MIN_SNR_GAMMA=0.05"),
        ({"PARAMS_STEP_TIMEOUT": "5"}, "PARAMS_STEP_TIMEOUT=5 is in seconds"),
        ({"MAX_RUNTIME": "0.01"}, "MAX_RUNTIME=0.01 is in hours"),
    ],
)
def test_an_unusual_value(variables, says):
    text = warnings(**variables)
    assert says in text and "Usual: " in text and text.count("\n") == 0


def test_every_tag_left_out():
    assert "leaves out every tag" in warnings(config=config({"caption_tag_dropout_rate": 1.0}))


# ---- settings without any effect


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"PARAMS_OPTIMIZER_TYPE": "adamw", "PARAMS_D_COEF": "1"}, "PARAMS_D_COEF=1 has no effect"),
        ({"PARAMS_NUM_CYCLES": "3", "PARAMS_LEARNING_SCHEDULER": "cosine"}, "cosine_with_restarts has"),
        ({"PARAMS_LEARNING_SCHEDULER": "constant_with_warmup"}, "PARAMS_WARMUP_STEPS is 0"),
        ({"PARAMS_DISCRETE_FLOW_SHIFT": "3"}, "PARAMS_TIMESTEP_SAMPLING=sigmoid has no shift"),
        ({"BASE_MODEL": "mini-sdxl", "PARAMS_GUIDANCE_SCALE": "3"}, "mini-sdxl has no embedded guidance"),
        ({"BASE_MODEL": "mini-sdxl", "PARAMS_SPLIT_QKV": "true"}, "have an adapter each anyway"),
        ({"PARAMS_MAX_EPOCHS": "3", "PARAMS_MAX_STEPS": "500"}, "PARAMS_MAX_STEPS=500 decides"),
        ({"KEEP_CHECKPOINTS": "3", "PARAMS_SAVE_EVERY_N_STEPS": "0"}, "KEEP_CHECKPOINTS=3 has no effect"),
        ({"SAMPLE_PROMPTS": '["a cat"]', "PARAMS_SAMPLE_EVERY_N_STEPS": "0"}, "SAMPLE_PROMPTS has no effect"),
        ({"WEBHOOK_SECRET": "abcdef"}, "WEBHOOK_URL is not set"),
        ({"HF_WRITE_TOKEN": "hf_abcdefgh"}, "PUSH_TO_HUB is not set"),
        ({"MEMORY_LIMIT_GIB": "3"}, "this job runs on the CPU"),
        ({"PARAMS_OPTIMIZER_TYPE": "adamw8bit", "PARAMS_OPTIMIZER_ARGS": "is_paged=true"}, "is_paged=true has no"),
    ],
)
def test_a_setting_without_any_effect(variables, says):
    text = warnings(**variables)
    assert says in text and "has no effect: " in text and text.count("\n") == 0


def test_what_is_left_to_the_job_is_never_idle():
    left = {"PARAMS_MAX_EPOCHS": "auto", "KEEP_CHECKPOINTS": "auto", "PARAMS_SAMPLE_EVERY_N_STEPS": "auto"}
    assert warnings(**left, PARAMS_MAX_STEPS="500", PARAMS_SAVE_EVERY_N_STEPS="0") == ""


def test_images_that_are_held_out_for_nothing():
    assert "validation_split=0.1" in warnings(config=config(validation_split=0.1))
    assert not warnings(config=config(validation_split=0.1), PARAMS_VALIDATE_EVERY_N_STEPS="10")


# ---- what depends on the number of steps

SHORT = Length(steps=100, steps_per_epoch=20, images=20)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {
                "PARAMS_WARMUP_STEPS": "500",
                "PARAMS_LEARNING_SCHEDULER": "cosine",
                "PARAMS_OPTIMIZER_TYPE": "adamw",
            },
            "PARAMS_WARMUP_STEPS=500: the job has 100 steps",
        ),
        ({"PARAMS_SAVE_EVERY_N_STEPS": "500"}, "only the finished LoRA is saved. Usual: a tenth of the steps, 10."),
        ({"PARAMS_SAMPLE_EVERY_N_STEPS": "500"}, "samples are drawn only before the first and after the last"),
        ({"PARAMS_NUM_CYCLES": "50", "PARAMS_LEARNING_SCHEDULER": "cosine_with_restarts"}, "restarts every 2."),
        ({"PARAMS_BATCH_SIZE": "8", "PARAMS_GRADIENT_ACCUMULATION": "4"}, "A step may have 32 images"),
        ({"PARAMS_EMA_DECAY": "0.9999"}, "averages over 10,000 steps, and the job has 100"),
        ({"PARAMS_PRIOR_LOSS_WEIGHT": "0.5"}, "no subset has regularisation images"),
    ],
)
def test_a_setting_for_a_longer_job(variables, says):
    text = of_steps(SHORT, **variables)
    assert says in text and text.count("\n") == 0
    assert plan(**variables).warnings == ()  # the steps are not known there


def test_validation_that_never_comes():
    held_out = config(validation_split=0.1)
    text = of_steps(SHORT, config=held_out, PARAMS_VALIDATE_EVERY_N_STEPS="500")
    assert "never validates" in text


def test_an_epoch_that_never_ends():
    endless = Length(steps=100, steps_per_epoch=4000, images=20)
    assert "an epoch has 4,000 steps, and the job ends after 100" in of_steps(endless, PARAMS_NUM_REPEATS="200")
    assert "the job has 400,000 steps" in of_steps(Length(400_000, 80_000, 20), PARAMS_MAX_EPOCHS="5000")


def test_a_usual_job_has_no_warnings_of_its_steps():
    given = {"PARAMS_SAVE_EVERY_N_STEPS": "100", "PARAMS_SAMPLE_EVERY_N_STEPS": "100", "PARAMS_BATCH_SIZE": "2"}
    assert of_steps(Length(1000, 50, 100), **given) == ""
    assert of_steps(SHORT) == ""  # defaults are no choice of the user


def test_steps_that_are_set_are_looked_at_by_the_plan_and_once_only():
    made = plan(PARAMS_MAX_STEPS="50", PARAMS_SAVE_EVERY_N_STEPS="500")
    assert "the job has 50 steps" in "\n".join(made.warnings)
    assert steps_sanity.warnings(made, Length(50, 20, 20)) == []


# ---- the table


def test_sentences_name_variables_that_exist_and_end_with_a_point():
    every = warnings(
        PARAMS_LEARNING_RATE="1e-4", PARAMS_D_COEF="100", PARAMS_NUM_CYCLES="3", PARAMS_NOISE_OFFSET="5",
        PARAMS_MAX_STEPS="10", PARAMS_SAVE_EVERY_N_STEPS="20", KEEP_CHECKPOINTS="1", PARAMS_EMA_DECAY="0.5",
    )  # fmt: skip
    assert every.count("\n") == 5
    for sentence in every.splitlines():
        assert sentence.endswith(".")
        for name in re.findall(r"\b(?:PARAMS|KEEP)_[A-Z_]+\b", sentence):
            assert name in NAMES


def test_no_row_is_left_out_of_its_table():
    for module, first in ((sanity, "_learning_rate"), (steps_sanity, "_warmup_longer_than_the_job")):
        helpers = {"_no_effect", "_sentences", "_said_by_index", "_said_by_name"}
        functions = {name for name, value in vars(module).items() if name.startswith("_") and callable(value)}
        rows = {row.__name__ for row in module.ROWS}
        assert first in rows and functions - helpers - rows == set()


def test_what_was_given_is_neutral():
    first, second = plan(), plan(PARAMS_SEED="42")
    assert first.essence() == second.essence() and second.given == ("BASE_MODEL", "DATASET_NAME", "PARAMS_SEED")
    assert dataclasses.replace(second, given=()).essence() == second.essence()
