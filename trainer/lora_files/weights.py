"""The weights of a LoRA, independent of any tool's key names.

Shapes: r rank, in and out the sides of the layer, kh and kw the sides of a convolution's kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class LoraWeights:
    """What a LoRA (arXiv:2106.09685) adds to the weight of one layer: scale * up @ down, where scale = alpha / r.

    With DoRA (arXiv:2402.09353), each row of the sum is then scaled to the norm in `magnitude`. A layer of rank 0 does
    not train, and its magnitudes are the norms that its rows have: a file needs them where it keeps that layer and one
    that trains as one.
    """

    down: torch.Tensor  # (r, in) or (r, in, kh, kw); A in papers
    up: torch.Tensor  # (out, r) or (out, r, 1, 1); B in papers
    scale: float
    magnitude: torch.Tensor | None = None  # (out,)

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        magnitude = self.magnitude.nbytes if self.magnitude is not None else 0
        return self.down.nbytes + self.up.nbytes + magnitude

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> torch.Tensor:
        """scale * up @ down, (out, in) or (out, in, kh, kw), in the precision of the matrices."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return self.scale * product.view(self.up.shape[0], *self.down.shape[1:])

    def to_cpu(self) -> LoraWeights:
        """The same with its tensors on the CPU."""
        magnitude = self.magnitude
        if magnitude is not None:
            magnitude = magnitude.cpu()
        return replace(self, down=self.down.cpu(), up=self.up.cpu(), magnitude=magnitude)

    def folded(self) -> LoraWeights:
        """The same with scale 1: the scale is multiplied into `up`."""
        if self.scale == 1:
            return self
        return replace(self, up=self.up * self.scale, scale=1.0)

    def without_kernel(self) -> LoraWeights:
        """The same for a linear layer: some tools store it as a convolution of 1 x 1."""
        if self.down.ndim == 2 or self.down.shape[2:].numel() != 1:
            return self
        return replace(self, down=self.down.flatten(1), up=self.up.flatten(1))

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The layer's weight with the LoRA merged into it, in fp32."""
        merged = weight.float() + self.delta().to(weight.device)
        if self.magnitude is None:
            return merged
        ratio = self.magnitude.to(weight.device) / merged.flatten(1).norm(dim=1)
        return merged * ratio.view(-1, *[1] * (merged.ndim - 1))


LoraModules = dict[str, LoraWeights]  # `<component>.<path in diffusers' model>` → the weights of that layer
