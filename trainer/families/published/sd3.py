"""Stable Diffusion 3 medium, and 3.5 medium and large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.families.published import common, configs
from trainer.spec.family import Lookalike, Published
from trainer.spec.rules.config_rules import HEADS, LAYERS, WIDTH, ConfigKind, Rules, each, only, optional, whole

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

# ---- what the configs of a model of this family may say

_RULES: Rules = {
    "sample_size": whole(2, 4096),
    "patch_size": only(2),
    "in_channels": whole(1, 256),
    "num_layers": LAYERS,
    "attention_head_dim": whole(1, 1024),
    "num_attention_heads": HEADS,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "out_channels": optional(whole(1, 256)),
    "pos_embed_max_size": whole(1, 4096),
    "dual_attention_layers": each(whole(0, 200), 0, 200),
    "qk_norm": only(None, "rms_norm"),
}


def _differing(config: Mapping[str, Any]) -> str | None:
    width = config.get("attention_head_dim", 64) * config.get("num_attention_heads", 18)
    if config.get("caption_projection_dim", 1152) != width:
        return "caption_projection_dim is not attention_head_dim * num_attention_heads"
    return None


PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
KINDS = {
    "scheduler": configs.FLOW_SCHEDULER,
    "transformer": ConfigKind("diffusers", ("SD3Transformer2DModel",), _RULES, differing=_differing),
    "vae": configs.VAE,
    "text_encoder": configs.clip("CLIPTextModelWithProjection"),
    "text_encoder_2": configs.clip("CLIPTextModelWithProjection"),
    "text_encoder_3": configs.T5_ENCODER,
    "tokenizer": configs.CLIP_TOKENIZER,
    "tokenizer_2": configs.CLIP_TOKENIZER,
    "tokenizer_3": configs.T5_TOKENIZER,
}


def same_sizes(parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, int, int]]:
    denoiser, vae, t5 = (parts.get(name) for name in ("transformer", "vae", "text_encoder_3"))
    clips = [parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts]
    sizes = []
    if denoiser is not None and vae is not None:
        channels = vae.get("latent_channels", 4)
        sizes.append(("transformer in_channels", "vae latent_channels", denoiser.get("in_channels", 16), channels))
    if denoiser is not None and len(clips) == 2:
        pooled = denoiser.get("pooled_projection_dim", 2048)
        both = sum(clip.get("projection_dim") or 0 for clip in clips)
        sizes.append(("transformer pooled_projection_dim", "projection_dim of both CLIPs", pooled, both))
    if denoiser is not None and t5 is not None:
        joint = denoiser.get("joint_attention_dim", 4096)
        sizes.append(("transformer joint_attention_dim", "text_encoder_3 d_model", joint, t5["d_model"]))
    return sizes
