"""Every variable reaches the plan, or what reads it instead: one table over all of them, and none is left out.

What the trainer makes of each field of the plan is in tests/trainer/job/test_wires.py.
"""

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.settings.aliases import VARIABLES
from entrypoint.settings.read import read_settings
from entrypoint.settings.variables import ROWS, SECTIONS, section_rows
from tests.support.machines import CPU, LARGE_GPU

NOW = datetime(2026, 1, 2, tzinfo=UTC)
HUB = {"BASE_MODEL": "mini-flux", "DATASET_NAME": "someone/pictures", "BACKEND": "cpu"}
SDXL = {**HUB, "BASE_MODEL": "mini-sdxl"}
CAPTIONED = {**HUB, "CAPTION_WITH": "org/model"}
ADAMW = {**HUB, "PARAMS_OPTIMIZER_TYPE": "adamw"}
HELD_OUT = {**HUB, "DATASET_CONFIG": '{"datasets": [{"resolution": 64, "validation_split": 0.5, "subsets": [{}]}]}'}
GPU = {**HUB, "BACKEND": "cuda"}


def of_source(name):
    return lambda plan: getattr(plan.data.datasets[0].subsets[0].source, name)


def of_subset(name):
    return lambda plan: getattr(plan.data.datasets[0].subsets[0], name)


def field(path):
    section, _, name = path.partition(".")
    return lambda plan: getattr(getattr(plan, section), name)


# variable → what is set besides, its value, where it is in the plan, and what is there
PLANNED = {
    "BASE_MODEL": (HUB, "mini-sd3", field("model.base"), "mini-sd3"),
    "MODEL_PATH": (HUB, "someone/model", field("model.source"), "someone/model"),
    "MODEL_REVISION": ({**HUB, "MODEL_PATH": "someone/model"}, "v2", field("model.revision"), "v2"),
    "DATASET_NAME": (HUB, "another/name", of_source("location"), "another/name"),
    "DATASET_CONFIG": (HUB, HELD_OUT["DATASET_CONFIG"], lambda plan: plan.data.datasets[0].resolution, (64, 64)),
    "DATASET_REVISION": (HUB, "v3", of_source("revision"), "v3"),
    "DATASET_SPLIT": (HUB, "test", of_source("split"), "test"),
    "DATASET_SUBSET": (HUB, "faces", of_source("subset"), "faces"),
    "IMAGE_COLUMN": (HUB, "picture", of_source("image_column"), "picture"),
    "CAPTION_COLUMN": (HUB, "words", of_source("caption_column"), "words"),
    "TRIGGER_WORD": (HUB, "ohwx", of_subset("trigger_word"), "ohwx"),
    "CAPTION_WITH": (HUB, "org/model@v2", lambda p: p.data.captioner and p.data.captioner.source, "org/model"),
    "CAPTION_PROMPT": (CAPTIONED, "style", of_subset("caption_prompt"), "style"),
    "CAPTION_MAX_TOKENS": (CAPTIONED, "33", lambda plan: plan.data.captioner.max_tokens, 33),
    "CAPTION_OVERWRITE": (CAPTIONED, "true", lambda plan: plan.data.captioner.overwrite, True),
    "CAPTION_WRITE": (
        {**CAPTIONED, "DATASET_NAME": str(Path(__file__).parent)}, "true",
        lambda plan: plan.data.captioner.write, True,
    ),
    "STRICT_DATASET": (HUB, "true", field("data.strict"), True),
    "MAX_CACHE_GIB": (HUB, "40", field("output.max_cache_bytes"), 40 * 2**30),
    "CACHE_PATH": (HUB, "/somewhere/cache", field("output.cache"), "/somewhere/cache"),
    "PARAMS_BATCH_SIZE": (HUB, "3", lambda plan: plan.data.datasets[0].batch_size, 3),
    "PARAMS_RESOLUTION": (HUB, "96x48", lambda plan: plan.data.datasets[0].resolution, (96, 48)),
    "PARAMS_NUM_REPEATS": (HUB, "5", of_subset("num_repeats"), 5),
    "PARAMS_CAPTION_DROPOUT_RATE": (HUB, "0.25", field("train.caption_dropout_rate"), 0.25),
    "PARAMS_MAX_EPOCHS": (HUB, "17", field("train.max_epochs"), 17),
    "PARAMS_MAX_STEPS": (HUB, "18", field("train.max_steps"), 18),
    "PARAMS_OPTIMIZER_TYPE": (HUB, "adafactor", field("optim.name"), "adafactor"),
    "PARAMS_OPTIMIZER_ARGS": (ADAMW, "eps=1e-5", field("optim.args"), {"eps": 1e-5}),
    "PARAMS_LEARNING_RATE": (ADAMW, "3e-5", field("optim.learning_rate"), 3e-5),
    "PARAMS_TEXT_ENCODER_LR": (ADAMW, "2e-5", field("optim.text_encoders"), {"text_encoder": 2e-5}),
    "PARAMS_D_COEF": (HUB, "0.7", lambda plan: plan.optim.args["d_coef"], 0.7),
    "PARAMS_WEIGHT_DECAY": (HUB, "0.02", field("optim.weight_decay"), 0.02),
    "PARAMS_LEARNING_SCHEDULER": (ADAMW, "linear", field("optim.scheduler"), "linear"),
    "PARAMS_WARMUP_STEPS": (
        {**ADAMW, "PARAMS_LEARNING_SCHEDULER": "cosine"}, "6", field("optim.warmup_steps"), 6,
    ),
    "PARAMS_NUM_CYCLES": (
        {**ADAMW, "PARAMS_LEARNING_SCHEDULER": "cosine_with_restarts"}, "4", field("optim.num_cycles"), 4,
    ),
    "PARAMS_GRADIENT_ACCUMULATION": (HUB, "4", field("train.gradient_accumulation"), 4),
    "PARAMS_MAX_GRAD_NORM": (HUB, "0", field("train.max_grad_norm"), 0.0),
    "PARAMS_SEED": (HUB, "0", field("train.seed"), 0),
    "PARAMS_TIMESTEP_SAMPLING": (HUB, "uniform", field("train.timestep_sampling"), "uniform"),
    "PARAMS_DISCRETE_FLOW_SHIFT": (HUB, "2.5", field("train.discrete_flow_shift"), 2.5),
    "PARAMS_LOSS_WEIGHTING": (HUB, "cosmap", field("train.loss_weighting"), "cosmap"),
    "PARAMS_PREDICTION_TYPE": (SDXL, "v_prediction", field("train.prediction_type"), "v_prediction"),
    "PARAMS_ZERO_TERMINAL_SNR": (SDXL, "false", field("train.zero_terminal_snr"), False),
    "PARAMS_MAX_TOKEN_LENGTH": (SDXL, "225", field("train.max_token_length"), 225),
    "PARAMS_MIN_SNR_GAMMA": (SDXL, "5", field("train.min_snr_gamma"), 5.0),
    "PARAMS_GUIDANCE_SCALE": (HUB, "0", field("train.guidance_scale"), 0.0),
    "PARAMS_NOISE_OFFSET": (HUB, "0", field("train.noise_offset"), 0.0),
    "PARAMS_PRIOR_LOSS_WEIGHT": (HUB, "0", field("train.prior_loss_weight"), 0.0),
    "PARAMS_EMA_DECAY": (HUB, "0.99", field("train.ema_decay"), 0.99),
    "PARAMS_MAX_SKIPPED_STEPS": (HUB, "0", field("train.max_skipped_steps"), 0),
    "PARAMS_MAX_LOSS_SPIKE": (HUB, "0", field("train.max_loss_spike"), 0.0),
    "PARAMS_LORA_TYPE": (HUB, "rslora", field("lora.kind"), "rslora"),
    "PARAMS_NETWORK_DIM": (HUB, "5", field("lora.rank"), 5),
    "PARAMS_NETWORK_ALPHA": (HUB, "2.5", field("lora.alpha"), 2.5),
    "PARAMS_SPLIT_QKV": (HUB, "true", field("lora.split_qkv"), True),
    "PARAMS_TARGET_MODULES": (HUB, "attn.to_q,proj_mlp", field("lora.targets"), ("attn.to_q", "proj_mlp")),
    "PARAMS_TRAINING_ADAPTER": (HUB, "a/b/c.safetensors", field("model.training_adapter"), "a/b/c.safetensors"),
    "RESUME_WITH_CHANGES": (HUB, "true", field("output.resume_with_changes"), True),
    "BACKEND": ({**GPU, "BACKEND": ""}, "cpu", field("engine.device"), "cpu"),
    "NUM_GPUS": (GPU, "2", field("engine.num_gpus"), 2),
    "NODES": (GPU, "3", field("engine.nodes"), 3),
    "PARAMS_PRECISION": (GPU, "fp16", lambda p: (p.engine.precision, p.engine.dtype), ("fp16", "float16")),
    "PARAMS_GRADIENT_CHECKPOINTING": (GPU, "true", field("engine.recompute"), "all"),
    "PARAMS_OFFLOAD": (GPU, "weights", field("engine.offload"), "weights"),
    "PARAMS_COMPILE": (GPU, "false", field("engine.compile"), False),
    "PARAMS_ATTENTION": (HUB, "_native_math", field("engine.attention"), "_native_math"),
    "PARAMS_DETERMINISTIC": (HUB, "true", field("engine.deterministic"), True),
    "MEMORY_LIMIT_GIB": (GPU, "20", field("engine.memory_limit_gib"), 20.0),
    "PARAMS_STEP_TIMEOUT": (HUB, "0", field("engine.step_timeout_s"), 0.0),
    "OUTPUT_PATH": (HUB, "/somewhere/out", field("output.path"), "/somewhere/out"),
    "MAX_RUNTIME": (HUB, "1.5", field("quote.limit_hours"), 1.5),
    "MAX_COST": ({**HUB, "PRICE_PER_HOUR": "0.5"}, "2.5", field("quote.limit_hours"), 5.0),
    "PRICE_PER_HOUR": (HUB, "0.75", field("quote.price_per_hour"), 0.75),
    "OUTPUT_NAME": (HUB, "mine", lambda plan: (plan.output.name, plan.output.requested), ("mine", "mine")),
    "SAMPLE_PROMPTS": (HUB, '["a fox"]', lambda plan: [p.text for p in plan.prompts], ["a fox"]),
    "PARAMS_SAMPLE_EVERY_N_STEPS": (HUB, "0", field("output.sample_every"), 0),
    "SAMPLE_STRENGTHS": (HUB, "0,0.5", field("output.sample_strengths"), (0.0, 0.5)),
    "PARAMS_SAVE_EVERY_N_STEPS": (HUB, "12", field("output.save_every"), 12),
    "PARAMS_VALIDATE_EVERY_N_STEPS": (HELD_OUT, "13", field("output.validate_every"), 13),
    "KEEP_CHECKPOINTS": (HUB, "4", field("output.keep_checkpoints"), 4),
    "PARAMS_SAVE_PRECISION": (HUB, "bf16", field("output.save_precision"), "bf16"),
}  # fmt: skip
# What the plan takes from a file that must exist: variable → the test that has one.
FILES = {
    "MODEL_CONFIG_PATH": "tests/jobs/test_local_weights.py",
    "VAE_PATH": "tests/jobs/test_local_weights.py",
    "CLIP_L_PATH": "tests/jobs/test_local_weights.py",
    "CLIP_G_PATH": "tests/entrypoint/planning/test_weight_kinds.py",
    "T5_PATH": "tests/jobs/test_local_weights.py",
    "TEXT_ENCODER_PATH": "tests/trainer/base_model/test_single_file.py",
    "PARAMS_RESUME_FROM": "tests/trainer/job/test_job_loop.py",
}
# What no plan has: secrets, and what the entrypoint alone does. Variable → value, as it is in the settings.
NOT_PLANNED = {
    "HF_TOKEN": ("hf_abcdefgh", "***"),
    "HF_WRITE_TOKEN": ("hf_abcdefgh", "***"),
    "HF_HOME": ("/somewhere/hf", "/somewhere/hf"),
    "NODES_TIMEOUT": ("60", "60.0"),
    "CIVITAI_TOKEN": ("abcdefgh12345678", "***"),
    "DOWNLOAD_TOKENS": ("example.com=abcdefgh", "{'example.com': ***}"),
    "PUSH_TO_HUB": ("me/lora", "me/lora"),
    "UPLOAD_TO": ("s3://bucket/loras", "s3://bucket/loras"),
    "WEBHOOK_URL": ("https://example.com/x", "(***,)"),
    "WEBHOOK_SECRET": ("abcdef", "***"),
    "LOG_WITH": ("wandb", "wandb"),
    "MONITOR_PORT": ("9000", "9000"),
    "MONITOR_TOKEN": ("abcdefghijklmnop", "***"),
    "ON_FINISH": ("idle", "idle"),
    "JOBS": ("jobs.jsonl", "jobs.jsonl"),
    "SWEEP": ("PARAMS_SEED=1,2", "PARAMS_SEED=1,2"),
}


NEEDS = {
    "HF_WRITE_TOKEN": {"PUSH_TO_HUB": "me/lora"},
    "WEBHOOK_SECRET": {"WEBHOOK_URL": "https://example.com/x"},
}
TWO_GPUS = dataclasses.replace(LARGE_GPU, count=2)


def plan_of(variables):
    asked = {name: value for name, value in variables.items() if value}
    machine = CPU if asked.get("BACKEND") == "cpu" else TWO_GPUS
    manifest = read_manifest(asked.get("DATASET_CONFIG"), asked.get("SAMPLE_PROMPTS"))
    return make_plan(read_settings(asked), manifest, machine, now=NOW)


@pytest.mark.parametrize("name", PLANNED)
def test_a_variable_reaches_the_plan_and_its_file(name):
    others, value, see, expected = PLANNED[name]
    plan = plan_of({**others, name: value})
    assert see(plan) == expected
    assert see(plan_of(others)) != expected
    assert see(type(plan).from_json(plan.to_json())) == expected
    assert name in plan.given


@pytest.mark.parametrize("alias", [alias for alias, name in VARIABLES.items() if name in PLANNED])
def test_another_trainers_name_reaches_the_same_place(alias):
    """Each alias once, and our own name in small letters beside it."""
    name = VARIABLES[alias]
    others, value, see, expected = PLANNED[name]
    others = {other: text for other, text in others.items() if other != name}
    plan = plan_of({**others, alias: value})
    assert see(plan) == expected
    assert see(plan_of({**others, name.removeprefix("PARAMS_").lower(): value})) == expected


@pytest.mark.parametrize("name", NOT_PLANNED)
def test_what_no_plan_has_is_in_the_settings(name):
    text, shown = NOT_PLANNED[name]
    variables = {**HUB, **NEEDS.get(name, {}), name: text}
    settings = read_settings(variables)
    for section in SECTIONS:
        for own, row in section_rows(section).items():
            if row.name == name:
                assert str(getattr(getattr(settings, section), own)) == shown
    usual, planned = (json.loads(plan_of(asked).to_json()) for asked in (HUB, variables))
    about_settings = ("given", "warnings")
    assert {k: v for k, v in usual.items() if k not in about_settings} == {
        k: v for k, v in planned.items() if k not in about_settings
    }


def test_every_variable_has_a_row():
    assert {*PLANNED, *FILES, *NOT_PLANNED} == ROWS.keys()
    for name, file in FILES.items():
        assert name in Path(file).read_text()
