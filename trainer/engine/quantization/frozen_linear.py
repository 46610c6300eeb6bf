"""Frozen linear layers in 8 bits, and the adapters on them. No weight gradient is ever formed.

Shapes: M tokens (rows), K input and N output features, R the adapter's rank. A weight is quantised once, by output
channel, and kept in 8 bits alone. Where a form multiplies in 8 bits, the input's rows are quantised by scales of their
own as they come; on the way back the weight's scales are folded into the gradient before its rows are quantised.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from trainer.engine.kernels.dispatch import transpose
from trainer.engine.quantization.formats import LEAST, STORED, WEIGHT_FORMATS, Rows
from trainer.spec.adapter_columns import fits_adapter_columns, padding_for


@contextlib.contextmanager
def dequantized_matmul(model: torch.nn.Module) -> Iterator[None]:
    """Inside, frozen weights are multiplied in 16 bits or more: no rounding of an input to 8 changes what comes out."""
    layers = [(m, m.weight_format) for m in model.modules() if isinstance(m, FrozenLinear)]
    linear, plain = torch.nn.Linear, torch.nn.Linear.forward
    others = [m for m in model.modules() if isinstance(m, linear) and type(m).forward is not plain]  # torchao's
    try:
        for layer, weight_format in layers:
            layer.weight_format = STORED.get(weight_format, weight_format)
        for other in others:
            other.__dict__["forward"] = types.MethodType(plain, other)
        yield
    finally:
        for layer, weight_format in layers:
            layer.weight_format = weight_format
        for other in others:
            del other.__dict__["forward"]


class _Product(torch.autograd.Function):
    """x wᵀ + bias + (x downᵀ) upᵀ for a frozen weight w in one of the forms."""

    @staticmethod
    def forward(ctx: Any, x, w, scale, bias, down, up, turned, weight_format):  # type: ignore[no-untyped-def]
        h_MR = None if down is None else x @ down.t()
        ctx.weight_format, ctx.width = weight_format, x.shape[1]
        ctx.save_for_backward(None if down is None else x, h_MR, w, scale, down, up, turned)
        return WEIGHT_FORMATS[weight_format].product(x, w, scale, bias, h_MR, up)

    @staticmethod
    def backward(ctx: Any, g):  # type: ignore[no-untyped-def]
        x, h_MR, w, scale, down, up, turned = ctx.saved_tensors
        g = g.contiguous()
        gh_MR = None if up is None else g @ up
        gx = None
        if ctx.needs_input_grad[0]:
            gx = WEIGHT_FORMATS[ctx.weight_format].gradient(g, w, scale, gh_MR, down, turned, ctx.width)
        if gh_MR is None:
            return gx, None, None, None, None, None, None, None
        return gx, None, None, None, gh_MR.t() @ x, g.t() @ h_MR, None, None


@torch.compiler.allow_in_graph
def product(x, w, scale, bias, down, up, turned, weight_format):  # type: ignore[no-untyped-def]
    """`_Product`, which the compiler need not look into to differentiate."""
    return _Product.apply(x, w, scale, bias, down, up, turned, weight_format)


class FrozenLinear(torch.nn.Module):
    """A linear layer whose weight is kept in 8 bits or 4 and never trained. `form`: a key of `WEIGHT_FORMATS`.

    `rank`: of the adapter that it will get. Where it multiplies in FP8, there are columns beside the weight for that.
    """

    weight_NF: torch.Tensor
    scale_1N: torch.Tensor
    weight_t_KN: torch.Tensor | None

    def __init__(self, linear: torch.nn.Linear, weight_format: str, rank: int = 0) -> None:
        super().__init__()
        self.in_features, self.out_features, self.weight_format = linear.in_features, linear.out_features, weight_format
        worth = self.in_fp8 and fits_adapter_columns(rank, min(linear.weight.shape))
        self.rank = rank if worth and linear.weight.abs().max() >= LEAST else 0
        room = padding_for(self.rank, self.in_features)
        values, scales = WEIGHT_FORMATS[weight_format].store(linear.weight.detach(), room)
        self.width = values.shape[1] - room
        self.register_buffer("weight_NF", values)
        self.register_buffer("scale_1N", scales)
        self.register_buffer("weight_t_KN", None)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    @property
    def in_fp8(self) -> bool:
        """Whether it multiplies in FP8, both ways."""
        return WEIGHT_FORMATS[self.weight_format].transposes

    @property
    def weight_NK(self) -> torch.Tensor:
        """As it is kept, without what is beside it."""
        return self.weight_NF[:, : self.width]

    def keep_transposed(self, keep: bool) -> None:
        """Keep a copy of the weight turned round, or do not: the way back then need not turn it each time."""
        room = padding_for(self.rank, self.out_features)
        self.weight_t_KN = transpose(self.weight_NK, room) if keep and self.in_fp8 else None

    def drop_adapter_columns(self) -> None:
        """Give up the columns beside the weight."""
        self.rank, self.weight_NF = 0, self.weight_NK.contiguous()

    @property
    def weight(self) -> torch.Tensor:
        """The weight that it stands for, (N, K), made anew each time."""
        return WEIGHT_FORMATS[self.weight_format].whole(self.weight_NK, self.scale_1N, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, None, None)

    def product(self, x: torch.Tensor, down_RK: Rows, up_NR: Rows) -> torch.Tensor:
        """x wᵀ + bias + (x downᵀ) upᵀ, (…, N)."""
        rows = x.reshape(-1, self.in_features)
        w = self.weight_NF if self.in_fp8 else self.weight_NK
        y = product(rows, w, self.scale_1N, self.bias, down_RK, up_NR, self.weight_t_KN, self.weight_format)
        return y.view(*x.shape[:-1], self.out_features)


def freeze(block: torch.nn.Module, weight_format: str, rank: Callable[[str], int] = lambda _: 0) -> None:
    """Replace the linear layers in `block`, in place. Modulations, with one row a picture, are only stored in 8 bits.

    Layers whose sides are no multiples of what the form needs stay as they are. `rank`: of the adapter that the layer
    of a name will get.
    """
    if weight_format == "torchao":
        _train_in_float8(block)
        return
    stored = STORED.get(weight_format, weight_format)
    for name, layer in list(block.named_modules()):
        if not isinstance(layer, torch.nn.Linear):
            continue
        here = stored if "norm" in name else weight_format
        if layer.in_features % WEIGHT_FORMATS[here].multiple or layer.out_features % WEIGHT_FORMATS[here].multiple:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, FrozenLinear(layer, here, rank(name)))


def _train_in_float8(block: torch.nn.Module) -> None:
    """torchao's float8 training: weights in 16 bits, quantised tensor by tensor in each product.

    As in its published recipe for diffusion models, `proj_out` and sizes that 16 does not divide stay as they are.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(layer: torch.nn.Module, name: str) -> bool:
        sides = (layer.in_features, layer.out_features) if isinstance(layer, torch.nn.Linear) else (1,)
        return "proj_out" not in name and not any(side % 16 for side in sides)

    on_cpu = next(block.parameters()).device.type == "cpu"  # which has no such products
    convert_to_float8_training(
        block, module_filter_fn=fits, config=Float8LinearConfig(pad_inner_dim=True, emulate=on_cpu)
    )
