"""Whether the fused kernels compute on this device what plain torch does: a kernel that is wrong would train, badly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from trainer.engine.kernels import dispatch, reference, rope_reference
from trainer.spec.adapter_columns import THIRDS, padding_for

log = logging.getLogger(__name__)
ROWS, WIDTH, HEADS, RANK = 96, 256, 4, 12
LEFT, WIDE = 1296, 2320  # of GELU's rows, which its kernel reads in several pieces, the last of them not whole
ALLOWED = 2e-2  # relative; both round to 16 bits, and of 8 bits few differ, by a step of 3 bits


def agree(device: str, dtype: torch.dtype) -> bool:
    """Each kernel against its reference, on random numbers; `dtype`: of what is quantised."""
    wrong = [name for name, found, wanted in _pairs(device, dtype) if not _error(found, wanted) <= ALLOWED]
    if wrong:
        log.warning(
            "The fused kernels %s do not give what plain torch does on this device: training goes on without them.",
            ", ".join(wrong),
        )
    return not wrong


def _pairs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Sequence[torch.Tensor], Sequence[torch.Tensor]]]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).bfloat16()

    (x, g, past), (scale, shift) = (normal(ROWS, WIDTH) for _ in "xgp"), (normal(2, WIDTH) for _ in "ab")
    options = (x, scale, shift, 1.0, 1e-6, dtype, True)
    yield "norm_rows", _whole(dispatch.norm_rows(*options)), _whole(reference.norm_rows(*options))
    h, up = normal(ROWS, RANK), normal(ROWS, RANK)
    ours, theirs = (_beside(module.append_adapter_columns, dtype, x, g, h, up) for module in (dispatch, reference))
    yield "beside", ours, theirs
    given = (x, scale, shift, 1.0, 1e-6, g, past, None, past, True)
    yield "norm_gradient", dispatch.norm_gradient(*given), reference.norm_gradient(*given)
    for left, gated in ((normal(ROWS, LEFT), False), (None, True)):
        wide = normal(ROWS, 2 * WIDE)
        before = normal(ROWS, (0 if left is None else LEFT) + (WIDE if gated else 2 * WIDE))
        rows = (left, wide, gated, dtype, True)
        yield "gelu_rows", _whole(dispatch.gelu_rows(*rows)), _whole(reference.gelu_rows(*rows))
        back = (left, wide, before, gated, True)
        ours, theirs = ([t for t in module.gelu_gradient(*back) if t.numel()] for module in (dispatch, reference))
        yield "gelu_gradient", ours, theirs
    first, second = (normal(2, n, 3 * HEADS * 64) for n in (40, 24))
    norms, transposes = [normal(64) for _ in range(4)], [normal(64, 64).float() for _ in "cs"]
    joined = [
        module.rotate(first, *norms[:2], second, *norms[2:], *transposes, 1e-6) for module in (dispatch, rope_reference)
    ]
    yield "rotate", *joined
    gs = [normal(2, 64, HEADS, 64) for _ in "qkv"]
    turned = [
        module.rotate_gradient(second, *norms[2:], *transposes, *gs, 40, 1e-6) for module in (dispatch, rope_reference)
    ]
    yield "rotate_gradient", turned[:1], turned[1:]


def _beside(
    kernel: Callable[..., None], dtype: torch.dtype, x: torch.Tensor, g: torch.Tensor, h: torch.Tensor, up: torch.Tensor
) -> list[torch.Tensor]:
    """What is written beside rows, and beside a weight, which are random numbers here: each half by itself."""
    room = padding_for(RANK, WIDTH)
    (x8, x_scale), (w8, w_scale) = (
        reference.quantize_rows(x, None, dtype, room),
        reference.quantize_rows(g, None, dtype),
    )
    w8 = reference.pad_columns(w8, room)
    kernel(x8, x_scale, h, w8, w_scale.t().contiguous(), up, WIDTH, 0.5)
    return [part for wide in (x8, w8) for part in wide[:, WIDTH:].float().split(RANK, 1)[:THIRDS]]


def _whole(found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """What 8 bits and scales stand for, and the rows."""
    values, scale, rows = found
    return [values.float() * scale, rows]


def _error(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest relative difference; NaN is no number that anything is below."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True) if b.numel()]
    return max(((a - b).norm() / b.norm()).nan_to_num(float("inf")).item() for a, b in pairs)
