"""The environment → Settings: what is accepted, what is refused and how, and that secrets stay secret."""

from __future__ import annotations

import json
import random
import re
import string
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from entrypoint.settings.checks import one_edit_apart
from entrypoint.settings.read import help_env, read_settings
from entrypoint.settings.row import Secret
from entrypoint.settings.variables import NAMES, ROWS, SECTIONS, Settings, section_rows
from trainer.spec.errors import SettingsError
from trainer.spec.family import base_models
from trainer.spec.plan import AUTO

BASE = min(base_models())
FROZEN = """
BASE_MODEL MODEL_PATH MODEL_CONFIG_PATH VAE_PATH CLIP_L_PATH CLIP_G_PATH T5_PATH TEXT_ENCODER_PATH
MODEL_REVISION HF_TOKEN CIVITAI_TOKEN DOWNLOAD_TOKENS HF_HOME
DATASET_NAME DATASET_CONFIG DATASET_REVISION DATASET_SPLIT DATASET_SUBSET IMAGE_COLUMN CAPTION_COLUMN TRIGGER_WORD
CAPTION_WITH CAPTION_PROMPT CAPTION_MAX_TOKENS CAPTION_OVERWRITE CAPTION_WRITE
STRICT_DATASET
CACHE_PATH MAX_CACHE_GIB PARAMS_BATCH_SIZE PARAMS_RESOLUTION PARAMS_NUM_REPEATS PARAMS_CAPTION_DROPOUT_RATE
PARAMS_MAX_EPOCHS PARAMS_MAX_STEPS PARAMS_OPTIMIZER_TYPE PARAMS_OPTIMIZER_ARGS PARAMS_LEARNING_RATE
PARAMS_TEXT_ENCODER_LR PARAMS_D_COEF
PARAMS_WEIGHT_DECAY PARAMS_LEARNING_SCHEDULER PARAMS_WARMUP_STEPS PARAMS_NUM_CYCLES PARAMS_GRADIENT_ACCUMULATION
PARAMS_MAX_GRAD_NORM PARAMS_SEED PARAMS_TIMESTEP_SAMPLING PARAMS_DISCRETE_FLOW_SHIFT PARAMS_LOSS_WEIGHTING
PARAMS_PREDICTION_TYPE PARAMS_ZERO_TERMINAL_SNR PARAMS_MAX_TOKEN_LENGTH PARAMS_MIN_SNR_GAMMA
PARAMS_GUIDANCE_SCALE PARAMS_NOISE_OFFSET PARAMS_PRIOR_LOSS_WEIGHT PARAMS_EMA_DECAY
PARAMS_MAX_SKIPPED_STEPS PARAMS_MAX_LOSS_SPIKE
PARAMS_LORA_TYPE PARAMS_NETWORK_DIM PARAMS_NETWORK_ALPHA PARAMS_SPLIT_QKV PARAMS_TARGET_MODULES
PARAMS_TRAINING_ADAPTER PARAMS_RESUME_FROM RESUME_WITH_CHANGES
BACKEND NUM_GPUS NODES NODES_TIMEOUT PARAMS_PRECISION PARAMS_GRADIENT_CHECKPOINTING PARAMS_OFFLOAD PARAMS_COMPILE
PARAMS_ATTENTION PARAMS_DETERMINISTIC
MEMORY_LIMIT_GIB PARAMS_STEP_TIMEOUT
OUTPUT_PATH OUTPUT_NAME SAMPLE_PROMPTS PARAMS_SAMPLE_EVERY_N_STEPS SAMPLE_STRENGTHS PARAMS_SAVE_EVERY_N_STEPS
PARAMS_VALIDATE_EVERY_N_STEPS KEEP_CHECKPOINTS PARAMS_SAVE_PRECISION
PUSH_TO_HUB HF_WRITE_TOKEN UPLOAD_TO WEBHOOK_URL WEBHOOK_SECRET LOG_WITH MONITOR_PORT MONITOR_TOKEN ON_FINISH
MAX_RUNTIME MAX_COST PRICE_PER_HOUR
JOBS SWEEP
HF_TOKEN_FILE HUGGING_FACE_HUB_TOKEN CONFIG_JSON
"""


def read(**variables: str) -> Settings:
    return read_settings({"BASE_MODEL": BASE, **variables})


def refusal(**variables: str) -> str:
    with pytest.raises(SettingsError) as caught:
        read(**variables)
    return str(caught.value)


# ---- the table


def test_the_list_of_variables_is_frozen():
    assert list(NAMES) == FROZEN.split()


@pytest.mark.parametrize("section", SECTIONS)
def test_a_field_is_named_after_its_variable(section):
    for name, row in section_rows(section).items():
        assert row.name.removeprefix("PARAMS_").lower() == name


def test_every_variable_belongs_to_one_section():
    names = [row.name for section in SECTIONS for row in section_rows(section).values()]
    assert names == [*ROWS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_default_has_the_type_of_its_field(section):
    hints = typing.get_type_hints(SECTIONS[section])
    values = getattr(read(), section)
    for name in section_rows(section):
        allowed = typing.get_args(hints[name]) if "|" in str(hints[name]) else (hints[name],)
        assert isinstance(getattr(values, name), tuple(typing.get_origin(a) or a for a in allowed)), name


def test_every_section_has_a_heading_in_help():
    headings = re.findall(r"^\| \*\*(\w+)\*\* \|", help_env(), re.MULTILINE)
    assert headings == ["model", "data", "training", "adapter", "engine", "output", "finish", "many"]


def test_help_lists_every_variable_with_its_default_and_its_meaning():
    table = help_env()
    for row in ROWS.values():
        line = next(line for line in table.splitlines() if line.startswith(f"| `{row.name}` |"))
        assert row.meaning in line and (row.default or row.if_unset) in line
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_help_names_every_base_model():
    assert all(base in help_env() for base in base_models())


def test_the_defaults_of_the_existing_interface_are_kept():
    settings = read()
    assert (settings.output.output_path, settings.model.hf_home) == (Path("/workspace/output"), Path("/workspace/hf"))
    training = settings.training
    assert (training.optimizer_type, training.weight_decay, training.learning_scheduler) == ("prodigy", 0.1, "constant")
    assert (training.noise_offset, training.max_epochs) == (0.1, AUTO)
    assert settings.adapter.network_alpha == 4.0  # the rank: see test_resume.py
    assert (settings.output.save_every_n_steps, settings.output.sample_every_n_steps) == (AUTO, AUTO)


# ---- values


@pytest.mark.parametrize("text", ["True", "1", "yes", "on", "TRUE", " true\r\n"])
def test_true_has_many_names(text):
    assert read(STRICT_DATASET=text).data.strict_dataset is True


@pytest.mark.parametrize("text", ["False", "0", "no", "off", "", "  ", "\r"])
def test_false_has_many_names_and_empty_means_the_default(text):
    assert read(STRICT_DATASET=text).data.strict_dataset is False


@pytest.mark.parametrize("text", ["auto", "AUTO", ""])
def test_auto_is_resolved_by_the_plan(text):
    settings = read(PARAMS_COMPILE=text, PARAMS_PRECISION=text)
    assert settings.engine.compile is None and settings.engine.precision == "auto"


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), (".5", 0.5), ("3", 3.0), ("+2.5E-3", 2.5e-3), (" 1\r", 1.0)]
)
def test_numbers_are_read_as_people_write_them(text, value):
    assert read(PARAMS_LEARNING_RATE=text).training.learning_rate == value


@pytest.mark.parametrize(
    "text", ["nan", "inf", "-inf", "1e999", "1e-4;rm", "１", "1_0", "0x1", "1,5", "one", "- 1", "$(id)"]
)
def test_numbers_are_read_strictly(text):
    message = refusal(PARAMS_LEARNING_RATE=text)
    assert "PARAMS_LEARNING_RATE" in message and "Allowed: number, above 0" in message


@pytest.mark.parametrize("text", ["1.0", "1e2", "１２", "1_000", "0x10", "five", "9" * 5000, "true"])
def test_whole_numbers_are_read_strictly(text):
    assert "PARAMS_MAX_EPOCHS" in refusal(PARAMS_MAX_EPOCHS=text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PARAMS_NETWORK_DIM", "0"),
        ("PARAMS_NETWORK_ALPHA", "0"),
        ("PARAMS_SEED", "-1"),
        ("PARAMS_SEED", str(2**32)),
        ("PARAMS_EMA_DECAY", "1"),
        ("PARAMS_CAPTION_DROPOUT_RATE", "1.01"),
        ("PARAMS_BATCH_SIZE", "0"),
        ("PARAMS_RESOLUTION", "8"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(name, text):
    message = refusal(**{name: text})
    assert f"{name}='{text}'" in message and "out of range" in message and " to " in message


@pytest.mark.parametrize(("text", "value"), [("512", (512, 512)), ("640x384", (640, 384)), ("640 X 384", (640, 384))])
def test_a_resolution_is_a_side_or_two(text, value):
    assert read(PARAMS_RESOLUTION=text).data.resolution == value


@pytest.mark.parametrize("text", ["512x", "x", "512x512x512", "-512", "512.0", "big"])
def test_anything_else_is_no_resolution(text):
    assert "PARAMS_RESOLUTION" in refusal(PARAMS_RESOLUTION=text)


def test_choices_do_not_mind_capitals():
    assert read(BASE_MODEL=BASE.upper(), PARAMS_OPTIMIZER_TYPE="AdamW").training.optimizer_type == "adamw"


def test_an_unknown_choice_is_refused_with_the_nearest_and_all():
    message = refusal(PARAMS_OPTIMIZER_TYPE="prodgy")
    assert "prodigy is nearest" in message and "adafactor" in message


def test_the_base_model_is_required():
    with pytest.raises(SettingsError, match=f"BASE_MODEL is not set.*{BASE}"):
        read_settings({})


def test_paths_are_made_absolute():
    assert read(OUTPUT_PATH="out").output.output_path == Path.cwd() / "out"


@pytest.mark.parametrize("text", ["../up", "a/b", ".hidden", "x" * 200, "new\nline", "$(touch x)"])
def test_an_output_name_is_the_name_of_a_file(text):
    assert "OUTPUT_NAME" in refusal(OUTPUT_NAME=text)


def test_target_modules_are_separated_by_commas_or_spaces():
    assert read(PARAMS_TARGET_MODULES="attn.to_q, attn.to_k,ff.net.2 ").adapter.target_modules == (
        "attn.to_q",
        "attn.to_k",
        "ff.net.2",
    )


def test_optimizer_arguments_are_python_values():
    text = "betas=0.9,0.99 decouple=True 'eps=1e-8' beta3=None  use_speed=false"
    values = {"betas": [0.9, 0.99], "decouple": True, "eps": 1e-8, "beta3": None, "use_speed": False}
    assert read(PARAMS_OPTIMIZER_ARGS=text).training.optimizer_args == values


@pytest.mark.parametrize(
    "text", ["betas", "=1", "a=1 a=2", "a=1e999", "a='", "a={1}", "a=\"b'x'\"", "a=__import__('os')", "a=" + "(" * 9999]
)
def test_other_optimizer_arguments_are_refused(text):
    assert "PARAMS_OPTIMIZER_ARGS" in refusal(PARAMS_OPTIMIZER_ARGS=text)


def test_every_problem_is_in_one_message():
    message = refusal(
        PARAMS_SEED="x", PARAMS_NETWORK_DIM="0", PARAMS_FOO="1", BASE_MODEL="?", DATASET_NAM="a", CONFIG_JSON="["
    )
    for name in ("PARAMS_SEED", "PARAMS_NETWORK_DIM", "PARAMS_FOO", "BASE_MODEL", "DATASET_NAM", "CONFIG_JSON"):
        assert len(re.findall(rf"^  - '?{name}\b", message, re.MULTILINE)) == 1


def test_text_with_undecodable_bytes_is_refused():
    assert "TRIGGER_WORD" in refusal(TRIGGER_WORD="caf\udce9")


# ---- names


def test_no_name_of_a_family_or_of_a_folder_means_a_miniature():
    """Somebody who writes it wants the real one."""
    for name, (family, model) in base_models().items():
        if model.is_miniature:
            for text in (family, family.replace("_", "-"), family.replace("_", " "), model.source):
                try:
                    chosen = read(BASE_MODEL=text).model.base_model
                except SettingsError:
                    continue
                assert chosen != name, text


def test_an_unknown_parameter_is_refused_with_the_nearest_name():
    assert "did you mean PARAMS_LEARNING_SCHEDULER?" in refusal(PARAMS_LEARN_SCHEDULER="cosine")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("LEARNING_RAT", "PARAMS_LEARNING_RATE"),
        ("LERNING_RATE", "PARAMS_LEARNING_RATE"),
        ("BASE_MODELL", "BASE_MODEL"),
        ("DATASET_NAM", "DATASET_NAME"),
        ("PARAM_SEED", "PARAMS_SEED"),
        ("params_sed", "PARAMS_SEED"),
        ("BASEMODEL", "BASE_MODEL"),
        ("PARAMSMAXSTEPS", "PARAMS_MAX_STEPS"),
        ("HF_TOKNE", "HF_TOKEN"),
    ],
)
def test_a_mistyped_name_is_refused_with_the_right_one(typed, meant):
    assert f"'{typed}' is not a variable. Fix: did you mean {meant}?" in refusal(**{typed: "1"})


def test_an_unrelated_environment_is_never_a_problem():
    unrelated = """PATH HOME PWD SHLVL LANG LC_ALL HOSTNAME TERM USER SEED DEBUG PYTHONPATH LD_LIBRARY_PATH CUDA_HOME
    CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES RUNPOD_POD_ID RUNPOD_API_KEY RUNPOD_GPU_COUNT RUNPOD_TCP_PORT_22
    PUBLIC_KEY JUPYTER_PASSWORD HF_HUB_CACHE HF_HUB_OFFLINE HF_DATASETS_CACHE HF_TOKEN_PATH TORCH_HOME
    OMP_NUM_THREADS TRANSFORMERS_CACHE XDG_CACHE_HOME HTTP_PROXY https_proxy NO_PROXY KUBERNETES_SERVICE_HOST
    MODEL DATASET OUTPUT TOKEN CCACHE_PATH CONFIG COMPILE PRECISION JAVA_HOME NUM_NODES _"""
    assert read(**dict.fromkeys(unrelated.split(), "x")) == read()


def typos(name: str) -> set[str]:
    letters = string.ascii_uppercase + "_"
    cuts = [(name[:i], name[i:]) for i in range(len(name) + 1)]
    found = {a + b[1:] for a, b in cuts if b} | {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    found |= {a + c + b for a, b in cuts for c in letters} | {a + c + b[1:] for a, b in cuts if b for c in letters}
    return found - set(NAMES) - {""}


def test_nearly_all_typos_of_one_character_are_refused_with_the_right_name():
    rng, right, total = random.Random(1), 0, 0
    for name in NAMES:
        some = rng.sample(sorted(typos(name)), 40)
        message = refusal(**dict.fromkeys(some, "1"))
        right += sum(f"{typo!r} is not a variable. Fix: did you mean {name}?" in message for typo in some)
        total += len(some)
    assert right / total >= 0.99


@given(st.text("ABC_", max_size=8), st.text("ABC_", max_size=8))
@hypothesis_settings(deadline=None)
def test_one_edit_is_a_distance_of_damerau_and_levenshtein_of_at_most_1(a, b):
    letters = sorted(set(a + b))
    cuts = [(a[:i], a[i:]) for i in range(len(a) + 1)]
    near = {a} | {x + y[1:] for x, y in cuts} | {x + y[1:2] + y[:1] + y[2:] for x, y in cuts}
    near |= {x + c + y for x, y in cuts for c in letters} | {x + c + y[1:] for x, y in cuts if y for c in letters}
    assert one_edit_apart(a, b) == (b in near)


# ---- CONFIG_JSON


def test_one_variable_may_carry_all_others():
    config = {"PARAMS_SEED": 7, "PARAMS_SPLIT_QKV": True, "PARAMS_LEARNING_RATE": 1e-5, "TRIGGER_WORD": None}
    settings = read(CONFIG_JSON=json.dumps({**config, "DATASET_CONFIG": {"datasets": []}}))
    assert (settings.training.seed, settings.adapter.split_qkv, settings.training.learning_rate) == (7, True, 1e-5)
    assert json.loads(settings.data.dataset_config or "") == {"datasets": []} and settings.data.trigger_word is None


def test_a_variable_set_by_itself_wins():
    config = json.dumps({"PARAMS_SEED": 7, "PARAMS_NETWORK_DIM": 8})
    settings = read(CONFIG_JSON=config, PARAMS_SEED="1", PARAMS_NETWORK_DIM="")
    assert (settings.training.seed, settings.adapter.network_dim) == (1, 8)


@pytest.mark.parametrize(
    "text", ["[]", "{", "1", '{"A": NaN}', "{'PARAMS_SEED' 1}", '{"PARAMS_SEED": 1, "PARAMS_SEED": 2}', "[" * 99999]
)
def test_anything_but_an_object_is_refused(text):
    assert "CONFIG_JSON is not a JSON object" in refusal(CONFIG_JSON=text)


@pytest.mark.parametrize("name", ["PARAMS_SEEDS", "SEEDY", "CONFIG_JSON", "PATH", ""])
def test_unknown_names_in_it_are_refused(name):
    assert f"CONFIG_JSON: {name!r} is not a variable" in refusal(CONFIG_JSON=json.dumps({name: 1}))


def test_variables_inside_an_object_are_said_to_belong_beside_the_others():
    told = refusal(CONFIG_JSON=json.dumps({"params": {"lr": 1e-4}}))
    assert "'params' holds an object" in told and "beside the others" in told and "did you mean" not in told


# ---- secrets


def test_a_secret_shows_itself_only_when_asked_to():
    secret = read(HF_TOKEN="hf_canary123").model.hf_token
    assert secret is not None and secret.reveal() == "hf_canary123"
    assert (repr(secret), str(secret), f"{secret}") == ("***",) * 3 and secret == Secret("hf_canary123")


def test_the_token_has_four_forms(tmp_path):
    file = tmp_path / "token"
    file.write_text("hf_canary123\n")
    forms: list[dict[str, str]] = [{"HF_TOKEN": "hf_canary123"}, {"HUGGING_FACE_HUB_TOKEN": "hf_canary123"}]
    forms += [{"HF_TOKEN_FILE": str(file)}, {"CONFIG_JSON": '{"HF_TOKEN": "hf_canary123"}'}]
    assert [read(**form).model.hf_token for form in forms] == [Secret("hf_canary123")] * 4


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_a_token_file_that_has_none_is_refused(tmp_path, content):
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    assert "HF_TOKEN_FILE" in refusal(HF_TOKEN_FILE=str(file))


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "HF_TOKE", "PARAMS_TOKEN", "CONFIG_JSON", "PARAMS_SEED", "DATASET_SPLITS"]
)
def test_a_token_is_in_no_message(name):
    assert "canary" not in refusal(**{name: "hf_canary123 with a space"})


def test_a_token_is_in_no_repr():
    assert "canary" not in repr(read(HF_TOKEN="hf_canary123"))


# ---- anything at all


@given(st.dictionaries(st.sampled_from(NAMES), st.text(), max_size=6))
@hypothesis_settings(max_examples=200, deadline=None)
def test_any_text_is_a_setting_or_a_settings_error(variables):
    outcome(variables)


@given(st.dictionaries(st.text(min_size=1), st.text(), max_size=4))
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_environment_is_settings_or_a_settings_error(variables):
    outcome(variables)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(
    st.dictionaries(st.sampled_from(NAMES), LEAVES | st.lists(LEAVES) | st.dictionaries(st.text(), LEAVES), max_size=6)
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_any_json_is_settings_or_a_settings_error(value):
    outcome({"CONFIG_JSON": json.dumps(value)})


def outcome(variables: dict[str, str]) -> Any:
    """Never a traceback; what is accepted is finite and can be written to a file."""
    try:
        settings = read_settings({"BASE_MODEL": BASE, **variables})
    except SettingsError as problem:
        assert str(problem).isprintable() or "\n  - " in str(problem)
        return
    for section in SECTIONS:
        for field in section_rows(section):
            value = getattr(getattr(settings, section), field)
            assert not isinstance(value, float) or abs(value) < 1e9
            json.dumps(str(value)).encode()
