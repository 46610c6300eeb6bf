"""Load text encoders and the VAE for the phases that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.engine.device import torch_dtype
from trainer.engine.memory import weight_streaming
from trainer.spec.family import Family
from trainer.spec.plan import EnginePlan

TILE_SIDE = 512  # pixels


def load_text_encoders(family: Family, model: Path, engine: EnginePlan) -> Any:
    """Tokenizers and text encoders for `Family.encode_text`; their layers are streamed if the plan says so."""
    device = "cpu" if engine.stream_encoders else engine.device
    encoders = family.load_encoders(model, device=device, dtype=torch_dtype(engine))
    if engine.stream_encoders:
        for name, component in encoders.components.items():
            if name.startswith("text_encoder") and component is not None:
                weight_streaming.stream_layers(component, engine.device)
    return encoders


def load_vae(family: Family, model: Path, engine: EnginePlan) -> Any:
    """The VAE for drawing; it decodes in tiles if the plan says so."""
    vae = family.load_vae(model, device=engine.device)
    if engine.tile_vae:
        vae.enable_tiling()
        # diffusers' default is the size that the model was trained with, so that most images would be one tile.
        downscaling = 2 ** (len(vae.config.block_out_channels) - 1)
        vae.tile_sample_min_size = TILE_SIDE
        vae.tile_latent_min_size = TILE_SIDE // downscaling
    return vae
