"""The weights of a LoRA, independent of any tool's key names."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class LoraWeights:
    """What a LoRA adds to the weight of one module: scale * up @ down.

    With DoRA (arXiv:2402.09353), each row of the sum is then brought to its `magnitude`, shape (out,).
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> torch.Tensor:
        """(out, in) or (out, in, kh, kw), in the precision of the matrices."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return self.scale * product.view(self.up.shape[0], *self.down.shape[1:])

    def to_cpu(self) -> LoraWeights:
        """The same with its tensors on the CPU."""
        length = None if self.magnitude is None else self.magnitude.cpu()
        return replace(self, down=self.down.cpu(), up=self.up.cpu(), magnitude=length)

    def folded(self) -> LoraWeights:
        """The same with scale 1."""
        return self if self.scale == 1 else replace(self, up=self.up * self.scale, scale=1.0)

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the adapter on it, in fp32."""
        whole = weight.float() + self.delta().to(weight.device)
        if self.magnitude is None:
            return whole
        ratio = self.magnitude.to(weight.device) / whole.flatten(1).norm(dim=1)
        return whole * ratio.view(-1, *[1] * (whole.ndim - 1))


LoraModules = dict[str, LoraWeights]  # `<component>.<path in diffusers' model>` → its adapter
