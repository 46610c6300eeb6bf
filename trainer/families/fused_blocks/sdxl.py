"""SDXL's transformer block: self-attention, cross-attention to the text, and a GEGLU MLP, each after a norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock

from trainer.engine.fused_linear import norm_linear, shared_input_linear
from trainer.families.fused_blocks.projections import feed_forward


def _attention(attn: Any, qkv: list[torch.Tensor]) -> torch.Tensor:
    """Attention of projected queries, keys and values, (B, T, D) each, with its output projection."""
    q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in qkv)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    output: torch.Tensor = attn.to_out[0](attended.to(q.dtype))
    return output


class FusedBasicBlock(BasicTransformerBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        masked = attention_mask is not None or encoder_attention_mask is not None
        if masked or cross_attention_kwargs or encoder_hidden_states is None or self._chunk_size is not None:
            output: torch.Tensor = super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
            return output
        self_attn, cross_attn = self.attn1, self.attn2
        *qkv, x = norm_linear(hidden_states, self.norm1, None, [self_attn.to_q, self_attn.to_k, self_attn.to_v])
        x = x + _attention(self_attn, qkv)
        q, x = norm_linear(x, self.norm2, None, [cross_attn.to_q])
        # Keys and values come from the text embeddings, which no norm precedes.
        kv = shared_input_linear(encoder_hidden_states, [cross_attn.to_k, cross_attn.to_v])
        x = x + _attention(cross_attn, [q, *kv])
        mlp, x = feed_forward(self.ff, x, self.norm3, None, geglu=True)
        return x + mlp
