"""Krea 2 Raw and Krea 2 Turbo: one architecture; Turbo is distilled to few steps, and its index says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.families.published import common, configs
from trainer.spec.family import Config, Published
from trainer.spec.rules.config_rules import (
    EPSILON,
    FLAG,
    HEADS,
    LAYERS,
    WIDTH,
    ConfigKind,
    Rules,
    each,
    number,
    only,
    whole,
)

TAPS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)  # the hidden states that are read: 0 would be the embeddings

_SCHEDULER: Config = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 6400,
}
_TRANSFORMER: Config = {
    "_class_name": "Krea2Transformer2DModel",
    "in_channels": 64,
    "num_layers": 28,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "num_key_value_heads": 12,
    "intermediate_size": 16384,
    "timestep_embed_dim": 256,
    "text_hidden_dim": 2560,
    "num_text_layers": 12,
    "text_num_attention_heads": 20,
    "text_num_key_value_heads": 20,
    "text_intermediate_size": 6912,
    "num_layerwise_text_blocks": 2,
    "num_refiner_text_blocks": 2,
    "axes_dims_rope": [32, 48, 48],
    "rope_theta": 1000.0,
    "norm_eps": 1e-5,
}


def _krea_2(*, is_distilled: bool) -> Published:
    index = common.index(
        "Krea2Pipeline",
        {
            "scheduler": "FlowMatchEulerDiscreteScheduler",
            "transformer": "Krea2Transformer2DModel",
            "vae": "AutoencoderKLQwenImage",
            "text_encoder": "Qwen3VLModel",
            "tokenizer": "Qwen2Tokenizer",
        },
    )
    return Published(
        configs={
            "model_index.json": {
                **index,
                "is_distilled": is_distilled,
                "patch_size": 2,
                "text_encoder_select_layers": [*TAPS],
            },
            "scheduler/scheduler_config.json": _SCHEDULER,
            "transformer/config.json": _TRANSFORMER,
            "vae/config.json": common.QWEN_VAE,
            "text_encoder/config.json": common.QWEN3_VL_4B,
        },
        tokenizers={"tokenizer": common.QWEN3_VL_TOKENIZER},
        marks={
            "first.weight": (6144, 64),
            "txtfusion.projector.weight": (1, 12),
            "blocks.27.mlp.down.weight": (6144, 16384),
            "blocks.28.mlp.down.weight": None,
        },
    )


RAW = _krea_2(is_distilled=False)
TURBO = _krea_2(is_distilled=True)

# Turbo has the same tensors as Raw.
NAME_CAUTIONS = {
    "turbo": common.DISTILLED,
    "distill": common.DISTILLED,
    "lightning": common.DISTILLED,
    common.EDIT: common.EDITS,
}

# ---- what the configs of a model of this family may say

_RULES: Rules = {
    "in_channels": whole(4, 1024),
    "num_layers": LAYERS,
    "attention_head_dim": whole(2, 1024),
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "intermediate_size": WIDTH,
    "timestep_embed_dim": whole(2, 8192),
    "text_hidden_dim": WIDTH,
    "num_text_layers": only(len(TAPS)),
    "text_num_attention_heads": HEADS,
    "text_num_key_value_heads": HEADS,
    "text_intermediate_size": WIDTH,
    "num_layerwise_text_blocks": whole(1, 16),
    "num_refiner_text_blocks": whole(1, 16),
    "axes_dims_rope": each(whole(2, 1024), 3, 3),
    "rope_theta": number(1, 1e9),
    "norm_eps": EPSILON,
}


def _differing(config: Mapping[str, Any]) -> str | None:
    axes = config.get("axes_dims_rope", [32, 48, 48])
    if sum(axes) != config.get("attention_head_dim", 128) or any(axis % 2 for axis in axes):
        return "axes_dims_rope are not even numbers whose sum is attention_head_dim"
    if config.get("in_channels", 64) % 4:
        return "in_channels is not a multiple of 4"  # 2 x 2 latents are a token
    if config.get("num_attention_heads", 48) % config.get("num_key_value_heads", 12):
        return "num_attention_heads is not a multiple of num_key_value_heads"
    text_heads = config.get("text_num_attention_heads", 20)
    if text_heads % config.get("text_num_key_value_heads", 20):
        return "text_num_attention_heads is not a multiple of text_num_key_value_heads"
    if config.get("text_hidden_dim", 2560) % text_heads:
        return "text_hidden_dim is not a multiple of text_num_attention_heads"
    if config.get("timestep_embed_dim", 256) % 2:
        return "timestep_embed_dim is not even"
    return None


INDEX_RULES: Rules = {
    "text_encoder_select_layers": only(None, [*TAPS]),
    "patch_size": only(2),
    "is_distilled": FLAG,
}
PIPELINES = ("Krea2Pipeline",)
KINDS = {
    "scheduler": configs.FLOW_SCHEDULER,
    "transformer": ConfigKind("diffusers", ("Krea2Transformer2DModel",), _RULES, differing=_differing),
    "vae": configs.QWEN_VAE,
    "text_encoder": configs.QWEN3_VL,
    "tokenizer": configs.QWEN_TOKENIZER,
}


def same_sizes(parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, int, int]]:
    denoiser, vae, encoder = (parts.get(name) for name in ("transformer", "vae", "text_encoder"))
    sizes = []
    if denoiser is not None and vae is not None:
        channels = denoiser.get("in_channels", 64) // 4
        sizes.append(("transformer in_channels / 4", "vae z_dim", channels, vae["z_dim"]))
    if denoiser is not None and encoder is not None:
        width = denoiser.get("text_hidden_dim", 2560)
        sizes.append(("transformer text_hidden_dim", "text_encoder hidden_size", width, encoder["hidden_size"]))
    if encoder is not None:
        depth = TAPS[-1] + 1  # one more than is read: the last layer's output gets normalised
        sizes.append(("the depth that is read", "text_encoder num_hidden_layers", depth, encoder["num_hidden_layers"]))
    return sizes
