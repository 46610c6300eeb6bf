"""Numbers in 8 bits, in plain torch: the reference of `trainer.kernels`, and what runs where there is no Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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


def restored(w_NK: torch.Tensor, scale_1N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What values in 8 bits and a scale for each row stand for, (N, K)."""
    return (w_NK.float() * scale_1N.t()).to(dtype)


def reads(w_NK: torch.Tensor) -> bool:  # noqa: ARG001
    """Whether `restored` has these values."""
    return True


def transpose(w_NK: torch.Tensor) -> torch.Tensor:
    """(K, N), contiguous."""
    return w_NK.t().contiguous()


# ---- what comes before a product, and its gradient. Computed in fp32 and rounded once, then quantised from what was
# rounded: so the rows that are kept for adapters are those that the 8 bits stand for. `kept`: whether they are wanted.
Kept = torch.Tensor  # rows like the input's, or nothing: empty


def norm_rows(
    x_MK: torch.Tensor,
    scale_BK: torch.Tensor,
    shift_BK: torch.Tensor,
    plus: float,
    eps: float,
    dtype: torch.dtype,
    kept: bool,
) -> tuple[torch.Tensor, torch.Tensor, Kept]:
    """LayerNorm(x) * (plus + scale) + shift in 8 bits, its scales, and the rows themselves. M: B pictures' tokens."""
    normed_MK = _modulated(F.layer_norm(x_MK.float(), x_MK.shape[1:], eps=eps), scale_BK, shift_BK, plus).to(x_MK.dtype)
    return *quantize_rows(normed_MK, None, dtype), normed_MK if kept else x_MK.new_empty(0)


def norm_gradient(
    x_MK: torch.Tensor,
    scale_BK: torch.Tensor,
    shift_BK: torch.Tensor,
    plus: float,
    eps: float,
    g1_MK: torch.Tensor,
    g2_MK: torch.Tensor | None,
    g3_MK: torch.Tensor | None,
    past_MK: torch.Tensor,
    kept: bool,
) -> tuple[torch.Tensor, Kept]:
    """The gradient of x from the sum of those of `norm_rows`' rows, plus `past`, x's own; and those rows again."""
    g_MK = torch.stack([g.float() for g in (g1_MK, g2_MK, g3_MK) if g is not None]).sum(0)
    g_MK = _modulated(g_MK, scale_BK, None, plus)
    centred_MK = x_MK.float() - x_MK.float().mean(-1, keepdim=True)
    rstd_M1 = (centred_MK.square().mean(-1, keepdim=True) + eps).rsqrt()
    hat_MK = centred_MK * rstd_M1
    gx_MK = rstd_M1 * (g_MK - g_MK.mean(-1, keepdim=True) - hat_MK * (g_MK * hat_MK).mean(-1, keepdim=True))
    gx_MK = (gx_MK + past_MK.float()).to(x_MK.dtype)
    return gx_MK, _modulated(hat_MK, scale_BK, shift_BK, plus).to(x_MK.dtype) if kept else x_MK.new_empty(0)


def _modulated(x_MK: torch.Tensor, scale_BK: torch.Tensor, shift_BK: torch.Tensor | None, plus: float) -> torch.Tensor:
    x_BTK = x_MK.view(len(scale_BK), -1, x_MK.shape[1]) * (plus + scale_BK.float())[:, None]
    return (x_BTK if shift_BK is None else x_BTK + shift_BK.float()[:, None]).view_as(x_MK)


def gelu_rows(
    left_ML: torch.Tensor | None, y_MK: torch.Tensor, gated: bool, dtype: torch.dtype, kept: bool
) -> tuple[torch.Tensor, torch.Tensor, Kept]:
    """[left, gelu(y)] in 8 bits, its scales, and the rows themselves. gelu: with tanh.

    gated: y is [a, b], and for gelu(y) stands a * gelu(b), with erf.
    """
    rows = _activated(left_ML, y_MK, gated)
    return *quantize_rows(rows, None, dtype), rows if kept else y_MK.new_empty(0)


def gelu_gradient(
    left_ML: torch.Tensor | None, y_MK: torch.Tensor, g: torch.Tensor, gated: bool, kept: bool
) -> tuple[torch.Tensor, Kept]:
    """The gradient of y from that of `gelu_rows`' rows, which has left's in its first columns; and those rows again."""
    g_MK = g[:, 0 if left_ML is None else left_ML.shape[1] :].float()
    backward = torch.ops.aten.gelu_backward
    if gated:
        a, b = y_MK.float().chunk(2, -1)
        gy_MK = torch.cat([g_MK * F.gelu(b), backward(g_MK * a, b, approximate="none")], -1)
    else:
        gy_MK = backward(g_MK, y_MK.float(), approximate="tanh")
    return gy_MK.to(y_MK.dtype), _activated(left_ML, y_MK, gated) if kept else y_MK.new_empty(0)


def _activated(left_ML: torch.Tensor | None, y_MK: torch.Tensor, gated: bool) -> torch.Tensor:
    y = y_MK.float()
    right = y.chunk(2, -1)[0] * F.gelu(y.chunk(2, -1)[1]) if gated else F.gelu(y, approximate="tanh")
    return right.to(y_MK.dtype) if left_ML is None else torch.cat([left_ML, right.to(y_MK.dtype)], -1)
