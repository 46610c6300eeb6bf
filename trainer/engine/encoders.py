"""Load text encoders and the VAE for the phases that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.engine.device import torch_dtype
from trainer.engine.memory import weight_streaming
from trainer.spec.family import Family
from trainer.spec.plan import EnginePlan

TILE = 512  # pixels of a side


def load_text_encoders(family: Family, model: Path, engine: EnginePlan) -> Any:
    """Tokenizers and text encoders for `encode_text`; their layers are streamed where the plan says so."""
    where = "cpu" if engine.stream_encoders else engine.device
    encoders = family.load_encoders(model, device=where, dtype=torch_dtype(engine))
    for name, part in encoders.components.items() if engine.stream_encoders else ():
        if name.startswith("text_encoder") and part is not None:
            weight_streaming.layers(part, engine.device)
    return encoders


def load_vae(family: Family, model: Path, engine: EnginePlan) -> Any:
    """The VAE for drawing; it decodes piece by piece where the plan says so."""
    vae = family.load_vae(model, device=engine.device)
    if engine.tile_vae:
        vae.enable_tiling()
        # By itself it takes the size that the model was trained with, which is that of the whole picture.
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // 2 ** (len(vae.config.block_out_channels) - 1)
    return vae
