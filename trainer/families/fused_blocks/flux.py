"""See the package. Attention's projections are three layers, or one whose rows are theirs (`lora.fuse`)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

from trainer.engine.fused_linear import activated, fuses, gated, normed
from trainer.engine.rope import attended, fits
from trainer.families.fused_blocks.projections import feed_forward, halves, whole

Rotary = tuple[torch.Tensor, torch.Tensor] | None


def _projections(attn: Any) -> list[Any]:
    return [attn.to_qkv] if hasattr(attn, "to_qkv") else [attn.to_q, attn.to_k, attn.to_v]


def _text_projections(attn: Any) -> list[Any]:
    return [attn.to_added_qkv] if hasattr(attn, "to_added_qkv") else [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]


def _heads(attn: Any, projected: list[torch.Tensor], norm_q: Any, norm_k: Any) -> list[torch.Tensor]:
    """Queries, keys and values, each (B, T, heads, D)."""
    parts = projected[0].chunk(3, dim=-1) if len(projected) == 1 else projected
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    return [norm_q(q), norm_k(k), v]


def _joined(sources: list[Any]) -> bool:
    """Whether `trainer.engine.rope` can take what was projected, or will be, with the norms of queries and keys."""
    return all(len(projected) == 1 and fits(*norms) for projected, *norms in sources)


def _attended(
    attn: Any, sources: list[tuple[list[torch.Tensor], Any, Any]], rotary: Rotary, *, recompute_rope: bool
) -> torch.Tensor:
    """Attention among the tokens of all sources: what was projected, and the norms of queries and keys."""
    attention = functools.partial(dispatch_attention_fn, backend=attn.processor._attention_backend)
    if rotary is not None and _joined(sources) and sources[0][0][0].dtype != torch.float32:
        joined = [(projected[0], *norms) for projected, *norms in sources]
        return attended(joined, rotary, attention, recompute_rope=recompute_rope).flatten(2, 3)
    several = [_heads(attn, *source) for source in sources]
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*several, strict=True)) if several[1:] else several[0]
    if rotary is not None:
        q, k = apply_rotary_emb(q, rotary, sequence_dim=1), apply_rotary_emb(k, rotary, sequence_dim=1)
    found: torch.Tensor = attention(q, k, v)
    return found.flatten(2, 3).to(q.dtype)


class FusedSingleBlock(FluxSingleTransformerBlock):
    recompute_rope = False  # see `trainer.engine.memory.checkpointing`

    def can_recompute_rope(self) -> bool:
        joined = _projections(self.attn)
        return fuses([*joined, self.proj_mlp, self.proj_out]) and _joined(
            [(joined, self.attn.norm_q, self.attn.norm_k)]
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if joint_attention_kwargs:
            found: tuple[torch.Tensor, torch.Tensor] = super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
            return found
        text, attn = encoder_hidden_states.shape[1], self.attn
        shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=1)
        x = whole(encoder_hidden_states, hidden_states)
        *projected, mlp, x = normed(x, self.norm.norm, (scale, shift), [*_projections(attn), self.proj_mlp])
        of_tokens = _attended(
            attn, [(projected, attn.norm_q, attn.norm_k)], image_rotary_emb, recompute_rope=self.recompute_rope
        )
        return halves(gated(x, gate, activated(mlp, self.proj_out, left_BTL=of_tokens)), text)


class FusedDoubleBlock(FluxTransformerBlock):
    recompute_rope = False

    def can_recompute_rope(self) -> bool:
        attn, first, second = self.attn, _projections(self.attn), _text_projections(self.attn)
        others = [
            attn.to_out[0],
            attn.to_add_out,
            *(n for ff in (self.ff, self.ff_context) for n in (ff.net[0].proj, ff.net[2])),
        ]
        sources = [(second, attn.norm_added_q, attn.norm_added_k), (first, attn.norm_q, attn.norm_k)]
        return fuses([*first, *second, *others]) and _joined(sources)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if joint_attention_kwargs:
            found: tuple[torch.Tensor, torch.Tensor] = super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
            return found
        x, y, attn = hidden_states, encoder_hidden_states, self.attn
        of_x = self.norm1.linear(self.norm1.silu(temb)).chunk(6, dim=1)
        of_y = self.norm1_context.linear(self.norm1_context.silu(temb)).chunk(6, dim=1)
        *image, x = normed(x, self.norm1.norm, (of_x[1], of_x[0]), _projections(attn))
        *text, y = normed(y, self.norm1_context.norm, (of_y[1], of_y[0]), _text_projections(attn))
        sources = [(text, attn.norm_added_q, attn.norm_added_k), (image, attn.norm_q, attn.norm_k)]
        of_text, of_image = halves(
            _attended(attn, sources, image_rotary_emb, recompute_rope=self.recompute_rope), y.shape[1]
        )
        x = gated(x, of_x[2], attn.to_out[0](of_image.contiguous()))
        y = gated(y, of_y[2], attn.to_add_out(of_text.contiguous()))
        made, x = feed_forward(self.ff, x, self.norm2, (of_x[4], of_x[3]))
        x = gated(x, of_x[5], made)
        made, y = feed_forward(self.ff_context, y, self.norm2_context, (of_y[4], of_y[3]))
        return gated(y, of_y[5], made), x
