"""Fixes the backward pass of torch's cuDNN attention, which misreads gradients of another layout.

torch builds one cuDNN graph for all calls whose q, k and v have the same sizes and strides, with the strides of the
first call's gradient (torch 2.11 at least, aten/src/ATen/native/cudnn/MHA.cpp). A gradient with other strides is read
in the wrong places, even past its end: no error, other numbers. Flux.1 makes such calls where q, k and v are separate
layers (PARAMS_SPLIT_QKV=true): in its single blocks the gradient is a part of longer rows, in its double blocks not.

Letters: B batch, H heads, T tokens, D numbers of a head.
"""

from __future__ import annotations

import functools
import warnings
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
def apply_fix() -> None:
    """From now on, in this process, cuDNN gets each gradient in the layout of attention's output. Done once."""
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
        *others: Any,
        scale: float | None = None,
    ) -> Any:
        return original.call_boxed(dispatch_keys, with_strides_of(grad, out), q, k, v, out, *others, scale=scale)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that another kernel was registered before
        _LIBRARY.impl(BACKWARD, backward, "CUDA", with_keyset=True)
