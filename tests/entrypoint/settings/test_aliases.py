"""Names of variables and values as other trainers write them: read where they mean the same, else named."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from entrypoint.dataset_config.manifest import LEVELS, SUBSET_KEYS
from entrypoint.settings import aliases
from entrypoint.settings.read import read_settings
from entrypoint.settings.variables import NAMES, ROWS, Settings
from trainer.spec.errors import SettingsError
from trainer.spec.family import base_models

ROOT = Path(__file__).parents[3]
BASE = "mini-flux"


def read(**variables: str) -> Settings:
    return read_settings({"BASE_MODEL": BASE, **variables})


def refusal(**variables: str) -> str:
    with pytest.raises(SettingsError) as caught:
        read(**variables)
    return str(caught.value)


# ---- variables


@pytest.mark.parametrize(
    ("name", "text", "section", "field", "value"),
    [
        ("PARAMS_LR", "1e-4", "training", "learning_rate", 1e-4),
        ("learning_rate", "1e-4", "training", "learning_rate", 1e-4),
        ("LEARNING_RATE", "1e-4", "training", "learning_rate", 1e-4),
        ("unet_lr", "1e-4", "training", "learning_rate", 1e-4),
        ("MAX_TRAIN_STEPS", "900", "training", "max_steps", 900),
        ("PARAMS_MAX_TRAIN_STEPS", "900", "training", "max_steps", 900),
        ("max_train_epochs", "9", "training", "max_epochs", 9),
        ("train_batch_size", "2", "data", "batch_size", 2),
        ("BATCH_SIZE", "2", "data", "batch_size", 2),
        ("network_dim", "16", "adapter", "network_dim", 16),
        ("NETWORK_DIM", "16", "adapter", "network_dim", 16),
        ("lora_rank", "16", "adapter", "network_dim", 16),
        ("linear_alpha", "16", "adapter", "network_alpha", 16),
        ("resolution", "512,512", "data", "resolution", (512, 512)),
        ("params_seed", "7", "training", "seed", 7),
        ("optimizer", "AdamW8bit", "training", "optimizer_type", "adamw8bit"),
        ("lr_scheduler", "cosine", "training", "learning_scheduler", "cosine"),
        ("snr_gamma", "5", "training", "min_snr_gamma", 5),
        ("output_dir", "/out", "output", "output_path", Path("/out")),
        ("train_data_dir", "/data", "data", "dataset_name", "/data"),
        ("pretrained_model_name_or_path", "/model", "model", "model_path", "/model"),
        ("--network-dim", "16", "adapter", "network_dim", 16),
    ],
)
def test_a_name_of_the_same_meaning_is_read_and_the_log_says_so(name, text, section, field, value):
    settings = read(**{name: text})
    assert getattr(getattr(settings, section), field) == value
    assert any(reason.startswith(f"{name}: read as ") for reason in settings.reasons)


def test_a_model_name_is_the_base_model_where_it_names_one():
    settings = read_settings({"pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0"})
    assert settings.model.base_model == "sdxl" and settings.model.model_path is None


def test_our_own_name_comes_before_anothers():
    settings = read(PARAMS_LEARNING_RATE="1e-4", LEARNING_RATE="1e-3")
    assert settings.training.learning_rate == 1e-4
    assert any("LEARNING_RATE='1e-3' is not read: PARAMS_LEARNING_RATE" in warning for warning in settings.warnings)
    assert not read(PARAMS_LEARNING_RATE="1e-4", LEARNING_RATE="1e-4").warnings


def test_a_token_by_another_name_is_in_no_message():
    settings = read(HUGGINGFACE_TOKEN="hf_canaryabcdef", HF_TOKEN="hf_other")
    assert settings.model.hf_token is not None and settings.model.hf_token.reveal() == "hf_other"
    assert "canary" not in repr(settings)
    alone = read(HUGGINGFACE_TOKEN="hf_canaryabcdef")
    assert alone.model.hf_token is not None and alone.model.hf_token.reveal() == "hf_canaryabcdef"
    assert "canary" not in repr(alone)


@pytest.mark.parametrize("name", ["PARAMS_SAVE_EVERY_N_EPOCHS", "save_every_n_epochs", "params_save_every_n_epochs"])
def test_a_name_that_is_only_near_is_refused_with_ours(name):
    assert "PARAMS_SAVE_EVERY_N_STEPS" in refusal(**{name: "1"})


def test_a_near_name_in_capitals_may_be_another_programs():
    assert any("MIXED_PRECISION" in w and "PARAMS_PRECISION" in w for w in read(MIXED_PRECISION="bf16").warnings)


def test_a_key_of_dataset_json_is_named_as_one():
    assert "dataset.json" in refusal(flip_aug="true") and "dataset.json" in refusal(PARAMS_ENABLE_BUCKET="true")


@pytest.mark.parametrize(
    ("name", "text", "ours"), [("RESOLUTION", "768", "PARAMS_RESOLUTION"), ("SEED", "7", "PARAMS")]
)
def test_a_single_word_in_capitals_is_named_where_its_value_fits(name, text, ours):
    settings = read(**{name: text})
    assert settings.training.seed == 42 and settings.data.resolution is None
    assert any(warning.startswith(f"{name}='{text}' is not read") and ours in warning for warning in settings.warnings)
    assert not read(**{name: "x"}).warnings


@pytest.mark.parametrize(("typed", "meant"), [("TRIGER_WORDS", "TRIGGER_WORD"), ("DATASETT_NAMEE", "DATASET_NAME")])
def test_two_wrong_letters_are_a_warning(typed, meant):
    assert read(**{typed: "x"}).warnings == (f"{typed} is not read. Did you mean {meant}?",)


def test_config_json_takes_the_same_names():
    config = {"network_dim": 16, "SEED": 7, "learning_rate": 1e-4, "optimizer_args": ["betas=0.9,0.99"]}
    settings = read(CONFIG_JSON=json.dumps(config))
    assert (settings.adapter.network_dim, settings.training.seed, settings.training.learning_rate) == (16, 7, 1e-4)
    assert settings.training.optimizer_args == {"betas": [0.9, 0.99]}
    assert "PARAMS_SAVE_EVERY_N_STEPS" in refusal(CONFIG_JSON='{"save_every_n_epochs": 1}')


def test_one_wrong_name_in_config_json_is_not_answered_with_all_names():
    message = refusal(CONFIG_JSON='{"QQQQ": 1}')
    assert "'QQQQ' is not a variable" in message and "PARAMS_EMA_DECAY" not in message
    assert "did you mean PARAMS_LEARNING_RATE?" in refusal(CONFIG_JSON='{"learnin_rat": 1}')


# ---- values


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("AdamW8bit", "adamw8bit"),
        ("Lion8bit", "lion8bit"),
        ("Prodigy", "prodigy"),
        ("prodigyopt", "prodigy"),
        ("prodigyopt.Prodigy", "prodigy"),
        ("AdamW", "adamw"),
        ("torch.optim.AdamW", "adamw"),
        ("Adafactor", "adafactor"),
        ("AdamWScheduleFree", "adamw-schedulefree"),
        ("adamw_schedulefree", "adamw-schedulefree"),
        ("ProdigyPlusScheduleFree", "prodigy-schedulefree"),
    ],
)
def test_an_optimizer_has_many_spellings(written, name):
    settings = read(PARAMS_OPTIMIZER_TYPE=written)
    assert settings.training.optimizer_type == name
    changed = written.lower() != name
    assert (f"PARAMS_OPTIMIZER_TYPE: {name} (written as {written!r})" in settings.reasons) == changed


@pytest.mark.parametrize(
    ("written", "near"), [("DAdaptAdam", "prodigy"), ("PagedAdamW8bit", "is_paged"), ("SGD", "ad")]
)
def test_an_optimizer_that_is_not_here_is_answered_with_the_near_one(written, near):
    message = refusal(PARAMS_OPTIMIZER_TYPE=written)
    assert f"PARAMS_OPTIMIZER_TYPE='{written}' is not known; " in message and near in message.partition("Allowed")[0]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("constant-with-warmup", "constant_with_warmup"),
        ("ConstantWithWarmup", "constant_with_warmup"),
        ("cosine_with_hard_restarts", "cosine_with_restarts"),
        ("Cosine With Restarts", "cosine_with_restarts"),
    ],
)
def test_a_schedule_has_many_spellings(written, name):
    assert read(PARAMS_LEARNING_SCHEDULER=written).training.learning_scheduler == name


def test_a_schedule_that_is_not_here_is_answered_with_the_near_one():
    assert "cosine is nearest, and falls to 0" in refusal(PARAMS_LEARNING_SCHEDULER="cosine_with_min_lr")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("FLUX.1-dev", "flux"),
        ("FLUX.1 [dev]", "flux"),
        ("flux1", "flux"),
        ("black-forest-labs/FLUX.1-dev", "flux"),
        ("https://huggingface.co/black-forest-labs/FLUX.1-dev", "flux"),
        ("flux1-dev.safetensors", "flux"),
        ("FLUX.1-schnell", "flux-schnell"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"),
        ("SDXL 1.0", "sdxl"),
        ("sd_xl_base_1.0", "sdxl"),
        ("SD3", "sd3"),
        ("stabilityai/stable-diffusion-3.5-large", "sd3.5-large"),
        ("sd3_5_large", "sd3.5-large"),
    ],
)
def test_a_base_model_has_many_spellings(written, name):
    assert read_settings({"BASE_MODEL": written}).model.base_model == name


def test_a_base_model_of_several_is_answered_with_them():
    with pytest.raises(SettingsError, match=r"it may be sd3\.5-medium or sd3\.5-large"):
        read_settings({"BASE_MODEL": "sd3.5"})


@pytest.mark.parametrize("variable", [name for name, row in ROWS.items() if row.choices])
def test_a_spelling_means_one_choice_only(variable):
    choices = tuple(ROWS[variable].choices() if ROWS[variable].choices else ())
    for choice in choices:
        found = aliases.find_value(variable, choice.replace("_", " ").upper())
        same = variable == "BASE_MODEL" and found is not None
        assert found == choice or (same and base_models()[found] == base_models()[choice])
    assert set(aliases.value_aliases(variable).values()) <= set(choices)


# ---- the tables


def test_every_alias_is_in_plain_form_and_names_a_variable():
    for alias, name in aliases.VARIABLES.items():
        assert aliases.plain(alias) == alias and name in NAMES
    for alias in (*aliases.NEAR, *aliases.MODEL_NAMES):
        assert aliases.plain(alias) == alias
    own = {aliases.plain(name) for name in NAMES}
    assert not own & (aliases.VARIABLES.keys() | aliases.NEAR.keys())
    assert not aliases.VARIABLES.keys() & aliases.NEAR.keys()


def test_advice_names_only_variables_that_exist():
    for advice in aliases.NEAR.values():
        for name in re.findall(r"\b[A-Z]+_[A-Z_]+\b", advice):
            assert name in NAMES, advice


def test_keys_of_dataset_json_are_those_of_the_manifest():
    keys = {**LEVELS["general"], **SUBSET_KEYS}.keys()
    own = {aliases.plain(name) for name in NAMES}
    others = {"dataset", "split", "subset", "revision"}
    assert keys - own - others - aliases.VARIABLES.keys() - set(aliases.DATASET_KEYS) == set()
    assert set(aliases.DATASET_KEYS) <= keys


def test_the_tables_of_the_documents_are_those_of_the_code():
    assert aliases.tables().strip() in (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def test_names_of_a_system_are_never_flagged():
    rng = random.Random(0)
    words = "PATH HOME CACHE DIR NAME HOST PORT USER VERSION LIB LOG LEVEL ROOT PREFIX CONFIG FILE URL KEY ID GPU NODE"
    heads = "SYSTEM GIT NVIDIA CUDA NCCL RUNPOD JUPYTER KUBERNETES SSH CONDA XDG AWS PIP UV NODE LESS TERM PYTHON"
    names = {f"{rng.choice(heads.split())}_{rng.choice(words.split())}" for _ in range(400)}
    settings = read(**dict.fromkeys(names, "1"))
    assert settings.warnings == () and settings.reasons == ()
