"""Queries, keys and values of projections that are joined, in one pass: normed, turned by their places, joined."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

if importlib.util.find_spec("triton"):
    from trainer.rotary_kernels import rotate, rotate_gradient
else:
    from trainer.rotary_reference import rotate, rotate_gradient

Tensor = torch.Tensor
Source = tuple[Tensor, Any, Any]  # queries, keys and values side by side, (B, T, 3HD); the norms of queries and keys


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first, first_q, first_k, second, second_q, second_k, cos, sin, eps):  # type: ignore[no-untyped-def]
        q, k, v = rotate(first, first_q, first_k, second, second_q, second_k, cos, sin, eps)
        ctx.eps = eps
        ctx.save_for_backward(first, first_q, first_k, second, second_q, second_k, cos, sin)
        return q, k, v if second is not None else first.unflatten(2, (3, *q.shape[2:]))[:, :, 2]

    @staticmethod
    def backward(ctx: Any, gq, gk, gv):  # type: ignore[no-untyped-def]
        first, first_q, first_k, second, second_q, second_k, cos, sin = ctx.saved_tensors
        more = (cos, sin, gq, gk, gv)
        of_first = rotate_gradient(first, first_q, first_k, *more, 0, ctx.eps)
        of_second = None
        if second is not None:
            of_second = rotate_gradient(second, second_q, second_k, *more, first.shape[1], ctx.eps)
        return of_first, None, None, of_second, None, None, None, None, None


@torch.compiler.allow_in_graph
def _rotated(*given):  # type: ignore[no-untyped-def]
    return _Rotated.apply(*given)


def fits(source: Source) -> bool:
    """Whether `rotated` can do it: norms that are frozen, of heads whose size is a power of two."""
    weights = [norm.weight for norm in source[1:]]
    return all(w is not None and not w.requires_grad and len(w).bit_count() == 1 for w in weights)


def rotated(sources: list[Source], turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, T, H, D), of one or two sources' tokens, one after the other."""
    (first, norm_q, norm_k), *others = sources
    second = (others[0][0], others[0][1].weight, others[0][2].weight) if others else (None, None, None)
    found: tuple[Tensor, Tensor, Tensor] = _rotated(first, norm_q.weight, norm_k.weight, *second, *turns, norm_q.eps)
    return found
