"""FP8 layers fused with the operation before them: a norm with its modulation, a GELU, a SwiGLU, a gate, or none.

One kernel computes the operation and quantises its result, once for all layers that read it. The layers' LoRA terms are
columns of their products (`trainer.engine.quantization`).

For the backward pass, only the operation's input is saved, and h = x Aᵀ. The rows that the gradient of A needs are
recomputed by the kernel that computes the input's gradient. A step of Flux.1 took 32.2 GiB instead of 40.9 this way,
and 269 ms instead of 276 (docs/lab-notes.md).

The public functions call the modules one by one if a layer has no FP8 product, or if its adapter is more than two
matrices (`can_fuse`).

Letters: B images, T tokens of one, M = B T rows, D or K input and N output features, L features that stand before
others in a row, R the adapter's rank, F = K + padding (the length of a row of an FP8 matrix). `down` is A (R, K) and
`up` is B (N, R), both in 16 bits, B times alpha / rank. g is the gradient of an output, h = x Aᵀ (M, R), gh = g B (M,
R).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.engine.kernels.dispatch import gated_residual as gated_residual_kernel
from trainer.engine.kernels.dispatch import (
    gelu_gradient,
    gelu_rows,
    norm_gradient,
    norm_rows,
    quantize_rows,
    swiglu_gradient,
    swiglu_rows,
)
from trainer.engine.kernels.dispatch import norm_residual as norm_residual_kernel
from trainer.engine.kernels.reference import normalized
from trainer.engine.quantization.formats import FORWARD_UP_FACTOR, fp8_gradient, fp8_product
from trainer.engine.quantization.frozen_linear import FrozenLinear
from trainer.engine.quantization.lora_linear import LoraLinear

NORM_KERNEL_GRADIENTS = 3  # gradients that `norm_gradient` adds up itself: g1 to g3


class _Fp8Layer(NamedTuple):
    """The tensors of one FP8 layer and its adapter, in the order in which autograd functions take them."""

    w_NF: Tensor
    scale_1N: Tensor
    bias_N: Tensor | None
    down_RK: Tensor | None  # down and up: None without an adapter
    up_NR: Tensor | None
    weight_t_KN: Tensor | None  # the transposed copy of the weight, if one is kept


# Autograd functions see and save only tensors that are arguments of their own, so fields are passed one after another.
FlatLayers = Sequence[Any]  # Tensor | None; Any, because the first two of each six are never None


def _unflatten(flat: FlatLayers) -> list[_Fp8Layer]:
    fields = len(_Fp8Layer._fields)
    return [_Fp8Layer(*flat[i : i + fields]) for i in range(0, len(flat), fields)]


def _concatenated_down(layers: list[_Fp8Layer]) -> Tensor | None:
    """The A matrices of all adapters on one input, (sum of R, K): one GEMM computes h for all of them."""
    downs = [layer.down_RK for layer in layers if layer.down_RK is not None]
    if not downs:
        return None
    return torch.cat(downs) if len(downs) > 1 else downs[0]


def _split_by_rank(tensor: Tensor | None, layers: list[_Fp8Layer], dim: int) -> list[Tensor | None]:
    """Each layer's part of a tensor that was computed with `_concatenated_down`; None for layers without an adapter."""
    if tensor is None:
        return [None] * len(layers)
    ranks = []
    for layer in layers:
        ranks.append(0 if layer.down_RK is None else len(layer.down_RK))
    parts: list[Tensor | None] = list(tensor.split(ranks, dim))
    for i, rank in enumerate(ranks):
        if rank == 0:
            parts[i] = None
    return parts


def _padding(layers: list[_Fp8Layer], in_features: int) -> int:
    """The columns after the quantised input that the layer with the most adapter columns needs."""
    return max(layer.w_NF.shape[1] for layer in layers) - in_features


def _linears(
    rows_MK: Tensor, x8_MF: Tensor, x_scale_M1: Tensor, layers: list[_Fp8Layer], in_features: int
) -> tuple[list[Tensor], Tensor | None]:
    """The output of each layer, (M, N), and h of all adapters, (M, sum of R).

    rows: the input in 16 bits, for the adapters; x8 and x_scale: the same, quantised, for the weights. The layers write
    their adapter columns into the same x8, one after the other.
    """
    h = None
    down = _concatenated_down(layers)
    if down is not None:
        h = rows_MK @ down.t()
    outputs = []
    for layer, h_MR in zip(layers, _split_by_rank(h, layers, 1), strict=True):
        w, scale, bias = layer.w_NF, layer.scale_1N, layer.bias_N
        y = fp8_product(x8_MF, x_scale_M1, w, scale, bias, h_MR, layer.up_NR, in_features, FORWARD_UP_FACTOR)
        outputs.append(y)
    return outputs, h


def _adapter_gradients(
    gs: list[Tensor], layers: list[_Fp8Layer], h: Tensor | None
) -> tuple[Tensor | None, list[Tensor | None]]:
    """gh = g B of all adapters, (M, sum of R), and the gradient of each B, gᵀ h."""
    ghs = []
    for g, layer in zip(gs, layers, strict=True):
        if layer.up_NR is not None:
            ghs.append(g @ layer.up_NR)
    up_gradients: list[Tensor | None] = []
    for g, h_MR in zip(gs, _split_by_rank(h, layers, 1), strict=True):
        up_gradients.append(None if h_MR is None else g.t() @ h_MR)
    # Joined again, so that the gradients of all A matrices are one GEMM.
    gh = torch.cat(ghs, 1) if ghs else None
    return gh, up_gradients


def _input_gradients(gs: list[Tensor], layers: list[_Fp8Layer], gh: Tensor | None, in_features: int) -> list[Tensor]:
    """The gradient of the input from each layer, (M, K). Their sum is the gradient of the input."""
    gradients = []
    for g, layer, gh_MR in zip(gs, layers, _split_by_rank(gh, layers, 1), strict=True):
        w, scale, weight_t = layer.w_NF, layer.scale_1N, layer.weight_t_KN
        gradients.append(fp8_gradient(g, w, scale, gh_MR, layer.down_RK, weight_t, in_features))
    return gradients


def _layer_gradients(
    rows_MK: Tensor, gh: Tensor | None, up_gradients: list[Tensor | None], layers: list[_Fp8Layer]
) -> list[Tensor | None]:
    """The gradients of the flat layers: those of A, ghᵀ x, and of B; None for all other fields."""
    g_down = None
    if gh is not None:
        g_down = gh.t() @ rows_MK
    gradients: list[Tensor | None] = []
    for down, up in zip(_split_by_rank(g_down, layers, 0), up_gradients, strict=True):
        gradients += [None, None, None, down, up, None]
    return gradients


class _NormLinear(torch.autograd.Function):
    """Layers on norm(x) * (scale_offset + scale) + shift; norm is LayerNorm if `centred`, else RMSNorm.

    Returns x as well, for the residual connection. So the gradient that reaches x past the norm arrives here, and the
    kernel adds it without another pass over it. Saves x, scale, shift and h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        scale_offset: float,
        eps: float,
        centred: bool,
        *flat: Any,
    ) -> tuple[Tensor, ...]:
        layers = _unflatten(flat)
        in_features = x.shape[1]
        keep_rows = any(layer.down_RK is not None for layer in layers)
        padding = _padding(layers, in_features)
        x8, x_scale, rows = norm_rows(x, scale, shift, scale_offset, eps, centred, flat[0].dtype, keep_rows, padding)
        outputs, h = _linears(rows, x8, x_scale, layers, in_features)
        ctx.scale_offset = scale_offset
        ctx.eps = eps
        ctx.centred = centred
        ctx.save_for_backward(x, scale, shift, h, *flat)
        return (*outputs, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, h, *flat = ctx.saved_tensors
        layers = _unflatten(flat)
        gs = [g.contiguous() for g in gradients[:-1]]  # a gradient may be part of longer rows
        residual_grad = gradients[-1]
        gh, up_gradients = _adapter_gradients(gs, layers, h)
        g_rows = _input_gradients(gs, layers, gh, x.shape[1])
        while len(g_rows) > NORM_KERNEL_GRADIENTS:  # separate q, k, v and MLP in a single block of Flux.1
            g_rows = [g_rows[0] + g_rows[1], *g_rows[2:]]
        three_g = (*g_rows, *[None] * (NORM_KERNEL_GRADIENTS - len(g_rows)))
        norm = (scale, shift, ctx.scale_offset, ctx.eps, ctx.centred)
        gx, rows = norm_gradient(x, *norm, *three_g, residual_grad, gh is not None)
        g_scale = g_shift = None
        if any(ctx.needs_input_grad[1:3]):  # where the modulation has an adapter
            g_scale, g_shift = _modulation_gradients(x, scale, shift, g_rows, ctx.eps, centred=ctx.centred)
        return gx, g_scale, g_shift, None, None, None, *_layer_gradients(rows, gh, up_gradients, layers)


def _modulation_gradients(
    x: Tensor, scale: Tensor, shift: Tensor | None, g_rows: Iterable[Tensor], eps: float, *, centred: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of scale and shift, (B, K) each."""
    g = sum(g.float() for g in g_rows).view(len(scale), -1, x.shape[1])  # type: ignore[union-attr]  # a tensor
    if centred:
        x_hat = F.layer_norm(x.float(), x.shape[1:], eps=eps)
    else:
        x_hat, _ = normalized(x, eps, centred=False)
    g_shift = None if shift is None else g.sum(1).to(shift.dtype)
    return (g * x_hat.view_as(g)).sum(1).to(scale.dtype), g_shift


class _GeluLinear(torch.autograd.Function):
    """One layer on [left, gelu(y)] (see `kernels.reference.gelu_rows`). Saves left, y and h."""

    @staticmethod
    def forward(ctx: Any, left: Tensor | None, y: Tensor, geglu: bool, *flat: Any) -> Tensor:
        layers = _unflatten(flat)
        left_features = 0 if left is None else left.shape[1]
        ctx.geglu = geglu
        ctx.in_features = left_features + y.shape[1] // (2 if geglu else 1)
        keep_rows = layers[0].down_RK is not None
        padding = _padding(layers, ctx.in_features)
        x8, x_scale, rows = gelu_rows(left, y, geglu, flat[0].dtype, keep_rows, padding)
        (output,), h = _linears(rows, x8, x_scale, layers, ctx.in_features)
        ctx.save_for_backward(left, y, h, *flat)
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        left, y, h, *flat = ctx.saved_tensors
        layers = _unflatten(flat)
        gs = [g.contiguous()]
        gh, up_gradients = _adapter_gradients(gs, layers, h)
        (g_rows,) = _input_gradients(gs, layers, gh, ctx.in_features)
        gy, g_left, rows = gelu_gradient(left, y, g_rows, ctx.geglu, gh is not None)
        of_layers = _layer_gradients(rows, gh, up_gradients, layers)
        if left is None:  # g_left is an empty tensor then
            return None, gy, None, *of_layers
        return g_left, gy, None, *of_layers


class _SwigluLinear(torch.autograd.Function):
    """One layer on [left, silu(a) * b], or on sigmoid(a) * b (see `kernels.reference.swiglu_rows`).

    Saves left, a, b and h.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor | None, a: Tensor, b: Tensor, silu: bool, *flat: Any) -> Tensor:
        layers = _unflatten(flat)
        ctx.silu = silu
        ctx.in_features = a.shape[1] + (0 if left is None else left.shape[1])
        keep_rows = layers[0].down_RK is not None
        padding = _padding(layers, ctx.in_features)
        x8, x_scale, rows = swiglu_rows(left, a, b, silu, flat[0].dtype, keep_rows, padding)
        (output,), h = _linears(rows, x8, x_scale, layers, ctx.in_features)
        ctx.save_for_backward(left, a, b, h, *flat)
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        left, a, b, h, *flat = ctx.saved_tensors
        layers = _unflatten(flat)
        gs = [g.contiguous()]
        gh, up_gradients = _adapter_gradients(gs, layers, h)
        (g_rows,) = _input_gradients(gs, layers, gh, ctx.in_features)
        ga, gb, g_left, rows = swiglu_gradient(left, a, b, ctx.silu, g_rows, gh is not None)
        of_layers = _layer_gradients(rows, gh, up_gradients, layers)
        if left is None:  # g_left is an empty tensor then
            return None, ga, gb, None, *of_layers
        return g_left, ga, gb, None, *of_layers


class _SharedInputLinear(torch.autograd.Function):
    """Layers on the same x, which is quantised once. Saves x and h."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        layers = _unflatten(flat)
        x8, x_scale = quantize_rows(x, None, flat[0].dtype, _padding(layers, x.shape[1]))
        outputs, h = _linears(x, x8, x_scale, layers, x.shape[1])
        ctx.save_for_backward(x, h, *flat)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *flat = ctx.saved_tensors
        layers = _unflatten(flat)
        gs = [g.contiguous() for g in gradients]
        gh, up_gradients = _adapter_gradients(gs, layers, h)
        gx = None
        if ctx.needs_input_grad[0]:  # text embeddings need none
            gx = sum(_input_gradients(gs, layers, gh, x.shape[1]))
        return gx, *_layer_gradients(x, gh, up_gradients, layers)  # type: ignore[arg-type]  # the sum is a tensor


class _GatedResidual(torch.autograd.Function):
    """x + gate * y. Saves gate, and y only if gate needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y if ctx.needs_input_grad[1] else None)
        return gated_residual_kernel(x, gate, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gate, y = ctx.saved_tensors
        g_gate = None
        if y is not None:
            g_gate = (g.float() * y.float()).sum(1).to(gate.dtype)
        g_y = None
        if ctx.needs_input_grad[2]:
            g_y = gated_residual_kernel(None, gate, g)
        return g, g_gate, g_y


class _NormResidual(torch.autograd.Function):
    """x + weight * RMSNorm(y). Saves y and weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(y, weight)
        return norm_residual_kernel(x, y, weight, eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, weight = ctx.saved_tensors
        y_MK, g_MK = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (y, g))
        gy = g_weight = None
        if ctx.needs_input_grad[1]:
            gy, _ = norm_gradient(y_MK, weight, None, 0.0, ctx.eps, False, g_MK, None, None, None, False)
            gy = gy.view_as(y)
        if ctx.needs_input_grad[2]:  # where the modulation has an adapter
            g_weight, _ = _modulation_gradients(y_MK, weight, None, [g_MK], ctx.eps, centred=False)
        return g, gy, g_weight, None


# torch.compile takes these into its graph without tracing them, and differentiates by their backward functions.
@torch.compiler.allow_in_graph
def _norm_linear(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    scale_offset: float,
    eps: float,
    centred: bool,
    *flat: Tensor | None,
) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _NormLinear.apply(x, scale, shift, scale_offset, eps, centred, *flat)
    return outputs


@torch.compiler.allow_in_graph
def _gelu_linear(left: Tensor | None, y: Tensor, geglu: bool, *flat: Tensor | None) -> Tensor:
    output: Tensor = _GeluLinear.apply(left, y, geglu, *flat)
    return output


@torch.compiler.allow_in_graph
def _swiglu_linear(left: Tensor | None, a: Tensor, b: Tensor, silu: bool, *flat: Tensor | None) -> Tensor:
    output: Tensor = _SwigluLinear.apply(left, a, b, silu, *flat)
    return output


@torch.compiler.allow_in_graph
def _shared_input_linear(x: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _SharedInputLinear.apply(x, *flat)
    return outputs


def _flatten(layers: Sequence[torch.nn.Module], dtype: torch.dtype) -> list[Tensor | None] | None:
    """The fields of `_Fp8Layer` for all layers, one after another; None if one of them cannot be fused.

    One with a hook cannot (`trainer.engine.training_adapter`).
    """
    flat: list[Tensor | None] = []
    for layer in layers:
        if not torch.compiler.is_compiling() and layer._forward_hooks:  # they are called with the module alone
            return None
        base: torch.nn.Module = layer
        weights: tuple[Tensor | None, Tensor | None] | None = (None, None)
        if isinstance(layer, LoraLinear):
            base = layer.base_layer
            weights = layer.cast_weights(dtype)
        if weights is None or not isinstance(base, FrozenLinear) or not base.in_fp8:
            return None
        flat += [base.weight_NF, base.scale_1N, base.bias, *weights, base.weight_t_KN]
    return flat


def can_fuse(layers: Sequence[torch.nn.Module]) -> bool:
    """Whether the functions below compute these layers in fused kernels, and not by their modules."""
    return _flatten(layers, torch.bfloat16) is not None


def norm_linear(
    x_BTD: Tensor, norm: Any, modulation: tuple[Tensor, Tensor] | None, layers: Sequence[torch.nn.Module]
) -> list[Tensor]:
    """The outputs of `layers`, (B, T, N) each, on norm(x) * (1 + scale) + shift; and x itself as the last one.

    Continue with the x that is returned: its gradient is added inside the norm's kernel. `modulation`: scale and shift,
    (B, D) each; None: the norm has a weight and bias of its own.
    """
    flat = _flatten(layers, x_BTD.dtype)
    if flat is None:
        y = norm(x_BTD)
        if modulation is not None:
            scale, shift = modulation
            y = y * (1 + scale[:, None]) + shift[:, None]
        return [*(layer(y) for layer in layers), x_BTD]
    if modulation is None:
        scale, shift = norm.weight[None], norm.bias[None]
        scale_offset = 0.0
    else:
        scale, shift = modulation
        scale_offset = 1.0
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    *outputs, x_MD = _norm_linear(x_MD, scale, shift, scale_offset, norm.eps, True, *flat)
    return [*(y.view(*x_BTD.shape[:-1], -1) for y in outputs), x_MD.view(x_BTD.shape)]


def rms_linear(
    x_BTD: Tensor,
    norm: Any,
    scale_BD: Tensor | None,
    layers: Sequence[torch.nn.Module],
    *,
    shift_BD: Tensor | None = None,
    weight_offset: float = 0.0,
) -> list[Tensor]:
    """The outputs of `layers`, (B, T, N) each, on RMSNorm(x) * (1 + scale) + shift; and x itself, as in `norm_linear`.

    A shift comes only with a scale. `weight_offset`: 1 for a norm that multiplies by 1 + weight.
    """
    flat = _flatten(layers, x_BTD.dtype)
    if flat is None:
        y = norm(x_BTD)
        if scale_BD is not None:
            y = y * (1 + scale_BD[:, None])
        if shift_BD is not None:
            y = y + shift_BD[:, None]
        return [*(layer(y) for layer in layers), x_BTD]
    weight_BD, offset = norm.weight[None], weight_offset
    if scale_BD is not None:
        if weight_offset:
            weight_BD = weight_BD.float() + weight_offset
        weight_BD, offset = weight_BD.float() * (1 + scale_BD.float()), 0.0
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    *outputs, x_MD = _norm_linear(x_MD, weight_BD, shift_BD, offset, norm.eps, False, *flat)
    return [*(y.view(*x_BTD.shape[:-1], -1) for y in outputs), x_MD.view(x_BTD.shape)]


def swiglu_linear(a_BTK: Tensor, b_BTK: Tensor, layer: torch.nn.Module, *, left_BTL: Tensor | None = None) -> Tensor:
    """The output of `layer`, (B, T, N), on [left, silu(a) * b]."""
    flat = _flatten([layer], a_BTK.dtype)
    if flat is None:
        x = F.silu(a_BTK) * b_BTK
        if left_BTL is not None:
            x = torch.cat([left_BTL, x], -1)
        output: Tensor = layer(x)
        return output
    a_MK, b_MK = (half.reshape(-1, half.shape[-1]) for half in (a_BTK, b_BTK))
    left_ML = None if left_BTL is None else left_BTL.reshape(-1, left_BTL.shape[-1])
    return _swiglu_linear(left_ML, a_MK, b_MK, True, *flat).view(*a_BTK.shape[:-1], -1)


def gated_linear(gate_BTK: Tensor, x_BTK: Tensor, layer: torch.nn.Module) -> Tensor:
    """The output of `layer`, (B, T, N), on sigmoid(gate) * x."""
    flat = _flatten([layer], x_BTK.dtype)
    if flat is None:
        output: Tensor = layer(x_BTK * gate_BTK.sigmoid())
        return output
    gate_MK, x_MK = (half.reshape(-1, half.shape[-1]) for half in (gate_BTK, x_BTK))
    return _swiglu_linear(None, gate_MK, x_MK, False, *flat).view(*x_BTK.shape[:-1], -1)


def gelu_linear(
    y_BTK: Tensor, layer: torch.nn.Module, *, geglu: bool = False, left_BTL: Tensor | None = None
) -> Tensor:
    """The output of `layer`, (B, T, N), on [left, gelu(y)], where gelu is the approximation by tanh.

    geglu: y is [a, b], (B, T, 2K), and a * gelu(b) with erf stands in the place of gelu(y).
    """
    flat = _flatten([layer], y_BTK.dtype)
    if flat is None:
        if geglu:
            a, b = y_BTK.chunk(2, -1)
            x = a * F.gelu(b)
        else:
            x = F.gelu(y_BTK, approximate="tanh")
        if left_BTL is not None:
            x = torch.cat([left_BTL, x], -1)
        output: Tensor = layer(x)
        return output
    left_ML = None if left_BTL is None else left_BTL.reshape(-1, left_BTL.shape[-1])
    y_MN = _gelu_linear(left_ML, y_BTK.reshape(-1, y_BTK.shape[-1]), geglu, *flat)
    return y_MN.view(*y_BTK.shape[:-1], -1)


def shared_input_linear(x_BTD: Tensor, layers: Sequence[torch.nn.Module]) -> list[Tensor]:
    """The outputs of `layers`, (B, T, N) each, on the same x."""
    flat = _flatten(layers, x_BTD.dtype)
    if flat is None:
        return [layer(x_BTD) for layer in layers]
    outputs = _shared_input_linear(x_BTD.reshape(-1, x_BTD.shape[-1]), *flat)
    return [y.view(*x_BTD.shape[:-1], -1) for y in outputs]


def gated_residual(x_BTD: Tensor, gate_BD: Tensor, y_BTD: Tensor) -> Tensor:
    """x + gate * y, in one kernel."""
    if torch.compiler.is_compiling():  # which fuses it with the operations around it
        return torch.addcmul(x_BTD, gate_BD[:, None], y_BTD)
    output: Tensor = _GatedResidual.apply(x_BTD, gate_BD, y_BTD)
    return output


def norm_residual(x_BTD: Tensor, norm: Any, gate_BD: Tensor | None, y_BTD: Tensor) -> Tensor:
    """x + gate * RMSNorm(y), in one kernel. `norm`: with its weight. Without a gate, x + RMSNorm(y)."""
    if torch.compiler.is_compiling() or x_BTD.dtype == torch.float32:  # the compiler fuses it with what is around it
        y_BTD = norm(y_BTD)
        return x_BTD + (y_BTD if gate_BD is None else gate_BD[:, None] * y_BTD)
    weight_BD = norm.weight[None]
    if gate_BD is not None:
        weight_BD = weight_BD.float() * gate_BD.float()
    output: Tensor = _NormResidual.apply(x_BTD, y_BTD, weight_BD, norm.eps)
    return output


def install(block: torch.nn.Module, forwards: Mapping[type, type]) -> None:
    """Give modules in `block` that have FP8 layers a class with a fused forward pass: `forwards`, old class to new.

    Weights and names stay, so adapters, checkpoints and LoRA files do not notice.
    """
    for module in block.modules():
        if type(module) not in forwards:
            continue
        if any(isinstance(m, FrozenLinear) and m.in_fp8 for m in module.modules()):
            module.__class__ = forwards[type(module)]
