"""What comes before a frozen layer's product, in one pass with the quantising of its input: norms, modulations, GELUs.

An input is quantised once for all the layers that read it. For the backward pass nothing is kept but what the pass
began with: the rows that adapters need there are made again. Where a layer is no FP8 product, or its adapter has more
to it than two matrices, all is computed by the modules one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from trainer.engine.kernels.dispatch import gated_residual as gated_sum
from trainer.engine.kernels.dispatch import gelu_gradient, gelu_rows, norm_gradient, norm_rows, quantize_rows
from trainer.engine.quantization.formats import FORWARD_SCALE, fp8_gradient, fp8_product
from trainer.engine.quantization.frozen_linear import FrozenLinear
from trainer.engine.quantization.lora_linear import LoraLinear

Tensor = torch.Tensor
ADDED = 3  # gradients that the norm's kernel adds up by itself


class _Layer(NamedTuple):
    """A frozen weight in FP8, with columns beside it; its adapter, if it has one: `up` is scaled already; the weight
    turned round, if kept."""

    w_NF: Tensor
    scale_1N: Tensor
    bias_N: Tensor | None
    down_RK: Tensor | None
    up_NR: Tensor | None
    weight_t_KN: Tensor | None


def _layers(flat: Sequence[Any]) -> list[_Layer]:
    step = len(_Layer._fields)
    return [_Layer(*flat[i : i + step]) for i in range(0, len(flat), step)]


def _stacked(layers: list[_Layer]) -> Tensor | None:
    """The first halves of all adapters on one input: one product serves them all."""
    downs = [layer.down_RK for layer in layers if layer.down_RK is not None]
    return torch.cat(downs) if len(downs) > 1 else next(iter(downs), None)


def _parts(tensor: Tensor | None, layers: list[_Layer], dim: int) -> list[Tensor | None]:
    """What belongs to each layer of what was computed for `_stacked`."""
    ranks = [0 if layer.down_RK is None else len(layer.down_RK) for layer in layers]
    if tensor is None:
        return [None] * len(layers)
    return [part if rank else None for part, rank in zip(tensor.split(ranks, dim), ranks, strict=True)]


def _room(layers: list[_Layer], width: int) -> int:
    """How many columns beside the rows are of use."""
    return max(layer.w_NF.shape[1] for layer in layers) - width


def _multiplied(x, x8, x_scale, layers, width):  # type: ignore[no-untyped-def]
    """What each layer makes of the rows x, and x downᵀ for all adapters."""
    down = _stacked(layers)
    h = None if down is None else x @ down.t()
    parts = zip(layers, _parts(h, layers, 1), strict=True)
    return [fp8_product(x8, x_scale, *layer[:3], part, layer.up_NR, width, FORWARD_SCALE) for layer, part in parts], h


def _gradients(gs, layers, h):  # type: ignore[no-untyped-def]
    """From the gradients of `_multiplied`: that of h; those of the `up`s."""
    ghs = [g @ layer.up_NR for g, layer in zip(gs, layers, strict=True) if layer.up_NR is not None]
    parts = _parts(h, layers, 1)
    ups = [None if part is None else g.t() @ part for g, part in zip(gs, parts, strict=True)]
    return torch.cat(ghs, 1) if ghs else None, ups


def _of_rows(gs, layers, gh, width):  # type: ignore[no-untyped-def]
    """The gradients of the rows by each layer, to be added up."""
    parts = zip(gs, layers, _parts(gh, layers, 1), strict=True)
    return [
        fp8_gradient(g, layer.w_NF, layer.scale_1N, part, layer.down_RK, layer.weight_t_KN, width)
        for g, layer, part in parts
    ]


def _of_layers(x, gh, gups, layers):  # type: ignore[no-untyped-def]
    """The gradients of `_Layer`'s fields, for each layer."""
    downs = _parts(None if gh is None else gh.t() @ x, layers, 0)
    return [g for down, up in zip(downs, gups, strict=True) for g in (None, None, None, down, up, None)]


class _Normed(torch.autograd.Function):
    """Products of LayerNorm(x) * (plus + scale) + shift; and x itself, so that its own gradient comes here too."""

    @staticmethod
    def forward(ctx: Any, x, scale, shift, plus, eps, *flat):  # type: ignore[no-untyped-def]
        layers = _layers(flat)
        width, kept = x.shape[1], any(layer.down_RK is not None for layer in layers)
        x8, x_scale, rows = norm_rows(x, scale, shift, plus, eps, flat[0].dtype, kept, _room(layers, width))
        found, h = _multiplied(rows, x8, x_scale, layers, width)
        ctx.plus, ctx.eps = plus, eps
        ctx.save_for_backward(x, scale, shift, h, *flat)
        return (*found, x)

    @staticmethod
    def backward(ctx: Any, *gs):  # type: ignore[no-untyped-def]
        x, scale, shift, h, *flat = ctx.saved_tensors
        layers, given, past = _layers(flat), [g.contiguous() for g in gs[:-1]], gs[-1]
        gh, gups = _gradients(given, layers, h)
        rows = _of_rows(given, layers, gh, x.shape[1])
        while len(rows) > ADDED:
            rows = [rows[0] + rows[1], *rows[2:]]
        several = (*rows, *[None] * (ADDED - len(rows)))
        gx, again = norm_gradient(x, scale, shift, ctx.plus, ctx.eps, *several, past, gh is not None)
        of_modulation = _modulation(ctx, x, scale, shift, rows) if any(ctx.needs_input_grad[1:3]) else (None, None)
        return gx, *of_modulation, None, None, *_of_layers(again, gh, gups, layers)


def _modulation(ctx, x, scale, shift, rows):  # type: ignore[no-untyped-def]
    """The gradients of scale and shift."""
    g = sum(g.float() for g in rows).view(len(scale), -1, x.shape[1])
    hat = F.layer_norm(x.float(), x.shape[1:], eps=ctx.eps).view_as(g)
    return (g * hat).sum(1).to(scale.dtype), g.sum(1).to(shift.dtype)


class _Activated(torch.autograd.Function):
    """The product of [left, gelu(y)]; see `quantize.gelu_rows`."""

    @staticmethod
    def forward(ctx: Any, left, y, gated, *flat):  # type: ignore[no-untyped-def]
        layers = _layers(flat)
        ctx.gated, ctx.width = gated, (0 if left is None else left.shape[1]) + y.shape[1] // (2 if gated else 1)
        kept = layers[0].down_RK is not None
        x8, x_scale, rows = gelu_rows(left, y, gated, flat[0].dtype, kept, _room(layers, ctx.width))
        (found,), h = _multiplied(rows, x8, x_scale, layers, ctx.width)
        ctx.save_for_backward(left, y, h, *flat)
        return found

    @staticmethod
    def backward(ctx: Any, g):  # type: ignore[no-untyped-def]
        left, y, h, *flat = ctx.saved_tensors
        layers, gs = _layers(flat), [g.contiguous()]
        gh, gups = _gradients(gs, layers, h)
        (of_row,) = _of_rows(gs, layers, gh, ctx.width)
        gy, of_left, again = gelu_gradient(left, y, of_row, ctx.gated, gh is not None)
        return None if left is None else of_left, gy, None, *_of_layers(again, gh, gups, layers)


class _Shared(torch.autograd.Function):
    """Products of x."""

    @staticmethod
    def forward(ctx: Any, x, *flat):  # type: ignore[no-untyped-def]
        layers = _layers(flat)
        x8, x_scale = quantize_rows(x, None, flat[0].dtype, _room(layers, x.shape[1]))
        found, h = _multiplied(x, x8, x_scale, layers, x.shape[1])
        ctx.save_for_backward(x, h, *flat)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gs):  # type: ignore[no-untyped-def]
        x, h, *flat = ctx.saved_tensors
        layers, given = _layers(flat), [g.contiguous() for g in gs]
        gh, gups = _gradients(given, layers, h)
        gx = sum(_of_rows(given, layers, gh, x.shape[1])) if ctx.needs_input_grad[0] else None
        return gx, *_of_layers(x, gh, gups, layers)


class _Gated(torch.autograd.Function):
    """x + gate * y."""

    @staticmethod
    def forward(ctx: Any, x, gate, y):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, y if ctx.needs_input_grad[1] else None)
        return gated_sum(x, gate, y)

    @staticmethod
    def backward(ctx: Any, g):  # type: ignore[no-untyped-def]
        gate, y = ctx.saved_tensors
        of_gate = None if y is None else (g.float() * y.float()).sum(1).to(gate.dtype)
        return g, of_gate, gated_sum(None, gate, g) if ctx.needs_input_grad[2] else None


# Functions that the compiler need not look into to differentiate.
@torch.compiler.allow_in_graph
def _normed(x, scale, shift, plus, eps, *flat):  # type: ignore[no-untyped-def]
    return _Normed.apply(x, scale, shift, plus, eps, *flat)


@torch.compiler.allow_in_graph
def _activated(left, y, gated, *flat):  # type: ignore[no-untyped-def]
    return _Activated.apply(left, y, gated, *flat)


@torch.compiler.allow_in_graph
def _shared(x, *flat):  # type: ignore[no-untyped-def]
    return _Shared.apply(x, *flat)


def _flat(layers: Sequence[Any], dtype: torch.dtype) -> list[Tensor | None] | None:
    """The fields of `_Layer` for each; None where one of them is not such a layer."""
    found: list[Tensor | None] = []
    for layer in layers:
        base, halves = (
            (layer.base_layer, layer.halves(dtype)) if isinstance(layer, LoraLinear) else (layer, (None, None))
        )
        if halves is None or not isinstance(base, FrozenLinear) or not base.in_fp8:
            return None
        found += [base.weight_NF, base.scale_1N, base.bias, *halves, base.weight_t_KN]
    return found


def fuses(layers: Sequence[Any]) -> bool:
    """Whether those layers' products are computed here, and not by the modules one by one."""
    return _flat(layers, torch.bfloat16) is not None


def normed(x_BTD: Tensor, norm: Any, modulation: tuple[Tensor, Tensor] | None, layers: Sequence[Any]) -> list[Tensor]:
    """What `layers` make of norm(x) * (1 + scale) + shift, each (B, T, N); and x, to go on with.

    `modulation`: scale and shift, (B, D) each; without, the norm has weights of its own.
    """
    flat = _flat(layers, x_BTD.dtype)
    if flat is None:
        y = norm(x_BTD)
        if modulation is not None:
            y = y * (1 + modulation[0][:, None]) + modulation[1][:, None]
        return [*(layer(y) for layer in layers), x_BTD]
    scale, shift = (norm.weight[None], norm.bias[None]) if modulation is None else modulation
    plus = 0.0 if modulation is None else 1.0
    *found, x = _normed(x_BTD.reshape(-1, x_BTD.shape[-1]), scale, shift, plus, norm.eps, *flat)
    return [*(y.view(*x_BTD.shape[:-1], -1) for y in found), x.view(x_BTD.shape)]


def activated(y_BTK: Tensor, layer: Any, *, gated: bool = False, left_BTL: Tensor | None = None) -> Tensor:
    """What `layer` makes of [left, gelu(y)] (with tanh), or, gated, of a * gelu(b), y being [a, b]; (B, T, N)."""
    flat = _flat([layer], y_BTK.dtype)
    if flat is None:
        a, b = y_BTK.chunk(2, -1) if gated else (None, y_BTK)
        x = F.gelu(b, approximate="tanh") if a is None else a * F.gelu(b)
        found: Tensor = layer(x if left_BTL is None else torch.cat([left_BTL, x], -1))
        return found
    left = None if left_BTL is None else left_BTL.reshape(-1, left_BTL.shape[-1])
    rows: Tensor = _activated(left, y_BTK.reshape(-1, y_BTK.shape[-1]), gated, *flat)
    return rows.view(*y_BTK.shape[:-1], -1)


def shared(x_BTD: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    """What `layers` make of x, each (B, T, N)."""
    flat = _flat(layers, x_BTD.dtype)
    if flat is None:
        return [layer(x_BTD) for layer in layers]
    return [y.view(*x_BTD.shape[:-1], -1) for y in _shared(x_BTD.reshape(-1, x_BTD.shape[-1]), *flat)]


def gated(x_BTD: Tensor, gate_BD: Tensor, y_BTD: Tensor) -> Tensor:
    """x + gate * y, in one pass; the compiler makes its own of it."""
    if torch.compiler.is_compiling():
        return torch.addcmul(x_BTD, gate_BD[:, None], y_BTD)
    found: Tensor = _Gated.apply(x_BTD, gate_BD, y_BTD)
    return found


def install(block: torch.nn.Module, forwards: Mapping[type, type]) -> None:
    """Modules in `block` that multiply in FP8 get another class: the same but for its forward pass."""
    for module in block.modules():
        if type(module) in forwards and any(isinstance(m, FrozenLinear) and m.in_fp8 for m in module.modules()):
            module.__class__ = forwards[type(module)]
