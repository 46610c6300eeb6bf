"""Configurations of the full-size models, and a writer of model folders with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from bench import original_names as original
from bench.step import FLUX, FLUX2, KREA2, QWEN_IMAGE, SD3, SDXL, Z_IMAGE
from trainer.base_model import loading
from trainer.spec.family import get_family

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX2_VAE = {
    **{key: VAE[key] for key in ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block")},
    "latent_channels": 32,
}
CLIP = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_G = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
HEADS = {"num_attention_heads": 12, "projection_dim": 768}
T5 = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}
QWEN2_5_VL = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
}
QWEN3_VL = {
    **QWEN3,
    "rope_theta": 5000000,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
}
VIDEO_VAE = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}


# Family → part → its published config. The keys that are missing are the miniature's.
FULL = {
    "flux": {"denoiser": FLUX, "vae": VAE, "clip_l": {**CLIP, **HEADS}, "t5": T5},
    "flux2": {"denoiser": FLUX2, "vae": FLUX2_VAE, "qwen3": QWEN3},
    "sdxl": {
        "denoiser": SDXL,
        "vae": {**VAE, "latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True},
        "clip_l": {**CLIP, **HEADS},
        "clip_g": CLIP_G,
    },
    "sd3": {"denoiser": SD3, "vae": VAE, "clip_l": {**CLIP, **HEADS}, "clip_g": CLIP_G, "t5": T5},
    "z_image": {"denoiser": Z_IMAGE, "vae": VAE, "qwen3": QWEN3},
    "qwen_image": {
        "denoiser": {**QWEN_IMAGE, "in_channels": 64, "out_channels": 16, "joint_attention_dim": 3584},
        "vae": {**VIDEO_VAE, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16},
        "qwen2_5_vl": QWEN2_5_VL,
    },
    "krea2": {
        "denoiser": {**KREA2, "num_layers": 28, "num_attention_heads": 48, "num_key_value_heads": 12},
        "vae": {**VIDEO_VAE, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16},
        "qwen3_vl": QWEN3_VL,
    },
}


# ---- a model in the file layout that users have

# Of the miniature's config.json: what names the model's class, and the tokens that its tokenizer has at other numbers.
OWN_KEYS = ("_class_name", "architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id")


def write_configs(folder: Path, name: str, changes: dict[str, dict[str, Any]]) -> dict[str, torch.nn.Module]:
    """Write a model's folder without weights; returns its parts on the device "meta".

    `changes`: part → its config, where it is not the miniature's; `FULL` has the published ones.
    """
    small = original.miniature(name)
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    models = {}
    facts = get_family(name).FACTS
    for part, subfolder in facts.parts.items():
        path = folder / subfolder / "config.json"
        if part in changes:
            config = json.loads(path.read_text())
            own = {key: config[key] for key in OWN_KEYS if key in config}
            path.write_text(json.dumps({**changes[part], **own}))
        kind = facts.kinds[subfolder]
        models[part] = loading.empty_model(kind, path.parent)
        if kind.library == "diffusers":
            models[part].save_config(path.parent)
    return models
