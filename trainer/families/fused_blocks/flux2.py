"""FLUX.2's two kinds of blocks.

They differ from Flux.1's in three ways: all blocks of a kind share a modulation, which comes from outside; the MLP is a
SwiGLU, whose two halves one layer computes; and in single blocks one layer computes those halves and the projections of
attention, and another one reads what both leave.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)

from trainer.engine.fused_linear import can_fuse, gated_residual, norm_linear, swiglu_linear
from trainer.families.fused_blocks.joint_attention import (
    Rotary,
    can_fuse_sources,
    is_partly_joined,
    joint_attention,
    partly_joined_attention,
    projections,
    text_projections,
)
from trainer.families.fused_blocks.projections import split_tokens


class PartlyJoinedFlux2Processor(Flux2AttnProcessor):
    """diffusers' attention, also where only image or only text has joined projections; otherwise unchanged."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary = None,
    ) -> Any:
        if encoder_hidden_states is None or attention_mask is not None or not is_partly_joined(attn):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return partly_joined_attention(attn, hidden_states, encoder_hidden_states, image_rotary_emb)


def _feed_forward(
    ff: Any, x_BTD: torch.Tensor, norm: Any, scale_BD: torch.Tensor, shift_BD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ff` on the normalised and modulated x; and x, to continue with (see `norm_linear`)."""
    both, x_BTD = norm_linear(x_BTD, norm, (scale_BD, shift_BD), [ff.linear_in])
    gate, up = both.chunk(2, dim=-1)
    return swiglu_linear(gate, up, ff.linear_out), x_BTD


class FusedFlux2SingleBlock(Flux2SingleTransformerBlock):
    """Attention and MLP side by side, on the tokens of text and image together."""

    # Set by `trainer.engine.memory.checkpointing`: recompute the outputs of norm and rotary embedding, save all else.
    recompute_rope = False

    def can_recompute_rope(self) -> bool:
        """As in Flux.1's fused blocks."""
        attn = self.attn
        sources = [([attn.to_qkv_mlp_proj], attn.norm_q, attn.norm_k)]
        return can_fuse([attn.to_qkv_mlp_proj, attn.to_out]) and can_fuse_sources(sources)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        temb_mod: torch.Tensor,
        image_rotary_emb: Rotary = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> Any:
        if joint_attention_kwargs or temb_mod.ndim != 2 or encoder_hidden_states is not None or split_hidden_states:
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                temb_mod,
                image_rotary_emb,
                joint_attention_kwargs,
                split_hidden_states,
                text_seq_len,
            )
        attn = self.attn
        shift, scale, gate = temb_mod.chunk(3, dim=1)
        projected, x = norm_linear(hidden_states, self.norm, (scale, shift), [attn.to_qkv_mlp_proj])
        qkv, mlp_gate, mlp_up = projected.split([3 * attn.inner_dim, *[attn.mlp_hidden_dim] * 2], dim=-1)
        source = ([qkv], attn.norm_q, attn.norm_k)
        attended = joint_attention(attn, [source], image_rotary_emb, recompute_rope=self.recompute_rope)
        return gated_residual(x, gate, swiglu_linear(mlp_gate, mlp_up, attn.to_out, left_BTL=attended))


class FusedFlux2DoubleBlock(Flux2TransformerBlock):
    """Image (x) and text (y) have weights of their own and attend to each other; then an MLP for each."""

    recompute_rope = False  # as in FusedFlux2SingleBlock

    def can_recompute_rope(self) -> bool:
        attn, ff, ff_context = self.attn, self.ff, self.ff_context
        of_image, of_text = projections(attn), text_projections(attn)
        layers = [*of_image, *of_text, attn.to_out[0], attn.to_add_out]
        layers += [ff.linear_in, ff.linear_out, ff_context.linear_in, ff_context.linear_out]
        text = (of_text, attn.norm_added_q, attn.norm_added_k)
        image = (of_image, attn.norm_q, attn.norm_k)
        return can_fuse(layers) and can_fuse_sources([text, image])

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb_mod_img: torch.Tensor,
        temb_mod_txt: torch.Tensor,
        image_rotary_emb: Rotary = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if joint_attention_kwargs or temb_mod_img.ndim != 2:
            outputs: tuple[torch.Tensor, torch.Tensor] = super().forward(
                hidden_states,
                encoder_hidden_states,
                temb_mod_img,
                temb_mod_txt,
                image_rotary_emb,
                joint_attention_kwargs,
            )
            return outputs
        x, y, attn = hidden_states, encoder_hidden_states, self.attn
        # Modulations, (B, D) each: shift, scale and gate of attention, then of the MLP.
        mod_x = temb_mod_img.chunk(6, dim=1)
        mod_y = temb_mod_txt.chunk(6, dim=1)
        *qkv_x, x = norm_linear(x, self.norm1, (mod_x[1], mod_x[0]), projections(attn))
        *qkv_y, y = norm_linear(y, self.norm1_context, (mod_y[1], mod_y[0]), text_projections(attn))
        sources = [(qkv_y, attn.norm_added_q, attn.norm_added_k), (qkv_x, attn.norm_q, attn.norm_k)]
        attended = joint_attention(attn, sources, image_rotary_emb, recompute_rope=self.recompute_rope)
        attended_y, attended_x = split_tokens(attended, y.shape[1])
        x = gated_residual(x, mod_x[2], attn.to_out[0](attended_x.contiguous()))
        y = gated_residual(y, mod_y[2], attn.to_add_out(attended_y.contiguous()))
        mlp_x, x = _feed_forward(self.ff, x, self.norm2, mod_x[4], mod_x[3])
        x = gated_residual(x, mod_x[5], mlp_x)
        mlp_y, y = _feed_forward(self.ff_context, y, self.norm2_context, mod_y[4], mod_y[3])
        return gated_residual(y, mod_y[5], mlp_y), x
