"""Numbers in 8 bits, in plain torch: the reference of `trainer.engine.kernels.quantize_triton`, and what runs where
there is no Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FLOOR = 1e-12  # of a row's largest value: a row of zeros stays zeros, without a division by zero
BF16_MAX = torch.finfo(torch.bfloat16).max
# What 8 bits with a point can hold is several times what is used of it: an adapter's numbers beside a row, by the same
# scale, may be so much larger than the row's. Of a row, numbers 3,000 times smaller than the largest lose precision by
# it; of a weight, 400 times.
HEADROOM, OF_WEIGHTS = 4, 32
# An adapter's numbers may be as large as the largest of a weight, or as this: a row that is 8 times smaller has the
# scale of one that is not; but none gets more than 128 times its own, by which it would lose precision.
LARGE, LEAST, DOUBLED = 0.25, 8, 7
AT_ONCE = 256  # rows of a weight


def most(dtype: torch.dtype) -> float:
    """The largest value that is used: 112 in e4m3fn, 60 in e4m3fnuz, 127 in int8."""
    return torch.finfo(dtype).max / HEADROOM if dtype.is_floating_point else torch.iinfo(dtype).max


def quantize_rows(
    x_MK: torch.Tensor, columns_1K: torch.Tensor | None, dtype: torch.dtype, room: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of x * columns in 8 bits by its own scale: values (M, K) and fp32 scales (M, 1).

    The product of both is x * columns again, nearly. An inf becomes the largest value that a row can hold. `room`: so
    many columns of no meaning after the values.
    """
    x_MK = x_MK.float() if columns_1K is None else x_MK.float() * columns_1K.float()
    scale_M1 = x_MK.abs().amax(-1, keepdim=True).clamp(FLOOR, BF16_MAX) / most(dtype)
    values_MK = (x_MK / scale_M1).clamp(-most(dtype), most(dtype))
    return pad_columns((values_MK if dtype.is_floating_point else values_MK.round()).to(dtype), room), scale_M1


def quantize_weight(w_NK: torch.Tensor, dtype: torch.dtype, room: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in 8 bits with a point, (N, K + room), and its rows' scales, (1, N), such as bf16 can hold.

    The largest of a row is such that 8 bits hold it, but for the scale's own rounding. `room`: so many columns of zeros
    after the values.
    """
    (n, width), limit = w_NK.shape, torch.finfo(dtype).max
    # What stays is there first, and what does not is small: no gaps are left between one weight and the next.
    values = torch.zeros(n, width + room, dtype=dtype, device=w_NK.device)
    low_N, high_N = w_NK.aminmax(dim=1)
    amax_N1 = torch.maximum(-low_N, high_N).float().clamp(FLOOR, BF16_MAX)[:, None]
    doubled = (amax_N1.max().clamp(min=LARGE) / LEAST / amax_N1).log2().ceil().clamp(0, DOUBLED)
    scale_N1 = (amax_N1 * doubled.exp2() / (limit / OF_WEIGHTS)).bfloat16().float()
    for begin in range(0, n, AT_ONCE):
        rows = slice(begin, begin + AT_ONCE)
        values[rows, :width] = (w_NK[rows].float() / scale_N1[rows]).clamp(-limit, limit).to(dtype)
    return values, scale_N1.t().contiguous()


def pad_columns(values_MK: torch.Tensor, room: int) -> torch.Tensor:
    """The same, of one byte each, with so many columns of zeros after it."""
    return F.pad(values_MK.view(torch.uint8), (0, room)).view(values_MK.dtype) if room else values_MK


def append_adapter_columns(
    x_MF: torch.Tensor,
    x_scale_M1: torch.Tensor,
    down_MR: torch.Tensor,
    w_NF: torch.Tensor,
    w_scale_1N: torch.Tensor,
    up_NR: torch.Tensor,
    width: int,
    times: float,
) -> None:
    """Write down and up into the columns of x and w from `width` on, so that x wᵀ by their scales has down upᵀ in it.

    Each is two numbers in 8 bits, the second what the first leaves over: together as good as bf16. Of the products of
    both halves three count: high high, low high, high low. `times`: by how much up is larger than it would be by its
    scale, and down smaller, so that neither leaves what 8 bits can hold.
    """
    limit, room = torch.finfo(x_MF.dtype).max, w_NF.shape[1] - width
    sides = ((x_MF, x_scale_M1, down_MR, 1 / times, (0, 1, 0)), (w_NF, w_scale_1N.t(), up_NR, times, (0, 0, 1)))
    for out, scale, values, factor, order in sides:
        exact = values.float() / scale * factor
        high = exact.clamp(-limit, limit).to(out.dtype)
        low = (exact - high.float()).clamp(-limit, limit).to(out.dtype)
        halves = torch.cat([(high, low)[i] for i in order], 1)
        # Past autograd: what is computed before does not read these columns.
        out.data[:, width : width + room] = pad_columns(halves, room - halves.shape[1])


def dequantize_rows(w_NK: torch.Tensor, scale_1N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What values in 8 bits and a scale for each row stand for, (N, K)."""
    return (w_NK.float() * scale_1N.t()).to(dtype)


def can_dequantize(w_NK: torch.Tensor) -> bool:  # noqa: ARG001
    """Whether `dequantize_rows` has these values."""
    return True


def transpose(w_NK: torch.Tensor, room: int = 0) -> torch.Tensor:
    """(K, N) with so many columns after it, contiguous."""
    return pad_columns(w_NK.t().contiguous(), room)


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
    room: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, Kept]:
    """LayerNorm(x) * (plus + scale) + shift in 8 bits, its scales, and the rows themselves. M: B pictures' tokens."""
    normed_MK = _modulated(F.layer_norm(x_MK.float(), x_MK.shape[1:], eps=eps), scale_BK, shift_BK, plus).to(x_MK.dtype)
    return *quantize_rows(normed_MK, None, dtype, room), normed_MK if kept else x_MK.new_empty(0)


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
    left_ML: torch.Tensor | None, y_MK: torch.Tensor, gated: bool, dtype: torch.dtype, kept: bool, room: int = 0
) -> tuple[torch.Tensor, torch.Tensor, Kept]:
    """[left, gelu(y)] in 8 bits, its scales, and the rows themselves. gelu: with tanh.

    gated: y is [a, b], and for gelu(y) stands a * gelu(b), with erf.
    """
    rows = _activated(left_ML, y_MK, gated)
    return *quantize_rows(rows, None, dtype, room), rows if kept else y_MK.new_empty(0)


def gelu_gradient(
    left_ML: torch.Tensor | None, y_MK: torch.Tensor, g: torch.Tensor, gated: bool, kept: bool
) -> tuple[torch.Tensor, torch.Tensor, Kept]:
    """From the gradient of `gelu_rows`' rows: that of y; of left, which is its first columns; and those rows again."""
    left = 0 if left_ML is None else left_ML.shape[1]
    g_MK = g[:, left:].float()
    backward = torch.ops.aten.gelu_backward
    if gated:
        a, b = y_MK.float().chunk(2, -1)
        gy_MK = torch.cat([g_MK * F.gelu(b), backward(g_MK * a, b, approximate="none")], -1)
    else:
        gy_MK = backward(g_MK, y_MK.float(), approximate="tanh")
    rows = _activated(left_ML, y_MK, gated) if kept else y_MK.new_empty(0)
    return gy_MK.to(y_MK.dtype), g[:, :left].clone(), rows


def _activated(left_ML: torch.Tensor | None, y_MK: torch.Tensor, gated: bool) -> torch.Tensor:
    y = y_MK.float()
    right = y.chunk(2, -1)[0] * F.gelu(y.chunk(2, -1)[1]) if gated else F.gelu(y, approximate="tanh")
    return right.to(y_MK.dtype) if left_ML is None else torch.cat([left_ML, right.to(y_MK.dtype)], -1)


def gated_residual(x_BTK: torch.Tensor | None, gate_BK: torch.Tensor, y_BTK: torch.Tensor) -> torch.Tensor:
    """x + gate * y, rounded once; without an x, gate * y."""
    return y_BTK * gate_BK[:, None] if x_BTK is None else torch.addcmul(x_BTK, gate_BK[:, None], y_BTK)
