"""A LoRA layer whose term is computed in the product of its frozen base layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.tuners import lora as peft_lora
from torch import Tensor

from trainer.engine.quantization.frozen_linear import FrozenLinear


class LoraLinear(peft_lora.Linear):
    """peft's LoRA layer with another forward pass. Its matrices are kept and trained in fp32.

    peft would compute the LoRA term in fp32, as separate layers, and add it to the base layer's output. Here A and B
    are cast to the activations' 16 bits, and a frozen base layer computes the term in its own product. What this cannot
    do (DoRA, dropout, merged or disabled adapters) is left to peft.
    """

    # (A, B) in 16 bits, while `AdapterCast` has them cast for all layers at once.
    shared_cast: tuple[Tensor, Tensor] | None = None

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether the term is x Aᵀ Bᵀ and nothing else, and activations are in 16 bits."""
        if self.disable_adapters or self.merged or self.lora_variant:
            return False
        # In fp32 nothing is gained over peft's own arithmetic.
        return dtype != torch.float32 and isinstance(self.lora_dropout["default"], torch.nn.Identity)

    def cast_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """A (R, K) and B (N, R) in `dtype`, B times alpha / rank; None if peft has to compute the layer."""
        if not self.is_plain(dtype):
            return None
        if self.shared_cast is not None and self.shared_cast[0].dtype == dtype:
            return self.shared_cast
        up = (self.lora_B["default"].weight * self.scaling["default"]).to(dtype)
        return self.lora_A["default"].weight.to(dtype), up

    def forward(self, x: Tensor) -> Tensor:
        weights = self.cast_weights(x.dtype)
        if weights is None:
            return super().forward(x)
        down, up = weights
        if isinstance(self.base_layer, FrozenLinear):
            return self.base_layer.linear(x, down, up)
        return self.base_layer(x) + F.linear(F.linear(x, down), up)
