"""FLUX.2 klein base (4B and 9B) and FLUX.2 dev: one architecture in three sizes, and one VAE.

dev alone has embedded guidance, and reads captions by another text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.families.published import common, configs
from trainer.spec.family import Config, Published, Tokenizer
from trainer.spec.rules.config_rules import (
    ACTIVATION,
    EPSILON,
    FLAG,
    GROUPS,
    HEADS,
    LAYERS,
    WIDTH,
    ConfigKind,
    Rules,
    each,
    number,
    only,
    optional,
    whole,
)

NAME_CAUTIONS = {
    "klein[-_. ]?(4b|9b)": common.DISTILLED,  # the names of the base models have `base` between
    common.TURBO: common.DISTILLED,
    common.FEW_STEPS: common.DISTILLED,
}
STATES = 3  # hidden states of the text encoder that are put side by side
VAE: Config = {
    "_class_name": "AutoencoderKLFlux2",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "in_channels": 3,
    "out_channels": 3,
    "sample_size": 1024,
    "latent_channels": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "batch_norm_eps": 1e-4,
    "batch_norm_momentum": 0.1,
    "patch_size": [2, 2],
}


def _klein(*, heads: int, double: int, single: int, encoder: Config) -> Published:
    return _published(
        _index("Flux2KleinPipeline", "Qwen3ForCausalLM", "Qwen2TokenizerFast") | {"is_distilled": False},
        heads=heads,
        double=double,
        single=single,
        guided=False,
        encoder=encoder,
        tokenizer=common.QWEN3_TOKENIZER,
    )


def _index(pipeline: str, encoder: str, tokenizer: str) -> Config:
    return common.index(
        pipeline,
        {
            "scheduler": "FlowMatchEulerDiscreteScheduler",
            "transformer": "Flux2Transformer2DModel",
            "vae": "AutoencoderKLFlux2",
            "text_encoder": encoder,
            "tokenizer": tokenizer,
        },
    )


def _published(
    index: Config, *, heads: int, double: int, single: int, guided: bool, encoder: Config, tokenizer: Tokenizer
) -> Published:
    width = 128 * heads
    return Published(
        configs={
            "model_index.json": index,
            "scheduler/scheduler_config.json": {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "num_train_timesteps": 1000,
                "base_shift": 0.5,
                "max_shift": 1.15,
                "base_image_seq_len": 256,
                "max_image_seq_len": 4096,
                "shift": 3.0,
                "time_shift_type": "exponential",
                "use_dynamic_shifting": True,
            },
            "transformer/config.json": {
                "_class_name": "Flux2Transformer2DModel",
                "patch_size": 1,
                "in_channels": 128,
                "num_layers": double,
                "num_single_layers": single,
                "attention_head_dim": 128,
                "num_attention_heads": heads,
                "joint_attention_dim": STATES * encoder["hidden_size"],
                "timestep_guidance_channels": 256,
                "mlp_ratio": 3.0,
                "axes_dims_rope": [32, 32, 32, 32],
                "rope_theta": 2000,
                "eps": 1e-6,
                "guidance_embeds": guided,
            },
            "vae/config.json": VAE,
            "text_encoder/config.json": encoder,
        },
        tokenizers={"tokenizer": tokenizer},
        marks={
            "img_in.weight": (width, 128),
            "guidance_in.in_layer.weight": (width, 256) if guided else None,
            "double_stream_modulation_img.lin.weight": (6 * width, width),
            f"double_blocks.{double - 1}.img_attn.qkv.weight": (3 * width, width),
            f"single_blocks.{single - 1}.linear2.weight": (width, 4 * width),
        },
    )


KLEIN_4B = _klein(heads=24, double=5, single=20, encoder=common.QWEN3_4B)
KLEIN_9B = _klein(heads=32, double=8, single=24, encoder=common.QWEN3_8B)
DEV = _published(
    _index("Flux2Pipeline", "Mistral3ForConditionalGeneration", "PixtralProcessor"),
    heads=48,
    double=8,
    single=48,
    guided=True,
    encoder=common.MISTRAL_SMALL,
    tokenizer=common.TEKKEN_TOKENIZER,
)

# The hidden states of the text encoder that are read, by how many layers they went through.
KLEIN_STATES = (9, 18, 27)
DEV_STATES = (10, 20, 30)

# ---- what the configs of a model of this family may say

_RULES: Rules = {
    "patch_size": only(1),
    "in_channels": whole(4, 1024),
    "out_channels": optional(whole(4, 1024)),
    "num_layers": LAYERS,
    "num_single_layers": LAYERS,
    "attention_head_dim": whole(2, 1024),
    "num_attention_heads": HEADS,
    "joint_attention_dim": WIDTH,
    "timestep_guidance_channels": whole(2, 4096),
    "mlp_ratio": number(0.1, 32),
    "axes_dims_rope": each(whole(2, 1024), 4, 4),
    "rope_theta": number(1, 1e9),
    "eps": EPSILON,
    "guidance_embeds": FLAG,
}
_LEVELS = 4  # which shrink an image's sides by 8, as in the other families


def _differing(config: Mapping[str, Any]) -> str | None:
    axes = config.get("axes_dims_rope", [32, 32, 32, 32])
    if sum(axes) != config.get("attention_head_dim", 128) or any(axis % 2 for axis in axes):
        return "axes_dims_rope are not even numbers whose sum is attention_head_dim"
    return None


INDEX_RULES: Rules = {"is_distilled": FLAG}
PIPELINES = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
DEV_PIPELINES = ("Flux2Pipeline",)
KINDS = {
    "scheduler": configs.FLOW_SCHEDULER,
    "transformer": ConfigKind("diffusers", ("Flux2Transformer2DModel",), _RULES, differing=_differing),
    "vae": ConfigKind(
        *("diffusers", ("AutoencoderKLFlux2",)),
        rules={
            "in_channels": only(3),
            "out_channels": only(3),
            "down_block_types": each(only("DownEncoderBlock2D"), _LEVELS, _LEVELS),
            "up_block_types": each(only("UpDecoderBlock2D"), _LEVELS, _LEVELS),
            "block_out_channels": each(WIDTH, _LEVELS, _LEVELS),
            "decoder_block_out_channels": optional(each(WIDTH, _LEVELS, _LEVELS)),
            "layers_per_block": whole(1, 16),
            "act_fn": ACTIVATION,
            "latent_channels": whole(1, 256),
            "norm_num_groups": GROUPS,
            "sample_size": whole(1, 16384),
            "force_upcast": optional(FLAG),
            "use_quant_conv": FLAG,
            "use_post_quant_conv": FLAG,
            "mid_block_add_attention": FLAG,
            "batch_norm_eps": EPSILON,
            "batch_norm_momentum": optional(number(0, 1)),
            "patch_size": each(only(2), 2, 2),
        },
        required=("block_out_channels", "down_block_types", "up_block_types", "latent_channels"),
    ),
    "text_encoder": configs.QWEN3,
    "tokenizer": configs.QWEN_TOKENIZER,
}
DEV_KINDS = {**KINDS, "text_encoder": configs.MISTRAL3, "tokenizer": configs.TEKKEN_TOKENIZER}


def same_sizes(parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, int, int]]:
    return _same_sizes(parts, depth=KLEIN_STATES[-1])


def dev_same_sizes(parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, int, int]]:
    return _same_sizes(parts, depth=DEV_STATES[-1])


def _same_sizes(parts: Mapping[str, Mapping[str, Any]], *, depth: int) -> list[tuple[str, str, int, int]]:
    denoiser, vae, encoder = (parts.get(name) for name in ("transformer", "vae", "text_encoder"))
    sizes = []
    if denoiser is not None and vae is not None:
        channels = 4 * vae.get("latent_channels", 32)
        sizes.append(("transformer in_channels", "4 * vae latent_channels", denoiser.get("in_channels", 128), channels))
    if denoiser is not None and encoder is not None:
        width = denoiser.get("joint_attention_dim", 15360)
        states = STATES * encoder["hidden_size"]
        sizes.append(("transformer joint_attention_dim", f"{STATES} * text_encoder hidden_size", width, states))
    if encoder is not None:  # which may have more layers than are read
        layers = min(depth, encoder["num_hidden_layers"])
        sizes.append(("the depth that is read", "text_encoder num_hidden_layers", depth, layers))
    return sizes
