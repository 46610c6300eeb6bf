"""Krea 2's blocks: text and image in one row, queries of four times as many heads as keys, and a gate on attention.

Its RMSNorms multiply by 1 + weight, and before a modulation they get a shift as well. q, k, v and the gate are separate
layers without a bias. All blocks share a modulation, to which each adds a table of its own. Blocks of the text alone
(`text_fusion`) have neither a modulation nor rotated heads.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_krea2 import Krea2TextFusionBlock, Krea2TransformerBlock

from trainer.engine.fused_linear import gated_linear, gated_residual, rms_linear, swiglu_linear
from trainer.engine.rope import can_fuse_rope, head_norm_rope

WEIGHT_OFFSET = 1.0  # of the family's norms
Rotary = tuple[torch.Tensor, torch.Tensor] | None  # cosines and sines, (T, D) each; both numbers of a pair have one


def _turns(rotary: Rotary, norm: Any) -> torch.Tensor:
    """Cosine and sine of each pair's angle in fp32, (1, T, D / 2, 2); (1, 1, D / 2, 2) where nothing is rotated."""
    if rotary is not None:
        return torch.stack([part[:, ::2] for part in rotary], -1).float()[None]
    turns_11R2 = norm.weight.new_zeros(1, 1, norm.dim // 2, 2, dtype=torch.float32)
    turns_11R2[..., 0] = 1.0
    return turns_11R2


def _heads(x_BTF: torch.Tensor, norm: Any, turns_BTR2: torch.Tensor | None, rotary: Rotary) -> torch.Tensor:
    """Normalised and rotated queries or keys, (B, T, H, D). Without `turns`, by diffusers' modules."""
    if turns_BTR2 is not None:
        return head_norm_rope(x_BTF, norm.weight + WEIGHT_OFFSET, turns_BTR2, norm.eps)
    heads_BTHD: torch.Tensor = norm(x_BTF.unflatten(-1, (-1, norm.dim)))
    if rotary is not None:
        heads_BTHD = apply_rotary_emb(heads_BTHD, rotary, sequence_dim=1)
    return heads_BTHD


def _repeated(heads_BTHD: torch.Tensor, times: int) -> torch.Tensor:
    """Each head `times` times: no kernel of attention but one takes fewer keys than queries beside a mask."""
    if times == 1:
        return heads_BTHD
    return heads_BTHD[:, :, :, None].expand(-1, -1, -1, times, -1).flatten(2, 3)


def _attention(attn: Any, projected: list[torch.Tensor], rotary: Rotary, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of projected queries, keys and values, with its gate (B, T, F) and its output projection."""
    q, k, v, gate = projected
    turns_BTR2 = None
    if q.dtype != torch.float32 and can_fuse_rope(attn.norm_q, attn.norm_k):
        turns_BTR2 = _turns(rotary, attn.norm_q)
    q = _heads(q, attn.norm_q, turns_BTR2, rotary)
    k = _heads(k, attn.norm_k, turns_BTR2, rotary)
    v = v.unflatten(-1, (attn.num_kv_heads, -1))
    times = attn.num_heads // attn.num_kv_heads
    k, v = _repeated(k, times), _repeated(v, times)
    attended = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=attn.processor._attention_backend)
    return gated_linear(gate, attended.flatten(2, 3).to(q.dtype), attn.to_out[0])


def _projections(attn: Any) -> list[torch.nn.Module]:
    return [attn.to_q, attn.to_k, attn.to_v, attn.to_gate]


class FusedKrea2Block(Krea2TransformerBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if temb.shape[1] != 1:  # a modulation for each token
            output: torch.Tensor = super().forward(hidden_states, temb, image_rotary_emb, attention_mask)
            return output
        attn, ff = self.attn, self.ff
        # Modulations, (B, D) each: scale, shift and gate of attention, then of the MLP.
        modulation = (temb.unflatten(-1, (6, -1)) + self.scale_shift_table)[:, 0].unbind(1)
        *projected, x = rms_linear(
            hidden_states,
            self.norm1,
            modulation[0],
            _projections(attn),
            shift_BD=modulation[1],
            weight_offset=WEIGHT_OFFSET,
        )
        x = gated_residual(x, modulation[2], _attention(attn, projected, image_rotary_emb, attention_mask))
        gate, up, x = rms_linear(
            x, self.norm2, modulation[3], [ff.gate, ff.up], shift_BD=modulation[4], weight_offset=WEIGHT_OFFSET
        )
        return gated_residual(x, modulation[5], swiglu_linear(gate, up, ff.down))


class FusedKrea2TextBlock(Krea2TextFusionBlock):
    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        attn, ff = self.attn, self.ff
        *projected, x = rms_linear(hidden_states, self.norm1, None, _projections(attn), weight_offset=WEIGHT_OFFSET)
        x = x + _attention(attn, projected, None, attention_mask)
        gate, up, x = rms_linear(x, self.norm2, None, [ff.gate, ff.up], weight_offset=WEIGHT_OFFSET)
        return x + swiglu_linear(gate, up, ff.down)
