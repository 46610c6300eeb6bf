"""Names as other trainers write them: of variables, and of optimisers, schedules and base models.

A name is read where its meaning is exactly that of one of ours, and the log says so. Where it is only near, the job is
refused with what to write instead. `docs/settings.md` has these tables, printed from here (`tables`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from entrypoint.settings.variables import NAMES, ROWS
from trainer.spec.family import base_models

PREFIX = "PARAMS_"

# Another trainer's name (sd-scripts, diffusers, ai-toolkit, OneTrainer, SimpleTuner) → our variable of the same
# meaning. `plain` brings a name into the form of these keys.
VARIABLES: dict[str, str] = {
    "report_to": "LOG_WITH",
    "lr": "PARAMS_LEARNING_RATE",
    "unet_lr": "PARAMS_LEARNING_RATE",
    "transformer_lr": "PARAMS_LEARNING_RATE",
    "te_lr": "PARAMS_TEXT_ENCODER_LR",
    "text_encoder_learning_rate": "PARAMS_TEXT_ENCODER_LR",
    "max_train_steps": "PARAMS_MAX_STEPS",
    "max_training_steps": "PARAMS_MAX_STEPS",
    "num_train_steps": "PARAMS_MAX_STEPS",
    "train_steps": "PARAMS_MAX_STEPS",
    "training_steps": "PARAMS_MAX_STEPS",
    "total_steps": "PARAMS_MAX_STEPS",
    "steps": "PARAMS_MAX_STEPS",
    "max_train_epochs": "PARAMS_MAX_EPOCHS",
    "num_train_epochs": "PARAMS_MAX_EPOCHS",
    "num_epochs": "PARAMS_MAX_EPOCHS",
    "epochs": "PARAMS_MAX_EPOCHS",
    "train_batch_size": "PARAMS_BATCH_SIZE",
    "gradient_accumulation_steps": "PARAMS_GRADIENT_ACCUMULATION",
    "repeats": "PARAMS_NUM_REPEATS",
    "dataset_repeats": "PARAMS_NUM_REPEATS",
    "optimizer": "PARAMS_OPTIMIZER_TYPE",
    "lr_scheduler": "PARAMS_LEARNING_SCHEDULER",
    "lr_scheduler_type": "PARAMS_LEARNING_SCHEDULER",
    "learning_rate_scheduler": "PARAMS_LEARNING_SCHEDULER",
    "scheduler_type": "PARAMS_LEARNING_SCHEDULER",
    "lr_warmup_steps": "PARAMS_WARMUP_STEPS",
    "learning_rate_warmup_steps": "PARAMS_WARMUP_STEPS",
    "lr_scheduler_num_cycles": "PARAMS_NUM_CYCLES",
    "lr_num_cycles": "PARAMS_NUM_CYCLES",
    "learning_rate_cycles": "PARAMS_NUM_CYCLES",
    "adam_weight_decay": "PARAMS_WEIGHT_DECAY",
    "clip_grad_norm": "PARAMS_MAX_GRAD_NORM",
    "snr_gamma": "PARAMS_MIN_SNR_GAMMA",
    "offset_noise_weight": "PARAMS_NOISE_OFFSET",
    "caption_dropout_probability": "PARAMS_CAPTION_DROPOUT_RATE",
    "rank": "PARAMS_NETWORK_DIM",
    "dim": "PARAMS_NETWORK_DIM",
    "lora_rank": "PARAMS_NETWORK_DIM",
    "lora_dim": "PARAMS_NETWORK_DIM",
    "network_rank": "PARAMS_NETWORK_DIM",
    "linear": "PARAMS_NETWORK_DIM",
    "alpha": "PARAMS_NETWORK_ALPHA",
    "lora_alpha": "PARAMS_NETWORK_ALPHA",
    "linear_alpha": "PARAMS_NETWORK_ALPHA",
    "network_weights": "PARAMS_RESUME_FROM",
    "init_lora": "PARAMS_RESUME_FROM",
    "assistant_lora_path": "PARAMS_TRAINING_ADAPTER",
    "output_dir": "OUTPUT_PATH",
    "output_folder": "OUTPUT_PATH",
    "save_name": "OUTPUT_NAME",
    "train_data_dir": "DATASET_NAME",
    "instance_data_dir": "DATASET_NAME",
    "instance_data_root": "DATASET_NAME",
    "dataset_path": "DATASET_NAME",
    "dataset_dir": "DATASET_NAME",
    "dataset_folder": "DATASET_NAME",
    "folder_path": "DATASET_NAME",
    "trigger": "TRIGGER_WORD",
    "trigger_words": "TRIGGER_WORD",
    "sample_every": "PARAMS_SAMPLE_EVERY_N_STEPS",
    "sample_every_steps": "PARAMS_SAMPLE_EVERY_N_STEPS",
    "save_every": "PARAMS_SAVE_EVERY_N_STEPS",
    "save_every_steps": "PARAMS_SAVE_EVERY_N_STEPS",
    "checkpointing_steps": "PARAMS_SAVE_EVERY_N_STEPS",
    "checkpoints_total_limit": "KEEP_CHECKPOINTS",
    "max_step_saves_to_keep": "KEEP_CHECKPOINTS",
    "output_dtype": "PARAMS_SAVE_PRECISION",
    "vae": "VAE_PATH",
    "ae": "VAE_PATH",
    "clip_l": "CLIP_L_PATH",
    "clip_g": "CLIP_G_PATH",
    "t5xxl": "T5_PATH",
    "revision": "MODEL_REVISION",
    "hub_model_id": "PUSH_TO_HUB",
    "hf_repo_id": "PUSH_TO_HUB",
    "hub_token": "HF_TOKEN",
    "huggingface_token": "HF_TOKEN",
    "huggingface_hub_token": "HF_TOKEN",
    "huggingfacehub_api_token": "HF_TOKEN",
    "hf_api_token": "HF_TOKEN",
}
# Names for a base model or a file of one: BASE_MODEL where the value is the name of one, else MODEL_PATH.
MODEL_NAMES = (
    *("pretrained_model_name_or_path", "pretrained_model_name", "model_name_or_path", "pretrained_model"),
    *("name_or_path", "base_model_name"),
)

_BY_STEPS = "Kiln counts steps: an epoch has images times repeats divided by the batch size. Fix: {}"
_DATASET_KEY = "is a key of dataset.json, and no variable. Fix: write it there (DATASET_CONFIG)"
_DATASET_KEY_NAMES = """
enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale validation_split validation_seed
resize_interpolation class_tokens caption_prefix caption_suffix caption_separator keep_tokens keep_tokens_separator
secondary_separator shuffle_caption enable_wildcard caption_dropout_every_n_epochs caption_tag_dropout_rate flip_aug
color_aug random_crop caption_extension auto_caption is_reg alpha_mask metadata_file conditioning_data_dir image_dir
class_prompt num_class_images
"""
DATASET_KEYS = tuple(_DATASET_KEY_NAMES.split())
# Another trainer's name → what to write instead, where the meaning is not the same.
NEAR: dict[str, str] = {
    "save_every_n_epochs": _BY_STEPS.format("PARAMS_SAVE_EVERY_N_STEPS"),
    "sample_every_n_epochs": _BY_STEPS.format("PARAMS_SAMPLE_EVERY_N_STEPS"),
    "save_n_epoch_ratio": _BY_STEPS.format("PARAMS_SAVE_EVERY_N_STEPS"),
    "validate_every_n_epochs": _BY_STEPS.format("PARAMS_VALIDATE_EVERY_N_STEPS"),
    "validation_epochs": _BY_STEPS.format("PARAMS_SAMPLE_EVERY_N_STEPS"),
    "validation_steps": "Fix: PARAMS_SAMPLE_EVERY_N_STEPS for samples, PARAMS_VALIDATE_EVERY_N_STEPS for the loss of "
    "held-out images",
    "validation_prompt": "Fix: SAMPLE_PROMPTS",
    "save_last_n_steps": "Fix: KEEP_CHECKPOINTS, the number of saves that are kept",
    "save_last_n_epochs": "Fix: KEEP_CHECKPOINTS, the number of saves that are kept",
    "mixed_precision": "Fix: PARAMS_PRECISION, the format of the frozen weights, which decides the compute precision",
    "fp8_base": "Fix: PARAMS_PRECISION=fp8",
    "full_bf16": "Fix: PARAMS_PRECISION=bf16; a LoRA's own weights are always fp32",
    "full_fp16": "Fix: PARAMS_PRECISION=bf16; a LoRA's own weights are always fp32",
    "quantize": "Fix: PARAMS_PRECISION",
    "blocks_to_swap": "Fix: PARAMS_OFFLOAD, which is auto unless set",
    "low_vram": "Fix: remove it; the memory mode follows the memory there is (PARAMS_OFFLOAD, MEMORY_LIMIT_GIB)",
    "lowvram": "Fix: remove it; the memory mode follows the memory there is (PARAMS_OFFLOAD, MEMORY_LIMIT_GIB)",
    "xformers": "Fix: remove it; PARAMS_ATTENTION chooses the attention",
    "sdpa": "Fix: remove it; PARAMS_ATTENTION chooses the attention",
    "mem_eff_attn": "Fix: remove it; PARAMS_ATTENTION chooses the attention",
    "cache_latents": "Latents are always cached. Fix: remove it; CACHE_PATH says where",
    "cache_latents_to_disk": "Latents are always cached. Fix: remove it; CACHE_PATH says where",
    "cache_text_encoder_outputs": "Encoded captions are always cached. Fix: remove it; CACHE_PATH says where",
    "network_module": "Fix: PARAMS_LORA_TYPE (lora, rslora or dora)",
    "network_args": "Fix: PARAMS_LORA_TYPE (lora, rslora or dora) and PARAMS_TARGET_MODULES",
    "network_type": "Fix: PARAMS_LORA_TYPE (lora, rslora or dora)",
    "conv_dim": "Kiln trains the linear layers alone. Fix: remove it",
    "network_dropout": "Kiln has no dropout of the network. Fix: remove it, or train with a lower rank",
    "lora_dropout": "Kiln has no dropout of the network. Fix: remove it, or train with a lower rank",
    "scale_weight_norms": "Kiln has no limit of the weights' norm. Fix: PARAMS_WEIGHT_DECAY",
    "network_train_unet_only": "Fix: remove it; PARAMS_TEXT_ENCODER_LR=0, the default, trains no text encoder",
    "train_text_encoder": "Fix: PARAMS_TEXT_ENCODER_LR, the learning rate of the text encoders",
    "resume_from_checkpoint": "An interrupted run in OUTPUT_PATH resumes by itself. Fix: remove it, or "
    "PARAMS_RESUME_FROM for another state or a LoRA file",
    "weighting_scheme": "Fix: PARAMS_LOSS_WEIGHTING for the loss, PARAMS_TIMESTEP_SAMPLING for the noise levels",
    "loss_type": "The loss is the squared error. Fix: remove it",
    "huber_c": "The loss is the squared error. Fix: remove it",
    "v_parameterization": "Fix: PARAMS_PREDICTION_TYPE=v_prediction",
    "use_ema": "Fix: PARAMS_EMA_DECAY, 0.999 for example",
    "instance_prompt": "Fix: TRIGGER_WORD, which is put before every caption; or class_tokens in dataset.json, the "
    "caption of images without one",
    "reg_data_dir": "Fix: a subset with is_reg in dataset.json (DATASET_CONFIG)",
    "class_data_dir": "Fix: a subset with is_reg in dataset.json (DATASET_CONFIG)",
    "with_prior_preservation": "Fix: a subset with is_reg in dataset.json (DATASET_CONFIG)",
    "num_processes": "Fix: NUM_GPUS",
    "gpu_ids": "Fix: NUM_GPUS, and the container's own choice of GPUs (docker run --gpus)",
    "clip_skip": "Each model takes the layer of its text encoders that it was trained with. Fix: remove it",
    "logging_dir": "Metrics are always written to OUTPUT_PATH/logs for TensorBoard. Fix: remove it",
    "lr_scheduler_power": "polynomial has the power 1. Fix: remove it",
    "min_lr": "No schedule in Kiln has a minimum learning rate. Fix: remove it",
    "lr_scheduler_min_lr_ratio": "No schedule in Kiln has a minimum learning rate. Fix: remove it",
    "use_8bit_adam": "Fix: PARAMS_OPTIMIZER_TYPE=adamw8bit",
    "network_alpha_ratio": "Fix: PARAMS_NETWORK_ALPHA; the LoRA counts alpha divided by rank",
    "resize_mode": "Fix: resize_interpolation in dataset.json (DATASET_CONFIG)",
    "caption_ext": "Fix: caption_extension in dataset.json (DATASET_CONFIG)",
    "shuffle_tokens": "Fix: shuffle_caption in dataset.json (DATASET_CONFIG)",
    "masked_training": "Fix: conditioning_data_dir or alpha_mask in dataset.json (DATASET_CONFIG)",
    "output_model_destination": "Fix: OUTPUT_PATH for the folder, OUTPUT_NAME for the file's name",
    "train_dtype": "Fix: PARAMS_PRECISION, the format of the frozen weights, which decides the compute precision",
    "weight_dtype": "Fix: PARAMS_PRECISION, the format of the frozen weights, which decides the compute precision",
    "quantize_te": "Text encoders come to the device layer by layer where memory is short. Fix: remove it",
    "timestep_type": "Fix: PARAMS_TIMESTEP_SAMPLING",
    "timestep_distribution": "Fix: PARAMS_TIMESTEP_SAMPLING",
    "timestep_shift": "Fix: PARAMS_DISCRETE_FLOW_SHIFT, with PARAMS_TIMESTEP_SAMPLING=shift",
    "content_or_style": "Fix: PARAMS_TIMESTEP_SAMPLING; shift favours composition",
    "loss_weight_fn": "Fix: PARAMS_LOSS_WEIGHTING with flow matching, else PARAMS_MIN_SNR_GAMMA",
    "sample_after": "Fix: PARAMS_SAMPLE_EVERY_N_STEPS",
    "sample_steps": "Fix: --s in SAMPLE_PROMPTS",
    "walk_seed": "Each prompt has a seed of its own, the same in every round. Fix: --d in SAMPLE_PROMPTS",
    **dict.fromkeys(DATASET_KEYS, _DATASET_KEY),
}

# Values as other trainers write them, by variable; `plain_value` brings a value into the form of these keys. Capitals,
# dashes, dots and blanks need no entry.
_OPTIMIZERS = {
    "prodigyopt": "prodigy",
    "prodigyoptprodigy": "prodigy",
    "torchoptimadamw": "adamw",
    "bitsandbytesoptimadamw8bit": "adamw8bit",
    "bnbadamw8bit": "adamw8bit",
    "bitsandbytesoptimlion8bit": "lion8bit",
    "transformersoptimizationadafactor": "adafactor",
    "schedulefreeadamw": "adamw-schedulefree",
    "schedulefreeadamwschedulefree": "adamw-schedulefree",
    "prodigyplus": "prodigy-schedulefree",
    "prodigyplusschedulefree": "prodigy-schedulefree",
    "prodigyplusprodigyplusschedulefree": "prodigy-schedulefree",
}
_SCHEDULES = {
    "warmupconstant": "constant_with_warmup",
    "cosineannealing": "cosine",
    "cosineannealinglr": "cosine",
    "cosinewithwarmup": "cosine",
    "cosinewithhardrestarts": "cosine_with_restarts",
    "cosinerestarts": "cosine_with_restarts",
    "cosineannealingwithrestarts": "cosine_with_restarts",
    "cosineannealingwarmrestarts": "cosine_with_restarts",
    "linearwithwarmup": "linear",
    "poly": "polynomial",
}
_SAVE_PRECISIONS = {
    **dict.fromkeys(("float", "float32"), "fp32"),
    **dict.fromkeys(("float16", "half"), "fp16"),
    "bfloat16": "bf16",
}
# A value that no variable has → the advice, as the rest of "is not one of Kiln's: ...".
NEAR_VALUES: dict[str, dict[str, str]] = {
    "LOG_WITH": {
        **dict.fromkeys(
            ("tensorboard", "all"), "TensorBoard's files are always written: leave it empty for them alone"
        ),
    },
    "PARAMS_OPTIMIZER_TYPE": {
        **dict.fromkeys(
            ("dadaptation", "dadaptadam", "dadaptadampreprint", "dadaptadagrad", "dadaptadan", "dadaptlion"),
            "prodigy is its successor, and finds its step size likewise",
        ),
        **dict.fromkeys(("adam", "radam", "adamp", "came", "ademamix"), "adamw is nearest"),
        **dict.fromkeys(("adam8bit", "ademamix8bit"), "adamw8bit is nearest"),
        **dict.fromkeys(("pagedadamw8bit", "pagedadamw"), "it is adamw8bit with PARAMS_OPTIMIZER_ARGS=is_paged=true"),
        "pagedlion8bit": "it is lion8bit with PARAMS_OPTIMIZER_ARGS=is_paged=true",
        **dict.fromkeys(("sgd", "sgdnesterov", "sgdnesterov8bit", "rmsprop", "adagrad"), "adamw is usual for LoRAs"),
    },
    "PARAMS_LEARNING_SCHEDULER": {
        "cosinewithminlr": "cosine is nearest, and falls to 0",
        "cosinewarmupwithminlr": "cosine is nearest, and falls to 0",
        "rex": "cosine is nearest",
        "warmupstabledecay": "constant_with_warmup or cosine is nearest",
        "inversesqrt": "constant_with_warmup or linear is nearest",
        "piecewiseconstant": "constant or linear is nearest",
        "adafactor": "constant is nearest: Adafactor follows PARAMS_LEARNING_RATE here",
    },
}


def plain(name: str) -> str:
    """The name of a variable in the form of the keys above."""
    return name.lower().strip("- ").replace("-", "_").replace(" ", "_").removeprefix(PREFIX.lower())


def meant_variable(name: str, value: str) -> str | None:
    """Our variable of exactly the same meaning as `name`=`value`; None if there is none."""
    key = plain(name)
    if key in MODEL_NAMES:
        return "BASE_MODEL" if find_value("BASE_MODEL", value) else "MODEL_PATH"
    return _own_names().get(key) or VARIABLES.get(key)


@functools.cache  # all names of an environment are looked up in it, and those of each job of a queue
def _own_names() -> Mapping[str, str]:
    return {plain(name): name for name in NAMES}


def plain_value(text: str) -> str:
    """A value in the form in which spellings are compared: letters and digits alone."""
    text = re.sub(r"^https?://huggingface\.co/", "", text.strip().lower()).removesuffix(".safetensors")
    return re.sub(r"[^a-z0-9]", "", text)


def find_value(variable: str, text: str) -> str | None:
    """The choice of `variable` that `text` is another spelling of; None if it is none."""
    row = ROWS[variable]
    choices = tuple(row.choices()) if row.choices else ()
    for choice in choices:
        if choice.lower() == text.lower():
            return choice
    spellings = {plain_value(choice): choice for choice in reversed(choices)}
    spellings |= value_aliases(variable)
    return spellings.get(plain_value(text))


def value_aliases(variable: str) -> Mapping[str, str]:
    """Further spellings of the choices of a variable, as `plain_value` has them."""
    if variable == "PARAMS_OPTIMIZER_TYPE":
        return _OPTIMIZERS
    if variable == "PARAMS_LEARNING_SCHEDULER":
        return _SCHEDULES
    if variable == "LOG_WITH":
        return {"wb": "wandb", "weightsbiases": "wandb", "weightsandbiases": "wandb"}
    if variable == "PARAMS_SAVE_PRECISION":
        return _SAVE_PRECISIONS
    if variable != "BASE_MODEL":
        return {}
    spellings: dict[str, str] = {}
    for name, (_, model) in base_models().items():
        sources = () if model.is_miniature else (model.source, model.source.rpartition("/")[2])
        for alias in (*sources, *model.aliases):
            spellings.setdefault(plain_value(alias), name)
    return spellings


def near_value(variable: str, text: str) -> str | None:
    """What to choose instead of `text`, which is no choice of `variable`; None if that is not known."""
    asked = plain_value(text)
    if advice := NEAR_VALUES.get(variable, {}).get(asked):
        return advice
    row = ROWS[variable]
    begins = [choice for choice in (row.choices() if row.choices else ()) if plain_value(choice).startswith(asked)]
    if asked and len(begins) > 1:
        return f"it may be {' or '.join(begins)}"
    return None


def tables() -> str:
    """The aliases as Markdown, for docs/settings.md."""
    by_variable: dict[str, list[str]] = {}
    for alias, name in VARIABLES.items():
        by_variable.setdefault(name, []).append(f"`{alias}`")
    by_variable.setdefault("BASE_MODEL", []).extend(f"`{alias}`" for alias in MODEL_NAMES)
    lines = ["| variable | also written |", "| --- | --- |"]
    for name in NAMES:
        if name in by_variable:
            lines.append(f"| `{name}` | {', '.join(by_variable[name])} |")
    lines += ["", "| another trainer's | here |", "| --- | --- |"]
    for alias, advice in NEAR.items():
        lines.append(f"| `{alias}` | {advice}. |")
    return "\n".join(lines) + "\n"
