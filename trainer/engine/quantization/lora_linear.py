"""A LoRA layer whose forward pass is fused with that of its frozen base layer."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from peft.tuners import lora as peft_lora

if importlib.util.find_spec("triton"):
    pass
else:
    pass
from trainer.engine.quantization.frozen_linear import FrozenLinear


class LoraLinear(peft_lora.Linear):
    """peft's LoRA layer; on a frozen layer the adapter is part of its product. Adapters are kept in fp32."""

    ready: tuple[torch.Tensor, torch.Tensor] | None = (
        None  # its halves, where they are made for all (trainer.engine.quantization.cast_adapters)
    )

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether it is the product of two matrices, and no more, that peft need not compute."""
        special = self.disable_adapters or self.merged or self.lora_variant
        # In fp32 peft's own arithmetic is as good; in 16 bits it would compute the adapter's part in fp32.
        return not special and dtype != torch.float32 and isinstance(self.lora_dropout["default"], torch.nn.Identity)

    def halves(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Its two matrices, the second one scaled; None where peft has to compute it."""
        if not self.is_plain(dtype):
            return None
        if self.ready is not None and self.ready[0].dtype == dtype:
            return self.ready
        up = (self.lora_B["default"].weight * self.scaling["default"]).to(dtype)
        return self.lora_A["default"].weight.to(dtype), up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = self.halves(x.dtype)
        if halves is None:
            return super().forward(x)
        down, up = halves
        if isinstance(self.base_layer, FrozenLinear):
            return self.base_layer.product(x, down, up)
        return self.base_layer(x) + F.linear(F.linear(x, down), up)
