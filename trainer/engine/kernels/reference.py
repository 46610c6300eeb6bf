"""Quantisation, and the operations fused with it, in plain torch.

The Triton kernels (`quantize_triton`, `norm_gelu_triton`) are compared with these functions: in the tests, and by
`self_test` before each job. Where Triton is not installed, and on CPU tensors, these run instead.

Letters: M rows (tokens of B images), K input and N output features, R the adapter's rank, L features that stand before
others in a row, F = K + padding (the length of a row of an FP8 matrix), T tokens of one image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainer.spec.adapter_columns import COLUMNS_PER_RANK

MIN_ROW_MAX = 1e-12  # a row's largest value counts as at least this, so that a row of zeros is not divided by zero
BF16_MAX = torch.finfo(torch.bfloat16).max  # and at most as this, so that an inf has a finite scale

# A row's largest value becomes this fraction of the largest FP8 number: 448 / 4 = 112 in activations and gradients,
# 448 / 32 = 14 in weights. The rest of the range is for the adapter columns, which share the row's scale and may hold
# larger values. The price is precision at the other end: e4m3's smallest normal number is 2**-6, so values below
# 1 / 7,168 of their row's largest in activations and gradients, or 1 / 896 in weights, lose bits.
ACTIVATION_HEADROOM = 4
WEIGHT_HEADROOM = 32

# B (forward) must fit up to this value, or the largest of the weight if that is larger: B begins at zero and does not
# depend on the row of the weight whose scale it shares.
MIN_B_RANGE = 0.25
# A row's columns hold B up to 8 times the row's largest weight: WEIGHT_HEADROOM / formats.FORWARD_UP_FACTOR. Rows that
# are smaller than the required range / 8 get a larger scale than their weights need.
B_HEADROOM = 8
# 2**7 = 128 times at most: each doubling costs the row's weights one bit of the range that keeps them precise.
MAX_SCALE_DOUBLINGS = 7

ROWS_PER_CHUNK = 256  # rows of a weight that are in fp32 at the same time: 16 MiB at 15,360 features


def max_value(dtype: torch.dtype) -> float:
    """The largest quantised value of a row of activations or gradients: 112 in e4m3fn, 60 in e4m3fnuz, 127 in int8."""
    if dtype.is_floating_point:
        return torch.finfo(dtype).max / ACTIVATION_HEADROOM
    return torch.iinfo(dtype).max


def quantize_rows(
    x_MK: torch.Tensor, column_scales_1K: torch.Tensor | None, dtype: torch.dtype, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x * column_scales by row: values (M, K + padding) in `dtype`, fp32 scales (M, 1).

    values * scales is x * column_scales again, rounded. An inf becomes the largest value that the row can hold; a NaN
    stays NaN in FP8. The padding has no defined content.
    """
    x_MK = x_MK.float() if column_scales_1K is None else x_MK.float() * column_scales_1K.float()
    limit = max_value(dtype)
    scale_M1 = x_MK.abs().amax(-1, keepdim=True).clamp(MIN_ROW_MAX, BF16_MAX) / limit
    values_MK = (x_MK / scale_M1).clamp(-limit, limit)
    if not dtype.is_floating_point:
        values_MK = values_MK.round()  # halves to the even number; a cast to int8 would cut off
    return pad_columns(values_MK.to(dtype), padding), scale_M1


def quantize_weight(w_NK: torch.Tensor, dtype: torch.dtype, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight in FP8 by output channel: values (N, K + padding) in `dtype`, fp32 scales (1, N).

    The padding is zeros. Scales are rounded to bf16 before the weight is divided by them, because the backward pass
    multiplies gradients by them and reads fp32 scales at half the speed (110 µs instead of 56 for rows of 3,072).
    Powers of two, which bf16 holds as well, made the error of gradients a third larger (docs/lab-notes.md).
    """
    n, in_features = w_NK.shape
    limit = torch.finfo(dtype).max
    # The result is allocated first and the temporary tensors are small. Otherwise these leave gaps between one weight
    # and the next: under a cap of 16 GiB, Flux.1 fits as a CUDA graph only like this.
    values_NF = torch.zeros(n, in_features + padding, dtype=dtype, device=w_NK.device)
    low_N, high_N = w_NK.aminmax(dim=1)
    amax_N1 = torch.maximum(-low_N, high_N).float().clamp(MIN_ROW_MAX, BF16_MAX)[:, None]
    b_range = amax_N1.max().clamp(min=MIN_B_RANGE)
    doublings_N1 = (b_range / B_HEADROOM / amax_N1).log2().ceil().clamp(0, MAX_SCALE_DOUBLINGS)
    scale_N1 = (amax_N1 * doublings_N1.exp2() / (limit / WEIGHT_HEADROOM)).bfloat16().float()
    for begin in range(0, n, ROWS_PER_CHUNK):
        rows = slice(begin, begin + ROWS_PER_CHUNK)
        values_NF[rows, :in_features] = (w_NK[rows].float() / scale_N1[rows]).clamp(-limit, limit).to(dtype)
    return values_NF, scale_N1.t().contiguous()


def pad_columns(values_MK: torch.Tensor, padding: int) -> torch.Tensor:
    """`values` of one byte each, followed by `padding` columns of zeros."""
    if padding == 0:
        return values_MK
    # As bytes: torch cannot pad FP8.
    return F.pad(values_MK.view(torch.uint8), (0, padding)).view(values_MK.dtype)


def append_adapter_columns(
    x_MF: torch.Tensor,
    x_scale_M1: torch.Tensor,
    h_MR: torch.Tensor,
    w_NF: torch.Tensor,
    w_scale_1N: torch.Tensor,
    up_NR: torch.Tensor,
    in_features: int,
    up_factor: float,
) -> None:
    """Write h and up into the columns of x and w after the first K = `in_features`, in place.

    The FP8 product of x and w then has h upᵀ in it. `trainer.engine.quantization` draws the columns: h is written as
    high, low, high and up as high, high, low, R columns each, and zeros to the end of the padding.

    `up_factor`: up is written so many times larger than the scale of w alone says, and h as many times smaller. The
    product is the same, and both stay within the range of FP8. Values beyond it saturate.
    """
    limit = torch.finfo(x_MF.dtype).max
    padding = w_NF.shape[1] - in_features
    # The parts of each side: 0 is high, 1 is low.
    sides = (
        (x_MF, x_scale_M1, h_MR, 1 / up_factor, (0, 1, 0)),
        (w_NF, w_scale_1N.t(), up_NR, up_factor, (0, 0, 1)),
    )
    for out, scale, values, factor, order in sides:
        exact = values.float() / scale * factor
        high = exact.clamp(-limit, limit).to(out.dtype)
        low = (exact - high.float()).clamp(-limit, limit).to(out.dtype)
        parts = torch.cat([(high, low)[i] for i in order], 1)
        # `.data` hides the write from autograd, which saved w for the backward pass and would refuse a changed version.
        # What it computes from w does not read these columns, but after they were written again.
        out.data[:, in_features : in_features + padding] = pad_columns(
            parts, padding - COLUMNS_PER_RANK * values.shape[1]
        )


def dequantize_rows(w_NK: torch.Tensor, scale_1N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) in `dtype` from 8-bit values and a scale for each row."""
    return (w_NK.float() * scale_1N.t()).to(dtype)


def can_dequantize(w_NK: torch.Tensor) -> bool:  # noqa: ARG001  (the Triton kernel looks at it)
    """Whether `dequantize_rows` can read this type on this device: always."""
    return True


def transpose(w_NK: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """wᵀ, (K, N + padding), contiguous. The padding has no defined content."""
    return pad_columns(w_NK.t().contiguous(), padding)


# ---- Operations before a product, and their gradients. All are computed in fp32 and rounded to 16 bits once; what is
# quantised is the rounded result, so the 16-bit rows for adapters are those that the 8 bits stand for. Rows are
# returned only if `keep_rows` is true; else an empty tensor, since an operator's result cannot be None.
Rows = torch.Tensor


def norm_rows(
    x_MK: torch.Tensor,
    scale_BK: torch.Tensor,
    shift_BK: torch.Tensor | None,
    scale_offset: float,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
    keep_rows: bool,
    padding: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, Rows]:
    """Quantise norm(x) * (scale_offset + scale) + shift: values (M, K + padding), scales (M, 1), rows (M, K).

    norm: LayerNorm if `centred`, else RMSNorm (arXiv 1910.07467), which does not centre x. scale_offset: 1 for a
    modulation, 0 for the norm's own weight. Each of the B images has M / B rows of x.
    """
    if centred:
        x_hat_MK = F.layer_norm(x_MK.float(), x_MK.shape[1:], eps=eps)
    else:
        x_hat_MK, _ = normalized(x_MK, eps, centred=False)
    rows_MK = _modulate(x_hat_MK, scale_BK, shift_BK, scale_offset).to(x_MK.dtype)
    values_MF, row_scale_M1 = quantize_rows(rows_MK, None, dtype, padding)
    return values_MF, row_scale_M1, rows_MK if keep_rows else x_MK.new_empty(0)


def normalized(x_MK: torch.Tensor, eps: float, *, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm, or RMSNorm if not `centred`, without weights, in fp32; and what each row was multiplied by (M, 1)."""
    x_MK = x_MK.float()
    if centred:
        x_MK = x_MK - x_MK.mean(-1, keepdim=True)
    rstd_M1 = (x_MK.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x_MK * rstd_M1, rstd_M1


def norm_gradient(
    x_MK: torch.Tensor,
    scale_BK: torch.Tensor,
    shift_BK: torch.Tensor | None,
    scale_offset: float,
    eps: float,
    centred: bool,
    g1_MK: torch.Tensor,
    g2_MK: torch.Tensor | None,
    g3_MK: torch.Tensor | None,
    residual_grad_MK: torch.Tensor | None,
    keep_rows: bool,
) -> tuple[torch.Tensor, Rows]:
    """The gradient of x (M, K), and the rows of `norm_rows` again.

    g1 to g3: gradients of the rows from the layers that read them, added here. residual_grad: the gradient that reaches
    x past the norm, added here as well. A shift changes nothing but the rows.
    """
    gradients = [g.float() for g in (g1_MK, g2_MK, g3_MK) if g is not None]
    g_MK = torch.stack(gradients).sum(0)
    g_MK = _modulate(g_MK, scale_BK, None, scale_offset)
    x_hat_MK, rstd_M1 = normalized(x_MK, eps, centred=centred)
    # LayerNorm's gradient (arXiv 1607.06450): g without its mean and without its projection on x_hat. RMSNorm's keeps
    # the mean.
    along_x_hat_MK = x_hat_MK * (g_MK * x_hat_MK).mean(-1, keepdim=True)
    if centred:
        g_MK = g_MK - g_MK.mean(-1, keepdim=True)
    gx_MK = rstd_M1 * (g_MK - along_x_hat_MK)
    if residual_grad_MK is not None:
        gx_MK = gx_MK + residual_grad_MK.float()
    gx_MK = gx_MK.to(x_MK.dtype)
    if not keep_rows:
        return gx_MK, x_MK.new_empty(0)
    return gx_MK, _modulate(x_hat_MK, scale_BK, shift_BK, scale_offset).to(x_MK.dtype)


def _modulate(
    x_MK: torch.Tensor, scale_BK: torch.Tensor, shift_BK: torch.Tensor | None, scale_offset: float
) -> torch.Tensor:
    x_BTK = x_MK.view(len(scale_BK), -1, x_MK.shape[1]) * (scale_offset + scale_BK.float())[:, None]
    if shift_BK is not None:
        x_BTK = x_BTK + shift_BK.float()[:, None]
    return x_BTK.view_as(x_MK)


def gelu_rows(
    left_ML: torch.Tensor | None,
    y_MK: torch.Tensor,
    geglu: bool,
    dtype: torch.dtype,
    keep_rows: bool,
    padding: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, Rows]:
    """Quantise [left, gelu(y)]: values (M, L + K + padding), scales (M, 1), rows (M, L + K).

    gelu is the approximation by tanh. geglu (arXiv 2002.05202): y is [a, b], (M, 2K), and a * gelu(b) with erf stands
    in the place of gelu(y).
    """
    rows = _concatenated_gelu(left_ML, y_MK, geglu)
    values, row_scale_M1 = quantize_rows(rows, None, dtype, padding)
    return values, row_scale_M1, rows if keep_rows else y_MK.new_empty(0)


def gelu_gradient(
    left_ML: torch.Tensor | None, y_MK: torch.Tensor, g: torch.Tensor, geglu: bool, keep_rows: bool
) -> tuple[torch.Tensor, torch.Tensor, Rows]:
    """From g (M, L + K), the gradient of `gelu_rows`' rows: the gradients of y and of left, and those rows again."""
    left_features = 0 if left_ML is None else left_ML.shape[1]
    g_MK = g[:, left_features:].float()
    gelu_backward = torch.ops.aten.gelu_backward
    if geglu:
        a, b = y_MK.float().chunk(2, -1)
        gy_MK = torch.cat([g_MK * F.gelu(b), gelu_backward(g_MK * a, b, approximate="none")], -1)
    else:
        gy_MK = gelu_backward(g_MK, y_MK.float(), approximate="tanh")
    rows = _concatenated_gelu(left_ML, y_MK, geglu) if keep_rows else y_MK.new_empty(0)
    return gy_MK.to(y_MK.dtype), g[:, :left_features].clone(), rows


def _concatenated_gelu(left_ML: torch.Tensor | None, y_MK: torch.Tensor, geglu: bool) -> torch.Tensor:
    y = y_MK.float()
    if geglu:
        a, b = y.chunk(2, -1)
        right = a * F.gelu(b)
    else:
        right = F.gelu(y, approximate="tanh")
    right = right.to(y_MK.dtype)
    return right if left_ML is None else torch.cat([left_ML, right], -1)


def gated_residual(x_BTK: torch.Tensor | None, gate_BK: torch.Tensor, y_BTK: torch.Tensor) -> torch.Tensor:
    """x + gate * y, rounded once; without an x, gate * y."""
    if x_BTK is None:
        return y_BTK * gate_BK[:, None]
    return torch.addcmul(x_BTK, gate_BK[:, None], y_BTK)


def norm_residual(x_BTK: torch.Tensor, y_BTK: torch.Tensor, weight_BK: torch.Tensor, eps: float) -> torch.Tensor:
    """x + weight * RMSNorm(y), rounded once. The norm of an output that is gated and added: Z-Image's sandwich."""
    y_hat_BTK, _ = normalized(y_BTK, eps, centred=False)
    return (x_BTK.float() + weight_BK.float()[:, None] * y_hat_BTK).to(x_BTK.dtype)


def swiglu_rows(
    left_ML: torch.Tensor | None,
    a_MK: torch.Tensor,
    b_MK: torch.Tensor,
    silu: bool,
    dtype: torch.dtype,
    keep_rows: bool,
    padding: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, Rows]:
    """Quantise [left, silu(a) * b] (arXiv 2002.05202): values (M, L + K + padding), scales (M, 1), rows (M, L + K).

    Without `silu`, sigmoid(a) * b (GLU, arXiv 1612.08083), by which Krea 2 gates what attention leaves.
    """
    gate = F.silu(a_MK.float()) if silu else a_MK.float().sigmoid()
    rows = (gate * b_MK.float()).to(a_MK.dtype)
    if left_ML is not None:
        rows = torch.cat([left_ML, rows], -1)
    values, row_scale_M1 = quantize_rows(rows, None, dtype, padding)
    return values, row_scale_M1, rows if keep_rows else a_MK.new_empty(0)


def swiglu_gradient(
    left_ML: torch.Tensor | None, a_MK: torch.Tensor, b_MK: torch.Tensor, silu: bool, g: torch.Tensor, keep_rows: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Rows]:
    """From g (M, L + K), the gradient of `swiglu_rows`' rows: those of a, of b and of left, and those rows again."""
    left_features = 0 if left_ML is None else left_ML.shape[1]
    a, b, g_MK = a_MK.float(), b_MK.float(), g[:, left_features:].float()
    sigmoid = a.sigmoid()
    gate, slope = sigmoid, sigmoid * (1 - sigmoid)
    if silu:
        gate, slope = a * sigmoid, sigmoid * (1 + a * (1 - sigmoid))
    ga = g_MK * b * slope
    gb = g_MK * gate
    rows = (gate * b).to(a_MK.dtype) if keep_rows else a_MK.new_empty(0)
    if keep_rows and left_ML is not None:
        rows = torch.cat([left_ML, rows], -1)
    return ga.to(a_MK.dtype), gb.to(b_MK.dtype), g[:, :left_features].clone(), rows
