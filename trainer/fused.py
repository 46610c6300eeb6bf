"""What comes before a frozen layer's product, in one pass with the quantising of its input: norms, modulations, GELUs.

An input is quantised once for all the layers that read it. For the backward pass nothing is kept but what the pass
began with: the rows that adapters need there are made again. Where a layer is no FP8 product, or its adapter has more
to it than two matrices, all is computed by the modules one by one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from trainer.frozen import Adapted, FrozenLinear, fp8_gradient, fp8_product

if importlib.util.find_spec("triton"):
    from trainer.fused_kernels import gelu_gradient, gelu_rows, norm_gradient, norm_rows
    from trainer.kernels import quantize_rows
else:
    from trainer.quantize import gelu_gradient, gelu_rows, norm_gradient, norm_rows, quantize_rows

Tensor = torch.Tensor
ADDED = 3  # gradients that the norm's kernel adds up by itself


class _Layer(NamedTuple):
    """A frozen weight in FP8; its adapter, if it has one: `up` is scaled already; the weight turned round, if kept."""

    w_NK: Tensor
    scale_1N: Tensor
    bias_N: Tensor | None
    down_RK: Tensor | None
    up_NR: Tensor | None
    turned_KN: Tensor | None


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


def _multiplied(x, x8, x_scale, layers):  # type: ignore[no-untyped-def]
    """What each layer makes of the rows x, and x downᵀ for all adapters."""
    down = _stacked(layers)
    h = None if down is None else x @ down.t()
    parts = _parts(h, layers, 1)
    return [
        fp8_product(x8, x_scale, *layer[:3], part, layer.up_NR, True) for layer, part in zip(layers, parts, strict=True)
    ], h


def _gradients(gs, layers, h):  # type: ignore[no-untyped-def]
    """From the gradients of `_multiplied`: that of h; those of the `up`s."""
    ghs = [g @ layer.up_NR for g, layer in zip(gs, layers, strict=True) if layer.up_NR is not None]
    parts = _parts(h, layers, 1)
    ups = [None if part is None else g.t() @ part for g, part in zip(gs, parts, strict=True)]
    return torch.cat(ghs, 1) if ghs else None, ups


def _of_rows(gs, layers, gh):  # type: ignore[no-untyped-def]
    """The gradients of the rows by each layer, to be added up. The first has that by all adapters in it."""
    of_adapters = [(gh, _stacked(layers)), *[(None, None)] * (len(layers) - 1)]
    return [
        fp8_gradient(g, layer.w_NK, layer.scale_1N, *more, layer.turned_KN)
        for g, layer, more in zip(gs, layers, of_adapters, strict=True)
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
        x8, x_scale, rows = norm_rows(x, scale, shift, plus, eps, flat[0].dtype, _stacked(layers) is not None)
        found, h = _multiplied(rows, x8, x_scale, layers)
        ctx.plus, ctx.eps = plus, eps
        ctx.save_for_backward(x, scale, shift, h, *flat)
        return (*found, x)

    @staticmethod
    def backward(ctx: Any, *gs):  # type: ignore[no-untyped-def]
        x, scale, shift, h, *flat = ctx.saved_tensors
        layers, given, past = _layers(flat), [g.contiguous() for g in gs[:-1]], gs[-1]
        gh, gups = _gradients(given, layers, h)
        rows = _of_rows(given, layers, gh)
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
        x8, x_scale, rows = gelu_rows(left, y, gated, flat[0].dtype, _stacked(layers) is not None)
        (found,), h = _multiplied(rows, x8, x_scale, layers)
        ctx.gated = gated
        ctx.save_for_backward(left, y, h, *flat)
        return found

    @staticmethod
    def backward(ctx: Any, g):  # type: ignore[no-untyped-def]
        left, y, h, *flat = ctx.saved_tensors
        layers, gs = _layers(flat), [g.contiguous()]
        gh, gups = _gradients(gs, layers, h)
        (of_row,) = _of_rows(gs, layers, gh)
        gy, again = gelu_gradient(left, y, of_row, ctx.gated, gh is not None)
        of_left = None if left is None else of_row[:, : left.shape[1]]
        return of_left, gy, None, *_of_layers(again, gh, gups, layers)


class _Shared(torch.autograd.Function):
    """Products of x."""

    @staticmethod
    def forward(ctx: Any, x, *flat):  # type: ignore[no-untyped-def]
        layers = _layers(flat)
        x8, x_scale = quantize_rows(x, None, flat[0].dtype)
        found, h = _multiplied(x, x8, x_scale, layers)
        ctx.save_for_backward(x, h, *flat)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gs):  # type: ignore[no-untyped-def]
        x, h, *flat = ctx.saved_tensors
        layers, given = _layers(flat), [g.contiguous() for g in gs]
        gh, gups = _gradients(given, layers, h)
        gx = sum(_of_rows(given, layers, gh)) if ctx.needs_input_grad[0] else None
        return gx, *_of_layers(x, gh, gups, layers)


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
        base, halves = (layer.base_layer, layer.halves(dtype)) if isinstance(layer, Adapted) else (layer, (None, None))
        if halves is None or not isinstance(base, FrozenLinear) or not base.in_fp8:
            return None
        found += [base.weight_NK, base.scale_1N, base.bias, *halves, base.turned_KN]
    return found


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


def install(block: torch.nn.Module, forwards: Mapping[type, type]) -> None:
    """Modules in `block` that multiply in FP8 get another class: the same but for its forward pass."""
    for module in block.modules():
        if type(module) in forwards and any(isinstance(m, FrozenLinear) and m.in_fp8 for m in module.modules()):
            module.__class__ = forwards[type(module)]
