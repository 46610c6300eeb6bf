"""Triton kernels of what comes before a product, quantised in the same pass; and of its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from trainer.engine.kernels import reference

CHUNK = 1024  # columns that four warps work on at once, eight to a thread
_FLOOR, _BF16_MAX = tl.constexpr(reference.FLOOR), tl.constexpr(reference.BF16_MAX)


@triton.jit
def _store_row(values, out, row, columns, inside, width, scale, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    rounded = tl.clamp(values * (1.0 / scale), -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * width + columns, rounded.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scale_of(amax, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(amax, _FLOOR), _BF16_MAX) / MOST


@triton.jit
def _hat(x, row, k, inside, K: tl.constexpr, EPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row with mean 0 and variance 1, and what it was multiplied by."""
    value = tl.load(x + row * K + k, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, axis=0) / K, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / K + EPS)
    return centred * rstd, rstd


@triton.jit
def _norm_rows(  # type: ignore[no-untyped-def]
    x,
    scale,
    shift,
    out,
    scales,
    normed,
    tokens,
    K: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
    PLUS: tl.constexpr,
    EPS: tl.constexpr,
    MOST: tl.constexpr,
    KEPT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    k = tl.arange(0, BLOCK)
    inside = k < K
    hat, _ = _hat(x, row, k, inside, K, EPS)
    weight = PLUS + tl.load(scale + image * K + k, mask=inside, other=0.0).to(tl.float32)
    value = hat * weight + tl.load(shift + image * K + k, mask=inside, other=0.0).to(tl.float32)
    kept = value.to(x.dtype.element_ty)
    if KEPT:
        tl.store(normed + row * K + k, kept, mask=inside)
    value = kept.to(tl.float32)
    found = _scale_of(tl.max(tl.abs(value), axis=0), MOST)
    tl.store(scales + row, found)
    _store_row(value, out, row, k, inside, K + ROOM, found, MOST)


@triton_op("kiln::norm_rows", mutates_args={})
def norm_rows(
    x_MK: torch.Tensor,
    scale_BK: torch.Tensor,
    shift_BK: torch.Tensor,
    plus: float,
    eps: float,
    dtype: torch.dtype,
    kept: bool,
    room: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize.norm_rows` in one pass."""
    x_MK = x_MK.contiguous()
    rows, width = x_MK.shape
    out = torch.empty(rows, width + room, device=x_MK.device, dtype=dtype)
    scales = torch.empty(rows, 1, device=x_MK.device, dtype=torch.float32)
    normed = torch.empty_like(x_MK) if kept else x_MK.new_empty(0)
    block = triton.next_power_of_2(width)
    wrap_triton(_norm_rows)[(rows,)](
        x_MK,
        scale_BK.contiguous(),
        shift_BK.contiguous(),
        out,
        scales,
        normed if kept else x_MK,
        rows // scale_BK.shape[0],
        width,
        room,
        block,
        plus,
        eps,
        reference.most(dtype),
        kept,
        num_warps=_warps(block),
    )
    return out, scales, normed


def _warps(block: int) -> int:
    """For a row of which several values an element are held at once: 16 elements a thread."""
    return min(16, max(2, block // 512))


@triton.jit
def _norm_gradient(  # type: ignore[no-untyped-def]
    x,
    scale,
    shift,
    g1,
    g2,
    g3,
    past,
    out,
    normed,
    tokens,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PLUS: tl.constexpr,
    EPS: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    KEPT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    k = tl.arange(0, BLOCK)
    inside = k < K
    hat, rstd = _hat(x, row, k, inside, K, EPS)
    weight = PLUS + tl.load(scale + image * K + k, mask=inside, other=0.0).to(tl.float32)
    if KEPT:
        value = hat * weight + tl.load(shift + image * K + k, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + row * K + k, value.to(x.dtype.element_ty), mask=inside)
    g = tl.load(g1 + row * K + k, mask=inside, other=0.0).to(tl.float32)
    if SECOND:
        g += tl.load(g2 + row * K + k, mask=inside, other=0.0).to(tl.float32)
    if THIRD:
        g += tl.load(g3 + row * K + k, mask=inside, other=0.0).to(tl.float32)
    g *= weight
    gx = rstd * (g - tl.sum(g, axis=0) / K - hat * (tl.sum(g * hat, axis=0) / K))
    gx += tl.load(past + row * K + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * K + k, gx.to(out.dtype.element_ty), mask=inside)


@triton_op("kiln::norm_gradient", mutates_args={})
def norm_gradient(
    x_MK: torch.Tensor,
    scale_BK: torch.Tensor,
    shift_BK: torch.Tensor,
    plus: float,
    eps: float,
    g1_MK: torch.Tensor,
    g2_MK: torch.Tensor | None,
    g3_MK: torch.Tensor | None,
    past_MK: torch.Tensor,
    kept: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize.norm_gradient` in one pass."""
    x_MK, g1_MK = x_MK.contiguous(), g1_MK.contiguous()
    rows, width = x_MK.shape
    out = torch.empty_like(x_MK)
    normed = torch.empty_like(x_MK) if kept else x_MK.new_empty(0)
    block = triton.next_power_of_2(width)
    wrap_triton(_norm_gradient)[(rows,)](
        x_MK,
        scale_BK.contiguous(),
        shift_BK.contiguous(),
        g1_MK,
        g1_MK if g2_MK is None else g2_MK.contiguous(),
        g1_MK if g3_MK is None else g3_MK.contiguous(),
        past_MK.contiguous(),
        out,
        normed if kept else x_MK,
        rows // scale_BK.shape[0],
        width,
        block,
        plus,
        eps,
        g2_MK is not None,
        g3_MK is not None,
        kept,
        num_warps=_warps(block),
    )
    return out, normed


@triton.jit
def _tanh_gelu(y):  # type: ignore[no-untyped-def]
    """gelu(y) with tanh, and its derivative. (1 + tanh(u)) / 2 is the sigmoid of 2u."""
    s = tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y * s, s + y * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * y * y))


@triton.jit
def _erf_gelu(y):  # type: ignore[no-untyped-def]
    s = 0.5 + 0.5 * tl.erf(y * 0.7071067811865476)
    return y * s, s + y * tl.exp(-0.5 * y * y) * 0.3989422804014327


@triton.jit
def _activated(y, row, k, inside, K: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    if GATED:
        a = tl.load(y + row * 2 * K + k, mask=inside, other=0.0).to(tl.float32)
        value, _ = _erf_gelu(tl.load(y + row * 2 * K + K + k, mask=inside, other=0.0).to(tl.float32))
        value *= a
    else:
        value, _ = _tanh_gelu(tl.load(y + row * K + k, mask=inside, other=0.0).to(tl.float32))
    return value.to(y.dtype.element_ty)


@triton.jit
def _gelu_rows(  # type: ignore[no-untyped-def]
    left,
    y,
    out,
    scales,
    rows,
    L: tl.constexpr,
    K: tl.constexpr,
    ROOM: tl.constexpr,
    CHUNK: tl.constexpr,
    GATED: tl.constexpr,
    MOST: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Chunk by chunk, twice: a whole row in registers would leave no room for another one at the same time."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNK)
    amax = tl.zeros([CHUNK], tl.float32)
    for start in range(0, K, CHUNK):
        k = start + chunk
        kept = _activated(y, row, k, k < K, K, GATED)
        amax = tl.maximum(amax, tl.abs(kept.to(tl.float32)))
        if KEPT:
            tl.store(rows + row * (L + K) + L + k, kept, mask=k < K)
    for start in range(0, L, CHUNK):
        i = start + chunk
        before = tl.load(left + row * L + i, mask=i < L, other=0.0)
        amax = tl.maximum(amax, tl.abs(before.to(tl.float32)))
        if KEPT:
            tl.store(rows + row * (L + K) + i, before, mask=i < L)
    found = _scale_of(tl.max(amax, axis=0), MOST)
    tl.store(scales + row, found)
    tl.debug_barrier()  # what was stored is read again, by other threads perhaps
    for start in range(0, K, CHUNK):
        k = start + chunk
        if KEPT:
            value = tl.load(rows + row * (L + K) + L + k, mask=k < K, other=0.0)
        else:
            value = _activated(y, row, k, k < K, K, GATED)
        _store_row(value.to(tl.float32), out, row, L + k, k < K, L + K + ROOM, found, MOST)
    for start in range(0, L, CHUNK):
        i = start + chunk
        before = tl.load(left + row * L + i, mask=i < L, other=0.0).to(tl.float32)
        _store_row(before, out, row, i, i < L, L + K + ROOM, found, MOST)


@triton_op("kiln::gelu_rows", mutates_args={})
def gelu_rows(
    left_ML: torch.Tensor | None, y_MK: torch.Tensor, gated: bool, dtype: torch.dtype, kept: bool, room: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize.gelu_rows` in one kernel."""
    y_MK = y_MK.contiguous()
    left_ML = None if left_ML is None else left_ML.contiguous()
    rows, left, width = len(y_MK), 0 if left_ML is None else left_ML.shape[1], y_MK.shape[1] // (2 if gated else 1)
    out = torch.empty(rows, left + width + room, device=y_MK.device, dtype=dtype)
    scales = torch.empty(rows, 1, device=y_MK.device, dtype=torch.float32)
    kept_rows = y_MK.new_empty(rows, left + width) if kept else y_MK.new_empty(0)
    wrap_triton(_gelu_rows)[(rows,)](
        y_MK if left_ML is None else left_ML,
        y_MK,
        out,
        scales,
        kept_rows if kept else y_MK,
        left,
        width,
        room,
        CHUNK,
        gated,
        reference.most(dtype),
        kept,
        num_warps=4,
    )
    return out, scales, kept_rows


@triton.jit
def _gelu_gradient(  # type: ignore[no-untyped-def]
    left,
    y,
    g,
    out,
    of_left,
    rows,
    L: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    KEPT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = column - L
    inside = (k >= 0) & (k < K)
    here = tl.load(g + row * (L + K) + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        a = tl.load(y + row * 2 * K + k, mask=inside, other=0.0).to(tl.float32)
        value, slope = _erf_gelu(tl.load(y + row * 2 * K + K + k, mask=inside, other=0.0).to(tl.float32))
        tl.store(out + row * 2 * K + k, (here * value).to(out.dtype.element_ty), mask=inside)
        tl.store(out + row * 2 * K + K + k, (here * a * slope).to(out.dtype.element_ty), mask=inside)
        value *= a
    else:
        value, slope = _tanh_gelu(tl.load(y + row * K + k, mask=inside, other=0.0).to(tl.float32))
        tl.store(out + row * K + k, (here * slope).to(out.dtype.element_ty), mask=inside)
    if L > 0:
        before = tl.load(g + row * (L + K) + column, mask=column < L)
        tl.store(of_left + row * L + column, before, mask=column < L)
    if KEPT:
        tl.store(rows + row * (L + K) + column, value.to(y.dtype.element_ty), mask=inside)
        if L > 0:
            before = tl.load(left + row * L + column, mask=column < L)
            tl.store(rows + row * (L + K) + column, before, mask=column < L)


@triton_op("kiln::gelu_gradient", mutates_args={})
def gelu_gradient(
    left_ML: torch.Tensor | None, y_MK: torch.Tensor, g: torch.Tensor, gated: bool, kept: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize.gelu_gradient` in one pass."""
    y_MK, g = y_MK.contiguous(), g.contiguous()
    left_ML = None if left_ML is None else left_ML.contiguous()
    rows, left, width = len(y_MK), 0 if left_ML is None else left_ML.shape[1], y_MK.shape[1] // (2 if gated else 1)
    out, of_left = torch.empty_like(y_MK), y_MK.new_empty(rows, left)
    kept_rows = y_MK.new_empty(rows, left + width) if kept else y_MK.new_empty(0)
    wrap_triton(_gelu_gradient)[(rows, triton.cdiv(left + width, CHUNK))](
        y_MK if left_ML is None else left_ML,
        y_MK,
        g,
        out,
        of_left,
        kept_rows if kept else y_MK,
        left,
        width,
        CHUNK,
        gated,
        kept,
        num_warps=4,
    )
    return out, of_left, kept_rows


norm_rows.register_kernel("cpu")(reference.norm_rows)
norm_gradient.register_kernel("cpu")(reference.norm_gradient)
gelu_rows.register_kernel("cpu")(reference.gelu_rows)
gelu_gradient.register_kernel("cpu")(reference.gelu_gradient)
