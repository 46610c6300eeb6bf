"""The arithmetic of each weight format: how a frozen weight is stored, multiplied and dequantised."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from trainer.engine.kernels import reference
from trainer.engine.kernels.dispatch import (
    append_adapter_columns,
    can_dequantize,
    dequantize_rows,
    quantize_rows,
    transpose,
)
from trainer.engine.kernels.reference import quantize_weight
from trainer.spec.adapter_columns import columns, padding_for
from trainer.spec.weight_formats import PRECISIONS

Rows = torch.Tensor | None
LONG, FEW = 5120, 2**17  # of longer rows cuBLAS 13.0 has no product with a bias that has fewer numbers
BLOCK = 64  # numbers that share a scale in nf4
LEAST = 3e-4  # a matrix without any number of that size has no scale for what an adapter may come to

# ---- an operator, which the compiler takes as one. Defined plainly: what a call costs the host counts.
_OPERATORS = torch.library.Library("kiln", "FRAGMENT")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as the operator of this schema, on every device."""

    def register(function: Callable[..., Any]) -> Any:
        name = _OPERATORS.define(schema)
        _OPERATORS.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kiln::{name}", fake, lib=_OPERATORS)
        return getattr(torch.ops.kiln, name).default

    return register


@_operator(
    "fp8_product(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor? bias, Tensor? down, Tensor? up, int width,"
    " float times) -> Tensor",
    lambda x, x_scale, w, w_scale, bias, down, up, width, times: x.new_empty(  # noqa: ARG005
        x.shape[0], w.shape[0], dtype=torch.bfloat16
    ),
)
def fp8_product(
    x_MF: torch.Tensor,
    x_scale_M1: torch.Tensor,
    w_NF: torch.Tensor,
    w_scale_1N: torch.Tensor,
    bias_N: torch.Tensor | None,
    down_MR: torch.Tensor | None,
    up_NR: torch.Tensor | None,
    width: int,
    times: float,
) -> torch.Tensor:
    """(M, N) in bf16: x wᵀ + bias + down upᵀ, with x and w in FP8, which have K = `width` columns that count.

    The columns after K are there to be written over: where w has as many as the adapter takes, its part comes out of
    the same product, and x must have them too; else it is added in place. `times`: see `quantize.beside`. To the
    compiler this changes neither x nor w, for nobody else reads those columns.
    """
    room = 0
    if down_MR is not None and up_NR is not None and columns(down_MR.shape[1]) <= w_NF.shape[1] - width:
        append_adapter_columns(x_MF, x_scale_M1, down_MR, w_NF, w_scale_1N, up_NR, width, times)
        room = w_NF.shape[1] - width
    after = bias_N if width + room > LONG and len(x_MF) * len(w_NF) < FEW else None
    y_MN = torch._scaled_mm(
        x_MF[:, : width + room],
        w_NF[:, : width + room].t(),
        scale_a=x_scale_M1,
        scale_b=w_scale_1N,
        bias=bias_N if after is None else None,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    if after is not None:
        y_MN += after
    return y_MN if room or down_MR is None or up_NR is None else y_MN.addmm_(down_MR, up_NR.t())


# ---- the forms: how x wᵀ + bias + h up, and g w + gh down, are computed from a weight (N, K) and its scales (1, N)
FORWARD_SCALE = 4.0  # what `quantize.beside` makes an adapter's second matrix larger by, on the way forward


def backward_scale(width: int) -> float:
    """And the first one on the way back: its numbers begin at 1 / √K."""
    return 2.0 ** round(math.log2(16 * math.sqrt(width)))


def _fp8_forward(x, w, scale, bias, h, up):  # type: ignore[no-untyped-def]
    x8, x_scale = quantize_rows(x, None, w.dtype, w.shape[1] - x.shape[1])
    return fp8_product(x8, x_scale, w, scale, bias, h, up, x.shape[1], FORWARD_SCALE)


def fp8_gradient(g, w, scale, gh, down, turned, width):  # type: ignore[no-untyped-def]
    """g w + gh down, the gradient of an input of `width` numbers. `w` and `turned` may have columns beside them."""
    if turned is None:  # tensor cores sum along rows of both
        rank = 0 if down is None or w.shape[1] == width else len(down)
        turned = transpose(w[:, :width], padding_for(rank, len(w)))
    g8, g_scale = quantize_rows(g, scale.to(torch.bfloat16), w.dtype, turned.shape[1] - g.shape[1])
    ones = torch.ones(1, width, device=g.device)
    up = None if down is None else down.t()
    return fp8_product(g8, g_scale, turned, ones, None, gh, up, g.shape[1], backward_scale(width))


def _int8_forward(x, w, scale, bias, h, up):  # type: ignore[no-untyped-def]
    x8, x_scale = quantize_rows(x, None, w.dtype)
    y = torch._int_mm(x8, w.t()).float() * x_scale * scale
    y = y if bias is None else y + bias
    return (y if h is None else y + h @ up.t()).to(x.dtype)


def _int8_backward(g, w, scale, gh, down, _turned, _width):  # type: ignore[no-untyped-def]
    g8, g_scale = quantize_rows(g, scale, w.dtype)
    gx = torch._int_mm(g8, w).float() * g_scale
    return (gx if gh is None else gx + gh @ down).to(g.dtype)


def whole(w_NK: torch.Tensor, scale_1N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight that 8 bits and scales stand for."""
    return (dequantize_rows if can_dequantize(w_NK) else reference.dequantize_rows)(w_NK, scale_1N, dtype)


def _nf4_store(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two numbers to a byte, (N, K / 2), and the scale of each block of 64, by bitsandbytes."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight_NK.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return packed.view(weight_NK.shape[0], -1), state.absmax.view(1, -1)


def _nf4_whole(w: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    restore = torch.ops.bitsandbytes.dequantize_4bit.default
    found: torch.Tensor = restore(w, scale.view(-1), BLOCK, "nf4", [w.shape[0], 2 * w.shape[1]], dtype)
    return found


# Operators, so that the compiler cannot keep the weight in 16 bits for the backward pass.
@_operator(
    "nf4_product(Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor? h, Tensor? up) -> Tensor",
    lambda x, w, scale, bias, h, up: x.new_empty(x.shape[0], w.shape[0]),  # noqa: ARG005
)
def _nf4_forward(x, w, scale, bias, h, up):  # type: ignore[no-untyped-def]
    y = F.linear(x, _nf4_whole(w, scale, x.dtype), bias)
    return y if h is None else y.addmm_(h, up.t())


@_operator(
    "nf4_gradient(Tensor g, Tensor w, Tensor scale, Tensor? gh, Tensor? down) -> Tensor",
    lambda g, w, scale, gh, down: g.new_empty(g.shape[0], 2 * w.shape[1]),  # noqa: ARG005
)
def _nf4_gradient(g, w, scale, gh, down):  # type: ignore[no-untyped-def]
    gx = g @ _nf4_whole(w, scale, g.dtype)
    return gx if gh is None else gx.addmm_(gh, down)


def _nf4_backward(g, w, scale, gh, down, _turned, _width):  # type: ignore[no-untyped-def]
    return _nf4_gradient(g, w, scale, gh, down)


@dataclass(frozen=True)
class WeightFormat:
    """How a frozen weight is kept and multiplied. `store`: (N, K) → what is kept of it, and its scales."""

    dtype: torch.dtype
    multiple: int = 1  # of both sides
    forward: Callable[..., torch.Tensor] | None = None  # None: by the weight that `whole` gives
    backward: Callable[..., torch.Tensor] | None = None
    whole: Callable[..., torch.Tensor] = whole
    transposes: bool = False  # the way back reads the weight turned round

    def store(self, weight_NK: torch.Tensor, room: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        if self.dtype == torch.uint8:
            return _nf4_store(weight_NK)
        if self.transposes:
            return quantize_weight(weight_NK, self.dtype, room)
        values, scale_N1 = reference.quantize_rows(weight_NK, None, self.dtype)
        return values, scale_N1.t().contiguous()

    def product(self, x, w, scale, bias, h, up):  # type: ignore[no-untyped-def]
        """x wᵀ + bias + h upᵀ."""
        if self.forward:
            return self.forward(x, w, scale, bias, h, up)
        y = F.linear(x, self.whole(w, scale, x.dtype), bias)
        return y if h is None else y + h @ up.t()

    def gradient(self, g, w, scale, gh, down, turned, width):  # type: ignore[no-untyped-def]
        """g w + gh down: of the input, K = `width`. `turned`: (K, N) of the weight, where a copy is kept."""
        if self.backward:
            return self.backward(g, w, scale, gh, down, turned, width)
        gx = g @ self.whole(w, scale, g.dtype)
        return gx if gh is None else gx + gh @ down


WEIGHT_FORMATS = {
    "fp8": WeightFormat(torch.float8_e4m3fn, 16, _fp8_forward, fp8_gradient, transposes=True),
    "fp8-fnuz": WeightFormat(torch.float8_e4m3fnuz, 16, _fp8_forward, fp8_gradient, transposes=True),
    "fp8-storage": WeightFormat(torch.float8_e4m3fn),
    "int8": WeightFormat(torch.int8, 16, _int8_forward, _int8_backward),
    "int8-storage": WeightFormat(torch.int8),
    "nf4": WeightFormat(torch.uint8, BLOCK, _nf4_forward, _nf4_backward, _nf4_whole),
}


STORED = {"fp8": "fp8-storage", "fp8-fnuz": "fp8-storage", "int8": "int8-storage"}  # multiplied in 16 bits instead


def weight_format_for(precision: str, device: str) -> str | None:
    """The key of `WEIGHT_FORMATS` for a value of PARAMS_PRECISION on a torch device type; None: not quantised."""
    import torch

    form = PRECISIONS[precision].weight_format
    if form == "fp8" and device == "cuda" and torch.version.hip:
        # CDNA 3 multiplies in the types without negative zero alone; CDNA 4 in those that NVIDIA has.
        return "fp8-fnuz" if "gfx94" in torch.cuda.get_device_properties(0).gcnArchName else form
    return form
