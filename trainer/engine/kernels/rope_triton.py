"""Triton kernels that normalise queries and keys by head and apply the rotary embedding; and their gradient.

Separate operations would each read and write every query and key. One kernel reads them once, where the joined
projection left them, and writes text's and image's tokens next to each other, as attention wants them.
`trainer.engine.kernels.rope_reference` has the same functions in plain torch.

Letters: B images, T tokens, H heads, D features of a head, a power of two. Parameters of kernels have no types, because
Triton gives annotations a meaning of its own; only `tl.constexpr` is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

HEADS_PER_PROGRAM = 8  # of one token: with D = 128, 1,024 elements, 8 for each thread of 4 warps


@triton.jit
def _pairs(x, D: tl.constexpr, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """Elements 0, 2, … and 1, 3, … of each row of (HEADS, D): the two halves of each rotated pair."""
    return tl.split(tl.reshape(x, (HEADS, D // 2, 2)))


@triton.jit
def _norm_rotate(x, weight, cos, sin, EPS: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """RMSNorm of each row of x (HEADS, D), then the rotation of each pair: (a, b) -> (a cos - b sin, b cos + a sin)."""
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + EPS)
    a, b = _pairs(x * rstd[:, None] * weight, D, HEADS)
    cos_a, cos_b = _pairs(cos, D, HEADS)
    sin_a, sin_b = _pairs(sin, D, HEADS)
    return tl.reshape(tl.join(a * cos_a - b * sin_a, b * cos_b + a * sin_b), (HEADS, D))


@triton.jit
def _norm_rotate_gradient(g, x, weight, cos, sin, EPS: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """The gradient of `_norm_rotate`: rotate g back, then RMSNorm's gradient. rstd and x_hat are computed again."""
    rstd = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + EPS))[:, None]
    a, b = _pairs(g, D, HEADS)
    cos_a, cos_b = _pairs(cos, D, HEADS)
    sin_a, sin_b = _pairs(sin, D, HEADS)
    g = tl.reshape(tl.join(a * cos_a + b * sin_b, b * cos_b - a * sin_a), (HEADS, D)) * weight
    hat = x * rstd
    return rstd * (g - hat * (tl.sum(g * hat, axis=1) / D)[:, None])


# Grid: (tokens of one source, groups of 8 heads). Reads one token's queries and keys, and values with COPY_VALUES, from
# a row of qkv, which has all heads of q, then of k, then of v; writes them at the token's position in the joined
# sequence. Rows of qkv are `row_stride` elements apart.
@triton.jit
def _rotate(  # type: ignore[no-untyped-def]  # Triton reads annotations
    qkv,
    weight_q,
    weight_k,
    cos,
    sin,
    q,
    k,
    v,
    row_stride,
    tokens,
    total,
    offset,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    EPS: tl.constexpr,
    COPY_VALUES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = offset + row % tokens
    out_offset = (row // tokens * total + position) * H * D
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, D)[None, :]
    head_offset = head * D + d
    inside = (head < H) & (d < D)
    angle_offset = position * D + d + 0 * head
    c, s = tl.load(cos + angle_offset).to(tl.float32), tl.load(sin + angle_offset).to(tl.float32)
    x = tl.load(qkv + row * row_stride + head_offset, mask=inside, other=0.0).to(tl.float32)
    y = _norm_rotate(x, tl.load(weight_q + d).to(tl.float32), c, s, EPS, D, HEADS)
    tl.store(q + out_offset + head_offset, y.to(q.dtype.element_ty), mask=inside)
    x = tl.load(qkv + row * row_stride + H * D + head_offset, mask=inside, other=0.0).to(tl.float32)
    y = _norm_rotate(x, tl.load(weight_k + d).to(tl.float32), c, s, EPS, D, HEADS)
    tl.store(k + out_offset + head_offset, y.to(k.dtype.element_ty), mask=inside)
    if COPY_VALUES:
        tl.store(
            v + out_offset + head_offset,
            tl.load(qkv + row * row_stride + 2 * H * D + head_offset, mask=inside),
            mask=inside,
        )


def _evenly_spaced(qkv_BTF: torch.Tensor) -> torch.Tensor:
    """The same, copied only if the rows of all images are not one distance apart: they may be parts of wider rows."""
    row_stride = qkv_BTF.stride(1)
    if qkv_BTF.stride(2) == 1 and qkv_BTF.stride(0) == row_stride * qkv_BTF.shape[1]:
        return qkv_BTF
    return qkv_BTF.contiguous()


@triton_op("kiln::rotate", mutates_args={})
def rotate(
    first: torch.Tensor,
    weight_q: torch.Tensor,
    weight_k: torch.Tensor,
    second: torch.Tensor | None,
    second_q: torch.Tensor | None,
    second_k: torch.Tensor | None,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rope_reference.rotate`, one launch for each source."""
    head_dim = len(weight_q)
    images = first.shape[0]
    total = cos_TD.shape[0]
    heads = first.shape[2] // (3 * head_dim)
    q = torch.empty(images, total, heads, head_dim, device=first.device, dtype=first.dtype)
    k = torch.empty_like(q)
    v = first.new_empty(0) if second is None else torch.empty_like(q)
    offset = 0
    for qkv, norm_q, norm_k in ((first, weight_q, weight_k), (second, second_q, second_k)):
        if qkv is not None and norm_q is not None and norm_k is not None:
            rows = _evenly_spaced(qkv)
            wrap_triton(_rotate)[(images * qkv.shape[1], triton.cdiv(heads, HEADS_PER_PROGRAM))](
                rows,
                norm_q,
                norm_k,
                cos_TD.contiguous(),
                sin_TD.contiguous(),
                q,
                k,
                q if second is None else v,
                rows.stride(1),
                qkv.shape[1],
                total,
                offset,
                heads,
                head_dim,
                HEADS_PER_PROGRAM,
                eps,
                second is not None,
                num_warps=4,
            )
            offset += qkv.shape[1]
    return q, k, v


# Grid: as `_rotate`. Reads the gradients at the token's position in the joined sequence, and qkv again; writes a row of
# qkv's gradient. The norms' weights are frozen and get none.
@triton.jit
def _rotate_gradient(  # type: ignore[no-untyped-def]  # Triton reads annotations
    qkv,
    weight_q,
    weight_k,
    cos,
    sin,
    gq,
    gk,
    gv,
    out,
    row_stride,
    tokens,
    total,
    offset,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    EPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = offset + row % tokens
    grad_offset = (row // tokens * total + position) * H * D
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, D)[None, :]
    head_offset = head * D + d
    inside = (head < H) & (d < D)
    angle_offset = position * D + d + 0 * head
    c, s = tl.load(cos + angle_offset).to(tl.float32), tl.load(sin + angle_offset).to(tl.float32)
    x = tl.load(qkv + row * row_stride + head_offset, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gq + grad_offset + head_offset, mask=inside, other=0.0).to(tl.float32)
    g = _norm_rotate_gradient(g, x, tl.load(weight_q + d).to(tl.float32), c, s, EPS, D, HEADS)
    tl.store(out + row * 3 * H * D + head_offset, g.to(out.dtype.element_ty), mask=inside)
    x = tl.load(qkv + row * row_stride + H * D + head_offset, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gk + grad_offset + head_offset, mask=inside, other=0.0).to(tl.float32)
    g = _norm_rotate_gradient(g, x, tl.load(weight_k + d).to(tl.float32), c, s, EPS, D, HEADS)
    tl.store(out + row * 3 * H * D + H * D + head_offset, g.to(out.dtype.element_ty), mask=inside)
    tl.store(
        out + row * 3 * H * D + 2 * H * D + head_offset,
        tl.load(gv + grad_offset + head_offset, mask=inside),
        mask=inside,
    )


@triton_op("kiln::rotate_gradient", mutates_args={})
def rotate_gradient(
    qkv: torch.Tensor,
    weight_q: torch.Tensor,
    weight_k: torch.Tensor,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    gq: torch.Tensor,
    gk: torch.Tensor,
    gv: torch.Tensor,
    offset: int,
    eps: float,
) -> torch.Tensor:
    """`rope_reference.rotate_gradient` in one kernel."""
    head_dim = len(weight_q)
    heads = gq.shape[2]
    qkv = _evenly_spaced(qkv)
    out = torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype)
    wrap_triton(_rotate_gradient)[(qkv.shape[0] * qkv.shape[1], triton.cdiv(heads, HEADS_PER_PROGRAM))](
        qkv,
        weight_q,
        weight_k,
        cos_TD.contiguous(),
        sin_TD.contiguous(),
        gq.contiguous(),
        gk.contiguous(),
        gv.contiguous(),
        out,
        qkv.stride(1),
        qkv.shape[1],
        cos_TD.shape[0],
        offset,
        heads,
        head_dim,
        HEADS_PER_PROGRAM,
        eps,
        num_warps=4,
    )
    return out


# Grid: (tokens of all images, groups of 8 heads). Reads one token's heads and the rotation of each of their pairs;
# writes the heads, normalised and rotated. There are `turn_rows` rows of rotations: as many as tokens, or as tokens of
# one image, if they are the same for all.
@triton.jit
def _rotate_heads(  # type: ignore[no-untyped-def]  # Triton reads annotations
    x, weight, turns, out, turn_rows, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, EPS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, D)[None, :]
    inside = (head < H) & (d < D)
    place = row * H * D + head * D + d
    cos, sin = _turn(turns, row % turn_rows, D)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / D + EPS)
    a, b = _pairs(value * rstd[:, None] * tl.load(weight + d).to(tl.float32), D, HEADS)
    value = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (HEADS, D))
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn(turns, row, D: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """Cosines and sines, (1, D / 2) each, of one token."""
    pair = tl.arange(0, D // 2)[None, :]
    return tl.load(turns + row * D + 2 * pair), tl.load(turns + row * D + 2 * pair + 1)


@triton_op("kiln::rotate_heads", mutates_args={})
def rotate_heads(x_BTF: torch.Tensor, weight_D: torch.Tensor, turns_BTR2: torch.Tensor, eps: float) -> torch.Tensor:
    """`rope_reference.rotate_heads` in one kernel."""
    x_BTF = x_BTF.contiguous()
    images, tokens, features = x_BTF.shape
    heads = features // len(weight_D)
    out = torch.empty(images, tokens, heads, len(weight_D), device=x_BTF.device, dtype=x_BTF.dtype)
    wrap_triton(_rotate_heads)[(images * tokens, triton.cdiv(heads, HEADS_PER_PROGRAM))](
        x_BTF,
        weight_D,
        turns_BTR2.contiguous(),
        out,
        turns_BTR2.shape[0] * turns_BTR2.shape[1],
        heads,
        len(weight_D),
        HEADS_PER_PROGRAM,
        eps,
        num_warps=4,
    )
    return out


# Grid: as `_rotate_heads`. Reads x again, and the gradient of the rotated heads; writes the gradient of x.
@triton.jit
def _rotate_heads_gradient(  # type: ignore[no-untyped-def]  # Triton reads annotations
    x, weight, turns, g, out, turn_rows, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, EPS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, D)[None, :]
    inside = (head < H) & (d < D)
    place = row * H * D + head * D + d
    cos, sin = _turn(turns, row % turn_rows, D)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    rstd = (1.0 / tl.sqrt(tl.sum(value * value, axis=1) / D + EPS))[:, None]
    a, b = _pairs(tl.load(g + place, mask=inside, other=0.0).to(tl.float32), D, HEADS)
    back = tl.reshape(tl.join(a * cos + b * sin, b * cos - a * sin), (HEADS, D))
    back *= tl.load(weight + d).to(tl.float32)
    hat = value * rstd
    value = rstd * (back - hat * (tl.sum(back * hat, axis=1) / D)[:, None])
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton_op("kiln::rotate_heads_gradient", mutates_args={})
def rotate_heads_gradient(
    x_BTF: torch.Tensor, weight_D: torch.Tensor, turns_BTR2: torch.Tensor, g_BTHD: torch.Tensor, eps: float
) -> torch.Tensor:
    """`rope_reference.rotate_heads_gradient` in one kernel."""
    x_BTF = x_BTF.contiguous()
    images, tokens, features = x_BTF.shape
    heads = features // len(weight_D)
    out = torch.empty_like(x_BTF)
    wrap_triton(_rotate_heads_gradient)[(images * tokens, triton.cdiv(heads, HEADS_PER_PROGRAM))](
        x_BTF,
        weight_D,
        turns_BTR2.contiguous(),
        g_BTHD.contiguous(),
        out,
        turns_BTR2.shape[0] * turns_BTR2.shape[1],
        heads,
        len(weight_D),
        HEADS_PER_PROGRAM,
        eps,
        num_warps=4,
    )
    return out
