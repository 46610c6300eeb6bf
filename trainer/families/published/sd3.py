"""Stable Diffusion 3 medium, and 3.5 medium and large."""

from __future__ import annotations

from typing import Any

from trainer.families.published import common
from trainer.spec.family import Lookalike, Published

HEAD_SIZE = 64


def _sd3(*, blocks: int, positions: int, qk_norm: bool, dual_blocks: int, marks: dict[str, Any]) -> Published:
    """The model is as wide as it has blocks: a head of attention for each.

    `dual_blocks`: how many of the first blocks have a second attention.
    """
    width = blocks * HEAD_SIZE
    transformer = {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": blocks,
        "attention_head_dim": HEAD_SIZE,
        "num_attention_heads": blocks,
        "joint_attention_dim": 4096,
        "caption_projection_dim": width,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": positions,
        "dual_attention_layers": list(range(dual_blocks)),
        "qk_norm": "rms_norm" if qk_norm else None,
    }
    return Published(
        configs={
            "model_index.json": common.index(
                "StableDiffusion3Pipeline",
                {
                    "scheduler": "FlowMatchEulerDiscreteScheduler",
                    "transformer": "SD3Transformer2DModel",
                    "vae": "AutoencoderKL",
                    "text_encoder": "CLIPTextModelWithProjection",
                    "text_encoder_2": "CLIPTextModelWithProjection",
                    "text_encoder_3": "T5EncoderModel",
                    "tokenizer": "CLIPTokenizer",
                    "tokenizer_2": "CLIPTokenizer",
                    "tokenizer_3": "T5Tokenizer",
                },
            ),
            "scheduler/scheduler_config.json": {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "num_train_timesteps": 1000,
                "shift": 3.0,
            },
            "transformer/config.json": transformer,
            "vae/config.json": common.vae(
                latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, quant_conv=False
            ),
            "text_encoder/config.json": common.CLIP_L_PROJECTED,
            "text_encoder_2/config.json": common.CLIP_G,
            "text_encoder_3/config.json": common.T5_XXL,
        },
        tokenizers={
            "tokenizer": common.CLIP_L_TOKENIZER,
            "tokenizer_2": common.CLIP_G_TOKENIZER,
            "tokenizer_3": common.T5_TOKENIZER,
        },
        marks={
            "x_embedder.proj.weight": (width, 16, 2, 2),
            f"joint_blocks.{blocks - 1}.x_block.attn.qkv.weight": (3 * width, width),
            "joint_blocks.0.x_block.attn.ln_q.weight": (HEAD_SIZE,) if qk_norm else None,
            **marks,
        },
    )


_WITHOUT_SECOND_ATTENTION = {"joint_blocks.0.x_block.attn2.qkv.weight": None}
MEDIUM = _sd3(blocks=24, positions=192, qk_norm=False, dual_blocks=0, marks=_WITHOUT_SECOND_ATTENTION)
MEDIUM_35 = _sd3(
    blocks=24,
    positions=384,
    qk_norm=True,
    dual_blocks=13,
    marks={"joint_blocks.0.x_block.attn2.qkv.weight": (4608, 1536)},
)
LARGE_35 = _sd3(blocks=38, positions=192, qk_norm=True, dual_blocks=0, marks=_WITHOUT_SECOND_ATTENTION)

LOOKALIKES = (Lookalike("AuraFlow", "double_layers.0.attn.w1q.weight"),)
