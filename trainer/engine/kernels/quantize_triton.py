"""Triton kernels that quantise, dequantise, transpose, append adapter columns and add gated residuals.

Each makes one pass over its operands, so memory bandwidth bounds it: 2.9 to 3.7 TB/s on an H200, where compiled torch
code reached 0.9 to 1.4 (docs/lab-notes.md). `trainer.engine.kernels.reference` has the same functions in plain torch.

Letters: M rows (tokens), K input and N output features, R the adapter's rank, F = K + padding (the length of a row of
an FP8 matrix), B images, T tokens of an image. Kernels take pointers, and strides in elements; results are contiguous.

`triton_op` and `wrap_triton` let torch.compile see the kernel and its launch instead of an opaque call: an operator of
`torch.library.custom_op` cost the host 94 ms a step, these cost 49. Parameters of kernels have no types, because Triton
gives annotations a meaning of its own; only `tl.constexpr` is written.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from trainer.engine.kernels import reference

# fp32 has 23 bits after the point: adding and subtracting 1.5 * 2**23 rounds a number below 2**22 to an integer, halves
# to the even one as torch does. Without it, 0.3 % of the int8 values of bf16 rows differ from the reference.
_ROUND_TO_EVEN = tl.constexpr(1.5 * 2.0**23)
_MIN_ROW_MAX, _BF16_MAX = tl.constexpr(reference.MIN_ROW_MAX), tl.constexpr(reference.BF16_MAX)


@triton.jit
def _load_scaled(x, column_scales, row, k, inside, K: tl.constexpr, HAS_COLUMN_SCALES: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """x[row, k], times the scale of column k if there is one, in fp32. Columns that are not `inside` read as 0."""
    value = tl.load(x + row * K + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_COLUMN_SCALES:
        value *= tl.load(column_scales + k, mask=inside, other=0.0).to(tl.float32)
    return value


# Grid: one program a row. It reads the row of x twice and writes K values and one scale; the padding is not written.
@triton.jit
def _quantize_rows(  # type: ignore[no-untyped-def]  # Triton reads annotations
    x,
    column_scales,
    out,
    scales,
    K: tl.constexpr,
    PADDING: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    HAS_COLUMN_SCALES: tl.constexpr,
    ROUND: tl.constexpr,
):
    """The row's largest value in a first pass, its quantised values in a second one, which finds the row in a cache.

    It goes chunk by chunk, because a whole row of 15,360 values in registers leaves room for only two programs at a
    time on a multiprocessor, which is too few to hide the memory's latency.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNK)
    amax = tl.zeros([CHUNK], tl.float32)
    for start in range(0, K, CHUNK):
        k = start + chunk
        amax = tl.maximum(amax, tl.abs(_load_scaled(x, column_scales, row, k, k < K, K, HAS_COLUMN_SCALES)))
    scale = tl.minimum(tl.maximum(tl.max(amax, axis=0), _MIN_ROW_MAX), _BF16_MAX) / MAX_VALUE
    tl.store(scales + row, scale)
    for start in range(0, K, CHUNK):
        k = start + chunk
        value = _load_scaled(x, column_scales, row, k, k < K, K, HAS_COLUMN_SCALES) / scale
        value = tl.clamp(value, -MAX_VALUE, MAX_VALUE, propagate_nan=tl.PropagateNan.ALL)
        if ROUND:
            value = (value + _ROUND_TO_EVEN) - _ROUND_TO_EVEN
        tl.store(out + row * (K + PADDING) + k, value.to(out.dtype.element_ty), mask=k < K)


@triton_op("kiln::quantize_rows", mutates_args={})
def quantize_rows(
    x_MK: torch.Tensor, column_scales_1K: torch.Tensor | None, dtype: torch.dtype, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.quantize_rows` in one kernel: values (M, K + padding), fp32 scales (M, 1)."""
    x_MK = x_MK.contiguous()
    rows, in_features = x_MK.shape
    out = torch.empty(rows, in_features + padding, device=x_MK.device, dtype=dtype)
    scales = torch.empty(rows, 1, device=x_MK.device, dtype=torch.float32)
    chunk = min(2048, triton.next_power_of_2(in_features))  # with the warps below, 8 elements a thread
    wrap_triton(_quantize_rows)[(rows,)](
        x_MK,
        scales if column_scales_1K is None else column_scales_1K,  # a pointer that is not read
        out,
        scales,
        in_features,
        padding,
        chunk,
        reference.max_value(dtype),
        column_scales_1K is not None,
        not dtype.is_floating_point,
        num_warps=max(1, chunk // 256),
    )
    return out, scales


# Grid: (rows, blocks of 2,048 columns). A program reads up to 2,048 values and one scale, and writes as many values.
@triton.jit
def _dequantize_rows(w, scale, out, K, ROW_STRIDE, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(w + row * ROW_STRIDE + k, mask=k < K, other=0.0).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)


@triton_op("kiln::dequantize_rows", mutates_args={})
def dequantize_rows(w_NK: torch.Tensor, scale_1N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`reference.dequantize_rows` in one kernel: (N, K) in `dtype`. The padding of w's rows is not read."""
    n, k = w_NK.shape
    out = torch.empty(n, k, device=w_NK.device, dtype=dtype)
    wrap_triton(_dequantize_rows)[(n, triton.cdiv(k, 2048))](w_NK, scale_1N, out, k, w_NK.stride(0), 2048, num_warps=4)
    return out


def can_dequantize(w_NK: torch.Tensor) -> bool:
    """Whether `dequantize_rows` can read these values: Triton loads FP8 only on hardware that has it."""
    return w_NK.dtype == torch.int8 or _has_fp8(w_NK.device)


@functools.cache
def _has_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)  # NVIDIA Ada, the first with FP8


# Grid: tiles of 128 x 128 bytes. A program reads rows of 128 bytes and writes rows of 128 bytes, so that both sides
# move whole cache lines: 2.8 to 3.2 TB/s (H200), where `.t().contiguous()` reaches 0.33.
@triton.jit
def _transpose(source, out, N, K, ROW_STRIDE, OUT_ROW_STRIDE, TILE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    tile = tl.load(source + n[:, None] * ROW_STRIDE + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K))
    tl.store(out + k[:, None] * OUT_ROW_STRIDE + n[None, :], tl.trans(tile), mask=(k[:, None] < K) & (n[None, :] < N))


@triton_op("kiln::transpose", mutates_args={})
def transpose(w_NK: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """wᵀ, (K, N + padding) of the same one-byte type, contiguous. The padding is not written."""
    n, k = w_NK.shape
    out = torch.empty(k, n + padding, device=w_NK.device, dtype=w_NK.dtype)
    grid = (triton.cdiv(n, 128), triton.cdiv(k, 128))
    as_bytes = (w_NK.view(torch.int8), out.view(torch.int8))  # the kernel only moves them, whatever they stand for
    wrap_triton(_transpose)[grid](*as_bytes, n, k, w_NK.stride(0), n + padding, 128, num_warps=8)
    return out


@triton.jit
def _high_or_low(exact, low, LIMIT: tl.constexpr, MIN_SUBNORMAL: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """The FP8 number nearest to `exact` (its high part); where `low` is true, the remainder (its low part). In fp32.

    Rounding is done by bit operations. `exact - exact.to(fp8).to(fp32)` was wrong for one number in two, because Triton
    returned values that were converted to 8 bits in registers in permuted positions.
    """
    exact = tl.clamp(exact, -2 * LIMIT, 2 * LIMIT, propagate_nan=tl.PropagateNan.ALL)
    bits = exact.to(tl.int32, bitcast=True)
    high = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # The line above keeps e4m3's 3 bits of mantissa out of fp32's 23 (20 are dropped) and rounds halves to the even.
    # Below the smallest normal number, 8 * MIN_SUBNORMAL, FP8 has equal steps of MIN_SUBNORMAL instead.
    small = (exact + 1.5 * 2.0**23 * MIN_SUBNORMAL) - 1.5 * 2.0**23 * MIN_SUBNORMAL
    high = tl.clamp(
        tl.where(tl.abs(exact) < 8 * MIN_SUBNORMAL, small, high), -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL
    )
    return tl.where(low, tl.clamp(exact - high, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL), high)


# Grid: the first `x_programs` programs write the columns of ROWS rows of x, the others those of ROWS rows of w: one
# launch for both sides. A program reads (ROWS, R) 16-bit values and as many scales as rows, and writes (ROWS, PADDING)
# bytes. Columns R to 2R of x and 2R to 3R of w get the low parts, all others up to 3R the high parts, and the rest of
# the padding zeros (`part` is 3 or more there), which add nothing to the product.
@triton.jit
def _append_adapter_columns(  # type: ignore[no-untyped-def]  # Triton reads annotations
    x,
    x_scales,
    h,
    w,
    w_scales,
    up,
    M,
    N,
    x_row_stride,
    w_row_stride,
    h_row_stride,
    up_row_stride,
    up_rank_stride,
    up_factor,
    K: tl.constexpr,
    PADDING: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LIMIT: tl.constexpr,
    MIN_SUBNORMAL: tl.constexpr,
):
    program, column = tl.program_id(0), tl.arange(0, BLOCK)[None, :]
    r, part, x_programs = column % R, column // R, tl.cdiv(M, ROWS)
    if program < x_programs:
        row = (program * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        value = tl.load(h + row * h_row_stride + r, mask=(row < M) & (part < 3), other=0.0).to(tl.float32)
        value = value / tl.load(x_scales + row, mask=row < M, other=1.0) / up_factor
        value = _high_or_low(value, part == 1, LIMIT, MIN_SUBNORMAL).to(x.dtype.element_ty)
        tl.store(x + row * x_row_stride + K + column, value, mask=(row < M) & (column < PADDING))
    else:
        row = ((program - x_programs) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        value = tl.load(up + row * up_row_stride + r * up_rank_stride, mask=(row < N) & (part < 3), other=0.0).to(
            tl.float32
        )
        value = value / tl.load(w_scales + row, mask=row < N, other=1.0) * up_factor
        value = _high_or_low(value, part == 2, LIMIT, MIN_SUBNORMAL).to(w.dtype.element_ty)
        tl.store(w + row * w_row_stride + K + column, value, mask=(row < N) & (column < PADDING))


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
    """`reference.append_adapter_columns` in one kernel. Writes into x and w."""
    m, rank = h_MR.shape
    n = len(w_NF)
    padding = w_NF.shape[1] - in_features
    block = triton.next_power_of_2(padding)
    rows = max(1, 4096 // block)  # 4,096 elements a program: 32 a thread of 4 warps
    _append_adapter_columns[(triton.cdiv(m, rows) + triton.cdiv(n, rows),)](
        x_MF,
        x_scale_M1,
        h_MR,
        w_NF,
        w_scale_1N,
        up_NR,
        m,
        n,
        x_MF.stride(0),
        w_NF.stride(0),
        h_MR.stride(0),
        up_NR.stride(0),
        up_NR.stride(1),
        up_factor,
        in_features,
        padding,
        rank,
        block,
        rows,
        torch.finfo(x_MF.dtype).max,
        torch.finfo(x_MF.dtype).smallest_normal / 8,  # 3 bits of mantissa: the smallest subnormal number
        num_warps=4,
    )


# Grid: one program a token. It reads a row of x, y and the image's gate, and writes one row.
@triton.jit
def _gated_residual(  # type: ignore[no-untyped-def]  # Triton reads annotations
    x,
    gate,
    y,
    out,
    tokens,
    x_image_stride,
    x_token_stride,
    gate_image_stride,
    y_image_stride,
    y_token_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_X: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    image, token = row // tokens, row % tokens
    k = tl.arange(0, BLOCK)
    inside = k < K
    value = tl.load(y + image * y_image_stride + token * y_token_stride + k, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(gate + image * gate_image_stride + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_X:
        value += tl.load(x + image * x_image_stride + token * x_token_stride + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=inside)


def gated_residual(x_BTK: torch.Tensor | None, gate_BK: torch.Tensor, y_BTK: torch.Tensor) -> torch.Tensor:
    """`reference.gated_residual` in one kernel: 82 µs, where torch's two take 172 (Flux.1, batch 4, H200)."""
    x = y_BTK if x_BTK is None else x_BTK  # without an x, a pointer that is not read
    # Parts of longer rows are read in place; only the last axis has to be contiguous.
    x, gate_BK, y_BTK = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, gate_BK, y_BTK))
    images, tokens, features = y_BTK.shape
    out = torch.empty(images, tokens, features, device=y_BTK.device, dtype=y_BTK.dtype)
    block = triton.next_power_of_2(features)
    strides = (*x.stride()[:2], gate_BK.stride(0), *y_BTK.stride()[:2])
    _gated_residual[(images * tokens,)](
        x,
        gate_BK,
        y_BTK,
        out,
        tokens,
        *strides,
        features,
        block,
        x_BTK is not None,
        num_warps=min(16, max(2, block // 512)),
    )
    return out
