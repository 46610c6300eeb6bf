"""Our Triton kernels in Triton's interpreter, against float64 and the references in plain torch.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_kernels

Prints a line of JSON: for each FP8 type and comparison, the relative error (for what must be equal, the share of other
bytes). A process of its own, because Triton reads the variable when kernels are defined, and operators are plain
functions here.

Two things of the interpreter (Triton 3.7) are replaced. It cannot name the types of CDNA 3, and its conversions round a
half up and cut off subnormal numbers. Here torch converts, which rounds as the hardware does: to the nearest, halves to
the even number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TYPES = {
    "fp8e4nv": torch.float8_e4m3fn, "fp8e4b8": torch.float8_e4m3fnuz, "fp8e5": torch.float8_e5m2,
    "fp8e5b16": torch.float8_e5m2fnuz, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
    "fp64": torch.float64,
}  # fmt: skip
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ROWS, WIDTH, RANK, OUT = 4, 192, 5, 160  # no multiples of the blocks that the kernels work in
LEFT, GELU = 1100, 1040  # more than one chunk
TOKENS, MORE_TOKENS, HEADS, HEAD_DIM = 3, 2, 3, 16
EPS = 1e-6


def convert(values: np.ndarray, source: object, target: object, _rounding: object) -> np.ndarray:
    """In the place of the interpreter's: the bits of `values`, in the type `source`, as those of `target`."""
    numbers = torch.frombuffer(bytearray(values.tobytes()), dtype=TYPES[source.name]).to(TYPES[target.name])
    unsigned = np.dtype(f"uint{8 * numbers.element_size()}")
    return numbers.view(BITS[numbers.element_size()]).numpy().view(unsigned).reshape(values.shape)


def prepare_interpreter() -> None:
    """See the module."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_core

    def patch_lang_core(lang: object, scope: object) -> None:
        patch(lang, scope)
        to_ir = lang.dtype.to_ir

        def with_fnuz(self: object, builder: object) -> object:
            if self.name in ("fp8e4b8", "fp8e5b16"):
                return getattr(builder, f"get_{self.name}_ty")()
            return to_ir(self, builder)

        scope.set_attr(lang.dtype, "to_ir", with_fnuz)

    interpreter._patch_lang_core = patch_lang_core
    interpreter._convert_float = convert


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).nan_to_num(float("inf")).item()


def other_bytes(found: Tensor, wanted: Tensor) -> float:
    return (found.contiguous().view(torch.uint8) != wanted.contiguous().view(torch.uint8)).float().mean().item()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


Compared = Iterator[tuple[str, float]]


def norms(dispatch: object, dtype: torch.dtype) -> Compared:
    x, g1, g2, residual = (normal(ROWS, WIDTH) for _ in range(4))
    scale, shift = normal(2, WIDTH), normal(2, WIDTH)
    exact = x.double().requires_grad_()
    per_image = ROWS // 2
    modulated = F.layer_norm(exact, (WIDTH,), eps=EPS) * (1 + scale.double().repeat_interleave(per_image, 0))
    modulated = modulated + shift.double().repeat_interleave(per_image, 0)
    values, scales, rows = dispatch.norm_rows(x, scale, shift, 1.0, EPS, True, dtype, True, 32)
    yield "norm_rows: 16 bits", error(rows, modulated.detach())
    yield "norm_rows: 8 bits", error(values[:, :WIDTH].float() * scales, modulated.detach())
    (gradient,) = torch.autograd.grad(modulated, exact, g1.double() + g2.double())
    found, again = dispatch.norm_gradient(x, scale, shift, 1.0, EPS, True, g1, g2, None, residual, True)
    yield "norm_gradient", error(found, gradient + residual.double())
    yield "norm_gradient: rows", other_bytes(again, rows)


def rms_norms(dispatch: object, dtype: torch.dtype) -> Compared:
    """Without a shift and with one; with weights of 16 bits, and with what norms and modulations make in 32."""
    x, g1, g2, residual = ((normal(ROWS, WIDTH).double() + 1).bfloat16() for _ in range(4))
    for name, scale, shift, past in (
        ("", normal(2, WIDTH), None, None),
        (" and a residual", normal(2, WIDTH).float(), None, residual),
        (" and a shift", normal(2, WIDTH).float(), normal(2, WIDTH), residual),
    ):
        exact = x.double().requires_grad_()
        modulated = exact * (exact.square().mean(-1, keepdim=True) + EPS).rsqrt()
        modulated = modulated * scale.double().repeat_interleave(ROWS // 2, 0)
        if shift is not None:
            modulated = modulated + shift.double().repeat_interleave(ROWS // 2, 0)
        values, scales, rows = dispatch.norm_rows(x, scale, shift, 0.0, EPS, False, dtype, True, 32)
        yield f"norm_rows, RMS{name}: 16 bits", error(rows, modulated.detach())
        yield f"norm_rows, RMS{name}: 8 bits", error(values[:, :WIDTH].float() * scales, modulated.detach())
        (gradient,) = torch.autograd.grad(modulated, exact, g1.double() + g2.double())
        found, again = dispatch.norm_gradient(x, scale, shift, 0.0, EPS, False, g1, g2, None, past, True)
        yield f"norm_gradient, RMS{name}", error(found, gradient if past is None else gradient + past.double())
        yield f"norm_gradient, RMS{name}: rows", other_bytes(again, rows)


def gelus(dispatch: object, dtype: torch.dtype) -> Compared:
    for geglu in (False, True):
        name = "geglu" if geglu else "gelu"
        left = None if geglu else normal(2, LEFT)
        y = normal(2, GELU * (2 if geglu else 1))
        exact = y.double().requires_grad_()
        if geglu:
            a, b = exact.chunk(2, -1)
            wanted = a * F.gelu(b)
        else:
            wanted = F.gelu(exact, approximate="tanh")
        width = LEFT if left is not None else 0
        joined = wanted.detach() if left is None else torch.cat([left.double(), wanted.detach()], 1)
        values, scales, rows = dispatch.gelu_rows(left, y, geglu, dtype, True)
        yield f"{name}_rows: 16 bits", error(rows, joined)
        yield f"{name}_rows: 8 bits", error(values.float() * scales, joined)
        g = normal(2, width + GELU)
        (gradient,) = torch.autograd.grad(wanted, exact, g[:, width:].double())
        found, of_left, again = dispatch.gelu_gradient(left, y, g, geglu, True)
        yield f"{name}_gradient", error(found, gradient)
        yield f"{name}_gradient: rows", other_bytes(again, rows)
        if left is not None:
            yield f"{name}_gradient: left", other_bytes(of_left, g[:, :width])


def swiglus(dispatch: object, dtype: torch.dtype) -> Compared:
    """Of halves of one row, as a joined layer leaves them, and of two layers' outputs; behind other features too.

    And the gate of attention, whose gradient is another one.
    """
    joined = normal(2, 2 * GELU)
    halves = {"joined": joined.chunk(2, -1), "separate": (normal(2, GELU), normal(2, GELU))}
    for name, left, (a, b) in (
        ("joined", None, halves["joined"]),
        ("separate", None, halves["separate"]),
        ("with left", normal(2, LEFT), halves["joined"]),
        ("without silu", None, halves["separate"]),
    ):
        silu = name != "without silu"
        exact = [half.double().requires_grad_() for half in (a, b)]
        wanted = (F.silu(exact[0]) if silu else exact[0].sigmoid()) * exact[1]
        width = 0 if left is None else LEFT
        row = wanted.detach() if left is None else torch.cat([left.double(), wanted.detach()], 1)
        values, scales, rows = dispatch.swiglu_rows(left, a, b, silu, dtype, True, 16)
        yield f"swiglu_rows, {name}: 16 bits", error(rows, row)
        yield f"swiglu_rows, {name}: 8 bits", error(values[:, : width + GELU].float() * scales, row)
        g = normal(2, width + GELU)
        gradients = torch.autograd.grad(wanted, exact, g[:, width:].double())
        *found, of_left, again = dispatch.swiglu_gradient(left, a, b, silu, g, True)
        for of, got, gradient in zip("ab", found, gradients, strict=True):
            yield f"swiglu_gradient, {name}: of {of}", error(got, gradient)
        yield f"swiglu_gradient, {name}: rows", other_bytes(again, rows)
        if left is not None:
            yield f"swiglu_gradient, {name}: left", other_bytes(of_left, g[:, :width])


def head_rotations(dispatch: object) -> Compared:
    """Each pair of a head's features as one complex number; angles of each image, of all, or of all tokens too."""
    x, weight, g = normal(2, TOKENS, HEADS * HEAD_DIM), normal(HEAD_DIM), normal(2, TOKENS, HEADS, HEAD_DIM)
    for images, tokens, name in ((2, TOKENS, ""), (1, TOKENS, ", one for all images"), (1, 1, ", one for all tokens")):
        angles = torch.rand(images, tokens, HEAD_DIM // 2) * 6
        turns = torch.polar(torch.ones_like(angles), angles)
        exact = x.double().requires_grad_()
        heads = exact.unflatten(2, (HEADS, HEAD_DIM))
        heads = heads * (heads.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
        pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
        wanted = torch.view_as_real(pairs * turns.to(torch.complex128)[:, :, None]).flatten(-2)
        given = x, weight, torch.view_as_real(turns)
        yield f"rotate_heads{name}: 16 bits", error(dispatch.rotate_heads(*given, EPS), wanted.detach())
        (gradient,) = torch.autograd.grad(wanted, exact, g.double())
        yield f"rotate_heads_gradient{name}", error(dispatch.rotate_heads_gradient(*given, g, EPS), gradient)


def quantisation(dispatch: object, reference: object, dtype: torch.dtype) -> Compared:
    x = normal(ROWS, WIDTH)
    x[1] = 0
    x[2, 3], x[2, 4], x[2, 5] = float("inf"), -1e-30, 1e30
    column_scales = (torch.rand(1, WIDTH) + 0.1).bfloat16()
    for kind in (dtype, torch.int8):
        for name, scales in (("", None), (", column scales", column_scales)):
            found, expected = (module.quantize_rows(x, scales, kind) for module in (dispatch, reference))
            yield f"quantize_rows {kind}{name}", max(map(other_bytes, found, expected))
        values, scale = reference.quantize_rows(normal(ROWS, WIDTH), None, kind)
        given = values, scale.t().contiguous(), torch.bfloat16
        yield (
            f"dequantize_rows {kind}",
            other_bytes(dispatch.dequantize_rows(*given), reference.dequantize_rows(*given)),
        )
    x[3, 7] = float("nan")
    values, scales = dispatch.quantize_rows(x, None, dtype)
    yield "quantize_rows: a NaN that is lost", float(not (values.float() * scales)[3].isnan().any())
    yield "quantize_rows: another row with a NaN", float((values[:3].float() * scales[:3]).isnan().any())
    w = values[:, :100]  # rows with a stride
    yield "transpose", other_bytes(dispatch.transpose(w, 16)[:, :ROWS], w.t())


def adapter_columns(dispatch: object, reference: object, dtype: torch.dtype) -> Compared:
    """The product of the columns alone is that of h and B; in the backward pass, with as large a factor as there is."""
    from trainer.engine.quantization.formats import FORWARD_UP_FACTOR, backward_up_factor
    from trainer.spec.adapter_columns import padding_for

    padding = padding_for(RANK, WIDTH)
    for name, factor, size in (("forward", FORWARD_UP_FACTOR, 0.02), ("backward", backward_up_factor(WIDTH), 0.06)):
        x, w, h, up = normal(ROWS, WIDTH), normal(OUT, WIDTH) * 0.05, normal(ROWS, RANK), normal(OUT, RANK) * size
        x8, x_scale = reference.quantize_rows(x, None, dtype, padding)
        w8, w_scale = reference.quantize_weight(w, dtype, padding)
        if name == "backward":
            w_scale = torch.ones(1, OUT)
        dispatch.append_adapter_columns(x8, x_scale, h, w8, w_scale, up, WIDTH, factor)
        columns = (x8[:, WIDTH:].double() * x_scale) @ (w8[:, WIDTH:].double() * w_scale.t()).t()
        yield f"append_adapter_columns: {name}", error(columns, h.double() @ up.double().t())


def rotations(dispatch: object) -> Compared:
    """Each pair of a head's features as one complex number."""
    tokens = TOKENS + MORE_TOKENS
    first = normal(2, TOKENS, 3 * HEADS * HEAD_DIM)
    second = normal(2, MORE_TOKENS, 3 * HEADS * HEAD_DIM + 24)[..., :-24]  # a part of wider rows
    weights = [normal(HEAD_DIM) for _ in range(4)]
    angles = torch.rand(tokens, HEAD_DIM // 2) * 6
    cos, sin = (part(angles).repeat_interleave(2, 1) for part in (torch.cos, torch.sin))
    turn = torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())
    exact = [source.double().requires_grad_() for source in (first, second)]
    parts = [source.unflatten(2, (3, HEADS, HEAD_DIM)) for source in exact]
    wanted = []
    for which in range(2):  # queries, keys
        heads = []
        for source, part in enumerate(parts):
            x = part[:, :, which]
            norm = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
            heads.append(norm * weights[2 * source + which].double())
        pairs = torch.view_as_complex(torch.cat(heads, 1).unflatten(-1, (-1, 2)).contiguous())
        wanted.append(torch.view_as_real(pairs * turn[:, None]).flatten(-2))
    wanted.append(torch.cat([part[:, :, 2] for part in parts], 1))
    found = dispatch.rotate(first, weights[0], weights[1], second, weights[2], weights[3], cos, sin, EPS)
    for name, a, b in zip("qkv", found, wanted, strict=True):
        yield f"rotate: {name}", error(a, b.detach())
    gradients = [normal(2, tokens, HEADS, HEAD_DIM) for _ in range(3)]
    expected = torch.autograd.grad(wanted, exact, [g.double() for g in gradients])
    for source, offset, norms_of, g in (
        (first, 0, weights[:2], expected[0]),
        (second, TOKENS, weights[2:], expected[1]),
    ):
        yield (
            f"rotate_gradient at {offset}",
            error(dispatch.rotate_gradient(source, *norms_of, cos, sin, *gradients, offset, EPS), g),
        )


def residuals(dispatch: object) -> Compared:
    joined, gate = normal(2, 5, WIDTH), normal(2, 3 * WIDTH)[:, WIDTH : 2 * WIDTH]
    x, y = joined[:, :3], normal(2, 3, WIDTH)
    exact = gate.double()[:, None] * y.double()
    yield "gated_residual", error(dispatch.gated_residual(x, gate, y), x.double() + exact)
    yield "gated_residual, without x", error(dispatch.gated_residual(None, gate, y), exact)
    y_hat = y.double() * (y.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    wanted = x.double() + gate.double()[:, None] * y_hat
    yield "norm_residual", error(dispatch.norm_residual(x, y, gate, EPS), wanted)


def main() -> None:
    prepare_interpreter()
    from bench.targets.launches import import_kernels

    import_kernels()
    from trainer.engine.kernels import dispatch, reference

    dispatch._on_cpu = lambda _arguments: False
    torch.manual_seed(0)
    compared = dict(rotations(dispatch)) | dict(head_rotations(dispatch)) | dict(residuals(dispatch))
    for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        for comparisons in (
            norms(dispatch, dtype),
            rms_norms(dispatch, dtype),
            gelus(dispatch, dtype),
            swiglus(dispatch, dtype),
            quantisation(dispatch, reference, dtype),
            adapter_columns(dispatch, reference, dtype),
        ):
            compared |= {f"{dtype}: {name}": found for name, found in comparisons}
    print(json.dumps(compared))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    main()
