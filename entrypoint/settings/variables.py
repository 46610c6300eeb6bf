"""Every environment variable: one row each. Reading (settings.py), help and README's table all come from here.

A row's default is text, as a user would write it. An empty default means "not set" (None); what the plan then
chooses is named in `otherwise`. A field is called like its variable, in small letters and without PARAMS_.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# ruff: noqa: RUF009 (`row` only makes a dataclasses.field)
from entrypoint.settings.row import Row, Secret, row
from trainer.spec.family import base_models, timestep_samplings
from trainer.spec.optimizers import OPTIMIZERS, SCHEDULERS
from trainer.spec.strategies import OFFLOADS
from trainer.spec.weight_formats import PRECISIONS

ACTIONS = ("exit", "stop", "terminate", "idle")


BACKENDS = {"cuda": "nvidia", "rocm": "amd", "cpu": "cpu"}  # a value of BACKEND → the vendor that it asks for
FORMATS = tuple(PRECISIONS)


GROUPS = {  # the field that each group begins with
    "base_model": "model",
    "dataset_name": "data",
    "max_epochs": "training",
    "lora_type": "adapter",
    "backend": "engine",
    "output_path": "output",
    "push_to_hub": "finish",
}
MANY = 10**8
OF_DATASET = "dataset.json's"
LORA_TYPES = ("lora", "rslora", "dora")
TEXT_RATE = "learning rate of the CLIP text encoders, or CLIP-L's and CLIP-G's"
# flash_4 (trainer.engine.attention.flash_attention_4), and those of diffusers' attention backends that torch itself
# carries: the others need
# packages that are not installed, or have no backward pass.
ATTENTION = ("native", "flash_4", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math", "flex")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for. None: not set, or auto."""

    # model
    base_model: str = row("BASE_MODEL", "choice", means="the model to train for", choices=base_models)
    model_path: str | None = row(
        "MODEL_PATH",
        "text",
        means="folder in diffusers layout, Hub repository, or .safetensors file, instead of the base model's own",
    )
    model_config_path: str | None = row(
        "MODEL_CONFIG_PATH",
        "text",
        means="folder or Hub repository with all that the file MODEL_PATH lacks: configs, tokenizers, other parts",
        otherwise="the base model's own",
    )
    vae_path: str | None = row("VAE_PATH", "text", means=".safetensors file or folder of the VAE alone")
    clip_l_path: str | None = row("CLIP_L_PATH", "text", means=".safetensors file or folder of CLIP-L alone")
    clip_g_path: str | None = row("CLIP_G_PATH", "text", means=".safetensors file or folder of CLIP-G alone")
    t5_path: str | None = row(
        "T5_PATH", "text", means=".safetensors file or folder of T5 alone; none: without it, where the model allows it"
    )
    model_revision: str | None = row("MODEL_REVISION", "text", means="branch, tag or commit of the model's repository")
    hf_token: Secret | None = row(
        "HF_TOKEN",
        "secret",
        means="access token of the Hugging Face Hub; also HUGGING_FACE_HUB_TOKEN, or HF_TOKEN_FILE with a file's path",
    )
    hf_home: Path = row("HF_HOME", "path", default="/workspace/hf", means="where downloads are kept")

    # data
    dataset_name: str | None = row(
        "DATASET_NAME",
        "text",
        means="Hub dataset, folder, or .zip or .tar archive (path or URL); needed unless DATASET_CONFIG names sources",
    )
    dataset_config: str | None = row(
        "DATASET_CONFIG",
        "text",
        means="dataset.json or .toml: path, URL, or the JSON itself",
        otherwise="the dataset.json of this program",
    )
    dataset_revision: str | None = row(
        "DATASET_REVISION", "text", means="branch, tag or commit of the Hub dataset DATASET_NAME"
    )
    dataset_split: str | None = row("DATASET_SPLIT", "text", means="split of Hub datasets", otherwise="train")
    image_column: str | None = row("IMAGE_COLUMN", "text", means="column of the pictures", otherwise="found")
    caption_column: str | None = row("CAPTION_COLUMN", "text", means="column of the captions", otherwise="found")
    trigger_word: str | None = row(
        "TRIGGER_WORD", "text", means="put before every caption, and before this program's own prompts"
    )
    strict_dataset: bool = row(
        "STRICT_DATASET", "switch", default="false", means="stop at an unusable picture instead of skipping it"
    )
    cache_path: Path = row("CACHE_PATH", "path", default="/workspace/cache", means="where encoded pictures are kept")
    batch_size: int | None = row(
        "PARAMS_BATCH_SIZE",
        "auto_integer",
        means="pictures at once; auto: fastest",
        low=1,
        high=4096,
        otherwise=OF_DATASET,
    )
    resolution: tuple[int, int] | None = row(
        "PARAMS_RESOLUTION",
        "size",
        means="training area in pixels: side, or WIDTHxHEIGHT",
        low=16,
        high=8192,
        otherwise=OF_DATASET,
    )
    num_repeats: int | None = row(
        "PARAMS_NUM_REPEATS",
        "integer",
        means="times that each picture is seen in an epoch",
        low=1,
        high=MANY,
        otherwise=OF_DATASET,
    )
    caption_dropout_rate: float | None = row(
        "PARAMS_CAPTION_DROPOUT_RATE", "number", means="share of empty captions", low=0, high=1, otherwise=OF_DATASET
    )

    # training
    max_epochs: int = row(
        "PARAMS_MAX_EPOCHS", "integer", default="5", means="passes over pictures times repeats", low=1, high=MANY
    )
    max_steps: int | None = row(
        "PARAMS_MAX_STEPS",
        "integer",
        means="optimiser steps; overrides PARAMS_MAX_EPOCHS",
        low=1,
        high=MANY,
        otherwise="by epochs",
    )
    optimizer_type: str = row(
        "PARAMS_OPTIMIZER_TYPE", "choice", default="prodigy", means="optimiser", choices=lambda: OPTIMIZERS
    )
    optimizer_args: dict[str, Any] = row(
        "PARAMS_OPTIMIZER_ARGS", "pairs", means="more arguments of the optimiser: key=value ..."
    )
    learning_rate: float | None = row(
        "PARAMS_LEARNING_RATE",
        "number",
        means="learning rate",
        above=0,
        high=1000,
        otherwise="the optimiser's: 1 with prodigy, 1e-4 with adamw",
    )
    text_encoder_lr: tuple[float, ...] = row(
        "PARAMS_TEXT_ENCODER_LR", "numbers", default="0", means=f"{TEXT_RATE}; 0: not trained", low=0, high=1000
    )
    d_coef: float | None = row(
        "PARAMS_D_COEF", "number", means="factor of the step size that Prodigy finds", above=0, high=1000, otherwise="2"
    )
    weight_decay: float = row("PARAMS_WEIGHT_DECAY", "number", default="0.1", means="weight decay", low=0, high=100)
    learning_scheduler: str = row(
        "PARAMS_LEARNING_SCHEDULER",
        "choice",
        default="constant",
        means="course of the learning rate",
        choices=lambda: SCHEDULERS,
    )
    warmup_steps: int = row(
        "PARAMS_WARMUP_STEPS", "integer", default="0", means="steps of a rising learning rate", low=0, high=MANY
    )
    num_cycles: int | None = row(
        "PARAMS_NUM_CYCLES",
        "integer",
        means="restarts of cosine_with_restarts",
        low=1,
        high=MANY,
        otherwise="a third of the epochs",
    )
    gradient_accumulation: int = row(
        "PARAMS_GRADIENT_ACCUMULATION", "integer", default="1", means="batches to a step", low=1, high=MANY
    )
    max_grad_norm: float = row(
        "PARAMS_MAX_GRAD_NORM", "number", default="1.0", means="largest gradient norm; 0 is no limit", low=0, high=1e6
    )
    seed: int = row("PARAMS_SEED", "integer", default="42", means="of all that is random", low=0, high=2**32 - 1)
    timestep_sampling: str | None = row(
        "PARAMS_TIMESTEP_SAMPLING",
        "choice",
        means="how noise levels are drawn, as far as the model has it",
        choices=timestep_samplings,
        otherwise="the model's",
    )
    discrete_flow_shift: float | None = row(
        "PARAMS_DISCRETE_FLOW_SHIFT",
        "number",
        means="shift of noise levels, with shift",
        above=0,
        high=1000,
        otherwise="the model's",
    )
    loss_weighting: str = row(
        "PARAMS_LOSS_WEIGHTING",
        "choice",
        default="none",
        means="weight of the loss by noise level; flow matching only",
        choices=lambda: ("none", "sigma_sqrt", "cosmap"),
    )
    prediction_type: str = row(
        "PARAMS_PREDICTION_TYPE",
        "choice",
        default="auto",
        means="what the model predicts; auto: what its scheduler says; not with flow matching",
        choices=lambda: ("auto", "epsilon", "v_prediction"),
    )
    zero_terminal_snr: bool | None = row(
        "PARAMS_ZERO_TERMINAL_SNR",
        "auto_switch",
        default="auto",
        means="whether the last noise level has no signal left; auto: what the scheduler says; not with flow matching",
    )
    min_snr_gamma: float = row(
        "PARAMS_MIN_SNR_GAMMA", "number", default="0", means="min-SNR loss weights, usually 5; 0: off", low=0, high=1000
    )
    guidance_scale: float = row(
        "PARAMS_GUIDANCE_SCALE", "number", default="1.0", means="embedded guidance, if there is any", low=0, high=100
    )
    noise_offset: float = row(
        "PARAMS_NOISE_OFFSET", "number", default="0.1", means="brightness noise added to each channel", low=0, high=10
    )
    prior_loss_weight: float = row(
        "PARAMS_PRIOR_LOSS_WEIGHT", "number", default="1.0", means="weight of regularisation pictures", low=0, high=1000
    )
    ema_decay: float = row(
        "PARAMS_EMA_DECAY",
        "number",
        default="0",
        means="decay of the averaged weights, 0.999 for example; 0 is off",
        low=0,
        high=0.999999,
    )
    max_skipped_steps: int = row(
        "PARAMS_MAX_SKIPPED_STEPS",
        "integer",
        default="3",
        means="steps whose loss or gradient is not finite, or a spike, that are skipped before the job stops",
        low=0,
        high=MANY,
    )
    max_loss_spike: float = row(
        "PARAMS_MAX_LOSS_SPIKE",
        "number",
        default="10",
        means="a loss is a spike above this many times the largest of the last 64; 0 is off",
        low=0,
        high=1e6,
    )

    # adapter
    lora_type: str = row(
        "PARAMS_LORA_TYPE", "choice", default="lora", means="few tools read dora", choices=lambda: LORA_TYPES
    )
    network_dim: int | None = row(
        "PARAMS_NETWORK_DIM",
        "integer",
        means="the LoRA's rank",
        low=1,
        high=4096,
        otherwise="32; or the resumed file's",
    )
    network_alpha: float = row(
        "PARAMS_NETWORK_ALPHA", "number", default="4", means="the LoRA counts alpha divided by rank", above=0, high=1e6
    )
    split_qkv: bool | None = row(
        "PARAMS_SPLIT_QKV",
        "auto_switch",
        default="auto",
        means="true: an adapter each for q, k and v; false: one together; auto: that, or as the resumed file has it",
    )
    target_modules: tuple[str, ...] | None = row(
        "PARAMS_TARGET_MODULES",
        "names",
        means="ends of the names of the layers that get adapters, with commas between",
        otherwise="the model's; or the resumed file's",
    )
    resume_from: str | None = row(
        "PARAMS_RESUME_FROM",
        "text",
        means="a LoRA file to start from (weights only), or a state folder (everything)",
        otherwise="an interrupted run in OUTPUT_PATH goes on by itself",
    )

    # engine
    backend: str = row("BACKEND", "choice", default="auto", means="what to run on", choices=lambda: ("auto", *BACKENDS))
    num_gpus: int = row("NUM_GPUS", "auto_integer", default="auto", means="GPUs to train on; auto: one", low=1, high=64)
    precision: str = row(
        "PARAMS_PRECISION", "choice", default="auto", means="format of the weights", choices=lambda: ("auto", *FORMATS)
    )
    gradient_checkpointing: bool | None = row(
        "PARAMS_GRADIENT_CHECKPOINTING",
        "auto_switch",
        default="auto",
        means="recompute instead of keeping: slower, less memory",
    )
    offload: str = row(
        "PARAMS_OFFLOAD",
        "choice",
        default="auto",
        means="what waits in the host's memory: what the backward pass needs, or that and the weights",
        choices=lambda: ("auto", *OFFLOADS),
    )
    compile: bool | None = row("PARAMS_COMPILE", "auto_switch", default="auto", means="compile the model's blocks")
    attention: str = row(
        "PARAMS_ATTENTION",
        "choice",
        default="auto",
        means="implementation of attention, by diffusers' names; flash_4: FlashAttention 4 (docs/docker.md)",
        choices=lambda: ("auto", *ATTENTION),
    )
    memory_limit_gib: float | None = row(
        "MEMORY_LIMIT_GIB", "number", means="GiB of a device that may be used", above=0, high=100_000, otherwise="all"
    )

    step_timeout: float | None = row(
        "PARAMS_STEP_TIMEOUT",
        "number",
        means="seconds without a step after which the job ends with 75; 0 is off",
        low=0,
        high=1e6,
        otherwise="20 times the usual step, at least 300",
    )

    # output
    output_path: Path = row("OUTPUT_PATH", "path", default="/workspace/output", means="where everything is written")
    output_name: str | None = row(
        "OUTPUT_NAME",
        "name",
        means="name of the LoRA file, without .safetensors",
        otherwise="hash of the job, and the start time",
    )
    sample_prompts: str | None = row(
        "SAMPLE_PROMPTS",
        "text",
        means="prompts.txt, .json or .toml: path, URL, or a JSON list itself",
        otherwise="the prompts.txt of this program",
    )
    sample_every_n_steps: int = row(
        "PARAMS_SAMPLE_EVERY_N_STEPS", "integer", default="200", means="steps between samples; 0: off", low=0, high=MANY
    )
    save_every_n_steps: int = row(
        "PARAMS_SAVE_EVERY_N_STEPS", "integer", default="100", means="steps between saves; 0 is off", low=0, high=MANY
    )
    validate_every_n_steps: int = row(
        "PARAMS_VALIDATE_EVERY_N_STEPS",
        "integer",
        default="0",
        means="steps between validations on held-out pictures; 0 is off",
        low=0,
        high=MANY,
    )
    keep_checkpoints: int = row(
        "KEEP_CHECKPOINTS", "integer", default="3", means="checkpoints that are kept, the newest", low=1, high=MANY
    )

    # finish
    push_to_hub: str | None = row(
        "PUSH_TO_HUB",
        "repo",
        means="Hub model repository that saves, samples and the LoRA are uploaded to; made private if it is new",
    )
    hf_write_token: Secret | None = row(
        "HF_WRITE_TOKEN", "secret", means="token that may write to PUSH_TO_HUB", otherwise="HF_TOKEN"
    )
    on_finish: str | None = row(
        "ON_FINISH",
        "choice",
        means="at the end: exit; stop or terminate the pod; idle: keep the container",
        choices=lambda: ACTIONS,
        otherwise="stop on a RunPod pod, else exit",
    )
    max_runtime: float | None = row(
        "MAX_RUNTIME", "number", means="hours after which the job saves and ends", above=0, high=1e5, otherwise="none"
    )
    max_cost: float | None = row(
        "MAX_COST", "number", means="the same in money, by PRICE_PER_HOUR", above=0, high=1e6, otherwise="none"
    )
    price_per_hour: float | None = row(
        "PRICE_PER_HOUR", "number", means="of this machine, in the money of MAX_COST", above=0, high=1e5
    )


def _rows() -> dict[str, Row]:
    found, group = {}, ""
    for field in dataclasses.fields(Settings):
        group = GROUPS.get(field.name, group)
        found[field.name] = dataclasses.replace(field.metadata["row"], group=group)
    return found


ROWS = _rows()  # by the field of Settings
CONFIG_JSON = "CONFIG_JSON"
ALIASES = ("HF_TOKEN_FILE", "HUGGING_FACE_HUB_TOKEN")  # other ways to give HF_TOKEN
SECRETS = (*ALIASES, *(r.name for r in ROWS.values() if r.kind == "secret"))
NAMES: tuple[str, ...] = (*(r.name for r in ROWS.values()), *ALIASES, CONFIG_JSON)
