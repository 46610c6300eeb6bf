"""Load text encoders and the VAE for the phases that need them, and run CLIP text encoders on long captions.

A CLIP text encoder reads 77 tokens: one that begins, up to 75 of the caption, and one that ends. Longer captions are
read in chunks of 75, each with a beginning and an end of its own, and the outputs are put together again. There are two
conventions. This is sd-scripts' (library/strategy_base.py, `_get_input_ids`, and library/strategy_sdxl.py,
`_get_hidden_states_sdxl`): the beginnings and ends between chunks are left out, so that 150 tokens give 152 states
and 225 give 227; always as many chunks as were asked for. ComfyUI (comfy/sd1_clip.py) and Forge keep them, which gives
154 and 231 states, and encode as many chunks as a prompt needs; a LoRA works with either. All take the pooled output of
the first chunk.

Letters: B captions, N chunks, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.engine.device import torch_dtype
from trainer.engine.memory import weight_streaming
from trainer.spec.family import CLIP_TOKENS, ClipOutput, Family
from trainer.spec.plan import EnginePlan

TILE_SIDE = 512  # pixels
CHUNK = CLIP_TOKENS - 2  # tokens of a caption in a chunk


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
    """The VAE for drawing; it decodes in tiles if the plan says so.

    On an accelerator it decodes in fp16, with half the memory: its error is a fraction of what a pixel of 8 bits holds,
    and twice that of fp32 with TF32 convolutions (docs/engine.md). bf16's is ten times as large.
    """
    vae = family.load_vae(model, device=engine.device)
    if engine.device == "cuda":
        vae = vae.half()
    if engine.tile_vae:
        vae.enable_tiling()
        if hasattr(vae, "tile_sample_min_size"):
            # diffusers' default is the size that the model was trained with, so that most images would be one tile.
            downscaling = 2 ** (len(vae.config.block_out_channels) - 1)
            vae.tile_sample_min_size = TILE_SIDE
            vae.tile_latent_min_size = TILE_SIDE // downscaling
    return vae


def clip_output(model: Any, tokenizer: Any, captions: Sequence[str], *, max_tokens: int = CLIP_TOKENS) -> ClipOutput:
    """Second to last hidden states (B, L, D) and pooled output (B, D) of one CLIP text encoder.

    L is 77, or 2 more than `max_tokens` where that is larger. With a gradient where one is enabled.
    """
    chunks = max(1, max_tokens // CHUNK)
    ids_ML = _token_ids(tokenizer, captions, chunks)  # M = B * N
    out = model(ids_ML.to(model.device), output_hidden_states=True)
    pooled_MD = out.pooler_output if "pooler_output" in out else out.text_embeds
    tokens_MLD = out.hidden_states[-2]
    if chunks == 1:
        return ClipOutput(tokens_MLD, pooled_MD)
    return ClipOutput(_join_chunks(tokens_MLD, chunks), pooled_MD[::chunks])


def _token_ids(tokenizer: Any, captions: Sequence[str], chunks: int) -> torch.Tensor:
    """The tokens of each chunk, all chunks of a caption one after the other."""
    chunk = tokenizer.model_max_length - 2
    length = chunks * chunk + 2
    ids_BL: torch.Tensor = tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt", verbose=False
    ).input_ids
    if chunks == 1:
        return ids_BL
    # Where the caption ends: at its first end token, which may be the padding as well.
    ends_B = (ids_BL[:, 1:] == tokenizer.eos_token_id).int().argmax(dim=1) + 1
    rows = []
    for ids_L, end in zip(ids_BL, ends_B.tolist(), strict=True):
        for start in range(1, length - 1, chunk):
            row_L = torch.cat([ids_L[:1], ids_L[start : start + chunk], ids_L[-1:]])
            if end >= start + chunk:  # full of the caption
                row_L[-1] = tokenizer.eos_token_id
            if end < start:  # nothing is left of it
                row_L[1] = tokenizer.eos_token_id
            rows.append(row_L)
    return torch.stack(rows)


def _join_chunks(states_MLD: torch.Tensor, chunks: int) -> torch.Tensor:
    """The states of a caption's chunks as one row (B, N * 75 + 2, D): only the outer begin and end tokens stay."""
    states_BNLD = states_MLD.unflatten(0, (-1, chunks))
    inner_BLD = states_BNLD[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states_BNLD[:, 0, :1], inner_BLD, states_BNLD[:, -1, -1:]], dim=1)
