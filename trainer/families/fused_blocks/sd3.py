"""See the package."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock

from trainer.engine.fused_linear import gated, normed
from trainer.families.fused_blocks.projections import feed_forward, halves

Heads = list[torch.Tensor]  # queries, keys and values, each (B, heads, T, D)


def _heads(attn: Any, projected: list[torch.Tensor], norms: tuple[Any, Any]) -> Heads:
    q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in projected)
    return [q if norms[0] is None else norms[0](q), k if norms[1] is None else norms[1](k), v]


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
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
            found: tuple[torch.Tensor | None, torch.Tensor] = super().forward(
                hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
            )
            return found
        x, y, attn, norms = hidden_states, encoder_hidden_states, self.attn, self.norm1
        of_x = norms.linear(norms.silu(temb)).chunk(9 if self.use_dual_attention else 6, dim=1)
        *image, x = normed(x, norms.norm, (of_x[1], of_x[0]), [attn.to_q, attn.to_k, attn.to_v])
        if self.use_dual_attention:
            second = self.attn2
            *again, x = normed(x, norms.norm, (of_x[7], of_x[6]), [second.to_q, second.to_k, second.to_v])
        norms = self.norm1_context
        of_y = norms.linear(norms.silu(temb)).chunk(2 if self.context_pre_only else 6, dim=1)
        modulation = (of_y[0], of_y[1]) if self.context_pre_only else (of_y[1], of_y[0])
        *text, y = normed(y, norms.norm, modulation, [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj])
        of_image, of_text = (
            _heads(attn, image, (attn.norm_q, attn.norm_k)),
            _heads(attn, text, (attn.norm_added_q, attn.norm_added_k)),
        )
        attended = _attended(*(torch.cat(both, dim=2) for both in zip(of_image, of_text, strict=True)))
        to_image, to_text = halves(attended, x.shape[1])
        x = gated(x, of_x[2], attn.to_out[0](to_image))
        if self.use_dual_attention:
            heads = _heads(second, again, (second.norm_q, second.norm_k))
            x = gated(x, of_x[8], second.to_out[0](_attended(*heads)))
        made, x = feed_forward(self.ff, x, self.norm2, (of_x[4], of_x[3]))
        x = gated(x, of_x[5], made)
        if self.context_pre_only:
            return None, x
        y = gated(y, of_y[2], attn.to_add_out(to_text))
        made, y = feed_forward(self.ff_context, y, self.norm2_context, (of_y[4], of_y[3]))
        return gated(y, of_y[5], made), x
