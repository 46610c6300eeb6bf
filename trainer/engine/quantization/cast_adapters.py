"""The matrices of all adapters, cast to 16 bits at once at the start of a micro-batch.

Without compilation, one adapter costs the device six small kernels a step for casting and scaling, forward and
backward. In SDXL, with 1,444 matrices, that is a quarter of all kernels. Here the matrices are concatenated, so that a
few kernels cast all of them. The bits are the same as one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.engine.flat_parameters import split_into_pieces
from trainer.engine.quantization.lora_linear import LoraLinear


class _Cast(torch.autograd.Function):
    """Each parameter times `scale`, cast to `dtype`. Saves nothing: the gradient is g times `scale`."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, scale: float, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.scale = scale
        ctx.shapes = [p.shape for p in params]
        ctx.dtype = params[0].dtype
        ctx.set_materialize_grads(False)  # an adapter that was not used has None instead of a tensor of zeros
        flat = torch.cat([p.flatten() for p in params])
        if scale != 1:
            flat = flat.mul_(scale)
        return _split(flat.to(dtype), ctx.shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        like = next(g for g in gradients if g is not None)
        parts = []
        for g, shape in zip(gradients, ctx.shapes, strict=True):
            if g is None:
                g = like.new_zeros(shape.numel())
            parts.append(g.flatten())
        flat = torch.cat(parts).to(ctx.dtype)
        if ctx.scale != 1:
            flat = flat.mul_(ctx.scale)
        return None, None, *_split(flat, ctx.shapes)


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """The tensors of these shapes that were concatenated to `flat`; views."""
    parts = flat.split([shape.numel() for shape in shapes])
    return tuple(map(Tensor.view, parts, shapes))


def _matrices(layer: LoraLinear) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


class AdapterCast:
    """A context in which the plain adapters of `model` share one cast to `dtype` (see `LoraLinear.cast_weights`).

    All of them must have the same alpha / rank, since one multiplication scales all; otherwise `layers` is empty and
    each adapter is cast alone.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.layers: list[LoraLinear] = []
        scales: set[float] = set()
        for module in model.modules():
            if isinstance(module, LoraLinear) and module.is_plain(dtype):
                self.layers.append(module)
                scales.add(module.scaling["default"])
        self.scale = max(scales, default=1.0)
        if len(scales) > 1:
            self.layers = []
        sizes = []
        for layer in self.layers:
            down, up = _matrices(layer)
            sizes.append(down.numel() + up.numel())
        # In pieces, so that the backward pass does not hold all gradients in both types at the same time.
        self.pieces: list[list[LoraLinear]] = []
        for places in split_into_pieces(sizes):
            self.pieces.append([self.layers[i] for i in places])

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        for piece in self.pieces:
            downs, ups = zip(*map(_matrices, piece), strict=True)
            cast_downs = _Cast.apply(self.dtype, 1, *downs)
            cast_ups = _Cast.apply(self.dtype, self.scale, *ups)
            for layer, down, up in zip(piece, cast_downs, cast_ups, strict=True):
                layer.shared_cast = (down, up)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.shared_cast = None
