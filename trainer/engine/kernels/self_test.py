"""Compare the kernels with plain torch on the job's own device, before it trains with them.

A kernel that a driver, a Triton version or a GPU gets wrong would not fail: the model would train badly. If any kernel
differs, the job uses diffusers' blocks and adds LoRA terms after the products instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from trainer.engine.kernels import dispatch, reference, rope_reference
from trainer.spec.adapter_columns import COLUMNS_PER_RANK, padding_for

log = logging.getLogger(__name__)

# Sizes of the test's tensors: small, so that the test takes little of a job's start, and no multiples of the blocks
# that the kernels work in.
ROWS, IN_FEATURES = 96, 256
RANK = 12
HEADS, HEAD_DIM = 4, 64
FIRST_TOKENS, SECOND_TOKENS = 40, 24  # of the two sources of joined queries and keys
LEFT_FEATURES, GELU_FEATURES = 1296, 2320  # several chunks of the GELU kernel, the last of them not full
# Relative. Both sides compute in fp32 and round to 16 bits. In 8 bits, where few values differ, it is by one step of 3
# bits. A kernel without the low parts of adapter columns is only 1.9 % off in the whole row, so parts are compared one
# by one.
TOLERANCE = 2e-2

Comparison = tuple[str, Sequence[Tensor], Sequence[Tensor]]  # the kernel's name, its results, its reference's


def agree(device: str, dtype: torch.dtype) -> bool:
    """Whether each kernel gives what its reference gives, on random numbers; `dtype` is that of quantised values."""
    wrong = []
    for name, found, expected in _comparisons(device, dtype):
        if _error(found, expected) > TOLERANCE:
            wrong.append(name)
    if wrong:
        log.warning(
            "The fused kernels %s give wrong results on this device. Training runs without fused kernels, more slowly.",
            ", ".join(wrong),
        )
    return not wrong


def _comparisons(device: str, dtype: torch.dtype) -> Iterator[Comparison]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).bfloat16()

    yield from _norm_comparisons(normal, dtype)
    yield from _rms_comparisons(normal, dtype)
    yield from _gelu_comparisons(normal, dtype)
    yield from _swiglu_comparisons(normal, dtype)
    yield from _rope_comparisons(normal)


def _norm_comparisons(normal: Callable[..., Tensor], dtype: torch.dtype) -> Iterator[Comparison]:
    x, g, residual_grad = (normal(ROWS, IN_FEATURES) for _ in range(3))
    scale, shift = (normal(2, IN_FEATURES) for _ in range(2))
    forward = (x, scale, shift, 1.0, 1e-6, True, dtype, True)
    yield "norm_rows", _dequantized(dispatch.norm_rows(*forward)), _dequantized(reference.norm_rows(*forward))
    h = normal(ROWS, RANK)
    up = normal(ROWS, RANK)
    found = _adapter_column_parts(dispatch.append_adapter_columns, dtype, x, g, h, up)
    expected = _adapter_column_parts(reference.append_adapter_columns, dtype, x, g, h, up)
    yield "append_adapter_columns", found, expected
    backward = (x, scale, shift, 1.0, 1e-6, True, g, residual_grad, None, residual_grad, True)
    yield "norm_gradient", dispatch.norm_gradient(*backward), reference.norm_gradient(*backward)


def _rms_comparisons(normal: Callable[..., Tensor], dtype: torch.dtype) -> Iterator[Comparison]:
    x, g = (normal(ROWS, IN_FEATURES) for _ in range(2))
    weight = normal(2, IN_FEATURES)
    for shift in (None, normal(2, IN_FEATURES)):
        forward = (x, weight, shift, 0.0, 1e-6, False, dtype, True)
        yield "norm_rows", _dequantized(dispatch.norm_rows(*forward)), _dequantized(reference.norm_rows(*forward))
    for shift, residual_grad in ((None, None), (normal(2, IN_FEATURES), normal(ROWS, IN_FEATURES))):
        backward = (x, weight, shift, 0.0, 1e-6, False, g, None, None, residual_grad, True)
        yield "norm_gradient", dispatch.norm_gradient(*backward), reference.norm_gradient(*backward)
    added = (normal(2, ROWS // 2, IN_FEATURES), x.view(2, -1, IN_FEATURES), weight, 1e-6)
    yield "norm_residual", [dispatch.norm_residual(*added)], [reference.norm_residual(*added)]


def _swiglu_comparisons(normal: Callable[..., Tensor], dtype: torch.dtype) -> Iterator[Comparison]:
    a, b = normal(ROWS, 2 * GELU_FEATURES).chunk(2, -1)
    for left, silu in ((None, True), (normal(ROWS, LEFT_FEATURES), True), (None, False)):
        forward = (left, a, b, silu, dtype, True)
        yield "swiglu_rows", _dequantized(dispatch.swiglu_rows(*forward)), _dequantized(reference.swiglu_rows(*forward))
        g = normal(ROWS, GELU_FEATURES + (0 if left is None else LEFT_FEATURES))
        backward = (left, a, b, silu, g, True)
        found = [t for t in dispatch.swiglu_gradient(*backward) if t.numel()]  # as of GELU
        yield "swiglu_gradient", found, [t for t in reference.swiglu_gradient(*backward) if t.numel()]


def _gelu_comparisons(normal: Callable[..., Tensor], dtype: torch.dtype) -> Iterator[Comparison]:
    for left, geglu in ((normal(ROWS, LEFT_FEATURES), False), (None, True)):
        y = normal(ROWS, 2 * GELU_FEATURES)
        left_features = 0 if left is None else LEFT_FEATURES
        g = normal(ROWS, left_features + (GELU_FEATURES if geglu else 2 * GELU_FEATURES))
        forward = (left, y, geglu, dtype, True)
        yield "gelu_rows", _dequantized(dispatch.gelu_rows(*forward)), _dequantized(reference.gelu_rows(*forward))
        backward = (left, y, g, geglu, True)
        found = [t for t in dispatch.gelu_gradient(*backward) if t.numel()]  # without a left, its gradient is empty
        expected = [t for t in reference.gelu_gradient(*backward) if t.numel()]
        yield "gelu_gradient", found, expected


def _rope_comparisons(normal: Callable[..., Tensor]) -> Iterator[Comparison]:
    tokens = FIRST_TOKENS + SECOND_TOKENS
    first, second = (normal(2, n, 3 * HEADS * HEAD_DIM) for n in (FIRST_TOKENS, SECOND_TOKENS))
    first_q, first_k, second_q, second_k = (normal(HEAD_DIM) for _ in range(4))  # weights of the norms
    cos, sin = (normal(tokens, HEAD_DIM).float() for _ in range(2))
    forward = (first, first_q, first_k, second, second_q, second_k, cos, sin, 1e-6)
    yield "rotate", dispatch.rotate(*forward), rope_reference.rotate(*forward)
    gq, gk, gv = (normal(2, tokens, HEADS, HEAD_DIM) for _ in range(3))
    backward = (second, second_q, second_k, cos, sin, gq, gk, gv, FIRST_TOKENS, 1e-6)
    found = dispatch.rotate_gradient(*backward)
    yield "rotate_gradient", [found], [rope_reference.rotate_gradient(*backward)]
    turns = normal(2, FIRST_TOKENS, HEAD_DIM // 2, 2).float()  # other angles in each image
    heads = (normal(2, FIRST_TOKENS, HEADS * HEAD_DIM), first_q, turns)
    yield "rotate_heads", [dispatch.rotate_heads(*heads, 1e-6)], [rope_reference.rotate_heads(*heads, 1e-6)]
    of_heads = (*heads, gq[:, :FIRST_TOKENS], 1e-6)
    found = dispatch.rotate_heads_gradient(*of_heads)
    yield "rotate_heads_gradient", [found], [rope_reference.rotate_heads_gradient(*of_heads)]


def _adapter_column_parts(
    append: Callable[..., None], dtype: torch.dtype, x: Tensor, w: Tensor, h: Tensor, up: Tensor
) -> list[Tensor]:
    """The three parts (high, low, high; and high, high, low) that `append` writes after x and after a weight w."""
    padding = padding_for(RANK, IN_FEATURES)
    x8, x_scale = reference.quantize_rows(x, None, dtype, padding)
    w8, w_scale = reference.quantize_rows(w, None, dtype)
    w8 = reference.pad_columns(w8, padding)
    append(x8, x_scale, h, w8, w_scale.t().contiguous(), up, IN_FEATURES, 0.5)
    parts: list[Tensor] = []
    for matrix in (x8, w8):
        columns = matrix[:, IN_FEATURES:].float()
        parts += columns.split(RANK, 1)[:COLUMNS_PER_RANK]
    return parts


def _dequantized(quantized: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The numbers that values and scales stand for, and the 16-bit rows."""
    values, scale, rows = quantized
    return [values.float() * scale, rows]


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference of two tensors; infinite if one has a NaN."""
    errors = []
    for a, b in zip(found, expected, strict=True):
        if b.numel():
            difference = (a.double() - b.double()).norm() / b.double().norm()
            errors.append(difference.nan_to_num(float("inf")).item())
    return max(errors)
