"""Fixes two faults of the backward pass of torch's cuDNN attention, both of which give wrong numbers without an error.

**Gradients of another layout are misread.** torch builds one cuDNN graph for all calls whose q, k and v have the same
sizes and strides, with the strides of the first call's gradient (torch 2.11 at least,
aten/src/ATen/native/cudnn/MHA.cpp). A gradient with other strides is read in the wrong places, even past its end: no
error, other numbers. Flux.1 makes such calls where q, k and v are separate layers (PARAMS_SPLIT_QKV=true): in its
single blocks the gradient is a part of longer rows, in its double blocks not.

**Gradients that are not numbers**, on compute capability 9.0, where 64 of 128 keys are left over and a row's logits are
all below some -88 (NVIDIA/cudnn-frontend#628, pytorch/pytorch#196678): exp(-LSE) of the keys that are not there
overflows. SDXL meets it at 896 x 1152 (4,032 tokens). FlashAttention 2, which torch has too, computes the gradients of
these lengths; with a mask, which it does not take, the memory-efficient kernel does.

Letters: B batch, H heads, T tokens, D numbers of a head.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch

BACKWARD = "_scaled_dot_product_cudnn_attention_backward"
ALIGNMENT = 16  # bytes; what every attention kernel reads at once
_LIBRARY = torch.library.Library("aten", "IMPL")  # its kernels stay registered for as long as it lives


def with_strides_of(grad_BHTD: torch.Tensor, like_BHTD: torch.Tensor) -> torch.Tensor:
    """`grad_BHTD` with the strides of `like_BHTD`, which has its shape, at an aligned address; itself if it is so.

    The stride of a dimension of size 1 does not matter.
    """
    strides = zip(grad_BHTD.shape, grad_BHTD.stride(), like_BHTD.stride(), strict=True)
    has_strides = all(stride == wanted for size, stride, wanted in strides if size > 1)
    if has_strides and grad_BHTD.data_ptr() % ALIGNMENT == 0:
        return grad_BHTD
    return torch.empty_like(like_BHTD).copy_(grad_BHTD)


@functools.cache
def _has_the_fault(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def has_faulty_length(tokens: int) -> bool:
    """Whether cuDNN's backward pass for compute capability 9.0 may give NaN with so many keys."""
    return tokens % 128 == 64


def _flash_gradients(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    philox: Sequence[torch.Tensor],
    lengths: Sequence[Any],
    is_causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v by FlashAttention 2, from cuDNN's output and logarithms of sums (B, H, T, 1)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, logsumexp.squeeze(-1), *lengths, 0.0, is_causal, *philox, scale=scale
    )


def masked_gradients(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    is_causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v by the memory-efficient kernel; its forward pass is run again for its layout of sums.

    `bias` is added to the logits, (B, H, T, T) or what expands to it. Several heads of q may share one of k and v.
    """
    shared = q.size(1) // k.size(1)
    keys, values = (tensor.repeat_interleave(shared, 1) if shared > 1 else tensor for tensor in (k, v))
    bias = bias.expand(*q.shape[:3], k.size(2))
    aten = torch.ops.aten
    saved = aten._scaled_dot_product_efficient_attention(q, keys, values, bias, True, 0.0, is_causal, scale=scale)
    grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, keys, values, bias, *saved, 0.0, [True, True, True, False], is_causal, scale=scale
    )
    if shared > 1:
        grad_k, grad_v = (tensor.unflatten(1, (-1, shared)).sum(2) for tensor in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


@functools.cache
def apply_fix() -> None:
    """From now on, in this process, both faults are avoided. Done once."""
    if torch.version.cuda is None:
        return
    original = torch.library.get_kernel(f"aten::{BACKWARD}", "CUDA")

    def backward(
        dispatch_keys: Any,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        philox_seed: torch.Tensor,
        philox_offset: torch.Tensor,
        bias: torch.Tensor | None,
        *others: Any,
        scale: float | None = None,
    ) -> Any:
        grad = with_strides_of(grad, out)
        philox = (philox_seed, philox_offset)
        *lengths, dropout_p, is_causal = others
        if has_faulty_length(k.size(2)) and dropout_p == 0 and _has_the_fault(q.device):
            if bias is None:
                return _flash_gradients(grad, q, k, v, out, logsumexp, philox, lengths, is_causal, scale)
            return masked_gradients(grad, q, k, v, bias, is_causal, scale)
        given = (grad, q, k, v, out, logsumexp, *philox, bias, *others)
        return original.call_boxed(dispatch_keys, *given, scale=scale)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that another kernel was registered before
        _LIBRARY.impl(BACKWARD, backward, "CUDA", with_keyset=True)
