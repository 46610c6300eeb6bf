"""Qwen-Image and Qwen-Image-2512: one architecture, of which the second was trained for longer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.families.published import common, configs
from trainer.spec.family import Lookalike, Published
from trainer.spec.rules.config_rules import FALSE, HEADS, LAYERS, WIDTH, ConfigKind, Rules, each, only, whole

PUBLISHED = Published(
    configs={
        "model_index.json": common.index(
            "QwenImagePipeline",
            {
                "scheduler": "FlowMatchEulerDiscreteScheduler",
                "transformer": "QwenImageTransformer2DModel",
                "vae": "AutoencoderKLQwenImage",
                "text_encoder": "Qwen2_5_VLForConditionalGeneration",
                "tokenizer": "Qwen2Tokenizer",
            },
        ),
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "use_dynamic_shifting": True,
            "time_shift_type": "exponential",
            "base_shift": 0.5,
            "max_shift": 0.9,
            "base_image_seq_len": 256,
            "max_image_seq_len": 8192,
            "shift_terminal": 0.02,
        },
        "transformer/config.json": {
            "_class_name": "QwenImageTransformer2DModel",
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "guidance_embeds": False,
            "axes_dims_rope": [16, 56, 56],
        },
        "vae/config.json": common.QWEN_VAE,
        "text_encoder/config.json": common.QWEN2_5_VL_7B,
    },
    tokenizers={"tokenizer": common.QWEN2_5_VL_TOKENIZER},
    marks={
        "img_in.weight": (3072, 64),
        "txt_norm.weight": (3584,),
        "transformer_blocks.59.img_mlp.net.0.proj.weight": (12288, 3072),
        "transformer_blocks.60.img_mlp.net.0.proj.weight": None,
    },
)

# Edit and Edit-2509 have the same tensors as Qwen-Image, so that nothing in a file tells them: `name_cautions` of the
# family's FACTS look at its name.
LOOKALIKES = (
    Lookalike("Qwen-Image-Edit-2511, which edits images", "__index_timestep_zero__"),
    Lookalike("Qwen-Image-Layered, which draws layers", "time_text_embed.addition_t_embedding.weight"),
    Lookalike("Qwen-Image 2.1, another architecture", "txt_in.text_norm.weight"),
)
NAME_CAUTIONS = {
    common.EDIT: common.EDITS,
    "lightning": common.DISTILLED,
    "turbo": common.DISTILLED,
    "rapid": common.DISTILLED,
    "distill": common.DISTILLED,
    common.FEW_STEPS: common.DISTILLED,
}

# ---- what the configs of a model of this family may say

_RULES: Rules = {
    "patch_size": only(2),
    "in_channels": whole(4, 1024),
    "out_channels": whole(1, 256),
    "num_layers": LAYERS,
    "attention_head_dim": whole(2, 1024),
    "num_attention_heads": HEADS,
    "joint_attention_dim": WIDTH,
    "guidance_embeds": FALSE,
    "axes_dims_rope": each(whole(2, 1024), 3, 3),
    # Of models that edit images, and of those that draw layers.
    "zero_cond_t": FALSE,
    "use_additional_t_cond": FALSE,
    "use_layer3d_rope": FALSE,
}


def _differing(config: Mapping[str, Any]) -> str | None:
    axes = config.get("axes_dims_rope", [16, 56, 56])
    if sum(axes) != config.get("attention_head_dim", 128) or any(axis % 2 for axis in axes):
        return "axes_dims_rope are not even numbers whose sum is attention_head_dim"
    if config.get("in_channels", 64) != 4 * config.get("out_channels", 16):
        return "in_channels is not four times out_channels"  # 2 x 2 latents are a token
    return None


PIPELINES = ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
KINDS = {
    "scheduler": configs.FLOW_SCHEDULER,
    "transformer": ConfigKind("diffusers", ("QwenImageTransformer2DModel",), _RULES, differing=_differing),
    "vae": configs.QWEN_VAE,
    "text_encoder": configs.QWEN2_5_VL,
    "tokenizer": configs.QWEN_TOKENIZER,
}


def same_sizes(parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, int, int]]:
    denoiser, vae, encoder = (parts.get(name) for name in ("transformer", "vae", "text_encoder"))
    sizes = []
    if denoiser is not None and vae is not None:
        sizes.append(("transformer out_channels", "vae z_dim", denoiser.get("out_channels", 16), vae["z_dim"]))
    if denoiser is not None and encoder is not None:
        width = denoiser.get("joint_attention_dim", 3584)
        sizes.append(("transformer joint_attention_dim", "text_encoder hidden_size", width, encoder["hidden_size"]))
    return sizes
