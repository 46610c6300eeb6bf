"""Triton kernels for a norm with its modulation, or a GELU, fused with quantisation; and for their gradients.

The operation before an FP8 product writes its result in 8 bits at once: a separate quantisation would read and write
every row once more. Adapters need the same rows in 16 bits, so these are written too if `keep_rows` is true. The
gradient's kernels recompute those rows, which is cheaper than to keep them from the forward pass to the backward pass.
`trainer.engine.kernels.reference` has the same functions in plain torch.

Letters: M rows (tokens of B images), K features of a row, L features that stand before GELU's in a row. Parameters of
kernels have no types, because Triton gives annotations a meaning of its own; only `tl.constexpr` is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from trainer.engine.kernels import reference

CHUNK = 1024  # elements of a row that a program holds at once: 8 for each thread of 4 warps
_MIN_ROW_MAX, _BF16_MAX = tl.constexpr(reference.MIN_ROW_MAX), tl.constexpr(reference.BF16_MAX)


@triton.jit
def _store_row(values, out, row, column, inside, row_stride, scale, MAX_VALUE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """Write `values`, divided by `scale`, to the columns `column` of one row of `out`."""
    rounded = tl.clamp(values * (1.0 / scale), -MAX_VALUE, MAX_VALUE, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * row_stride + column, rounded.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _row_scale(amax, MAX_VALUE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    return tl.minimum(tl.maximum(amax, _MIN_ROW_MAX), _BF16_MAX) / MAX_VALUE


@triton.jit
def _normalize(x, row, k, inside, K: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """LayerNorm of one row without weights, (x - mean) / std, and 1 / std; if not CENTRED, RMSNorm. In fp32."""
    value = tl.load(x + row * K + k, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value, axis=0) / K, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / K + EPS)
    return value * rstd, rstd


# Grid: one program a row, which holds the whole row: it is read once for mean, variance and maximum. Reads the row of x
# and the image's scale and shift; writes the quantised row, its scale, and the 16-bit row if KEEP_ROWS.
@triton.jit
def _norm_rows(  # type: ignore[no-untyped-def]  # Triton reads annotations
    x,
    scale,
    shift,
    out,
    scales,
    modulated,
    tokens,
    K: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    EPS: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    KEEP_ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    k = tl.arange(0, BLOCK)
    inside = k < K
    x_hat, _ = _normalize(x, row, k, inside, K, EPS, CENTRED)
    value = x_hat * (SCALE_OFFSET + tl.load(scale + image * K + k, mask=inside, other=0.0).to(tl.float32))
    if HAS_SHIFT:
        value += tl.load(shift + image * K + k, mask=inside, other=0.0).to(tl.float32)
    # Quantise what was rounded to 16 bits: the rows that adapters read are those that the 8 bits stand for.
    rounded = value.to(x.dtype.element_ty)
    if KEEP_ROWS:
        tl.store(modulated + row * K + k, rounded, mask=inside)
    value = rounded.to(tl.float32)
    row_scale = _row_scale(tl.max(tl.abs(value), axis=0), MAX_VALUE)
    tl.store(scales + row, row_scale)
    _store_row(value, out, row, k, inside, K + PADDING, row_scale, MAX_VALUE)


@triton_op("kiln::norm_rows", mutates_args={})
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.norm_rows` in one kernel: values (M, K + padding), scales (M, 1), rows (M, K) or empty."""
    x_MK = x_MK.contiguous()
    rows, features = x_MK.shape
    out = torch.empty(rows, features + padding, device=x_MK.device, dtype=dtype)
    scales = torch.empty(rows, 1, device=x_MK.device, dtype=torch.float32)
    modulated = torch.empty_like(x_MK) if keep_rows else x_MK.new_empty(0)
    block = triton.next_power_of_2(features)
    wrap_triton(_norm_rows)[(rows,)](
        x_MK,
        scale_BK.contiguous(),
        x_MK if shift_BK is None else shift_BK.contiguous(),
        out,
        scales,
        modulated if keep_rows else x_MK,
        rows // scale_BK.shape[0],
        features,
        padding,
        block,
        scale_offset,
        eps,
        reference.max_value(dtype),
        keep_rows,
        centred,
        shift_BK is not None,
        num_warps=_num_warps(block),
    )
    return out, scales, modulated


def _num_warps(block: int) -> int:
    """16 elements a thread: these kernels hold several fp32 values for each element of a row at once."""
    return min(16, max(2, block // 512))


# Grid: one program a row, which holds the whole row. Reads the rows of x, of up to three gradients and of the
# residual's gradient; writes the row of x's gradient, and the modulated row again if KEEP_ROWS.
@triton.jit
def _norm_gradient(  # type: ignore[no-untyped-def]  # Triton reads annotations
    x,
    scale,
    shift,
    g1,
    g2,
    g3,
    residual_grad,
    out,
    modulated,
    tokens,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    EPS: tl.constexpr,
    HAS_G2: tl.constexpr,
    HAS_G3: tl.constexpr,
    KEEP_ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    k = tl.arange(0, BLOCK)
    inside = k < K
    x_hat, rstd = _normalize(x, row, k, inside, K, EPS, CENTRED)
    weight = SCALE_OFFSET + tl.load(scale + image * K + k, mask=inside, other=0.0).to(tl.float32)
    if KEEP_ROWS:
        value = x_hat * weight
        if HAS_SHIFT:
            value += tl.load(shift + image * K + k, mask=inside, other=0.0).to(tl.float32)
        tl.store(modulated + row * K + k, value.to(x.dtype.element_ty), mask=inside)
    g = tl.load(g1 + row * K + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_G2:
        g += tl.load(g2 + row * K + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_G3:
        g += tl.load(g3 + row * K + k, mask=inside, other=0.0).to(tl.float32)
    g *= weight
    # LayerNorm's gradient (arXiv 1607.06450): g without its mean and without its projection on x_hat.
    # RMSNorm's keeps the mean.
    along_x_hat = x_hat * (tl.sum(g * x_hat, axis=0) / K)
    if CENTRED:
        g -= tl.sum(g, axis=0) / K
    gx = rstd * (g - along_x_hat)
    if HAS_RESIDUAL:
        gx += tl.load(residual_grad + row * K + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * K + k, gx.to(out.dtype.element_ty), mask=inside)


@triton_op("kiln::norm_gradient", mutates_args={})
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.norm_gradient` in one kernel: the gradient of x (M, K), and rows (M, K) or empty."""
    x_MK = x_MK.contiguous()
    g1_MK = g1_MK.contiguous()
    rows, features = x_MK.shape
    out = torch.empty_like(x_MK)
    modulated = torch.empty_like(x_MK) if keep_rows else x_MK.new_empty(0)
    block = triton.next_power_of_2(features)
    wrap_triton(_norm_gradient)[(rows,)](
        x_MK,
        scale_BK.contiguous(),
        x_MK if shift_BK is None else shift_BK.contiguous(),
        g1_MK,
        g1_MK if g2_MK is None else g2_MK.contiguous(),
        g1_MK if g3_MK is None else g3_MK.contiguous(),
        g1_MK if residual_grad_MK is None else residual_grad_MK.contiguous(),
        out,
        modulated if keep_rows else x_MK,
        rows // scale_BK.shape[0],
        features,
        block,
        scale_offset,
        eps,
        g2_MK is not None,
        g3_MK is not None,
        keep_rows,
        centred,
        shift_BK is not None,
        residual_grad_MK is not None,
        num_warps=_num_warps(block),
    )
    return out, modulated


# Grid: one program a row. Reads the rows of x and y, and the image's weight; writes x + weight * RMSNorm(y).
@triton.jit
def _norm_residual(x, y, weight, out, tokens, K: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    k = tl.arange(0, BLOCK)
    inside = k < K
    y_hat, _ = _normalize(y, row, k, inside, K, EPS, False)
    value = tl.load(x + row * K + k, mask=inside, other=0.0).to(tl.float32)
    value += y_hat * tl.load(weight + image * K + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=inside)


@triton_op("kiln::norm_residual", mutates_args={})
def norm_residual(x_BTK: torch.Tensor, y_BTK: torch.Tensor, weight_BK: torch.Tensor, eps: float) -> torch.Tensor:
    """`reference.norm_residual` in one kernel."""
    x_BTK = x_BTK.contiguous()
    out = torch.empty_like(x_BTK)
    rows = out.numel() // out.shape[-1]
    block = triton.next_power_of_2(out.shape[-1])
    wrap_triton(_norm_residual)[(rows,)](
        x_BTK,
        y_BTK.contiguous(),
        weight_BK.contiguous(),
        out,
        rows // weight_BK.shape[0],
        out.shape[-1],
        block,
        eps,
        num_warps=_num_warps(block),
    )
    return out


@triton.jit
def _tanh_gelu(y):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """gelu(y) in its approximation by tanh (arXiv 1606.08415), and its derivative.

    (1 + tanh(u)) / 2 is the sigmoid of 2u, with u = sqrt(2 / pi) * (y + 0.044715 y**3); 1.5957… is 2 sqrt(2 / pi).
    """
    s = tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y * s, s + y * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * y * y))


@triton.jit
def _erf_gelu(y):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """gelu(y) with erf, and its derivative: Phi(y) + y phi(y). The constants are 1 / sqrt(2) and 1 / sqrt(2 pi)."""
    s = 0.5 + 0.5 * tl.erf(y * 0.7071067811865476)
    return y * s, s + y * tl.exp(-0.5 * y * y) * 0.3989422804014327


@triton.jit
def _load_gelu(y, row, k, inside, K: tl.constexpr, GEGLU: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """gelu(y) of one row; with GEGLU a * gelu(b), where the row of y is [a, b]. Rounded to 16 bits."""
    if GEGLU:
        a = tl.load(y + row * 2 * K + k, mask=inside, other=0.0).to(tl.float32)
        value, _ = _erf_gelu(tl.load(y + row * 2 * K + K + k, mask=inside, other=0.0).to(tl.float32))
        value *= a
    else:
        value, _ = _tanh_gelu(tl.load(y + row * K + k, mask=inside, other=0.0).to(tl.float32))
    return value.to(y.dtype.element_ty)


# Grid: one program a row. Reads the rows of `left` (L values) and y (K, or 2K with GEGLU); writes the quantised row
# [left, gelu(y)], its scale, and the 16-bit row if KEEP_ROWS.
@triton.jit
def _gelu_rows(  # type: ignore[no-untyped-def]  # Triton reads annotations
    left,
    y,
    out,
    scales,
    kept_rows,
    L: tl.constexpr,
    K: tl.constexpr,
    PADDING: tl.constexpr,
    CHUNK: tl.constexpr,
    GEGLU: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    KEEP_ROWS: tl.constexpr,
):
    """Two passes over the row in chunks: the first one finds its largest value, the second one quantises.

    A whole row of 15,360 values in registers leaves room for only two programs at a time on a multiprocessor: that
    reached 1.24 TB/s (H200), chunks in two passes 1.9 to 2.0 (H100, whose memory is a third slower).
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNK)
    amax = tl.zeros([CHUNK], tl.float32)
    for start in range(0, K, CHUNK):
        k = start + chunk
        rounded = _load_gelu(y, row, k, k < K, K, GEGLU)
        amax = tl.maximum(amax, tl.abs(rounded.to(tl.float32)))
        if KEEP_ROWS:
            tl.store(kept_rows + row * (L + K) + L + k, rounded, mask=k < K)
    for start in range(0, L, CHUNK):
        i = start + chunk
        left_value = tl.load(left + row * L + i, mask=i < L, other=0.0)
        amax = tl.maximum(amax, tl.abs(left_value.to(tl.float32)))
        if KEEP_ROWS:
            tl.store(kept_rows + row * (L + K) + i, left_value, mask=i < L)
    row_scale = _row_scale(tl.max(amax, axis=0), MAX_VALUE)
    tl.store(scales + row, row_scale)
    tl.debug_barrier()  # the rows stored above are read again below, and not always by the same thread
    for start in range(0, K, CHUNK):
        k = start + chunk
        if KEEP_ROWS:
            value = tl.load(kept_rows + row * (L + K) + L + k, mask=k < K, other=0.0)
        else:
            value = _load_gelu(y, row, k, k < K, K, GEGLU)
        _store_row(value.to(tl.float32), out, row, L + k, k < K, L + K + PADDING, row_scale, MAX_VALUE)
    for start in range(0, L, CHUNK):
        i = start + chunk
        left_value = tl.load(left + row * L + i, mask=i < L, other=0.0).to(tl.float32)
        _store_row(left_value, out, row, i, i < L, L + K + PADDING, row_scale, MAX_VALUE)


@triton_op("kiln::gelu_rows", mutates_args={})
def gelu_rows(
    left_ML: torch.Tensor | None, y_MK: torch.Tensor, geglu: bool, dtype: torch.dtype, keep_rows: bool, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.gelu_rows` in one kernel: values (M, L + K + padding), scales (M, 1), rows (M, L + K) or empty."""
    y_MK = y_MK.contiguous()
    left_ML = None if left_ML is None else left_ML.contiguous()
    rows = len(y_MK)
    left_features = 0 if left_ML is None else left_ML.shape[1]
    features = y_MK.shape[1] // (2 if geglu else 1)
    out = torch.empty(rows, left_features + features + padding, device=y_MK.device, dtype=dtype)
    scales = torch.empty(rows, 1, device=y_MK.device, dtype=torch.float32)
    kept_rows = y_MK.new_empty(rows, left_features + features) if keep_rows else y_MK.new_empty(0)
    wrap_triton(_gelu_rows)[(rows,)](
        y_MK if left_ML is None else left_ML,
        y_MK,
        out,
        scales,
        kept_rows if keep_rows else y_MK,
        left_features,
        features,
        padding,
        CHUNK,
        geglu,
        reference.max_value(dtype),
        keep_rows,
        num_warps=4,
    )
    return out, scales, kept_rows


# Grid: (rows, chunks of 1,024 columns of [left, gelu(y)]): no program needs to see a whole row. Reads y and the
# gradient g of the row; writes the gradients of y and left, and the 16-bit row again if KEEP_ROWS.
@triton.jit
def _gelu_gradient(  # type: ignore[no-untyped-def]  # Triton reads annotations
    left,
    y,
    g,
    out,
    g_left,
    kept_rows,
    L: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    GEGLU: tl.constexpr,
    KEEP_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = column - L  # negative in left's columns
    inside = (k >= 0) & (k < K)
    g_value = tl.load(g + row * (L + K) + column, mask=inside, other=0.0).to(tl.float32)
    if GEGLU:
        a = tl.load(y + row * 2 * K + k, mask=inside, other=0.0).to(tl.float32)
        value, derivative = _erf_gelu(tl.load(y + row * 2 * K + K + k, mask=inside, other=0.0).to(tl.float32))
        tl.store(out + row * 2 * K + k, (g_value * value).to(out.dtype.element_ty), mask=inside)
        tl.store(out + row * 2 * K + K + k, (g_value * a * derivative).to(out.dtype.element_ty), mask=inside)
        value *= a
    else:
        value, derivative = _tanh_gelu(tl.load(y + row * K + k, mask=inside, other=0.0).to(tl.float32))
        tl.store(out + row * K + k, (g_value * derivative).to(out.dtype.element_ty), mask=inside)
    if L > 0:
        left_value = tl.load(g + row * (L + K) + column, mask=column < L)
        tl.store(g_left + row * L + column, left_value, mask=column < L)
    if KEEP_ROWS:
        tl.store(kept_rows + row * (L + K) + column, value.to(y.dtype.element_ty), mask=inside)
        if L > 0:
            left_value = tl.load(left + row * L + column, mask=column < L)
            tl.store(kept_rows + row * (L + K) + column, left_value, mask=column < L)


@triton_op("kiln::gelu_gradient", mutates_args={})
def gelu_gradient(
    left_ML: torch.Tensor | None, y_MK: torch.Tensor, g: torch.Tensor, geglu: bool, keep_rows: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.gelu_gradient` in one kernel: the gradients of y and of left, and rows (M, L + K) or empty."""
    y_MK = y_MK.contiguous()
    g = g.contiguous()
    left_ML = None if left_ML is None else left_ML.contiguous()
    rows = len(y_MK)
    left_features = 0 if left_ML is None else left_ML.shape[1]
    features = y_MK.shape[1] // (2 if geglu else 1)
    out = torch.empty_like(y_MK)
    g_left = y_MK.new_empty(rows, left_features)
    kept_rows = y_MK.new_empty(rows, left_features + features) if keep_rows else y_MK.new_empty(0)
    wrap_triton(_gelu_gradient)[(rows, triton.cdiv(left_features + features, CHUNK))](
        y_MK if left_ML is None else left_ML,
        y_MK,
        g,
        out,
        g_left,
        kept_rows if keep_rows else y_MK,
        left_features,
        features,
        CHUNK,
        geglu,
        keep_rows,
        num_warps=4,
    )
    return out, g_left, kept_rows
