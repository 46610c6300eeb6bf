"""Z-Image and Z-Image-Turbo: one architecture; Turbo is distilled to few steps, and its schedule has less shift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.families.published import common, configs
from trainer.spec.family import Lookalike, Published
from trainer.spec.rules.config_rules import (
    EPSILON,
    HEADS,
    LAYERS,
    NOTHING,
    WIDTH,
    ConfigKind,
    Rules,
    each,
    number,
    only,
    whole,
)


def _z_image(*, shift: float) -> Published:
    return Published(
        configs={
            "model_index.json": common.index(
                "ZImagePipeline",
                {
                    "scheduler": "FlowMatchEulerDiscreteScheduler",
                    "transformer": "ZImageTransformer2DModel",
                    "vae": "AutoencoderKL",
                    "text_encoder": "Qwen3Model",
                    "tokenizer": "Qwen2Tokenizer",
                },
            ),
            "scheduler/scheduler_config.json": {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "num_train_timesteps": 1000,
                "use_dynamic_shifting": False,
                "shift": shift,
            },
            "transformer/config.json": {
                "_class_name": "ZImageTransformer2DModel",
                "all_patch_size": [2],
                "all_f_patch_size": [1],
                "in_channels": 16,
                "dim": 3840,
                "n_layers": 30,
                "n_refiner_layers": 2,
                "n_heads": 30,
                "n_kv_heads": 30,
                "norm_eps": 1e-5,
                "qk_norm": True,
                "cap_feat_dim": 2560,
                "rope_theta": 256.0,
                "t_scale": 1000.0,
                "axes_dims": [32, 48, 48],
                "axes_lens": [1536, 512, 512],
            },
            "vae/config.json": common.vae(
                latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant_conv=False
            ),
            "text_encoder/config.json": common.QWEN3_4B,
        },
        tokenizers={"tokenizer": common.QWEN3_TOKENIZER},
        marks={
            "x_embedder.weight": (3840, 64),
            "cap_embedder.1.weight": (3840, 2560),
            "layers.29.attention.qkv.weight": (11520, 3840),
            "siglip_embedder.1.weight": None,
        },
    )


BASE = _z_image(shift=6.0)
TURBO = _z_image(shift=3.0)

# Turbo has the same tensors as the base model.
NAME_CAUTIONS = {common.TURBO: common.DISTILLED, common.FEW_STEPS: common.DISTILLED}

LOOKALIKES = (
    Lookalike("Lumina 2", "cap_embedder.1.weight", (2304, None)),
    Lookalike("Lumina 2", "time_caption_embed.caption_embedder.1.weight"),
    Lookalike("Z-Image Omni, which reads images as well", "siglip_embedder.1.weight"),
    Lookalike("Z-Image ControlNet", "control_layers.0.attention.to_q.weight"),
)

# ---- what the configs of a model of this family may say

_RULES: Rules = {
    "all_patch_size": each(only(2), 1, 1),
    "all_f_patch_size": each(only(1), 1, 1),
    "in_channels": whole(1, 256),
    "dim": WIDTH,
    "n_layers": LAYERS,
    "n_refiner_layers": whole(1, 16),
    "n_heads": HEADS,
    "n_kv_heads": HEADS,
    "norm_eps": EPSILON,
    "qk_norm": only(True, False),
    "cap_feat_dim": WIDTH,
    "siglip_feat_dim": NOTHING,
    "rope_theta": number(1, 1e9),
    "t_scale": number(1e-3, 1e6),
    "axes_dims": each(whole(2, 1024), 3, 3),
    "axes_lens": each(whole(64, 65536), 3, 3),
}


def _differing(config: Mapping[str, Any]) -> str | None:
    dim = config.get("dim", 3840)
    heads = config.get("n_heads", 30)
    axes = config.get("axes_dims", [32, 48, 48])
    if dim % heads or sum(axes) != dim // heads or any(axis % 2 for axis in axes):
        return "axes_dims are not even numbers whose sum is dim / n_heads"
    if config.get("n_kv_heads", 30) != heads:
        return "n_kv_heads is not n_heads"  # diffusers' class reads only the latter
    return None


PIPELINES = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
KINDS = {
    "scheduler": configs.FLOW_SCHEDULER,
    "transformer": ConfigKind("diffusers", ("ZImageTransformer2DModel",), _RULES, differing=_differing),
    "vae": configs.VAE,
    "text_encoder": configs.QWEN3,
    "tokenizer": configs.QWEN_TOKENIZER,
}


def same_sizes(parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, int, int]]:
    denoiser, vae, encoder = (parts.get(name) for name in ("transformer", "vae", "text_encoder"))
    sizes = []
    if denoiser is not None and vae is not None:
        channels = vae.get("latent_channels", 4)
        sizes.append(("transformer in_channels", "vae latent_channels", denoiser.get("in_channels", 16), channels))
    if denoiser is not None and encoder is not None:
        width = denoiser.get("cap_feat_dim", 2560)
        sizes.append(("transformer cap_feat_dim", "text_encoder hidden_size", width, encoder["hidden_size"]))
    return sizes
