"""Triton kernels of what is done to queries and keys before attention, and of its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from trainer.engine.kernels import rope_reference as reference

_HEADS = 8  # a program


@triton.jit
def _pairs(x, D: tl.constexpr, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements 0, 2, … and 1, 3, … of each row."""
    return tl.split(tl.reshape(x, (HEADS, D // 2, 2)))


@triton.jit
def _turned(x, weight, cos, sin, EPS: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """RMSNorm of each row, and then pair by pair turned."""
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + EPS)
    a, b = _pairs(x * rstd[:, None] * weight, D, HEADS)
    cos_a, cos_b = _pairs(cos, D, HEADS)
    sin_a, sin_b = _pairs(sin, D, HEADS)
    return tl.reshape(tl.join(a * cos_a - b * sin_a, b * cos_b + a * sin_b), (HEADS, D))


@triton.jit
def _turned_back(g, x, weight, cos, sin, EPS: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    rstd = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + EPS))[:, None]
    a, b = _pairs(g, D, HEADS)
    cos_a, cos_b = _pairs(cos, D, HEADS)
    sin_a, sin_b = _pairs(sin, D, HEADS)
    g = tl.reshape(tl.join(a * cos_a + b * sin_b, b * cos_b - a * sin_a), (HEADS, D)) * weight
    hat = x * rstd
    return rstd * (g - hat * (tl.sum(g * hat, axis=1) / D)[:, None])


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    qkv,
    weight_q,
    weight_k,
    cos,
    sin,
    q,
    k,
    v,
    tokens,
    total,
    offset,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    EPS: tl.constexpr,
    VALUES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = offset + row % tokens
    to = (row // tokens * total + place) * H * D
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, D)[None, :]
    at = head * D + d
    inside = (head < H) & (d < D)
    turn = place * D + d + 0 * head
    c, s = tl.load(cos + turn).to(tl.float32), tl.load(sin + turn).to(tl.float32)
    x = tl.load(qkv + row * 3 * H * D + at, mask=inside, other=0.0).to(tl.float32)
    y = _turned(x, tl.load(weight_q + d).to(tl.float32), c, s, EPS, D, HEADS)
    tl.store(q + to + at, y.to(q.dtype.element_ty), mask=inside)
    x = tl.load(qkv + row * 3 * H * D + H * D + at, mask=inside, other=0.0).to(tl.float32)
    y = _turned(x, tl.load(weight_k + d).to(tl.float32), c, s, EPS, D, HEADS)
    tl.store(k + to + at, y.to(k.dtype.element_ty), mask=inside)
    if VALUES:
        tl.store(v + to + at, tl.load(qkv + row * 3 * H * D + 2 * H * D + at, mask=inside), mask=inside)


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
    """`rotary_reference.rotate`, one pass over each source."""
    dim, images, total = len(weight_q), first.shape[0], cos_TD.shape[0]
    heads = first.shape[2] // (3 * dim)
    q = torch.empty(images, total, heads, dim, device=first.device, dtype=first.dtype)
    k, v = torch.empty_like(q), first.new_empty(0) if second is None else torch.empty_like(q)
    offset = 0
    for qkv, of_q, of_k in ((first, weight_q, weight_k), (second, second_q, second_k)):
        if qkv is not None and of_q is not None and of_k is not None:
            wrap_triton(_rotate)[(images * qkv.shape[1], triton.cdiv(heads, _HEADS))](
                qkv.contiguous(),
                of_q,
                of_k,
                cos_TD.contiguous(),
                sin_TD.contiguous(),
                q,
                k,
                q if second is None else v,
                qkv.shape[1],
                total,
                offset,
                heads,
                dim,
                _HEADS,
                eps,
                second is not None,
                num_warps=4,
            )
            offset += qkv.shape[1]
    return q, k, v


@triton.jit
def _rotate_gradient(  # type: ignore[no-untyped-def]
    qkv,
    weight_q,
    weight_k,
    cos,
    sin,
    gq,
    gk,
    gv,
    out,
    tokens,
    total,
    offset,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    EPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = offset + row % tokens
    source = (row // tokens * total + place) * H * D
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, D)[None, :]
    at = head * D + d
    inside = (head < H) & (d < D)
    turn = place * D + d + 0 * head
    c, s = tl.load(cos + turn).to(tl.float32), tl.load(sin + turn).to(tl.float32)
    x = tl.load(qkv + row * 3 * H * D + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gq + source + at, mask=inside, other=0.0).to(tl.float32)
    g = _turned_back(g, x, tl.load(weight_q + d).to(tl.float32), c, s, EPS, D, HEADS)
    tl.store(out + row * 3 * H * D + at, g.to(out.dtype.element_ty), mask=inside)
    x = tl.load(qkv + row * 3 * H * D + H * D + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gk + source + at, mask=inside, other=0.0).to(tl.float32)
    g = _turned_back(g, x, tl.load(weight_k + d).to(tl.float32), c, s, EPS, D, HEADS)
    tl.store(out + row * 3 * H * D + H * D + at, g.to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * 3 * H * D + 2 * H * D + at, tl.load(gv + source + at, mask=inside), mask=inside)


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
    """`rotary_reference.rotate_gradient` in one pass."""
    dim, heads, qkv = len(weight_q), gq.shape[2], qkv.contiguous()
    out = torch.empty_like(qkv)
    wrap_triton(_rotate_gradient)[(qkv.shape[0] * qkv.shape[1], triton.cdiv(heads, _HEADS))](
        qkv,
        weight_q,
        weight_k,
        cos_TD.contiguous(),
        sin_TD.contiguous(),
        gq.contiguous(),
        gk.contiguous(),
        gv.contiguous(),
        out,
        qkv.shape[1],
        cos_TD.shape[0],
        offset,
        heads,
        dim,
        _HEADS,
        eps,
        num_warps=4,
    )
    return out


rotate.register_kernel("cpu")(reference.rotate)
rotate_gradient.register_kernel("cpu")(reference.rotate_gradient)
