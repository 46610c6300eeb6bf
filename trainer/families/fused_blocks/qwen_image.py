"""Qwen-Image's block: image and text have weights of their own and attend to each other; then an MLP for each.

q, k and v are separate layers, and image and text have rotations of their own, the same for all images. Where captions
differ in length, attention leaves out what fills them up.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

from trainer.engine.fused_linear import gated_residual, norm_linear
from trainer.families.fused_blocks.projections import feed_forward, split_tokens, turned_heads

Heads = list[torch.Tensor]  # queries, keys and values, (B, T, H, D) each


def _heads(attn: Any, qkv: list[torch.Tensor], norm_q: Any, norm_k: Any, turns_TR: torch.Tensor | None) -> Heads:
    turns_BTR = None if turns_TR is None else turns_TR[None]
    q, k = (turned_heads(x, norm, turns_BTR, attn.heads) for x, norm in ((qkv[0], norm_q), (qkv[1], norm_k)))
    return [q, k, qkv[2].unflatten(-1, (attn.heads, -1))]


class FusedQwenImageBlock(QwenImageTransformerBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if joint_attention_kwargs or modulate_index is not None or self.zero_cond_t:
            outputs: tuple[torch.Tensor, torch.Tensor] = super().forward(
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                temb,
                image_rotary_emb,
                joint_attention_kwargs,
                modulate_index,
            )
            return outputs
        x, y, attn = hidden_states, encoder_hidden_states, self.attn
        # Modulations, (B, D) each: shift, scale and gate of attention, then of the MLP.
        mod_x = self.img_mod(temb).chunk(6, dim=1)
        mod_y = self.txt_mod(temb).chunk(6, dim=1)
        *qkv_x, x = norm_linear(x, self.img_norm1, (mod_x[1], mod_x[0]), [attn.to_q, attn.to_k, attn.to_v])
        added = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        *qkv_y, y = norm_linear(y, self.txt_norm1, (mod_y[1], mod_y[0]), added)
        turns_x, turns_y = image_rotary_emb or (None, None)
        heads_x = _heads(attn, qkv_x, attn.norm_q, attn.norm_k, turns_x)
        heads_y = _heads(attn, qkv_y, attn.norm_added_q, attn.norm_added_k, turns_y)
        mask = None
        if encoder_hidden_states_mask is not None:
            of_image_BT = encoder_hidden_states_mask.new_ones(x.shape[:2])
            mask = torch.cat([encoder_hidden_states_mask, of_image_BT], dim=1)[:, None, None, :]
        q, k, v = (torch.cat(both, dim=1) for both in zip(heads_y, heads_x, strict=True))
        attended = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=attn.processor._attention_backend)
        attended_y, attended_x = split_tokens(attended.flatten(2, 3).to(q.dtype), y.shape[1])
        x = gated_residual(x, mod_x[2], attn.to_out[0](attended_x.contiguous()))
        y = gated_residual(y, mod_y[2], attn.to_add_out(attended_y.contiguous()))
        mlp_x, x = feed_forward(self.img_mlp, x, self.img_norm2, (mod_x[4], mod_x[3]))
        x = gated_residual(x, mod_x[5], mlp_x)
        mlp_y, y = feed_forward(self.txt_mlp, y, self.txt_norm2, (mod_y[4], mod_y[3]))
        return gated_residual(y, mod_y[5], mlp_y), x
