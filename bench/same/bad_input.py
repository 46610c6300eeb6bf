"""Wrong inputs, and unusual ones that are right: each a change of the environment of a job that could run.

<data> stands for the folder of input files (`data.py`), <tree> for the tree that is recorded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

Environment = dict[str, str]


def _dataset(own: Mapping[str, object], subset: Mapping[str, object]) -> Environment:
    """DATASET_CONFIG with one dataset, which has the keys `own` and one subset."""
    datasets = [{"resolution": 128, **own, "subsets": [subset]}]
    return {"DATASET_CONFIG": json.dumps({"datasets": datasets})}


def _prompts(*prompts: object) -> Environment:
    return {"SAMPLE_PROMPTS": json.dumps(prompts)}


_VARIABLES: dict[str, Environment] = {
    "misspelt variable": {"PARAMS_LEARNING_RAT": "1"},
    "misspelt without prefix": {"LEARNING_RATE": "1", "DATASET_NAM": "x", "params_seed": "1"},
    "unknown variable": {"PARAMS_LR_SCHEDULER": "cosine", "PARAMS_NOPE": "1"},
    "text for a number": {"PARAMS_NETWORK_DIM": "many", "PARAMS_LEARNING_RATE": "1e-4;rm"},
    "numbers that are not finite": {"PARAMS_LEARNING_RATE": "nan", "PARAMS_WEIGHT_DECAY": "inf"},
    "whole numbers": {"PARAMS_MAX_EPOCHS": "1.0", "PARAMS_MAX_STEPS": "1_000", "PARAMS_SEED": "0x10"},
    "below the range": {"PARAMS_NETWORK_DIM": "0", "PARAMS_NETWORK_ALPHA": "0", "PARAMS_SEED": "-1"},
    "above the range": {"PARAMS_SEED": "4294967296", "PARAMS_EMA_DECAY": "1", "PARAMS_CAPTION_DROPOUT_RATE": "1.01"},
    "more ranges": {
        "KEEP_CHECKPOINTS": "0",
        "PARAMS_MAX_GRAD_NORM": "-1",
        "PARAMS_MIN_SNR_GAMMA": "1001",
        "PARAMS_NOISE_OFFSET": "11",
        "PARAMS_STEP_TIMEOUT": "-1",
        "MAX_RUNTIME": "0",
        "MEMORY_LIMIT_GIB": "0",
        "NUM_GPUS": "65",
        "PARAMS_GUIDANCE_SCALE": "101",
        "PARAMS_D_COEF": "0",
    },
    "resolutions": {"PARAMS_RESOLUTION": "512x512x512"},
    "a small resolution": {"PARAMS_RESOLUTION": "8"},
    "no switch": {"STRICT_DATASET": "maybe", "PARAMS_COMPILE": "sometimes"},
    "no model": {"BASE_MODEL": ""},
    "unknown model": {"BASE_MODEL": "fluks"},
    "unknown choices": {
        "PARAMS_OPTIMIZER_TYPE": "prodgy",
        "PARAMS_LEARNING_SCHEDULER": "cosin",
        "PARAMS_LORA_TYPE": "lokr",
        "PARAMS_PRECISION": "fp4",
        "PARAMS_ATTENTION": "xformers",
        "PARAMS_OFFLOAD": "disk",
        "BACKEND": "mps",
        "ON_FINISH": "sleep",
        "PARAMS_TIMESTEP_SAMPLING": "cubic",
    },
    "timestep sampling of others": {"BASE_MODEL": "mini-sdxl", "PARAMS_TIMESTEP_SAMPLING": "flux_shift"},
    "optimiser arguments": {"PARAMS_OPTIMIZER_ARGS": "bettas=(0.9,0.99)"},
    "no optimiser arguments": {"PARAMS_OPTIMIZER_ARGS": "betas"},
    "optimiser arguments elsewhere": {"PARAMS_OPTIMIZER_ARGS": "lr=1 weight_decay=0.1 eps=small betas=1"},
    "optimiser arguments twice": {"PARAMS_OPTIMIZER_ARGS": "a=1 a=2"},
    "output names": {"OUTPUT_NAME": "../up"},
    "no repository": {"PUSH_TO_HUB": "not a repository"},
    "target modules": {"PARAMS_TARGET_MODULES": "attn.to_q, $(id)"},
    "a token with spaces": {"HF_TOKEN": "hf_canary123 and more"},
    "a token file that is not there": {"HF_TOKEN_FILE": "/nowhere/token"},
    "bad bytes": {"TRIGGER_WORD": "caf\udce9"},
    "many problems": {"PARAMS_NETWORK_DIM": "x", "PARAMS_SEED": "-1", "BASE_MODEL": "no", "CONFIG_JSON": "["},
    "CONFIG_JSON that is none": {"CONFIG_JSON": "{not json"},
    "CONFIG_JSON that is a list": {"CONFIG_JSON": "[]"},
    "CONFIG_JSON with unknown names": {"CONFIG_JSON": '{"PARAMS_SEEDS": 1, "SEED": 2}'},
    "CONFIG_JSON with a key twice": {"CONFIG_JSON": '{"PARAMS_SEED": 1, "PARAMS_SEED": 2}'},
}
_TOGETHER: dict[str, Environment] = {
    "a schedule for schedule-free": {
        "PARAMS_OPTIMIZER_TYPE": "adamw-schedulefree",
        "PARAMS_LEARNING_SCHEDULER": "cosine",
    },
    "warm-up without": {"PARAMS_WARMUP_STEPS": "10"},
    "second rate with prodigy": {"PARAMS_TEXT_ENCODER_LR": "1e-4"},
    "too many rates": {"PARAMS_TEXT_ENCODER_LR": "1,1,1"},
    "min-SNR with flow": {"PARAMS_MIN_SNR_GAMMA": "5", "PARAMS_PREDICTION_TYPE": "v_prediction"},
    "flow shift with noise": {
        "BASE_MODEL": "mini-sdxl",
        "PARAMS_DISCRETE_FLOW_SHIFT": "3",
        "PARAMS_LOSS_WEIGHTING": "cosmap",
    },
    "epsilon and zero SNR": {
        "BASE_MODEL": "mini-sdxl",
        "PARAMS_PREDICTION_TYPE": "epsilon",
        "PARAMS_ZERO_TERMINAL_SNR": "true",
    },
    "validation without images": {"PARAMS_VALIDATE_EVERY_N_STEPS": "5"},
    "DoRA of a part of q, k, v": {"PARAMS_LORA_TYPE": "dora", "PARAMS_TARGET_MODULES": "attn.to_q"},
    "no such device": {"BACKEND": "cuda"},
    "full size without an accelerator": {"BASE_MODEL": "flux", "BACKEND": "auto"},
    "offload on a CPU": {"PARAMS_OFFLOAD": "activations"},
    "weights offloaded on a CPU": {"PARAMS_OFFLOAD": "weights"},
    "recorded attention on a CPU": {"PARAMS_ATTENTION": "flash_4"},
    "cost without a price": {"MAX_COST": "5"},
}
_FILES: dict[str, Environment] = {
    "missing dataset": {"DATASET_NAME": "/nowhere/at/all"},
    "no dataset": {"DATASET_NAME": ""},
    "an empty dataset": {"DATASET_NAME": "<data>/empty"},
    "an archive of another kind": {"DATASET_NAME": "<data>/images.rar"},
    "a missing archive": {"DATASET_NAME": "<data>/images.zip"},
    "a revision of a folder": {"DATASET_REVISION": "main"},
    "a LoRA that is not there": {"PARAMS_RESUME_FROM": "/nowhere/x.safetensors"},
    "a damaged LoRA": {"PARAMS_RESUME_FROM": "<data>/garbage.safetensors"},
    "no LoRA": {"PARAMS_RESUME_FROM": "<data>/no-lora.safetensors"},
    "a LoRA of another family": {"PARAMS_RESUME_FROM": "<data>/of-sdxl.safetensors"},
    "a folder that is no state": {"PARAMS_RESUME_FROM": "<data>/few"},
    "no LoRA file": {"PARAMS_RESUME_FROM": "<data>/model.ckpt"},
    "a pickled model": {"MODEL_PATH": "<data>/model.ckpt"},
    "a model of a foreign format": {"MODEL_PATH": "<data>/model.gguf"},
    "a model that is not there": {"MODEL_PATH": "/nowhere/model"},
    "an empty model folder": {"MODEL_PATH": "<data>/no-model"},
    "a LoRA as a model": {"MODEL_PATH": "<data>/of-sdxl.safetensors"},
    "a damaged model": {"MODEL_PATH": "<data>/garbage.safetensors"},
    "a config without a file": {"MODEL_CONFIG_PATH": "<data>/no-model"},
    "a revision of a model folder": {"MODEL_REVISION": "main"},
    "parts": {"VAE_PATH": "<data>/a-file", "CLIP_G_PATH": "<data>/few", "T5_PATH": "none"},
    "output in a file": {"OUTPUT_PATH": "<data>/a-file"},
    "output below a file": {"OUTPUT_PATH": "<data>/a-file/out"},
    "output that cannot be written": {"OUTPUT_PATH": "/proc/kiln"},
    "a config that is not there": {"DATASET_CONFIG": "/nowhere/dataset.json"},
    "a config that is no JSON": {"DATASET_CONFIG": "<data>/bad.json"},
    "a config that is no TOML": {"DATASET_CONFIG": "<data>/bad.toml"},
    "a config that is not UTF-8": {"DATASET_CONFIG": "<data>/latin.json"},
    "a config by another protocol": {"DATASET_CONFIG": "ftp://nowhere/dataset.json"},
    "prompts that are not there": {"SAMPLE_PROMPTS": "/nowhere/prompts.txt"},
    "bad prompts": {"SAMPLE_PROMPTS": "<data>/prompts-bad.txt"},
}
_CONTENT: dict[str, Environment] = {
    "unknown key of a dataset": _dataset({"batch_sise": 1}, {}),
    "a key of the wrong level": _dataset({"image_dir": "x"}, {"resolution": 64}),
    "no dataset in dataset.json": {"DATASET_CONFIG": '{"general": {}}'},
    "a strange top key": {"DATASET_CONFIG": '{"datasets": [{"subsets": [{}]}], "generall": {}}'},
    "an empty list of subsets": {"DATASET_CONFIG": '{"datasets": [{"resolution": 128, "subsets": []}]}'},
    "values of a dataset": _dataset({"batch_size": 0, "enable_bucket": "yes", "validation_split": 1.5}, {}),
    "values of a subset": _dataset({}, {"num_repeats": 0, "caption_dropout_rate": 2, "flip_aug": 1}),
    "an unknown interpolation": _dataset({}, {"resize_interpolation": "magic"}),
    "separator and extension": _dataset({}, {"caption_separator": "", "caption_extension": "txt"}),
    "a resolution that does not fit": _dataset({"resolution": [100, 90], "enable_bucket": False}, {}),
    "bucket steps": _dataset({"enable_bucket": True, "bucket_reso_steps": 24}, {}),
    "bucket limits": _dataset({"enable_bucket": True, "min_bucket_reso": 512, "max_bucket_reso": 256}, {}),
    "regularisation alone": _dataset({}, {"is_reg": True}),
    "class images of a folder": _dataset({}, {"class_prompt": "a pot", "image_dir": "<data>/reg"}),
    "class images without a prompt": _dataset({}, {"num_class_images": 3}),
    "class images that are not regularisation": _dataset({}, {"class_prompt": "a pot", "is_reg": False}),
    "two sources": _dataset({}, {"image_dir": "<data>/few", "dataset": "org/name"}),
    "no name of the Hub": _dataset({}, {"dataset": "a/b/c"}),
    "a split of a folder": _dataset({}, {"image_dir": "<data>/few", "split": "train"}),
    "an image folder that is not there": _dataset({}, {"image_dir": "/nowhere"}),
    "prompts that are no list": {"SAMPLE_PROMPTS": '{"a": 1}'},
    "unknown key of a prompt": _prompts({"prompt": "a", "widht": 64}),
    "values of a prompt": _prompts({"prompt": "a", "width": 8, "seed": -1}, {"prompt": 3}, 7),
    "a prompt with a key twice": _prompts({"prompt": "a", "w": 64, "width": 64}),
    "flags of a prompt": _prompts("a --w 64 --w 64", "--w 64", "b --steps 3", "c --g x"),
}
BAD_INPUT: dict[str, Environment] = _VARIABLES | _TOGETHER | _FILES | _CONTENT

# Refused by the trainer, which alone opens images; these jobs run without --check.
BAD_DATA: dict[str, Environment] = {
    "broken images": {"DATASET_NAME": "<data>/broken"},
    "strict": {"DATASET_NAME": "<data>/messy", "STRICT_DATASET": "true"},
    "bad metadata": {"DATASET_NAME": "<data>/bad-metadata"},
    "target modules that are nowhere": {"PARAMS_TARGET_MODULES": "attn.nothing"},
    "an archive that escapes": {"DATASET_NAME": "<data>/escapes.zip"},
}

ACCEPTED: dict[str, Environment] = {
    "no captions": {"DATASET_NAME": "<data>/silent"},
    "CONFIG_JSON": {"CONFIG_JSON": '{"PARAMS_NETWORK_DIM": 8, "PARAMS_SEED": "3"}', "PARAMS_SEED": "5"},
    "capitals and spaces": {"BASE_MODEL": "MINI-FLUX", "PARAMS_COMPILE": " AUTO ", "PARAMS_LEARNING_RATE": " .5\r"},
    "arguments": {"PARAMS_OPTIMIZER_ARGS": "betas=0.8,0.99 slice_p=2 safeguard_warmup=true"},
    "a wide resolution": {"PARAMS_RESOLUTION": "160x96"},
    "what is not used": {"PARAMS_NUM_CYCLES": "3", "PARAMS_D_COEF": "2", "PARAMS_OPTIMIZER_TYPE": "adamw"},
    "prompts as objects": _prompts("a --w 64", {"prompt": "b", "negative_prompt": "c", "scale": 2}),
    "prompts with defaults": {"SAMPLE_PROMPTS": '{"prompt": {"width": 64, "subset": [{"prompt": "a"}]}}'},
    "a batch size of its own": {"PARAMS_BATCH_SIZE": "auto"},
    "a limit": {"MAX_RUNTIME": "2", "MEMORY_LIMIT_GIB": "1000", "ON_FINISH": "stop"},
}
