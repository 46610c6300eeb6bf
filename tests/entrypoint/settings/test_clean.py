"""Values as web forms, shells and env files leave them: mended where there is no doubt, else named with the fix."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from entrypoint.settings import clean
from entrypoint.settings.read import read_settings
from entrypoint.settings.variables import ROWS, Settings
from trainer.spec.errors import SettingsError

BASE = "mini-flux"


def read(**variables: str) -> Settings:
    return read_settings({"BASE_MODEL": BASE, **variables})


def refusal(**variables: str) -> str:
    with pytest.raises(SettingsError) as caught:
        read(**variables)
    return str(caught.value)


def value(name: str, text: str) -> Any:
    settings = read(**{name: text})
    field = name.removeprefix("PARAMS_").lower()
    for section in (settings.model, settings.data, settings.training, settings.adapter, settings.engine):
        if hasattr(section, field):
            return getattr(section, field)
    return getattr(settings.output, field)


@pytest.mark.parametrize(
    ("name", "text", "meant"),
    [
        ("BASE_MODEL", '"mini-flux"', "mini-flux"),
        ("BASE_MODEL", "“mini-flux”", "mini-flux"),
        ("BASE_MODEL", "\"'mini-flux'\"", "mini-flux"),
        ("BASE_MODEL", "\ufeffmini-flux\r\n", "mini-flux"),
        ("BASE_MODEL", "BASE_MODEL=mini-flux", "mini-flux"),
        ("BASE_MODEL", "mini-flux # the small one", "mini-flux"),
        ("PARAMS_LEARNING_RATE", "'1e-4'", 1e-4),
        ("PARAMS_LEARNING_RATE", "1e-4,", 1e-4),
        ("PARAMS_LEARNING_RATE", "1e−4", 1e-4),
        ("PARAMS_LEARNING_RATE", "1e-4  # usual", 1e-4),
        ("PARAMS_LEARNING_RATE", "none", None),
        ("PARAMS_LEARNING_RATE", '""', None),
        ("PARAMS_LEARNING_RATE", "auto", None),
        ("PARAMS_NETWORK_DIM", "null", None),
        ("PARAMS_MAX_STEPS", "500;", 500),
        ("PARAMS_CAPTION_DROPOUT_RATE", "10%", 0.1),
        ("PARAMS_RESOLUTION", "(1024, 768)", (1024, 768)),
        ("PARAMS_RESOLUTION", "1024*768", (1024, 768)),
        ("PARAMS_TEXT_ENCODER_LR", "[1e-5, 1e-6]", (1e-5, 1e-6)),
        ("PARAMS_TEXT_ENCODER_LR", "1e-5 1e-6", (1e-5, 1e-6)),
        ("PARAMS_TARGET_MODULES", '["attn.to_q", "attn.to_k"]', ("attn.to_q", "attn.to_k")),
        ("TRIGGER_WORD", '"sks"', "sks"),
        ("TRIGGER_WORD", "sks # woman", "sks # woman"),
        ("TRIGGER_WORD", 'the "sks" cat', 'the "sks" cat'),
        ("TRIGGER_WORD", "$ks", "$ks"),
        ("TRIGGER_WORD", "None", None),
        ("STRICT_DATASET", "'yes'", True),
        ("STRICT_DATASET", "Y", True),
        ("OUTPUT_NAME", "x.safetensors", "x"),
        ("OUTPUT_PATH", "~/out", Path.home() / "out"),
        ("MODEL_PATH", "None", None),
        ("T5_PATH", "none", "none"),
        ("PARAMS_OFFLOAD", "none", "none"),
    ],
)
def test_what_is_meant_without_doubt_is_read_and_the_log_says_so(name, text, meant):
    assert value(name, text) == meant
    told = [reason for reason in read(**{name: text}).reasons if reason.startswith(f"{name}: ")]
    unchanged = isinstance(meant, str) and text == meant
    plain_switch = text == "Y"
    blanks_alone = text.strip() == meant
    assert bool(told) != (unchanged or plain_switch or blanks_alone)


@pytest.mark.parametrize(
    ("name", "text", "fix"),
    [
        ("PARAMS_MAX_STEPS", "1,000", "Fix: PARAMS_MAX_STEPS=1000"),
        ("PARAMS_MAX_STEPS", "1 000", "Fix: PARAMS_MAX_STEPS=1000"),
        ("PARAMS_MAX_STEPS", "1e3", "Fix: PARAMS_MAX_STEPS=1000"),
        ("PARAMS_MAX_STEPS", "100.0", "Fix: PARAMS_MAX_STEPS=100"),
        ("PARAMS_MAX_STEPS", "１００", "Fix: PARAMS_MAX_STEPS=100"),
        ("PARAMS_LEARNING_RATE", "0,0001", "Fix: PARAMS_LEARNING_RATE=0.0001"),
        ("PARAMS_LEARNING_RATE", "10%", "is a percentage"),
        ("PARAMS_SAVE_EVERY_N_STEPS", "none", "Fix: 0, or leave it empty for the default (auto)"),
        ("HF_TOKEN", "{{ RUNPOD_SECRET_HF }}", "create the secret HF at RunPod"),
        ("TRIGGER_WORD", "{{ trigger }}", "the placeholder {{ trigger }}"),
        ("DATASET_NAME", "$HOME/images", "holds $HOME as it stands"),
        ("DATASET_NAME", "${DATA}", "holds ${DATA} as it stands"),
        ("OUTPUT_PATH", "%USERPROFILE%/out", "holds %USERPROFILE% as it stands"),
        ("HF_TOKEN", "$HF_TOKEN", "holds the name of a variable"),
        ("TRIGGER_WORD", "${TRIGGER}", "holds ${TRIGGER} as it stands"),
        ("DATASET_NAME", "C:\\Users\\me\\images", "docker run -v C:\\Users\\me\\images:/data"),
        ("DATASET_NAME", "C:\\Users\\me\\images", "DATASET_NAME=/data"),
        ("DATASET_NAME", "C:/Users/me/images", "/mnt/c/Users/me/images"),
        ("OUTPUT_PATH", "\\\\server\\share", "is a Windows path"),
        ("DATASET_NAME", "images\\train", "write it with slashes: images/train"),
        ("DATASET_NAME", "/my\\ images", "without them: /my images"),
        ("OUTPUT_PATH", "~nobody-at-all/out", "no such user"),
        ("OUTPUT_NAME", "loras/x.safetensors", "OUTPUT_PATH=loras and OUTPUT_NAME=x"),
        ("BASE_MODEL", "BASE_MODEL=flux\nDATASET_NAME=/data\n", "other variables (DATASET_NAME)"),
        ("TRIGGER_WORD", "sks\nPARAMS_SEED=1", "other variables (PARAMS_SEED)"),
        ("TRIGGER_WORD", "x" * 160_000, "is 160,000 characters long"),
        ("OUTPUT_PATH", "/" + "x" * 160_000, "is 160,001 characters long"),
    ],
)
def test_what_is_in_doubt_is_named_with_the_fix(name, text, fix):
    message = refusal(**{name: text})
    assert fix in message and f"  - {name}" in message and len(message) < 600


# ---- tokens


@pytest.mark.parametrize(
    "text", ["'hf_abcdefghij'", "Bearer hf_abcdefghij", "HF_TOKEN=hf_abcdefghij", "hf_abcdefghij\n"]
)
def test_a_token_is_read_without_what_stands_around_it(text):
    settings = read(HF_TOKEN=text)
    assert settings.model.hf_token is not None and settings.model.hf_token.reveal() == "hf_abcdefghij"
    assert "abcdef" not in "".join(settings.reasons)


@pytest.mark.parametrize(
    "text", ["hf_xxx", "hf_xxxxxxxxxxxxxxxx", "hf_...", "your_token_here", "<token>", "hf_your_token"]
)
def test_a_placeholder_is_no_token(text):
    assert "HF_TOKEN is a placeholder" in refusal(HF_TOKEN=text)


@pytest.mark.parametrize("text", ["rpa_abcdefghijklmnop", "sk-abcdefghijklmnop", "ghp_abcdefghijk", "0123456789abcdef"])
def test_a_key_of_another_service_is_no_token(text):
    message = refusal(HF_TOKEN=text)
    assert "HF_TOKEN does not begin with hf_" in message and text not in message
    assert "HF_WRITE_TOKEN does not begin" in refusal(HF_WRITE_TOKEN=text)


def test_another_hub_has_tokens_of_its_own():
    settings = read(HF_TOKEN="cmVmdGtuOjAxOg", HF_ENDPOINT="https://mirror.example/api")
    assert settings.model.hf_token is not None
    assert "does not begin" in refusal(HF_TOKEN="cmVmdGtuOjAxOg", HF_ENDPOINT="https://huggingface.co")


def test_no_token_is_none():
    assert read(HF_TOKEN="none").model.hf_token is None


# ---- what is missing


def test_both_variables_that_are_needed_are_named_at_once():
    with pytest.raises(SettingsError) as caught:
        read_settings({})
    message = str(caught.value)
    assert "BASE_MODEL is not set, nor DATASET_NAME" in message
    assert "-e BASE_MODEL=" in message and "-e DATASET_NAME=/data" in message
    with pytest.raises(SettingsError) as caught:
        read_settings({"DATASET_NAME": "/data"})
    assert "nor DATASET_NAME" not in str(caught.value)


# ---- CONFIG_JSON


@pytest.mark.parametrize(
    "text",
    [
        '{"PARAMS_SEED": 7,}',
        '{// mine\n"PARAMS_SEED": 7}',
        "{PARAMS_SEED: 7}",
        "{'PARAMS_SEED': 7}",
        '{\\"PARAMS_SEED\\": 7}',
        "'{\"PARAMS_SEED\": 7}'",
    ],
)
def test_config_json_is_read_as_people_write_it(text):
    assert read(CONFIG_JSON=text).training.seed == 7


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("BASE_MODEL=flux\nPARAMS_SEED=1", "NAME=value lines"),
        ("/data/config.json", "It is a path"),
        ("{" * 1200, "not a JSON object"),
        ('{"PARAMS_SEED": ' + "[" * 1200 + "]" * 1200 + "}", "nested too deeply|is not a whole number"),
    ],
)
def test_what_is_no_object_is_named_for_what_it_is(text, word):
    message = refusal(CONFIG_JSON=text)
    assert re.search(word, message) and len(message) < 600


# ---- optimiser arguments


@pytest.mark.parametrize(
    "text",
    [
        "betas=0.9,0.99 eps=1e-8",
        "betas=(0.9, 0.99) eps=1e-8",
        "betas=(0.9,0.99), eps=1e-8",
        "betas=0.9,0.99,eps=1e-8",
        "betas=0.9,0.99; eps=1e-8;",
        "betas=[0.9, 0.99] eps=1e-08",
        "betas = 0.9, 0.99 eps = 1e-8",
        "betas=0.9 0.99 eps=.00000001",
        '"betas=0.9,0.99" "eps=1e-8"',
        "'betas=0.9,0.99' 'eps=1e-8'",
        "betas='0.9,0.99' eps='1e-8'",
        '["betas=0.9,0.99", "eps=1e-8"]',
        '{"betas": [0.9, 0.99], "eps": 1e-8}',
        '{"betas": "0.9,0.99", "eps": "1e-8"}',
    ],
)
def test_optimizer_arguments_are_read_as_other_trainers_write_them(text):
    assert read(PARAMS_OPTIMIZER_ARGS=text).training.optimizer_args == {"betas": [0.9, 0.99], "eps": 1e-8}
    config = json.dumps({"PARAMS_OPTIMIZER_ARGS": text})
    assert read(CONFIG_JSON=config).training.optimizer_args == {"betas": [0.9, 0.99], "eps": 1e-8}


LITERALS = st.one_of(
    st.booleans(),
    st.none(),
    st.integers(-(10**6), 10**6),
    st.floats(-1e6, 1e6, allow_nan=False),
    st.lists(st.floats(0, 1, allow_nan=False), min_size=2, max_size=3),
)
KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)


@given(
    st.dictionaries(KEYS, LITERALS, max_size=4), st.sampled_from([" ", ", ", ",", "; ", "\n", "  ,  "]), st.booleans()
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_arguments_are_read_back_with_any_separator(arguments, separator, quoted):
    pairs = []
    for key, argument in arguments.items():
        text = f"({', '.join(map(repr, argument))})" if isinstance(argument, list) else repr(argument)
        pairs.append(f'"{key}={text}"' if quoted else f"{key}={text}")
    assert read(PARAMS_OPTIMIZER_ARGS=separator.join(pairs)).training.optimizer_args == arguments


# ---- anything


def test_every_name_of_a_table_here_is_a_variable():
    assert set(clean.LOCATIONS) <= ROWS.keys() and set(clean.DOCUMENTS) <= ROWS.keys()


@given(st.sampled_from(sorted(ROWS)), st.text(max_size=40))
@hypothesis_settings(max_examples=200, deadline=None)
def test_cleaning_ends_with_a_text_or_a_reason(name, text):
    try:
        assert isinstance(clean.clean(text, ROWS[name]), str)
    except ValueError as problem:
        assert str(problem)


@given(
    st.sampled_from(sorted(ROWS)), st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=3, max_size=9)
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_a_plain_word_is_left_as_it_is(name, text):
    if text.lower() not in (*clean.NOTHING, "auto") and ROWS[name].kind not in clean.NUMBERS:
        assert clean.clean(text, ROWS[name]) == text
