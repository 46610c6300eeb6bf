"""Numbers in 8 bits, in plain torch: the reference of `trainer.kernels`, and what runs where there is no Triton."""

from __future__ import annotations

import torch

FLOOR = 1e-12  # of a row's largest value: a row of zeros stays zeros, without a division by zero
BF16_MAX = torch.finfo(torch.bfloat16).max


def most(dtype: torch.dtype) -> float:
    """The largest value that is used: 448 in e4m3fn, 240 in e4m3fnuz, 127 in int8."""
    return torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max


def quantize_rows(
    x_MK: torch.Tensor, columns_1K: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of x * columns in 8 bits by its own scale: values (M, K) and fp32 scales (M, 1).

    The product of both is x * columns again, nearly. An inf becomes the largest value that a row can hold.
    """
    x_MK = x_MK.float() if columns_1K is None else x_MK.float() * columns_1K
    scale_M1 = x_MK.abs().amax(-1, keepdim=True).clamp(FLOOR, BF16_MAX) / most(dtype)
    values_MK = (x_MK / scale_M1).clamp(-most(dtype), most(dtype))
    return (values_MK if dtype.is_floating_point else values_MK.round()).to(dtype), scale_M1


def transpose(w_NK: torch.Tensor) -> torch.Tensor:
    """(K, N), contiguous."""
    return w_NK.t().contiguous()
