"""The weight formats: how each stores a frozen weight, multiplies by it and dequantises it.

Letters: M rows (tokens), K input and N output features, R the adapter's rank, F = K + padding (the length of a row of
an FP8 matrix). g is the gradient of y, h = x Aᵀ (M, R), gh = g B (M, R). `down` is A (R, K) and `up` is B (N, R), both
in 16 bits, B times alpha / rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.engine.kernels import reference
from trainer.engine.kernels.dispatch import (
    append_adapter_columns,
    can_dequantize,
    dequantize_rows,
    quantize_rows,
    transpose,
)
from trainer.engine.kernels.reference import quantize_weight
from trainer.spec.adapter_columns import adapter_columns, padding_for
from trainer.spec.weight_formats import PRECISIONS

# cuBLAS 13.0 has no FP8 kernel with row scales and a bias if K > 5,120 and M x N < 2**17; without a bias it has one for
# every size. SDXL reaches this: adapter columns widen the 5,120 columns of its second MLP layers to 5,248.
BIAS_MAX_K = 5120
BIAS_MIN_OUTPUTS = 2**17

NF4_BLOCK = 64  # weights that share a scale (QLoRA, arXiv 2305.14314)

# A layer whose weights are all smaller gets no adapter columns: its rows' scales, which are doubled at most 7 times,
# would not hold values of B up to MIN_B_RANGE (8 * 128 * 3e-4 = 0.3).
MIN_LARGEST_WEIGHT = 3e-4

# By how much B is larger in its columns, and h smaller, than the scales of their rows say. With 4, h may be up to 16
# times the row's largest activation, and B up to 8 times its row's largest weight.
FORWARD_UP_FACTOR = 4.0


def backward_up_factor(in_features: int) -> float:
    """The same for A and gh in the backward pass: the power of two nearest to 16 sqrt(K).

    peft draws A between ±1 / sqrt(K), so its values begin at about ±16 in FP8. They saturate at 20 to 40 times their
    initial size.
    """
    return 2.0 ** round(math.log2(16 * math.sqrt(in_features)))


# ---- Operators. torch.compile and checkpoints take each as a single operation. They are defined with `Library.define`,
# because calls of `torch.library.custom_op` take the host longer: 94 ms of a step instead of 49 (docs/lab-notes.md).
_OPERATORS = torch.library.Library("kiln", "FRAGMENT")


def _operator(schema: str, fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the decorated function as the operator of this schema, on every device.

    `fake` returns an empty tensor of the result's shape and type, from which the compiler learns these.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = _OPERATORS.define(schema)
        _OPERATORS.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kiln::{name}", fake, lib=_OPERATORS)
        operator: Callable[..., Tensor] = getattr(torch.ops.kiln, name).default
        return operator

    return register


@_operator(
    "fp8_product(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor? bias, Tensor? h, Tensor? up,"
    " int in_features, float up_factor) -> Tensor",
    lambda x, x_scale, w, w_scale, bias, h, up, in_features, up_factor: x.new_empty(  # noqa: ARG005
        x.shape[0], w.shape[0], dtype=torch.bfloat16
    ),
)
def fp8_product(
    x_MF: Tensor,
    x_scale_M1: Tensor,
    w_NF: Tensor,
    w_scale_1N: Tensor,
    bias_N: Tensor | None,
    h_MR: Tensor | None,
    up_NR: Tensor | None,
    in_features: int,
    up_factor: float,
) -> Tensor:
    """x wᵀ + bias + h upᵀ, (M, N) in bf16, where x and w are FP8 with scales by row.

    `in_features`: K, the columns of x and w that hold their own values. If w has room for the adapter's columns after
    these, x must have the same: h and up are written there, and one GEMM computes both terms. Otherwise h upᵀ is added
    afterwards. `up_factor`: see `reference.append_adapter_columns`.

    The schema declares neither x nor w as changed, although their padding is written: nobody else reads the padding,
    and the compiler may copy an operand, here a whole weight, before an operator changes it.
    """
    padding = 0
    if h_MR is not None and up_NR is not None and adapter_columns(h_MR.shape[1]) <= w_NF.shape[1] - in_features:
        append_adapter_columns(x_MF, x_scale_M1, h_MR, w_NF, w_scale_1N, up_NR, in_features, up_factor)
        padding = w_NF.shape[1] - in_features
    multiplied_columns = in_features + padding  # without an adapter, what is in the padding must not count
    add_bias_later = multiplied_columns > BIAS_MAX_K and len(x_MF) * len(w_NF) < BIAS_MIN_OUTPUTS
    # FP8 GEMMs read both operands along K: x row-major, and wᵀ as the transposed view of a row-major w.
    y_MN = torch._scaled_mm(
        x_MF[:, :multiplied_columns],
        w_NF[:, :multiplied_columns].t(),
        scale_a=x_scale_M1,
        scale_b=w_scale_1N,
        bias=None if add_bias_later else bias_N,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    if add_bias_later and bias_N is not None:
        y_MN += bias_N
    if padding == 0 and h_MR is not None and up_NR is not None:
        y_MN = y_MN.addmm_(h_MR, up_NR.t())
    return y_MN


# ---- The functions of `WeightFormat.forward` and `.backward`. All have the same parameters; see the methods there.


def _fp8_forward(
    x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, h: Tensor | None, up: Tensor | None
) -> Tensor:
    x8, x_scale = quantize_rows(x, None, w.dtype, w.shape[1] - x.shape[1])
    return fp8_product(x8, x_scale, w, scale, bias, h, up, x.shape[1], FORWARD_UP_FACTOR)


def fp8_gradient(
    g: Tensor,
    w: Tensor,
    scale: Tensor,
    gh: Tensor | None,
    down: Tensor | None,
    weight_t: Tensor | None,
    in_features: int,
) -> Tensor:
    """g w + gh down, (M, K), in FP8. `w` is (N, F). `weight_t`: its transposed copy (K, N + padding) if one is kept.

    The GEMM sums over N here, so w has to be transposed: FP8 tensor cores read both operands along the summed axis. Its
    scales, one for each n, cannot be applied to the result any more. They are multiplied into g before g is quantised.
    """
    if weight_t is None:
        rank = 0
        if down is not None and w.shape[1] != in_features:  # the layer has adapter columns
            rank = len(down)
        weight_t = transpose(w[:, :in_features], padding_for(rank, len(w)))
    g8, g_scale = quantize_rows(g, scale.to(torch.bfloat16), w.dtype, weight_t.shape[1] - g.shape[1])
    ones = torch.ones(1, in_features, device=g.device)
    up = None if down is None else down.t()
    return fp8_product(g8, g_scale, weight_t, ones, None, gh, up, g.shape[1], backward_up_factor(in_features))


def _int8_forward(
    x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, h: Tensor | None, up: Tensor | None
) -> Tensor:
    x8, x_scale = quantize_rows(x, None, w.dtype)
    y = torch._int_mm(x8, w.t()).float() * x_scale * scale
    if bias is not None:
        y = y + bias
    if h is not None and up is not None:
        y = y + h @ up.t()
    return y.to(x.dtype)


def _int8_backward(
    g: Tensor,
    w: Tensor,
    scale: Tensor,
    gh: Tensor | None,
    down: Tensor | None,
    _weight_t: Tensor | None,
    _in_features: int,
) -> Tensor:
    # int8 GEMMs read w in either order, so nothing is transposed.
    g8, g_scale = quantize_rows(g, scale, w.dtype)
    gx = torch._int_mm(g8, w).float() * g_scale
    if gh is not None and down is not None:
        gx = gx + gh @ down
    return gx.to(g.dtype)


def dequantize(w_NK: Tensor, scale_1N: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight, (N, K) in `dtype`, from 8-bit values and their scales."""
    if can_dequantize(w_NK):
        return dequantize_rows(w_NK, scale_1N, dtype)
    return reference.dequantize_rows(w_NK, scale_1N, dtype)


def _nf4_store(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights to a byte, (N, K / 2), and the scale of each block of 64, by bitsandbytes."""
    from bitsandbytes.functional import quantize_4bit  # heavy, and only this format needs it

    packed, state = quantize_4bit(weight_NK.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    return packed.view(weight_NK.shape[0], -1), state.absmax.view(1, -1)


def _nf4_dequantize(w: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    shape = [w.shape[0], 2 * w.shape[1]]
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(w, scale.view(-1), NF4_BLOCK, "nf4", shape, dtype)
    return weight


# As operators, because the compiler would otherwise keep the dequantised weight, in 16 bits, for the backward pass.
@_operator(
    "nf4_product(Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor? h, Tensor? up) -> Tensor",
    lambda x, w, scale, bias, h, up: x.new_empty(x.shape[0], w.shape[0]),  # noqa: ARG005
)
def _nf4_forward(
    x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, h: Tensor | None, up: Tensor | None
) -> Tensor:
    y = F.linear(x, _nf4_dequantize(w, scale, x.dtype), bias)
    if h is None or up is None:
        return y
    return y.addmm_(h, up.t())


@_operator(
    "nf4_gradient(Tensor g, Tensor w, Tensor scale, Tensor? gh, Tensor? down) -> Tensor",
    lambda g, w, scale, gh, down: g.new_empty(g.shape[0], 2 * w.shape[1]),  # noqa: ARG005
)
def _nf4_gradient(g: Tensor, w: Tensor, scale: Tensor, gh: Tensor | None, down: Tensor | None) -> Tensor:
    gx = g @ _nf4_dequantize(w, scale, g.dtype)
    if gh is None or down is None:
        return gx
    return gx.addmm_(gh, down)


def _nf4_backward(
    g: Tensor,
    w: Tensor,
    scale: Tensor,
    gh: Tensor | None,
    down: Tensor | None,
    _weight_t: Tensor | None,
    _in_features: int,
) -> Tensor:
    return _nf4_gradient(g, w, scale, gh, down)


@dataclass(frozen=True)
class WeightFormat:
    """How a frozen weight (N, K) is stored and multiplied.

    A format without a `forward` dequantises the weight to 16 bits and multiplies there (`fp8-storage`, `int8-storage`).
    """

    dtype: torch.dtype  # of the stored values
    multiple: int = 1  # both sides of a layer must be a multiple of it; others stay in 16 bits
    forward: Callable[..., Tensor] | None = None
    backward: Callable[..., Tensor] | None = None
    dequantize: Callable[[Tensor, Tensor, torch.dtype], Tensor] = dequantize
    transposes: bool = False  # FP8 products: the backward pass reads the weight transposed, and rows can be padded

    def store(self, weight_NK: Tensor, padding: int = 0) -> tuple[Tensor, Tensor]:
        """The stored values, (N, K + padding), and their scales, (1, N). nf4: (N, K / 2), and a scale for each block.

        Only formats with `transposes` take a padding.
        """
        if self.dtype == torch.uint8:
            return _nf4_store(weight_NK)
        if self.transposes:
            return quantize_weight(weight_NK, self.dtype, padding)
        values, scale_N1 = reference.quantize_rows(weight_NK, None, self.dtype)
        return values, scale_N1.t().contiguous()

    def linear(
        self, x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, h: Tensor | None, up: Tensor | None
    ) -> Tensor:
        """x wᵀ + bias + h upᵀ, (M, N), for x (M, K) and the stored w and scale. h and up: both or neither."""
        if self.forward:
            return self.forward(x, w, scale, bias, h, up)
        y = F.linear(x, self.dequantize(w, scale, x.dtype), bias)
        if h is None or up is None:
            return y
        return y + h @ up.t()

    def input_gradient(
        self,
        g: Tensor,
        w: Tensor,
        scale: Tensor,
        gh: Tensor | None,
        down: Tensor | None,
        weight_t: Tensor | None,
        in_features: int,
    ) -> Tensor:
        """g w + gh down, (M, K): the gradient of x. `weight_t`: the transposed copy of w, if one is kept."""
        if self.backward:
            return self.backward(g, w, scale, gh, down, weight_t, in_features)
        gx = g @ self.dequantize(w, scale, g.dtype)
        if gh is None or down is None:
            return gx
        return gx + gh @ down


WEIGHT_FORMATS = {
    "fp8": WeightFormat(torch.float8_e4m3fn, 16, _fp8_forward, fp8_gradient, transposes=True),
    "fp8-fnuz": WeightFormat(torch.float8_e4m3fnuz, 16, _fp8_forward, fp8_gradient, transposes=True),
    "fp8-storage": WeightFormat(torch.float8_e4m3fn),
    "fp8-fnuz-storage": WeightFormat(torch.float8_e4m3fnuz),
    "int8": WeightFormat(torch.int8, 16, _int8_forward, _int8_backward),
    "int8-storage": WeightFormat(torch.int8),
    "nf4": WeightFormat(torch.uint8, NF4_BLOCK, _nf4_forward, _nf4_backward, _nf4_dequantize),
}

# Formats that multiply in 8 bits, and those that store the same values but multiply in 16.
STORAGE_ONLY = {"fp8": "fp8-storage", "fp8-fnuz": "fp8-fnuz-storage", "int8": "int8-storage"}
# FP8 formats, and the same in the types of CDNA 3 (gfx94x), whose hardware has no others: no negative zero, and a range
# that begins and ends one power of two lower.
FNUZ = {"fp8": "fp8-fnuz", "fp8-storage": "fp8-fnuz-storage"}


def weight_format_for(precision: str, device: str) -> str | None:
    """The key of `WEIGHT_FORMATS` for a value of PARAMS_PRECISION on a torch device type; None: not quantised."""
    weight_format = PRECISIONS[precision].weight_format
    if weight_format not in FNUZ or device != "cuda" or not torch.version.hip:
        return weight_format
    cdna_3 = "gfx94" in torch.cuda.get_device_properties(0).gcnArchName  # CDNA 4 has NVIDIA's types
    return FNUZ[weight_format] if cdna_3 else weight_format
