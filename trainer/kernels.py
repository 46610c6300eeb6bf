"""Triton kernels of the 8-bit engine: each one pass over its operands, bound by the memory's bandwidth."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from trainer import quantize

# Added to a small number, it leaves no room for a fraction: a half goes to the even.
_EVEN = tl.constexpr(1.5 * 2.0**23)
_FLOOR, _BF16_MAX = tl.constexpr(quantize.FLOOR), tl.constexpr(quantize.BF16_MAX)


@triton.jit
def _quantize_rows(  # type: ignore[no-untyped-def]
    x,
    columns,
    out,
    scales,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
    WEIGHED: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < K
    value = tl.load(x + row * K + k, mask=inside, other=0.0).to(tl.float32)
    if WEIGHED:
        value *= tl.load(columns + k, mask=inside, other=0.0)
    amax = tl.max(tl.abs(value), axis=0)
    scale = tl.minimum(tl.maximum(amax, _FLOOR), _BF16_MAX) / MOST
    value = tl.clamp(value / scale, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
    if ROUNDED:
        value = (value + _EVEN) - _EVEN
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton_op("kiln::quantize_rows", mutates_args={})
def quantize_rows(
    x_MK: torch.Tensor, columns_1K: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize.quantize_rows` in one pass."""
    x_MK = x_MK.contiguous()
    rows, width = x_MK.shape
    out = torch.empty_like(x_MK, dtype=dtype)
    scales = torch.empty(rows, 1, device=x_MK.device, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    wrap_triton(_quantize_rows)[(rows,)](
        x_MK,
        scales if columns_1K is None else columns_1K,
        out,
        scales,
        width,
        block,
        quantize.most(dtype),
        columns_1K is not None,
        not dtype.is_floating_point,
        num_warps=min(16, max(2, block // 1024)),
    )
    return out, scales


@triton.jit
def _restored(w, scale, out, K, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(w + row * K + k, mask=k < K, other=0.0).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)


@triton_op("kiln::restored", mutates_args={})
def restored(w_NK: torch.Tensor, scale_1N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`quantize.restored` in one pass."""
    n, k = w_NK.shape
    out = torch.empty(n, k, device=w_NK.device, dtype=dtype)
    wrap_triton(_restored)[(n, triton.cdiv(k, 2048))](w_NK, scale_1N, out, k, 2048, num_warps=4)
    return out


def reads(w_NK: torch.Tensor) -> bool:
    """Whether `restored` can read these values: 8 bits with a point take hardware that has them."""
    return w_NK.dtype == torch.int8 or (w_NK.is_cuda and _has_fp8(w_NK.device))


@functools.cache
def _has_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def _transpose(source, out, N, K, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    tile = tl.load(source + n[:, None] * K + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K))
    tl.store(out + k[:, None] * N + n[None, :], tl.trans(tile), mask=(k[:, None] < K) & (n[None, :] < N))


@triton_op("kiln::transpose", mutates_args={})
def transpose(w_NK: torch.Tensor) -> torch.Tensor:
    """(K, N) of the same one-byte type, contiguous."""
    n, k = w_NK.shape
    out = torch.empty(k, n, device=w_NK.device, dtype=w_NK.dtype)
    grid = (triton.cdiv(n, 128), triton.cdiv(k, 128))
    wrap_triton(_transpose)[grid](w_NK.view(torch.int8), out.view(torch.int8), n, k, 128, num_warps=8)
    return out


quantize_rows.register_kernel("cpu")(quantize.quantize_rows)
transpose.register_kernel("cpu")(quantize.transpose)
restored.register_kernel("cpu")(quantize.restored)
