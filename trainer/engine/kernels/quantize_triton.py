"""Triton kernels of the 8-bit engine: each one pass over its operands, bound by the memory's bandwidth."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from trainer.engine.kernels import reference

# Added to a small number, it leaves no room for a fraction: a half goes to the even.
_EVEN = tl.constexpr(1.5 * 2.0**23)
_FLOOR, _BF16_MAX = tl.constexpr(reference.FLOOR), tl.constexpr(reference.BF16_MAX)


@triton.jit
def _weighed(x, columns, row, k, inside, K: tl.constexpr, WEIGHED: tl.constexpr):  # type: ignore[no-untyped-def]
    value = tl.load(x + row * K + k, mask=inside, other=0.0).to(tl.float32)
    if WEIGHED:
        value *= tl.load(columns + k, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _quantize_rows(  # type: ignore[no-untyped-def]
    x,
    columns,
    out,
    scales,
    K: tl.constexpr,
    ROOM: tl.constexpr,
    CHUNK: tl.constexpr,
    MOST: tl.constexpr,
    WEIGHED: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """Twice over the row, piece by piece: the second time it is in a cache."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNK)
    amax = tl.zeros([CHUNK], tl.float32)
    for start in range(0, K, CHUNK):
        k = start + chunk
        amax = tl.maximum(amax, tl.abs(_weighed(x, columns, row, k, k < K, K, WEIGHED)))
    scale = tl.minimum(tl.maximum(tl.max(amax, axis=0), _FLOOR), _BF16_MAX) / MOST
    tl.store(scales + row, scale)
    for start in range(0, K, CHUNK):
        k = start + chunk
        value = _weighed(x, columns, row, k, k < K, K, WEIGHED) / scale
        value = tl.clamp(value, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
        if ROUNDED:
            value = (value + _EVEN) - _EVEN
        tl.store(out + row * (K + ROOM) + k, value.to(out.dtype.element_ty), mask=k < K)


@triton_op("kiln::quantize_rows", mutates_args={})
def quantize_rows(
    x_MK: torch.Tensor, columns_1K: torch.Tensor | None, dtype: torch.dtype, room: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize.quantize_rows` in one pass."""
    x_MK = x_MK.contiguous()
    rows, width = x_MK.shape
    out = torch.empty(rows, width + room, device=x_MK.device, dtype=dtype)
    scales = torch.empty(rows, 1, device=x_MK.device, dtype=torch.float32)
    chunk = min(2048, triton.next_power_of_2(width))
    wrap_triton(_quantize_rows)[(rows,)](
        x_MK,
        scales if columns_1K is None else columns_1K,
        out,
        scales,
        width,
        room,
        chunk,
        reference.most(dtype),
        columns_1K is not None,
        not dtype.is_floating_point,
        num_warps=max(1, chunk // 256),
    )
    return out, scales


@triton.jit
def _dequantize_rows(w, scale, out, K, PITCH, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(w + row * PITCH + k, mask=k < K, other=0.0).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)


@triton_op("kiln::dequantize_rows", mutates_args={})
def dequantize_rows(w_NK: torch.Tensor, scale_1N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`quantize.dequantize_rows` in one pass. Rows may have columns after them that are not read."""
    n, k = w_NK.shape
    out = torch.empty(n, k, device=w_NK.device, dtype=dtype)
    wrap_triton(_dequantize_rows)[(n, triton.cdiv(k, 2048))](w_NK, scale_1N, out, k, w_NK.stride(0), 2048, num_warps=4)
    return out


def can_dequantize(w_NK: torch.Tensor) -> bool:
    """Whether `dequantize_rows` can read these values: 8 bits with a point take hardware that has them."""
    return w_NK.dtype == torch.int8 or (w_NK.is_cuda and _has_fp8(w_NK.device))


@functools.cache
def _has_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def _transpose(source, out, N, K, PITCH, WIDE, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    tile = tl.load(source + n[:, None] * PITCH + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K))
    tl.store(out + k[:, None] * WIDE + n[None, :], tl.trans(tile), mask=(k[:, None] < K) & (n[None, :] < N))


@triton_op("kiln::transpose", mutates_args={})
def transpose(w_NK: torch.Tensor, room: int = 0) -> torch.Tensor:
    """(K, N) of the same one-byte type, and so many columns after it that are not written; contiguous."""
    n, k = w_NK.shape
    out = torch.empty(k, n + room, device=w_NK.device, dtype=w_NK.dtype)
    grid = (triton.cdiv(n, 128), triton.cdiv(k, 128))
    bytes_ = w_NK.view(torch.int8), out.view(torch.int8)
    wrap_triton(_transpose)[grid](*bytes_, n, k, w_NK.stride(0), n + room, 128, num_warps=8)
    return out


@triton.jit
def _split(exact, low, LIMIT: tl.constexpr, LEAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number of 8 bits next to `exact`, or where `low` says so what that leaves over.

    The first is rounded here: one that comes back from 8 bits in registers stands in another's place.
    """
    exact = tl.clamp(exact, -2 * LIMIT, 2 * LIMIT, propagate_nan=tl.PropagateNan.ALL)
    bits = exact.to(tl.int32, bitcast=True)
    high = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)  # three bits, to the even
    small = (exact + 1.5 * 2.0**23 * LEAST) - 1.5 * 2.0**23 * LEAST  # in equal steps, next to zero
    high = tl.clamp(tl.where(tl.abs(exact) < 8 * LEAST, small, high), -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(low, tl.clamp(exact - high, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL), high)


@triton.jit
def _append_adapter_columns(  # type: ignore[no-untyped-def]
    x,
    x_scales,
    down,
    w,
    w_scales,
    up,
    M,
    N,
    x_row,
    w_row,
    down_row,
    up_row,
    up_rank,
    times,
    K: tl.constexpr,
    ROOM: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
):
    program, column = tl.program_id(0), tl.arange(0, BLOCK)[None, :]
    r, third, of_x = column % R, column // R, tl.cdiv(M, ROWS)
    if program < of_x:
        row = (program * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        value = tl.load(down + row * down_row + r, mask=(row < M) & (third < 3), other=0.0).to(tl.float32)
        value = value / tl.load(x_scales + row, mask=row < M, other=1.0) / times
        value = _split(value, third == 1, LIMIT, LEAST).to(x.dtype.element_ty)
        tl.store(x + row * x_row + K + column, value, mask=(row < M) & (column < ROOM))
    else:
        row = ((program - of_x) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        value = tl.load(up + row * up_row + r * up_rank, mask=(row < N) & (third < 3), other=0.0).to(tl.float32)
        value = value / tl.load(w_scales + row, mask=row < N, other=1.0) * times
        value = _split(value, third == 2, LIMIT, LEAST).to(w.dtype.element_ty)
        tl.store(w + row * w_row + K + column, value, mask=(row < N) & (column < ROOM))


def append_adapter_columns(
    x_MF: torch.Tensor,
    x_scale_M1: torch.Tensor,
    down_MR: torch.Tensor,
    w_NF: torch.Tensor,
    w_scale_1N: torch.Tensor,
    up_NR: torch.Tensor,
    width: int,
    times: float,
) -> None:
    """`quantize.beside` in one kernel."""
    if not x_MF.is_cuda:
        reference.append_adapter_columns(x_MF, x_scale_M1, down_MR, w_NF, w_scale_1N, up_NR, width, times)
        return
    (m, rank), n, room = down_MR.shape, len(w_NF), w_NF.shape[1] - width
    block = triton.next_power_of_2(room)
    rows = max(1, 4096 // block)
    _append_adapter_columns[(triton.cdiv(m, rows) + triton.cdiv(n, rows),)](
        x_MF,
        x_scale_M1,
        down_MR,
        w_NF,
        w_scale_1N,
        up_NR,
        m,
        n,
        x_MF.stride(0),
        w_NF.stride(0),
        down_MR.stride(0),
        up_NR.stride(0),
        up_NR.stride(1),
        times,
        width,
        room,
        rank,
        block,
        rows,
        torch.finfo(x_MF.dtype).max,
        torch.finfo(x_MF.dtype).smallest_normal / 8,
        num_warps=4,
    )


@triton.jit
def _gated(  # type: ignore[no-untyped-def]
    x,
    gate,
    y,
    out,
    T,
    x_picture,
    x_token,
    gate_picture,
    y_picture,
    y_token,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    image, token = row // T, row % T
    k = tl.arange(0, BLOCK)
    inside = k < K
    value = tl.load(y + image * y_picture + token * y_token + k, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(gate + image * gate_picture + k, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(x + image * x_picture + token * x_token + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=inside)


def gated_residual(x_BTK: torch.Tensor | None, gate_BK: torch.Tensor, y_BTK: torch.Tensor) -> torch.Tensor:
    """`reference.gated_residual` in one pass."""
    if not y_BTK.is_cuda:
        return reference.gated_residual(x_BTK, gate_BK, y_BTK)
    x, gate_BK, y_BTK = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (y_BTK if x_BTK is None else x_BTK, gate_BK, y_BTK)
    )
    images, tokens, width = y_BTK.shape
    out = torch.empty(images, tokens, width, device=y_BTK.device, dtype=y_BTK.dtype)
    block, of = triton.next_power_of_2(width), (*x.stride()[:2], gate_BK.stride(0), *y_BTK.stride()[:2])
    _gated[(images * tokens,)](
        x, gate_BK, y_BTK, out, tokens, *of, width, block, x_BTK is not None, num_warps=min(16, max(2, block // 512))
    )
    return out


quantize_rows.register_kernel("cpu")(reference.quantize_rows)
transpose.register_kernel("cpu")(reference.transpose)
dequantize_rows.register_kernel("cpu")(reference.dequantize_rows)
