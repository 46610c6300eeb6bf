"""Queries, keys and values of projections that are joined, in one pass: normed, turned by their places, joined."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from trainer.engine.kernels.dispatch import rotate, rotate_gradient
from trainer.engine.memory.activation_offload import without_graph

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


def fits(*norms: Any) -> bool:
    """Whether `rotated` can do it: norms that are frozen, of heads whose size is a power of two."""
    weights = [norm.weight for norm in norms]
    return all(w is not None and not w.requires_grad and len(w).bit_count() == 1 for w in weights)


def rotated(sources: list[Source], transposes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, T, H, D), of one or two sources' tokens, one after the other."""
    found: tuple[Tensor, Tensor, Tensor] = _rotated(*_given(sources, transposes))
    return found


def _given(sources: list[Source], transposes: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    (first, norm_q, norm_k), *others = sources
    second = (others[0][0], others[0][1].weight, others[0][2].weight) if others else (None, None, None)
    return first, norm_q.weight, norm_k.weight, *second, *transposes, norm_q.eps


def attended(
    sources: list[Source],
    transposes: tuple[Tensor, Tensor],
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    recompute_rope: bool,
) -> Tensor:
    """Attention among what `rotated` gives. `remade`: that is not kept for the backward pass, but made once more."""
    q, k, v = rotated(sources, transposes)
    with (
        _remaking(sources, transposes, (q, k, v) if len(sources) > 1 else (q, k))
        if recompute_rope
        else contextlib.nullcontext()
    ):
        return attention(q, k, v)


def _remaking(
    sources: list[Source], transposes: tuple[Tensor, Tensor], made: tuple[Tensor, ...]
) -> contextlib.AbstractContextManager[Any]:
    """Inside, autograd keeps none of the tensors `made`."""
    first, *given = (t.detach() if isinstance(t, Tensor) else t for t in _given(sources, transposes))
    places = {t.data_ptr(): (index, t.numel()) for index, t in enumerate(made)}
    again: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor | tuple[int, torch.Size, tuple[int, ...]]:
        index, count = places.get(tensor.data_ptr(), (0, -1))
        return (index, tensor.shape, tensor.stride()) if tensor.numel() == count else without_graph(tensor)

    def unpack(kept: Tensor | tuple[int, torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        index, shape, stride = kept
        if index not in again:
            again.update(enumerate(rotate(first, *given)))
        return again.pop(index).as_strided(shape, stride)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
