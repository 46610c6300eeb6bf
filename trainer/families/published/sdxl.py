"""Stable Diffusion XL base 1.0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.families.published import common, configs
from trainer.spec.family import Lookalike, Published
from trainer.spec.rules.config_rules import (
    ACTIVATION,
    EPSILON,
    FALSE,
    FLAG,
    GROUPS,
    HEADS,
    NOTHING,
    SHARE,
    WIDTH,
    ConfigKind,
    Rules,
    each,
    either,
    number,
    only,
    optional,
    whole,
)

BASE = Published(
    configs={
        "model_index.json": {
            **common.index(
                "StableDiffusionXLPipeline",
                {
                    "scheduler": "EulerDiscreteScheduler",
                    "unet": "UNet2DConditionModel",
                    "vae": "AutoencoderKL",
                    "text_encoder": "CLIPTextModel",
                    "text_encoder_2": "CLIPTextModelWithProjection",
                    "tokenizer": "CLIPTokenizer",
                    "tokenizer_2": "CLIPTokenizer",
                },
            ),
            "force_zeros_for_empty_prompt": True,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "EulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
            "interpolation_type": "linear",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "use_karras_sigmas": False,
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],  # numbers of heads, in spite of the name
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae/config.json": common.vae(latent_channels=4, scaling_factor=0.13025, shift_factor=None, quant_conv=True),
        "text_encoder/config.json": common.CLIP_L,
        "text_encoder_2/config.json": common.CLIP_G,
    },
    tokenizers={"tokenizer": common.CLIP_L_TOKENIZER, "tokenizer_2": common.CLIP_G_TOKENIZER},
    marks={
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "label_emb.0.0.weight": (1280, 2816),
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
    },
)

_FIRST_ATTENTION = (
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
)
_FIRST_CONVOLUTION = ("input_blocks.0.0.weight", "conv_in.weight")
# The first of several that fit counts.
LOOKALIKES = (
    *(Lookalike("Stable Diffusion 1.x", name, (320, 768)) for name in _FIRST_ATTENTION),
    *(Lookalike("Stable Diffusion 2.x", name, (320, 1024)) for name in _FIRST_ATTENTION),
    *(Lookalike("the refiner of Stable Diffusion XL", name, (384, 4, 3, 3)) for name in _FIRST_CONVOLUTION),
    *(Lookalike("a model that paints into images", name, (None, 9, 3, 3)) for name in _FIRST_CONVOLUTION),
    *(Lookalike("a model that edits images", name, (None, 8, 3, 3)) for name in _FIRST_CONVOLUTION),
    Lookalike("Kolors", "encoder_hid_proj.weight"),
)

# ---- what the configs of a model of this family may say

_DOWN = only("DownBlock2D", "CrossAttnDownBlock2D")
_UP = only("UpBlock2D", "CrossAttnUpBlock2D")
_DEPTH = whole(0, 64)
_RULES: Rules = {
    "sample_size": optional(whole(1, 4096)),
    "in_channels": whole(1, 256),
    "out_channels": whole(1, 256),
    "center_input_sample": FALSE,
    "flip_sin_to_cos": FLAG,
    "freq_shift": number(0, 1),
    "down_block_types": each(_DOWN, 1, 8),
    "mid_block_type": only("UNetMidBlock2DCrossAttn", None),
    "up_block_types": each(_UP, 1, 8),
    "only_cross_attention": FALSE,
    "block_out_channels": each(WIDTH, 1, 8),
    "layers_per_block": either(whole(1, 16), each(whole(1, 16), 1, 8)),
    "downsample_padding": only(0, 1),
    "mid_block_scale_factor": number(1e-3, 1e3),
    "dropout": SHARE,
    "act_fn": ACTIVATION,
    "norm_num_groups": GROUPS,
    "norm_eps": EPSILON,
    "cross_attention_dim": WIDTH,
    "transformer_layers_per_block": either(_DEPTH, each(either(_DEPTH, each(_DEPTH, 1, 8)), 1, 8)),
    "reverse_transformer_layers_per_block": optional(each(either(_DEPTH, each(_DEPTH, 1, 8)), 1, 8)),
    "encoder_hid_dim": NOTHING,
    "encoder_hid_dim_type": NOTHING,
    "attention_head_dim": either(HEADS, each(HEADS, 1, 8)),
    "num_attention_heads": NOTHING,
    "dual_cross_attention": FALSE,
    "use_linear_projection": FLAG,
    "class_embed_type": NOTHING,
    "addition_embed_type": only("text_time"),
    "addition_time_embed_dim": whole(2, 4096),
    "num_class_embeds": NOTHING,
    "upcast_attention": optional(FLAG),
    "resnet_time_scale_shift": only("default"),
    "resnet_skip_time_act": FALSE,
    "resnet_out_scale_factor": number(1e-3, 1e3),
    "time_embedding_type": only("positional"),
    "time_embedding_dim": NOTHING,
    "time_embedding_act_fn": NOTHING,
    "timestep_post_act": NOTHING,
    "time_cond_proj_dim": optional(whole(1, 4096)),
    "conv_in_kernel": only(3),
    "conv_out_kernel": only(3),
    "projection_class_embeddings_input_dim": WIDTH,
    "attention_type": only("default"),
    "class_embeddings_concat": FALSE,
    "mid_block_only_cross_attention": only(None, False),
    "cross_attention_norm": NOTHING,
    "addition_embed_type_num_heads": whole(1, 512),
}

PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
KINDS = {
    "scheduler": configs.DENOISING_SCHEDULER,
    "unet": ConfigKind(
        *("diffusers", ("UNet2DConditionModel",), _RULES),
        required=("addition_embed_type", "addition_time_embed_dim", "cross_attention_dim"),
    ),
    "vae": configs.VAE,
    "text_encoder": configs.clip("CLIPTextModel"),
    "text_encoder_2": configs.clip("CLIPTextModelWithProjection"),
    "tokenizer": configs.CLIP_TOKENIZER,
    "tokenizer_2": configs.CLIP_TOKENIZER,
}


def same_sizes(parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, int, int]]:
    denoiser, vae = parts.get("unet"), parts.get("vae")
    clips = [parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts]
    sizes = []
    if denoiser is not None and vae is not None:
        channels = vae.get("latent_channels", 4)
        sizes.append(("unet in_channels", "vae latent_channels", denoiser.get("in_channels", 4), channels))
    if denoiser is not None and len(clips) == 2:
        width = sum(clip["hidden_size"] for clip in clips)
        sizes.append(("unet cross_attention_dim", "hidden_size of both CLIPs", denoiser["cross_attention_dim"], width))
        pooled = clips[1].get("projection_dim", 512) or 0
        vector = pooled + 6 * denoiser["addition_time_embed_dim"]
        own = denoiser.get("projection_class_embeddings_input_dim", 0)
        sizes.append(("unet projection_class_embeddings_input_dim", "text and sizes together", own, vector))
    return sizes
