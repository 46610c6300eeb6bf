"""Flux.1's two kinds of blocks.

Their attention is that of `fused_blocks.joint_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

from trainer.engine.fused_linear import can_fuse, gated_residual, gelu_linear, norm_linear
from trainer.families.fused_blocks.joint_attention import (
    Rotary,
    can_fuse_sources,
    is_partly_joined,
    joint_attention,
    partly_joined_attention,
    projections,
    text_projections,
)
from trainer.families.fused_blocks.projections import feed_forward, join_tokens, split_tokens


class PartlyJoinedProcessor(FluxAttnProcessor):
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


class FusedSingleBlock(FluxSingleTransformerBlock):
    """Attention and MLP side by side, on the tokens of text and image together."""

    # Set by `trainer.engine.memory.checkpointing`: recompute the outputs of norm and rotary embedding, save all else.
    recompute_rope = False

    def can_recompute_rope(self) -> bool:
        """Whether every layer is fused. The block then keeps what a checkpoint of its products would, without one."""
        of_both = projections(self.attn)
        if not can_fuse([*of_both, self.proj_mlp, self.proj_out]):
            return False
        return can_fuse_sources([(of_both, self.attn.norm_q, self.attn.norm_k)])

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
        *qkv, mlp, x = norm_linear(x, self.norm.norm, (scale, shift), [*projections(attn), self.proj_mlp])
        source = (qkv, attn.norm_q, attn.norm_k)
        attended = joint_attention(attn, [source], image_rotary_emb, recompute_rope=self.recompute_rope)
        x = gated_residual(x, gate, gelu_linear(mlp, self.proj_out, left_BTL=attended))
        return split_tokens(x, text_tokens)


class FusedDoubleBlock(FluxTransformerBlock):
    """Image (x) and text (y) have weights of their own and attend to each other; then an MLP for each."""

    recompute_rope = False  # as in FusedSingleBlock

    def can_recompute_rope(self) -> bool:
        attn, ff, ff_context = self.attn, self.ff, self.ff_context
        of_image, of_text = projections(attn), text_projections(attn)
        layers = [*of_image, *of_text, attn.to_out[0], attn.to_add_out]
        layers += [ff.net[0].proj, ff.net[2], ff_context.net[0].proj, ff_context.net[2]]
        text = (of_text, attn.norm_added_q, attn.norm_added_k)
        image = (of_image, attn.norm_q, attn.norm_k)
        return can_fuse(layers) and can_fuse_sources([text, image])

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
        *qkv_x, x = norm_linear(x, self.norm1.norm, (mod_x[1], mod_x[0]), projections(attn))
        *qkv_y, y = norm_linear(y, self.norm1_context.norm, (mod_y[1], mod_y[0]), text_projections(attn))
        sources = [(qkv_y, attn.norm_added_q, attn.norm_added_k), (qkv_x, attn.norm_q, attn.norm_k)]
        attended = joint_attention(attn, sources, image_rotary_emb, recompute_rope=self.recompute_rope)
        attended_y, attended_x = split_tokens(attended, y.shape[1])
        x = gated_residual(x, mod_x[2], attn.to_out[0](attended_x.contiguous()))
        y = gated_residual(y, mod_y[2], attn.to_add_out(attended_y.contiguous()))
        mlp_x, x = feed_forward(self.ff, x, self.norm2, (mod_x[4], mod_x[3]))
        x = gated_residual(x, mod_x[5], mlp_x)
        mlp_y, y = feed_forward(self.ff_context, y, self.norm2_context, (mod_y[4], mod_y[3]))
        return gated_residual(y, mod_y[5], mlp_y), x
