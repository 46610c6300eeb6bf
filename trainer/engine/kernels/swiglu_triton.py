"""Triton kernels for SwiGLU, silu(a) * b, or GLU, sigmoid(a) * b, fused with quantisation; and for their gradients.

The two halves are outputs of separate layers, or views of one. Other features may stand before the result in a row.
`trainer.engine.kernels.reference` has the same functions in plain torch.

Letters: M rows (tokens of B images), K features of a half, L features that stand before them in a row. Parameters of
kernels have no types, because Triton gives annotations a meaning of its own; only `tl.constexpr` is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from trainer.engine.kernels import reference
from trainer.engine.kernels.norm_gelu_triton import CHUNK, _row_scale, _store_row


@triton.jit
def _load_swiglu(a, b, row, k, inside, a_stride, b_stride, SILU: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """silu(a) * b of one row, or sigmoid(a) * b, rounded to 16 bits."""
    value = tl.load(a + row * a_stride + k, mask=inside, other=0.0).to(tl.float32)
    gate = tl.sigmoid(value)
    if SILU:
        gate *= value
    value = gate * tl.load(b + row * b_stride + k, mask=inside, other=0.0).to(tl.float32)
    return value.to(a.dtype.element_ty)


# Grid: one program a row. Reads the rows of `left` (L values), a and b (K each), in two passes as
# `norm_gelu_triton._gelu_rows` does; writes the quantised row [left, silu(a) * b], its scale, and the 16-bit row if
# KEEP_ROWS.
@triton.jit
def _swiglu_rows(  # type: ignore[no-untyped-def]  # Triton reads annotations
    left,
    a,
    b,
    out,
    scales,
    kept_rows,
    a_stride,
    b_stride,
    L: tl.constexpr,
    K: tl.constexpr,
    PADDING: tl.constexpr,
    CHUNK: tl.constexpr,
    SILU: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    KEEP_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNK)
    amax = tl.zeros([CHUNK], tl.float32)
    for start in range(0, K, CHUNK):
        k = start + chunk
        rounded = _load_swiglu(a, b, row, k, k < K, a_stride, b_stride, SILU)
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
            value = _load_swiglu(a, b, row, k, k < K, a_stride, b_stride, SILU)
        _store_row(value.to(tl.float32), out, row, L + k, k < K, L + K + PADDING, row_scale, MAX_VALUE)
    for start in range(0, L, CHUNK):
        i = start + chunk
        left_value = tl.load(left + row * L + i, mask=i < L, other=0.0).to(tl.float32)
        _store_row(left_value, out, row, i, i < L, L + K + PADDING, row_scale, MAX_VALUE)


@triton_op("kiln::swiglu_rows", mutates_args={})
def swiglu_rows(
    left_ML: torch.Tensor | None,
    a_MK: torch.Tensor,
    b_MK: torch.Tensor,
    silu: bool,
    dtype: torch.dtype,
    keep_rows: bool,
    padding: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.swiglu_rows` in one kernel: values (M, L + K + padding), scales (M, 1), rows (M, L + K) or empty."""
    left_ML = None if left_ML is None else left_ML.contiguous()
    rows, features = a_MK.shape
    left_features = 0 if left_ML is None else left_ML.shape[1]
    out = torch.empty(rows, left_features + features + padding, device=a_MK.device, dtype=dtype)
    scales = torch.empty(rows, 1, device=a_MK.device, dtype=torch.float32)
    kept_rows = a_MK.new_empty(rows, left_features + features) if keep_rows else a_MK.new_empty(0)
    wrap_triton(_swiglu_rows)[(rows,)](
        a_MK if left_ML is None else left_ML,
        a_MK,
        b_MK,
        out,
        scales,
        kept_rows if keep_rows else a_MK,
        a_MK.stride(0),
        b_MK.stride(0),
        left_features,
        features,
        padding,
        CHUNK,
        silu,
        reference.max_value(dtype),
        keep_rows,
        num_warps=4,
    )
    return out, scales, kept_rows


# Grid: (rows, chunks of 1,024 columns of [left, silu(a) * b]). Reads a, b and the gradient g of the row; writes the
# gradients of a, b and left, and the 16-bit row again if KEEP_ROWS.
@triton.jit
def _swiglu_gradient(  # type: ignore[no-untyped-def]  # Triton reads annotations
    left,
    a,
    b,
    g,
    ga,
    gb,
    g_left,
    kept_rows,
    a_stride,
    b_stride,
    L: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    SILU: tl.constexpr,
    KEEP_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = column - L  # negative in left's columns
    inside = (k >= 0) & (k < K)
    a_value = tl.load(a + row * a_stride + k, mask=inside, other=0.0).to(tl.float32)
    b_value = tl.load(b + row * b_stride + k, mask=inside, other=0.0).to(tl.float32)
    g_value = tl.load(g + row * (L + K) + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(a_value)
    gate = sigmoid
    slope = sigmoid * (1.0 - sigmoid)
    if SILU:
        gate = sigmoid * a_value
        slope = sigmoid * (1.0 + a_value * (1.0 - sigmoid))
    tl.store(ga + row * K + k, (g_value * b_value * slope).to(ga.dtype.element_ty), mask=inside)
    tl.store(gb + row * K + k, (g_value * gate).to(gb.dtype.element_ty), mask=inside)
    if L > 0:
        left_value = tl.load(g + row * (L + K) + column, mask=column < L)
        tl.store(g_left + row * L + column, left_value, mask=column < L)
    if KEEP_ROWS:
        value = gate * b_value
        tl.store(kept_rows + row * (L + K) + column, value.to(a.dtype.element_ty), mask=inside)
        if L > 0:
            left_value = tl.load(left + row * L + column, mask=column < L)
            tl.store(kept_rows + row * (L + K) + column, left_value, mask=column < L)


@triton_op("kiln::swiglu_gradient", mutates_args={})
def swiglu_gradient(
    left_ML: torch.Tensor | None, a_MK: torch.Tensor, b_MK: torch.Tensor, silu: bool, g: torch.Tensor, keep_rows: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.swiglu_gradient` in one kernel: the gradients of a, b and left, and rows (M, L + K) or empty."""
    g = g.contiguous()
    left_ML = None if left_ML is None else left_ML.contiguous()
    rows, features = a_MK.shape
    left_features = 0 if left_ML is None else left_ML.shape[1]
    ga = a_MK.new_empty(rows, features)
    gb = torch.empty_like(ga)
    g_left = a_MK.new_empty(rows, left_features)
    kept_rows = torch.empty_like(g) if keep_rows else g.new_empty(0)
    wrap_triton(_swiglu_gradient)[(rows, triton.cdiv(left_features + features, CHUNK))](
        a_MK if left_ML is None else left_ML,
        a_MK,
        b_MK,
        g,
        ga,
        gb,
        g_left,
        kept_rows if keep_rows else g,
        a_MK.stride(0),
        b_MK.stride(0),
        left_features,
        features,
        CHUNK,
        silu,
        keep_rows,
        num_warps=4,
    )
    return ga, gb, g_left, kept_rows
