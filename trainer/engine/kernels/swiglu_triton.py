"""Triton kernels for SwiGLU, silu(a) * b, fused with quantisation; and for its gradients.

The two halves are outputs of separate layers, or views of one. `trainer.engine.kernels.reference` has the same
functions in plain torch.

Letters: M rows (tokens of B images), K features of a row. Parameters of kernels have no types, because Triton gives
annotations a meaning of its own; only `tl.constexpr` is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from trainer.engine.kernels import reference
from trainer.engine.kernels.norm_gelu_triton import CHUNK, _row_scale, _store_row


@triton.jit
def _load_swiglu(a, b, row, k, inside, a_stride, b_stride):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """silu(a) * b of one row, rounded to 16 bits."""
    value = tl.load(a + row * a_stride + k, mask=inside, other=0.0).to(tl.float32)
    value *= tl.sigmoid(value) * tl.load(b + row * b_stride + k, mask=inside, other=0.0).to(tl.float32)
    return value.to(a.dtype.element_ty)


# Grid: one program a row. Reads the rows of a and b, in two passes as `norm_gelu_triton._gelu_rows` does; writes the
# quantised row, its scale, and the 16-bit row if KEEP_ROWS.
@triton.jit
def _swiglu_rows(  # type: ignore[no-untyped-def]  # Triton reads annotations
    a,
    b,
    out,
    scales,
    kept_rows,
    a_stride,
    b_stride,
    K: tl.constexpr,
    PADDING: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    KEEP_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNK)
    amax = tl.zeros([CHUNK], tl.float32)
    for start in range(0, K, CHUNK):
        k = start + chunk
        rounded = _load_swiglu(a, b, row, k, k < K, a_stride, b_stride)
        amax = tl.maximum(amax, tl.abs(rounded.to(tl.float32)))
        if KEEP_ROWS:
            tl.store(kept_rows + row * K + k, rounded, mask=k < K)
    row_scale = _row_scale(tl.max(amax, axis=0), MAX_VALUE)
    tl.store(scales + row, row_scale)
    tl.debug_barrier()  # the rows stored above are read again below, and not always by the same thread
    for start in range(0, K, CHUNK):
        k = start + chunk
        if KEEP_ROWS:
            value = tl.load(kept_rows + row * K + k, mask=k < K, other=0.0)
        else:
            value = _load_swiglu(a, b, row, k, k < K, a_stride, b_stride)
        _store_row(value.to(tl.float32), out, row, k, k < K, K + PADDING, row_scale, MAX_VALUE)


@triton_op("kiln::swiglu_rows", mutates_args={})
def swiglu_rows(
    a_MK: torch.Tensor, b_MK: torch.Tensor, dtype: torch.dtype, keep_rows: bool, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.swiglu_rows` in one kernel: values (M, K + padding), scales (M, 1), rows (M, K) or empty."""
    rows, features = a_MK.shape
    out = torch.empty(rows, features + padding, device=a_MK.device, dtype=dtype)
    scales = torch.empty(rows, 1, device=a_MK.device, dtype=torch.float32)
    kept_rows = a_MK.new_empty(rows, features) if keep_rows else a_MK.new_empty(0)
    wrap_triton(_swiglu_rows)[(rows,)](
        a_MK,
        b_MK,
        out,
        scales,
        kept_rows if keep_rows else a_MK,
        a_MK.stride(0),
        b_MK.stride(0),
        features,
        padding,
        CHUNK,
        reference.max_value(dtype),
        keep_rows,
        num_warps=4,
    )
    return out, scales, kept_rows


# Grid: (rows, chunks of 1,024 columns). Reads a, b and the gradient g of the row; writes the gradients of a and b, and
# the 16-bit row again if KEEP_ROWS.
@triton.jit
def _swiglu_gradient(  # type: ignore[no-untyped-def]  # Triton reads annotations
    a, b, g, ga, gb, kept_rows, a_stride, b_stride, K: tl.constexpr, BLOCK: tl.constexpr, KEEP_ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    a_value = tl.load(a + row * a_stride + k, mask=inside, other=0.0).to(tl.float32)
    b_value = tl.load(b + row * b_stride + k, mask=inside, other=0.0).to(tl.float32)
    g_value = tl.load(g + row * K + k, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(a_value)
    of_a = g_value * b_value * sigmoid * (1.0 + a_value * (1.0 - sigmoid))
    tl.store(ga + row * K + k, of_a.to(ga.dtype.element_ty), mask=inside)
    tl.store(gb + row * K + k, (g_value * a_value * sigmoid).to(gb.dtype.element_ty), mask=inside)
    if KEEP_ROWS:
        tl.store(kept_rows + row * K + k, (a_value * sigmoid * b_value).to(a.dtype.element_ty), mask=inside)


@triton_op("kiln::swiglu_gradient", mutates_args={})
def swiglu_gradient(
    a_MK: torch.Tensor, b_MK: torch.Tensor, g_MK: torch.Tensor, keep_rows: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.swiglu_gradient` in one kernel: the gradients of a and b (M, K), and rows (M, K) or empty."""
    g_MK = g_MK.contiguous()
    rows, features = a_MK.shape
    ga = torch.empty_like(g_MK)
    gb = torch.empty_like(g_MK)
    kept_rows = torch.empty_like(g_MK) if keep_rows else g_MK.new_empty(0)
    wrap_triton(_swiglu_gradient)[(rows, triton.cdiv(features, CHUNK))](
        a_MK,
        b_MK,
        g_MK,
        ga,
        gb,
        kept_rows if keep_rows else g_MK,
        a_MK.stride(0),
        b_MK.stride(0),
        features,
        CHUNK,
        keep_rows,
        num_warps=4,
    )
    return ga, gb, kept_rows
