"""The configs of the published denoisers by their values of BASE_MODEL, and narrow ones for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)

_FLUX = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
_FLUX2 = {
    "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
    "joint_attention_dim": 7680, "guidance_embeds": False,
}  # fmt: skip
_SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536, "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
_SDXL = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_Z_IMAGE = {
    "in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30,
    "cap_feat_dim": 2560, "axes_dims": (32, 48, 48), "axes_lens": (1536, 512, 512),
}  # fmt: skip
_QWEN_IMAGE = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
_KREA2 = {
    "in_channels": 64, "num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 48,
    "num_key_value_heads": 12, "intermediate_size": 16384, "timestep_embed_dim": 256, "text_hidden_dim": 2560,
    "num_text_layers": 12, "text_num_attention_heads": 20, "text_num_key_value_heads": 20,
    "text_intermediate_size": 6912, "num_layerwise_text_blocks": 2, "num_refiner_text_blocks": 2,
    "axes_dims_rope": (32, 48, 48),
}  # fmt: skip
LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
# BASE_MODEL → its family, and the architecture in its config.json.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux-dev": ("flux", {**_FLUX, "guidance_embeds": True}),
    "flux-krea": ("flux", {**_FLUX, "guidance_embeds": True}),
    "flux-schnell": ("flux", {**_FLUX, "guidance_embeds": False}),
    "flux2-klein-4b": ("flux2", _FLUX2),
    "flux2-klein-9b": (
        "flux2",
        {**_FLUX2, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    ),
    "flux2-dev": (
        "flux2",
        {
            **_FLUX2,
            "num_layers": 8,
            "num_single_layers": 48,
            "num_attention_heads": 48,
            "joint_attention_dim": 15360,
            "guidance_embeds": True,
        },
    ),
    "sd3-medium": ("sd3", _SD3),
    "sd3.5-medium": (
        "sd3",
        {**_SD3, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
    ),
    "sd3.5-large": ("sd3", {**_SD3, **LARGE}),
    "sdxl-base": ("sdxl", _SDXL),
    "z-image": ("z_image", _Z_IMAGE),
    "qwen-image": ("qwen_image", _QWEN_IMAGE),
    "krea2": ("krea2", _KREA2),
}
CLASSES = {
    "flux": FluxTransformer2DModel,
    "flux2": Flux2Transformer2DModel,
    "sd3": SD3Transformer2DModel,
    "sdxl": UNet2DConditionModel,
    "z_image": ZImageTransformer2DModel,
    "qwen_image": QwenImageTransformer2DModel,
    "krea2": Krea2Transformer2DModel,
}
# Only the widths differ: numbers of layers, classes of blocks, norms and conditions are the published ones.
NARROW = {
    "flux": {
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20,
        "axes_dims_rope": (2, 2, 4),
    },
    "flux2": {
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (2, 2, 2, 2),
        "timestep_guidance_channels": 16, "in_channels": 64,
    },
    "sd3": {
        "sample_size": 8, "pos_embed_max_size": 8, "attention_head_dim": 8, "num_attention_heads": 2,
        "caption_projection_dim": 16, "joint_attention_dim": 24, "pooled_projection_dim": 20,
    },
    "sdxl": {
        "sample_size": 8, "block_out_channels": (8, 16, 16), "norm_num_groups": 4, "attention_head_dim": (1, 2, 2),
        "cross_attention_dim": 24, "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 20,
    },
    "z_image": {"dim": 24, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 24, "axes_dims": [4, 4, 4]},
    "qwen_image": {
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (2, 2, 4),
    },
    "krea2": {
        "attention_head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 80,
        "timestep_embed_dim": 16, "text_hidden_dim": 24, "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2, "text_intermediate_size": 40, "axes_dims_rope": (4, 2, 2),
    },
}  # fmt: skip


def config(base: str, *, narrow: bool) -> dict[str, Any]:
    """The options of a published denoiser, at its own width or a narrow one."""
    name, published = VARIANTS[base]
    return {**published, **(NARROW[name] if narrow else {})}


def shape(base: str, changes: dict[str, Any]) -> torch.nn.Module:
    """A published denoiser on the device "meta", with the options in `changes` instead of its own."""
    with torch.device("meta"):
        return CLASSES[VARIANTS[base][0]](**{**config(base, narrow=False), **changes})
