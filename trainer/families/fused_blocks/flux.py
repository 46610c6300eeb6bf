"""Flux.1's two kinds of blocks.

Attention's projections are three layers, or one joined layer with the rows of all three
(`trainer.engine.adapters.fuse_projections`). If they are joined, `trainer.engine.rope` computes norms and rotary
embedding in one kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

from trainer.engine.fused_linear import can_fuse, gated_residual, gelu_linear, norm_linear
from trainer.engine.rope import can_fuse_rope, rope_attention
from trainer.families.fused_blocks.projections import feed_forward, join_tokens, split_tokens

Rotary = tuple[torch.Tensor, torch.Tensor] | None  # cosines and sines, (T, D) each


def _projections(attn: Any) -> list[Any]:
    if hasattr(attn, "to_qkv"):
        return [attn.to_qkv]
    return [attn.to_q, attn.to_k, attn.to_v]


def _text_projections(attn: Any) -> list[Any]:
    if hasattr(attn, "to_added_qkv"):
        return [attn.to_added_qkv]
    return [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]


def _heads(attn: Any, projected: list[torch.Tensor], norm_q: Any, norm_k: Any) -> list[torch.Tensor]:
    """Normalised queries and keys, and values, (B, T, heads, D) each."""
    parts = projected[0].chunk(3, dim=-1) if len(projected) == 1 else projected
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    return [norm_q(q), norm_k(k), v]


# A source: its projections, as layers or as their outputs, and the norms of queries and keys.
def _can_fuse_rope(sources: list[tuple[list[Any], Any, Any]]) -> bool:
    """Whether `rope_attention` can take these sources: joined projections, and norms that the kernel can compute."""
    return all(len(projected) == 1 and can_fuse_rope(norm_q, norm_k) for projected, norm_q, norm_k in sources)


def _attention(
    attn: Any, sources: list[tuple[list[torch.Tensor], Any, Any]], rotary: Rotary, *, recompute_rope: bool
) -> torch.Tensor:
    """Attention among the tokens of all sources, in their order: (B, T, heads * D)."""
    attention = functools.partial(dispatch_attention_fn, backend=attn.processor._attention_backend)
    if rotary is not None and _can_fuse_rope(sources) and sources[0][0][0].dtype != torch.float32:
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


class PartlyJoinedProcessor(FluxAttnProcessor):
    """diffusers' attention, also where only image or only text has joined projections; otherwise unchanged.

    diffusers' own asks one question for both: where `to_qkv` is there, `to_added_qkv` has to be.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary = None,
    ) -> Any:
        has_text = attn.added_kv_proj_dim is not None
        if (
            encoder_hidden_states is None
            or not has_text
            or attention_mask is not None
            or hasattr(attn, "to_qkv") == hasattr(attn, "to_added_qkv")
        ):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        image = [layer(hidden_states) for layer in _projections(attn)]
        text = [layer(encoder_hidden_states) for layer in _text_projections(attn)]
        sources = [(text, attn.norm_added_q, attn.norm_added_k), (image, attn.norm_q, attn.norm_k)]
        attended = _attention(attn, sources, image_rotary_emb, recompute_rope=False)
        attended_text, attended_image = split_tokens(attended, encoder_hidden_states.shape[1])
        attended_image = attn.to_out[1](attn.to_out[0](attended_image.contiguous()))
        return attended_image, attn.to_add_out(attended_text.contiguous())


class FusedSingleBlock(FluxSingleTransformerBlock):
    """Attention and MLP side by side, on the tokens of text and image together."""

    # Set by `trainer.engine.memory.checkpointing`: recompute the outputs of norm and rotary embedding, save all else.
    recompute_rope = False

    def can_recompute_rope(self) -> bool:
        """Whether every layer is fused. The block then keeps what a checkpoint of its products would, without one."""
        projections = _projections(self.attn)
        if not can_fuse([*projections, self.proj_mlp, self.proj_out]):
            return False
        return _can_fuse_rope([(projections, self.attn.norm_q, self.attn.norm_k)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if joint_attention_kwargs:
            outputs: tuple[torch.Tensor, torch.Tensor] = super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
            return outputs
        attn = self.attn
        text_tokens = encoder_hidden_states.shape[1]
        shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=1)
        x = join_tokens(encoder_hidden_states, hidden_states)
        # One quantised input for attention's projections and the MLP.
        *qkv, mlp, x = norm_linear(x, self.norm.norm, (scale, shift), [*_projections(attn), self.proj_mlp])
        source = (qkv, attn.norm_q, attn.norm_k)
        attended = _attention(attn, [source], image_rotary_emb, recompute_rope=self.recompute_rope)
        x = gated_residual(x, gate, gelu_linear(mlp, self.proj_out, left_BTL=attended))
        return split_tokens(x, text_tokens)


class FusedDoubleBlock(FluxTransformerBlock):
    """Image (x) and text (y) have weights of their own and attend to each other; then an MLP for each."""

    recompute_rope = False  # as in FusedSingleBlock

    def can_recompute_rope(self) -> bool:
        attn, ff, ff_context = self.attn, self.ff, self.ff_context
        projections, text_projections = _projections(attn), _text_projections(attn)
        layers = [*projections, *text_projections, attn.to_out[0], attn.to_add_out]
        layers += [ff.net[0].proj, ff.net[2], ff_context.net[0].proj, ff_context.net[2]]
        text = (text_projections, attn.norm_added_q, attn.norm_added_k)
        image = (projections, attn.norm_q, attn.norm_k)
        return can_fuse(layers) and _can_fuse_rope([text, image])

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if joint_attention_kwargs:
            outputs: tuple[torch.Tensor, torch.Tensor] = super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
            return outputs
        x, y, attn = hidden_states, encoder_hidden_states, self.attn
        # Modulations, (B, D) each: shift, scale and gate of attention, then of the MLP.
        mod_x = self.norm1.linear(self.norm1.silu(temb)).chunk(6, dim=1)
        mod_y = self.norm1_context.linear(self.norm1_context.silu(temb)).chunk(6, dim=1)
        *qkv_x, x = norm_linear(x, self.norm1.norm, (mod_x[1], mod_x[0]), _projections(attn))
        *qkv_y, y = norm_linear(y, self.norm1_context.norm, (mod_y[1], mod_y[0]), _text_projections(attn))
        sources = [(qkv_y, attn.norm_added_q, attn.norm_added_k), (qkv_x, attn.norm_q, attn.norm_k)]
        attended = _attention(attn, sources, image_rotary_emb, recompute_rope=self.recompute_rope)
        attended_y, attended_x = split_tokens(attended, y.shape[1])
        x = gated_residual(x, mod_x[2], attn.to_out[0](attended_x.contiguous()))
        y = gated_residual(y, mod_y[2], attn.to_add_out(attended_y.contiguous()))
        mlp_x, x = feed_forward(self.ff, x, self.norm2, (mod_x[4], mod_x[3]))
        x = gated_residual(x, mod_x[5], mlp_x)
        mlp_y, y = feed_forward(self.ff_context, y, self.norm2_context, (mod_y[4], mod_y[3]))
        return gated_residual(y, mod_y[5], mlp_y), x
