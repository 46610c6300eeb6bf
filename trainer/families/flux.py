"""Flux.1: all that is known about it. torch and diffusers are imported inside the functions, see `trainer.families`."""

from __future__ import annotations

from pathlib import Path

from trainer.families import BaseModel, Facts

MINIATURE = str(Path(__file__).with_name("miniatures") / "flux")

FACTS = Facts(
    name="flux",
    models={
        "flux": BaseModel("black-forest-labs/FLUX.1-dev", files_gib=31.5, gated=True),
        "flux-dev": BaseModel("black-forest-labs/FLUX.1-dev", files_gib=31.5, gated=True),
        "flux-krea": BaseModel("black-forest-labs/FLUX.1-Krea-dev", files_gib=31.5, gated=True),
        "flux-schnell": BaseModel(
            "black-forest-labs/FLUX.1-schnell", files_gib=31.4, gated=True, defaults={"steps": 4, "guidance": 0.0}
        ),
        "mini-flux": BaseModel(MINIATURE, files_gib=0.0, resolution=128),
    },
    files=(
        "model_index.json",
        "scheduler/*",
        "transformer/*.json",
        "transformer/*.safetensors",
        "vae/*",
        "text_encoder/*",
        "text_encoder_2/*",
        "tokenizer/*",
        "tokenizer_2/*",
    ),
    multiple=16,
    objective="flow",
    timestep_samplings=("sigmoid", "uniform", "shift", "flux_shift", "logit_normal"),
    targets=(
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
        "proj_out",
    ),
    fused_targets={
        "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    prompt_steps=20,
    prompt_guidance=3.5,
    prompt_cfg=1.0,
)
