"""Queries, keys and values of joined projections, prepared for attention by one kernel for each source.

The kernel normalises queries and keys by head, applies the rotary embedding, and writes the tokens of text and image
next to each other. Its outputs can be recomputed for the backward pass instead of saved: three tensors as large as the
projections, which attention would keep.

Letters: B images, T tokens, H heads, D features of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.engine.kernels.dispatch import rotate, rotate_gradient, rotate_heads, rotate_heads_gradient
from trainer.engine.memory.activation_offload import without_graph

Source = tuple[Tensor, Any, Any]  # qkv, (B, T, 3HD): all heads of q, of k, of v; the RMSNorms of queries and keys
CosSin = tuple[Tensor, Tensor]  # of each token's angles, (T, D) each
Saved = Tensor | tuple[int, torch.Size, tuple[int, ...]]  # a tensor; or which one it is, its shape and strides


class _NormRope(torch.autograd.Function):
    """`kernels.rope_reference.rotate`. Saves its inputs only. The norms' weights are frozen and get no gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        first_q: Tensor,
        first_k: Tensor,
        second: Tensor | None,
        second_q: Tensor | None,
        second_k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rotate(first, first_q, first_k, second, second_q, second_k, cos, sin, eps)
        ctx.eps = eps
        ctx.save_for_backward(first, first_q, first_k, second, second_q, second_k, cos, sin)
        if second is None:  # values are where they were: nothing has to be put next to them
            v = first.unflatten(2, (3, *q.shape[2:]))[:, :, 2]
        return q, k, v

    @staticmethod
    def backward(ctx: Any, gq: Tensor, gk: Tensor, gv: Tensor) -> tuple[Tensor | None, ...]:
        first, first_q, first_k, second, second_q, second_k, cos, sin = ctx.saved_tensors
        g_first = rotate_gradient(first, first_q, first_k, cos, sin, gq, gk, gv, 0, ctx.eps)
        g_second = None
        if second is not None:
            offset = first.shape[1]
            g_second = rotate_gradient(second, second_q, second_k, cos, sin, gq, gk, gv, offset, ctx.eps)
        return g_first, None, None, g_second, None, None, None, None, None


# torch.compile takes this into its graph without tracing it, and differentiates by its backward function.
@torch.compiler.allow_in_graph
def _norm_rope(
    first: Tensor,
    first_q: Tensor,
    first_k: Tensor,
    second: Tensor | None,
    second_q: Tensor | None,
    second_k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    qkv: tuple[Tensor, Tensor, Tensor] = _NormRope.apply(
        first, first_q, first_k, second, second_q, second_k, cos, sin, eps
    )
    return qkv


def can_fuse_rope(*norms: Any) -> bool:
    """Whether `norm_rope` can take these norms: frozen, with a weight, of heads whose size is a power of two."""
    for norm in norms:
        weight = norm.weight
        if weight is None or weight.requires_grad or len(weight).bit_count() != 1:
            return False
    return True


def norm_rope(sources: list[Source], cos_sin_TD: CosSin) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, T, H, D), of the tokens of one or two sources, one after the other."""
    return _norm_rope(*_kernel_arguments(sources, cos_sin_TD))


def _kernel_arguments(sources: list[Source], cos_sin_TD: CosSin) -> tuple[Any, ...]:
    first, norm_q, norm_k = sources[0]
    second: tuple[Tensor | None, ...] = (None, None, None)
    if len(sources) > 1:
        qkv, second_norm_q, second_norm_k = sources[1]
        second = (qkv, second_norm_q.weight, second_norm_k.weight)
    return first, norm_q.weight, norm_k.weight, *second, *cos_sin_TD, norm_q.eps


class _HeadNormRope(torch.autograd.Function):
    """`kernels.rope_reference.rotate_heads`. Saves its inputs only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turns: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight, turns)
        return rotate_heads(x, weight, turns, eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, turns = ctx.saved_tensors
        return rotate_heads_gradient(x, weight, turns, g, ctx.eps), None, None, None


@torch.compiler.allow_in_graph
def _head_norm_rope(x: Tensor, weight: Tensor, turns: Tensor, eps: float) -> Tensor:
    rotated: Tensor = _HeadNormRope.apply(x, weight, turns, eps)
    return rotated


def head_norm_rope(x_BTF: Tensor, weight_D: Tensor, turns_BTR2: Tensor, eps: float) -> Tensor:
    """The queries or keys of a projection of their own, normalised by head and rotated, (B, T, H, D).

    `turns`: cosine and sine of each token's angles, in each image, or (1, T, R, 2) in all; (1, 1, R, 2) for all tokens.
    `weight`: what an RMSNorm that `can_fuse_rope` takes multiplies by.
    """
    return _head_norm_rope(x_BTF, weight_D, turns_BTR2, eps)


def rope_attention(
    sources: list[Source],
    cos_sin_TD: CosSin,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    recompute_rope: bool,
) -> Tensor:
    """`attention` on the outputs of `norm_rope`, which with `recompute_rope` are recomputed instead of saved."""
    q, k, v = norm_rope(sources, cos_sin_TD)
    if not recompute_rope:
        return attention(q, k, v)
    # With one source, v is a view of the projection's output, which is kept anyway.
    outputs = (q, k, v) if len(sources) > 1 else (q, k)
    with _recomputed(outputs):
        return attention(q, k, v)


def _recomputed(outputs: tuple[Tensor, ...]) -> contextlib.AbstractContextManager[Any]:
    """Inside, autograd saves none of the tensors `outputs`: the backward pass recomputes all when it wants the first.

    A checkpoint of the rotation alone would save nothing, because attention saves its inputs; one of both would run
    attention's forward pass twice.
    """
    rotation: Any = outputs[0].grad_fn  # of `_NormRope`; None without a gradient, and then nothing is saved
    # Attention may save views with other strides: a tensor is known by its address and size.
    known = {t.data_ptr(): (index, t.numel()) for index, t in enumerate(outputs)}
    recomputed: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Saved:
        index, count = known.get(tensor.data_ptr(), (0, -1))
        if tensor.numel() != count:
            return without_graph(tensor)
        return index, tensor.shape, tensor.stride()

    def unpack(saved: Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        index, shape, stride = saved
        if index not in recomputed:
            # What it has saved: weights that wait elsewhere (`memory.weight_streaming`) are fetched again.
            recomputed.update(enumerate(rotate(*rotation.saved_tensors, rotation.eps)))
        return recomputed.pop(index).as_strided(shape, stride)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
