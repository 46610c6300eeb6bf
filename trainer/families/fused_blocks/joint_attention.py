"""Attention of Flux.1's and FLUX.2's fused blocks, among the tokens of text and image together.

The projections of each are three layers, or one joined layer with the rows of all three
(`trainer.engine.adapters.fuse_projections`). If they are joined, `trainer.engine.rope` computes norms and rotary
embedding in one kernel.

Letters: B images, T tokens, D features of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb

from trainer.engine.rope import can_fuse_rope, rope_attention
from trainer.families.fused_blocks.projections import split_tokens

Rotary = tuple[torch.Tensor, torch.Tensor] | None  # cosines and sines, (T, D) each
# Projections, as layers or as their outputs, and the norms of queries and keys.
Source = tuple[list[Any], Any, Any]


def projections(attn: Any) -> list[Any]:
    """The layers that make queries, keys and values of the image's tokens."""
    if hasattr(attn, "to_qkv"):
        return [attn.to_qkv]
    return [attn.to_q, attn.to_k, attn.to_v]


def text_projections(attn: Any) -> list[Any]:
    """The same of the text's."""
    if hasattr(attn, "to_added_qkv"):
        return [attn.to_added_qkv]
    return [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]


def can_fuse_sources(sources: list[Source]) -> bool:
    """Whether `rope_attention` can take these sources: joined projections, and norms that the kernel can compute."""
    return all(len(projected) == 1 and can_fuse_rope(norm_q, norm_k) for projected, norm_q, norm_k in sources)


def joint_attention(attn: Any, sources: list[Source], rotary: Rotary, *, recompute_rope: bool) -> torch.Tensor:
    """Attention among the tokens of all sources, in their order: (B, T, heads * D)."""
    attention = functools.partial(dispatch_attention_fn, backend=attn.processor._attention_backend)
    if rotary is not None and can_fuse_sources(sources) and sources[0][0][0].dtype != torch.float32:
        joined = [(projected[0], norm_q, norm_k) for projected, norm_q, norm_k in sources]
        return rope_attention(joined, rotary, attention, recompute_rope=recompute_rope).flatten(2, 3)
    heads = [_heads(attn, *source) for source in sources]
    if len(heads) > 1:
        q, k, v = (torch.cat(parts, dim=1) for parts in zip(*heads, strict=True))
    else:
        q, k, v = heads[0]
    if rotary is not None:
        q = apply_rotary_emb(q, rotary, sequence_dim=1)
        k = apply_rotary_emb(k, rotary, sequence_dim=1)
    attended: torch.Tensor = attention(q, k, v)
    return attended.flatten(2, 3).to(q.dtype)


def is_partly_joined(attn: Any) -> bool:
    """Whether only the image's or only the text's projections are joined, where adapters train the others or none.

    diffusers' own attention asks one question for both: where `to_qkv` is there, `to_added_qkv` has to be.
    """
    return attn.added_kv_proj_dim is not None and hasattr(attn, "to_qkv") != hasattr(attn, "to_added_qkv")


def partly_joined_attention(
    attn: Any, image_BTD: torch.Tensor, text_BTD: torch.Tensor, rotary: Rotary
) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers' attention returns of image and text, whichever of their projections are joined."""
    image = [layer(image_BTD) for layer in projections(attn)]
    text = [layer(text_BTD) for layer in text_projections(attn)]
    sources = [(text, attn.norm_added_q, attn.norm_added_k), (image, attn.norm_q, attn.norm_k)]
    attended = joint_attention(attn, sources, rotary, recompute_rope=False)
    attended_text, attended_image = split_tokens(attended, text_BTD.shape[1])
    attended_image = attn.to_out[1](attn.to_out[0](attended_image.contiguous()))
    return attended_image, attn.to_add_out(attended_text.contiguous())


def _heads(attn: Any, projected: list[torch.Tensor], norm_q: Any, norm_k: Any) -> list[torch.Tensor]:
    """Normalised queries and keys, and values, (B, T, heads, D) each."""
    parts = projected[0].chunk(3, dim=-1) if len(projected) == 1 else projected
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    return [norm_q(q), norm_k(k), v]
