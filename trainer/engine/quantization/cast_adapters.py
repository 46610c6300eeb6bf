"""The two matrices of each adapter in 16 bits, made once a step for all of them.

Where nothing is compiled, an adapter by itself costs the device six pieces of work a step for casting and scaling, both
ways; of a model with hundreds of them that is a quarter of all its work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from trainer.engine.flat_parameters import split_into_pieces
from trainer.engine.quantization.lora_linear import LoraLinear


class _Cast(torch.autograd.Function):
    """Each parameter times `scale`, in `dtype`."""

    @staticmethod
    def forward(ctx: Any, dtype, scale, *params):  # type: ignore[no-untyped-def]
        ctx.scale, ctx.shapes, ctx.dtype = scale, [p.shape for p in params], params[0].dtype
        ctx.set_materialize_grads(False)
        flat = torch.cat([p.flatten() for p in params])
        return _parted((flat if scale == 1 else flat.mul_(scale)).to(dtype), ctx.shapes)

    @staticmethod
    def backward(ctx: Any, *gs):  # type: ignore[no-untyped-def]
        like = next(g for g in gs if g is not None)
        flat = torch.cat(
            [like.new_zeros(s.numel()) if g is None else g.flatten() for g, s in zip(gs, ctx.shapes, strict=True)]
        ).to(ctx.dtype)
        return None, None, *_parted(flat if ctx.scale == 1 else flat.mul_(ctx.scale), ctx.shapes)


def _parted(flat: torch.Tensor, shapes: Sequence[torch.Size]) -> tuple[torch.Tensor, ...]:
    parts = flat.split([shape.numel() for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _matrices(layer: LoraLinear) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


class AdapterCast:
    """Of the adapters in `model` that count alike; inside the context that a call gives, they use what it made."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        found = [m for m in model.modules() if isinstance(m, LoraLinear) and m.is_plain(dtype)]
        scales: set[float] = {m.scaling["default"] for m in found}
        self.dtype, self.layers, self.scale = dtype, found if len(scales) == 1 else [], max(scales, default=1.0)
        sizes = [sum(p.numel() for p in _matrices(layer)) for layer in self.layers]
        # In pieces, so that on the way back not all gradients are there at once in both types.
        self.pieces = [[self.layers[i] for i in piece] for piece in split_into_pieces(sizes)]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        for piece in self.pieces:
            downs, ups = zip(*map(_matrices, piece), strict=True)
            made = _Cast.apply(self.dtype, 1, *downs), _Cast.apply(self.dtype, self.scale, *ups)
            for layer, *both in zip(piece, *made, strict=True):
                layer.ready = tuple(both)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.ready = None
