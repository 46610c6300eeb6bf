"""Flux.1 dev, Krea and schnell: schnell has no embedded guidance, and its schedule no shift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.families.published import common, configs
from trainer.spec.family import Lookalike, Published
from trainer.spec.rules.config_rules import FLAG, HEADS, LAYERS, WIDTH, ConfigKind, Rules, each, only, optional, whole


def _flux(*, guidance: bool) -> Published:
    schedule = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    return Published(
        configs={
            "model_index.json": common.index(
                "FluxPipeline",
                {
                    "scheduler": "FlowMatchEulerDiscreteScheduler",
                    "transformer": "FluxTransformer2DModel",
                    "vae": "AutoencoderKL",
                    "text_encoder": "CLIPTextModel",
                    "text_encoder_2": "T5EncoderModel",
                    "tokenizer": "CLIPTokenizer",
                    "tokenizer_2": "T5Tokenizer",
                },
            ),
            "scheduler/scheduler_config.json": {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "num_train_timesteps": 1000,
                "base_shift": 0.5,
                "max_shift": 1.15,
                "base_image_seq_len": 256,
                "max_image_seq_len": 4096,
                **schedule,
            },
            "transformer/config.json": {
                "_class_name": "FluxTransformer2DModel",
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "axes_dims_rope": [16, 56, 56],
                "guidance_embeds": guidance,
            },
            "vae/config.json": common.vae(
                latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant_conv=False
            ),
            "text_encoder/config.json": common.CLIP_L,
            "text_encoder_2/config.json": common.T5_XXL,
        },
        tokenizers={"tokenizer": common.CLIP_L_TOKENIZER, "tokenizer_2": common.T5_TOKENIZER},
        marks={
            "img_in.weight": (3072, 64),
            "guidance_in.in_layer.weight": (3072, 256) if guidance else None,
            "double_blocks.18.img_attn.qkv.weight": (9216, 3072),
            "single_blocks.37.linear2.weight": (3072, 15360),
        },
    )


DEV = _flux(guidance=True)  # and Krea
SCHNELL = _flux(guidance=False)

# FLUX.2 klein 4B has these, and is as wide as Flux.1; its latents have 128 channels.
OF_FLUX2 = ("double_stream_modulation_img.lin.weight", "double_stream_modulation_img.linear.weight")
LOOKALIKES = (
    Lookalike("Flux.1 Fill, which paints into images", "img_in.weight", (3072, 384)),
    Lookalike("Flux.1 Fill, which paints into images", "x_embedder.weight", (3072, 384)),
    Lookalike("Flux.1 Canny or Depth, which an image controls", "img_in.weight", (3072, 128), lacks=OF_FLUX2),
    Lookalike("Flux.1 Canny or Depth, which an image controls", "x_embedder.weight", (3072, 128), lacks=OF_FLUX2),
    Lookalike("Chroma", "distilled_guidance_layer.in_proj.weight"),
)

# ---- what the configs of a model of this family may say

_RULES: Rules = {
    "patch_size": only(1),
    "in_channels": whole(4, 1024),
    "out_channels": optional(whole(4, 1024)),
    "num_layers": LAYERS,
    "num_single_layers": whole(0, 200),
    "attention_head_dim": whole(2, 1024),
    "num_attention_heads": HEADS,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "guidance_embeds": FLAG,
    "axes_dims_rope": each(whole(2, 1024), 3, 3),
}


def _differing(config: Mapping[str, Any]) -> str | None:
    axes = config.get("axes_dims_rope", [16, 56, 56])
    if sum(axes) != config.get("attention_head_dim", 128) or any(axis % 2 for axis in axes):
        return "axes_dims_rope are not even numbers whose sum is attention_head_dim"
    return None


PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
KINDS = {
    "scheduler": configs.FLOW_SCHEDULER,
    "transformer": ConfigKind("diffusers", ("FluxTransformer2DModel",), _RULES, differing=_differing),
    "vae": configs.VAE,
    "text_encoder": configs.clip("CLIPTextModel"),
    "text_encoder_2": configs.T5_ENCODER,
    "tokenizer": configs.CLIP_TOKENIZER,
    "tokenizer_2": configs.T5_TOKENIZER,
}


def same_sizes(parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, int, int]]:
    denoiser, vae, clip, t5 = (parts.get(name) for name in ("transformer", "vae", "text_encoder", "text_encoder_2"))
    sizes = []
    if denoiser is not None and vae is not None:
        channels = 4 * vae.get("latent_channels", 4)
        sizes.append(("transformer in_channels", "4 * vae latent_channels", denoiser.get("in_channels", 64), channels))
    if denoiser is not None and clip is not None:
        pooled = denoiser.get("pooled_projection_dim", 768)
        sizes.append(("transformer pooled_projection_dim", "text_encoder hidden_size", pooled, clip["hidden_size"]))
    if denoiser is not None and t5 is not None:
        joint = denoiser.get("joint_attention_dim", 4096)
        sizes.append(("transformer joint_attention_dim", "text_encoder_2 d_model", joint, t5["d_model"]))
    return sizes
