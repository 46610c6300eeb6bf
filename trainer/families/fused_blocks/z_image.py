"""Z-Image's block: text and image in one row, with a norm before and after attention and MLP.

q, k and v are separate layers without a bias; a rotation differs from image to image, because an image stands behind
its caption. The MLP is a SwiGLU of two layers. What comes out of attention and MLP is normalised, gated by a tanh and
added, in one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

from trainer.engine.fused_linear import norm_residual, rms_linear, swiglu_linear
from trainer.families.fused_blocks.projections import turned_heads


def _attention(
    attn: Any, qkv: list[torch.Tensor], turns_BTR: torch.Tensor | None, attended_BT: torch.Tensor | None
) -> torch.Tensor:
    """Attention among the tokens of a row, (B, T, H * D). `attended`: the tokens that are; None: all."""
    q = turned_heads(qkv[0], attn.norm_q, turns_BTR, attn.heads)
    k = turned_heads(qkv[1], attn.norm_k, turns_BTR, attn.heads)
    v = qkv[2].unflatten(-1, (attn.heads, -1))
    mask = None if attended_BT is None else attended_BT[:, None, None, :]
    found: torch.Tensor = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=attn.processor._attention_backend)
    return found.flatten(2, 3).to(q.dtype)


class FusedZImageBlock(ZImageTransformerBlock):
    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None,
        freqs_cis: torch.Tensor | None,
        adaln_input: torch.Tensor | None = None,
        noise_mask: torch.Tensor | None = None,
        adaln_noisy: torch.Tensor | None = None,
        adaln_clean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if noise_mask is not None or (attn_mask is not None and attn_mask.dim() != 2):
            output: torch.Tensor = super().forward(
                x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean
            )
            return output
        attn, ff = self.attention, self.feed_forward
        scale_attn = gate_attn = scale_ff = gate_ff = None
        if self.modulation:  # the blocks of the text alone have none
            scale_attn, gate_attn, scale_ff, gate_ff = self.adaLN_modulation(adaln_input).chunk(4, dim=1)
            gate_attn, gate_ff = gate_attn.tanh(), gate_ff.tanh()
        *qkv, x = rms_linear(x, self.attention_norm1, scale_attn, [attn.to_q, attn.to_k, attn.to_v])
        attended = attn.to_out[0](_attention(attn, qkv, freqs_cis, attn_mask))
        x = norm_residual(x, self.attention_norm2, gate_attn, attended)
        gate, up, x = rms_linear(x, self.ffn_norm1, scale_ff, [ff.w1, ff.w3])
        return norm_residual(x, self.ffn_norm2, gate_ff, swiglu_linear(gate, up, ff.w2))
