"""SD3's joint block: image and text have weights of their own and attend to each other.

In SD3.5 medium, some blocks have a second self-attention of the image (`use_dual_attention`). The last block of each
model computes no new text (`context_pre_only`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock

from trainer.engine.fused_linear import gated_residual, norm_linear
from trainer.families.fused_blocks.projections import feed_forward, split_tokens


def _heads(attn: Any, projected: list[torch.Tensor], norm_q: Any, norm_k: Any) -> list[torch.Tensor]:
    """Queries, keys and values, (B, heads, T, D) each, from their projections. Not all variants have norms."""
    q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in projected)
    if norm_q is not None:
        q = norm_q(q)
    if norm_k is not None:
        k = norm_k(k)
    return [q, k, v]


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)


class FusedJointBlock(JointTransformerBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        if joint_attention_kwargs or self._chunk_size is not None:
            outputs: tuple[torch.Tensor | None, torch.Tensor] = super().forward(
                hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
            )
            return outputs
        x, y, attn = hidden_states, encoder_hidden_states, self.attn
        # Modulations, (B, D) each: shift, scale and gate of attention, then of the MLP, then of the second attention.
        norm = self.norm1
        mod_x = norm.linear(norm.silu(temb)).chunk(9 if self.use_dual_attention else 6, dim=1)
        *qkv_x, x = norm_linear(x, norm.norm, (mod_x[1], mod_x[0]), [attn.to_q, attn.to_k, attn.to_v])
        if self.use_dual_attention:
            attn2 = self.attn2
            *qkv_2, x = norm_linear(x, norm.norm, (mod_x[7], mod_x[6]), [attn2.to_q, attn2.to_k, attn2.to_v])
        norm = self.norm1_context
        mod_y = norm.linear(norm.silu(temb)).chunk(2 if self.context_pre_only else 6, dim=1)
        # The last block's norm of the text is another class, with scale before shift.
        modulation = (mod_y[0], mod_y[1]) if self.context_pre_only else (mod_y[1], mod_y[0])
        *qkv_y, y = norm_linear(y, norm.norm, modulation, [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj])
        heads_x = _heads(attn, qkv_x, attn.norm_q, attn.norm_k)
        heads_y = _heads(attn, qkv_y, attn.norm_added_q, attn.norm_added_k)
        attended = _attention(*(torch.cat(both, dim=2) for both in zip(heads_x, heads_y, strict=True)))
        attended_x, attended_y = split_tokens(attended, x.shape[1])
        x = gated_residual(x, mod_x[2], attn.to_out[0](attended_x))
        if self.use_dual_attention:
            heads_2 = _heads(attn2, qkv_2, attn2.norm_q, attn2.norm_k)
            x = gated_residual(x, mod_x[8], attn2.to_out[0](_attention(*heads_2)))
        mlp, x = feed_forward(self.ff, x, self.norm2, (mod_x[4], mod_x[3]))
        x = gated_residual(x, mod_x[5], mlp)
        if self.context_pre_only:
            return None, x
        y = gated_residual(y, mod_y[2], attn.to_add_out(attended_y))
        mlp, y = feed_forward(self.ff_context, y, self.norm2_context, (mod_y[4], mod_y[3]))
        return gated_residual(y, mod_y[5], mlp), x
