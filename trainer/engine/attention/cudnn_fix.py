"""Attention by cuDNN, as torch calls it, mended.

For the way back torch builds one graph for all calls whose queries, keys and values have the same sizes and strides,
and in it are the strides of the first call's gradient (torch 2.11 at least, aten/src/ATen/native/cudnn/MHA.cpp). A
gradient that is laid out in another way is read in the wrong places, even past its end: no error, other numbers. Flux.1
makes such calls where queries, keys and values are layers of their own: in one kind of block it is a part of longer
rows.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

BACKWARD = "_scaled_dot_product_cudnn_attention_backward"
ALIGNED = 16  # bytes
_LIBRARY = torch.library.Library("aten", "IMPL")  # what is registered in it stays as long as it does


def with_strides_of(g: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`g` with the strides of `like`, of the same size, and at an address that any kernel reads; itself if it is so."""
    pairs = zip(g.shape, g.stride(), like.stride(), strict=True)
    if all(its == wanted for size, its, wanted in pairs if size > 1) and g.data_ptr() % ALIGNED == 0:
        return g
    return torch.empty_like(like).copy_(g)


@functools.cache
def apply_fix() -> None:
    """From now on each gradient is handed to cuDNN laid out as attention's output is. For this process, once."""
    if torch.version.cuda is None:
        return
    original = torch.library.get_kernel(f"aten::{BACKWARD}", "CUDA")

    def backward(
        keys: Any, g: torch.Tensor, q: Any, k: Any, v: Any, out: torch.Tensor, *more: Any, scale: Any = None
    ) -> Any:
        return original.call_boxed(keys, with_strides_of(g, out), q, k, v, out, *more, scale=scale)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another kernel was there before
        _LIBRARY.impl(BACKWARD, backward, "CUDA", with_keyset=True)
