"""See the package."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock

from trainer.engine.fused_linear import normed, shared
from trainer.families.fused_blocks.projections import feed_forward


def _attended(attn: Any, projected: list[torch.Tensor]) -> torch.Tensor:
    q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in projected)
    found: torch.Tensor = attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(q.dtype))
    return found


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
            found: torch.Tensor = super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
            return found
        own, cross = self.attn1, self.attn2
        *projected, x = normed(hidden_states, self.norm1, None, [own.to_q, own.to_k, own.to_v])
        x = x + _attended(own, projected)
        q, x = normed(x, self.norm2, None, [cross.to_q])
        x = x + _attended(cross, [q, *shared(encoder_hidden_states, [cross.to_k, cross.to_v])])
        made, x = feed_forward(self.ff, x, self.norm3, None, gated=True)
        return x + made
