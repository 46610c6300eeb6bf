"""Frozen linear layers in 8 bits, and the adapters on them. No weight gradient is ever formed.

Shapes: M tokens (rows), K input and N output features, R the adapter's rank. A weight is quantised once, by output
channel, and kept in 8 bits alone. Where a form multiplies in 8 bits, the input's rows are quantised by scales of their
own as they come; on the way back the weight's scales are folded into the gradient before its rows are quantised.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora as peft_lora

from trainer.precision import columns, fits_beside, room_for
from trainer.quantize import quantize_rows as reference_quantize_rows
from trainer.quantize import quantize_weight
from trainer.quantize import restored as reference_restored

if importlib.util.find_spec("triton"):
    from trainer.kernels import beside, quantize_rows, reads, restored, transpose
else:
    from trainer.quantize import beside, quantize_rows, reads, restored, transpose

Rows = torch.Tensor | None
LONG, FEW = 5120, 2**17  # of longer rows cuBLAS 13.0 has no product with a bias that has fewer numbers
BLOCK = 64  # numbers that share a scale in nf4
LEAST = 3e-4  # a matrix without any number of that size has no scale for what an adapter may come to

# ---- an operator, which the compiler takes as one. Defined plainly: what a call costs the host counts.
_OPERATORS = torch.library.Library("kiln", "FRAGMENT")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as the operator of this schema, on every device."""

    def register(function: Callable[..., Any]) -> Any:
        name = _OPERATORS.define(schema)
        _OPERATORS.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kiln::{name}", fake, lib=_OPERATORS)
        return getattr(torch.ops.kiln, name).default

    return register


@_operator(
    "fp8_product(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor? bias, Tensor? down, Tensor? up, int width,"
    " float times) -> Tensor",
    lambda x, x_scale, w, w_scale, bias, down, up, width, times: x.new_empty(  # noqa: ARG005
        x.shape[0], w.shape[0], dtype=torch.bfloat16
    ),
)
def fp8_product(
    x_MF: torch.Tensor,
    x_scale_M1: torch.Tensor,
    w_NF: torch.Tensor,
    w_scale_1N: torch.Tensor,
    bias_N: torch.Tensor | None,
    down_MR: torch.Tensor | None,
    up_NR: torch.Tensor | None,
    width: int,
    times: float,
) -> torch.Tensor:
    """(M, N) in bf16: x wᵀ + bias + down upᵀ, with x and w in FP8, which have K = `width` columns that count.

    The columns after K are there to be written over: where w has as many as the adapter takes, its part comes out of
    the same product, and x must have them too; else it is added in place. `times`: see `quantize.beside`. To the
    compiler this changes neither x nor w, for nobody else reads those columns.
    """
    room = 0
    if down_MR is not None and up_NR is not None and columns(down_MR.shape[1]) <= w_NF.shape[1] - width:
        beside(x_MF, x_scale_M1, down_MR, w_NF, w_scale_1N, up_NR, width, times)
        room = w_NF.shape[1] - width
    after = bias_N if width + room > LONG and len(x_MF) * len(w_NF) < FEW else None
    y_MN = torch._scaled_mm(
        x_MF[:, : width + room],
        w_NF[:, : width + room].t(),
        scale_a=x_scale_M1,
        scale_b=w_scale_1N,
        bias=bias_N if after is None else None,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    if after is not None:
        y_MN += after
    return y_MN if room or down_MR is None or up_NR is None else y_MN.addmm_(down_MR, up_NR.t())


# ---- the forms: how x wᵀ + bias + h up, and g w + gh down, are computed from a weight (N, K) and its scales (1, N)
OF_INPUTS = 4.0  # what `quantize.beside` makes an adapter's second matrix larger by, on the way forward


def of_gradients(width: int) -> float:
    """And the first one on the way back: its numbers begin at 1 / √K."""
    return 2.0 ** round(math.log2(16 * math.sqrt(width)))


def _fp8_forward(x, w, scale, bias, h, up):  # type: ignore[no-untyped-def]
    x8, x_scale = quantize_rows(x, None, w.dtype, w.shape[1] - x.shape[1])
    return fp8_product(x8, x_scale, w, scale, bias, h, up, x.shape[1], OF_INPUTS)


def fp8_gradient(g, w, scale, gh, down, turned, width):  # type: ignore[no-untyped-def]
    """g w + gh down, the gradient of an input of `width` numbers. `w` and `turned` may have columns beside them."""
    if turned is None:  # tensor cores sum along rows of both
        rank = 0 if down is None or w.shape[1] == width else len(down)
        turned = transpose(w[:, :width], room_for(rank, len(w)))
    g8, g_scale = quantize_rows(g, scale.to(torch.bfloat16), w.dtype, turned.shape[1] - g.shape[1])
    ones = torch.ones(1, width, device=g.device)
    up = None if down is None else down.t()
    return fp8_product(g8, g_scale, turned, ones, None, gh, up, g.shape[1], of_gradients(width))


def _int8_forward(x, w, scale, bias, h, up):  # type: ignore[no-untyped-def]
    x8, x_scale = quantize_rows(x, None, w.dtype)
    y = torch._int_mm(x8, w.t()).float() * x_scale * scale
    y = y if bias is None else y + bias
    return (y if h is None else y + h @ up.t()).to(x.dtype)


def _int8_backward(g, w, scale, gh, down, _turned, _width):  # type: ignore[no-untyped-def]
    g8, g_scale = quantize_rows(g, scale, w.dtype)
    gx = torch._int_mm(g8, w).float() * g_scale
    return (gx if gh is None else gx + gh @ down).to(g.dtype)


def whole(w_NK: torch.Tensor, scale_1N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight that 8 bits and scales stand for."""
    return (restored if reads(w_NK) else reference_restored)(w_NK, scale_1N, dtype)


def _nf4_store(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two numbers to a byte, (N, K / 2), and the scale of each block of 64, by bitsandbytes."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight_NK.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return packed.view(weight_NK.shape[0], -1), state.absmax.view(1, -1)


def _nf4_whole(w: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    restore = torch.ops.bitsandbytes.dequantize_4bit.default
    found: torch.Tensor = restore(w, scale.view(-1), BLOCK, "nf4", [w.shape[0], 2 * w.shape[1]], dtype)
    return found


# Operators, so that the compiler cannot keep the weight in 16 bits for the backward pass.
@_operator(
    "nf4_product(Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor? h, Tensor? up) -> Tensor",
    lambda x, w, scale, bias, h, up: x.new_empty(x.shape[0], w.shape[0]),  # noqa: ARG005
)
def _nf4_forward(x, w, scale, bias, h, up):  # type: ignore[no-untyped-def]
    y = F.linear(x, _nf4_whole(w, scale, x.dtype), bias)
    return y if h is None else y.addmm_(h, up.t())


@_operator(
    "nf4_gradient(Tensor g, Tensor w, Tensor scale, Tensor? gh, Tensor? down) -> Tensor",
    lambda g, w, scale, gh, down: g.new_empty(g.shape[0], 2 * w.shape[1]),  # noqa: ARG005
)
def _nf4_gradient(g, w, scale, gh, down):  # type: ignore[no-untyped-def]
    gx = g @ _nf4_whole(w, scale, g.dtype)
    return gx if gh is None else gx.addmm_(gh, down)


def _nf4_backward(g, w, scale, gh, down, _turned, _width):  # type: ignore[no-untyped-def]
    return _nf4_gradient(g, w, scale, gh, down)


@dataclass(frozen=True)
class Form:
    """How a frozen weight is kept and multiplied. `store`: (N, K) → what is kept of it, and its scales."""

    dtype: torch.dtype
    multiple: int = 1  # of both sides
    forward: Callable[..., torch.Tensor] | None = None  # None: by the weight that `whole` gives
    backward: Callable[..., torch.Tensor] | None = None
    whole: Callable[..., torch.Tensor] = whole
    turns: bool = False  # the way back reads the weight turned round

    def store(self, weight_NK: torch.Tensor, room: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        if self.dtype == torch.uint8:
            return _nf4_store(weight_NK)
        if self.turns:
            return quantize_weight(weight_NK, self.dtype, room)
        values, scale_N1 = reference_quantize_rows(weight_NK, None, self.dtype)
        return values, scale_N1.t().contiguous()

    def product(self, x, w, scale, bias, h, up):  # type: ignore[no-untyped-def]
        """x wᵀ + bias + h upᵀ."""
        if self.forward:
            return self.forward(x, w, scale, bias, h, up)
        y = F.linear(x, self.whole(w, scale, x.dtype), bias)
        return y if h is None else y + h @ up.t()

    def gradient(self, g, w, scale, gh, down, turned, width):  # type: ignore[no-untyped-def]
        """g w + gh down: of the input, K = `width`. `turned`: (K, N) of the weight, where a copy is kept."""
        if self.backward:
            return self.backward(g, w, scale, gh, down, turned, width)
        gx = g @ self.whole(w, scale, g.dtype)
        return gx if gh is None else gx + gh @ down


FORMS = {
    "fp8": Form(torch.float8_e4m3fn, 16, _fp8_forward, fp8_gradient, turns=True),
    "fp8-fnuz": Form(torch.float8_e4m3fnuz, 16, _fp8_forward, fp8_gradient, turns=True),
    "fp8-storage": Form(torch.float8_e4m3fn),
    "int8": Form(torch.int8, 16, _int8_forward, _int8_backward),
    "int8-storage": Form(torch.int8),
    "nf4": Form(torch.uint8, BLOCK, _nf4_forward, _nf4_backward, _nf4_whole),
}


STORED = {"fp8": "fp8-storage", "fp8-fnuz": "fp8-storage", "int8": "int8-storage"}  # multiplied in 16 bits instead


@contextlib.contextmanager
def exactly(model: torch.nn.Module) -> Iterator[None]:
    """Inside, frozen weights are multiplied in 16 bits or more: no rounding of an input to 8 changes what comes out."""
    layers = [(m, m.form) for m in model.modules() if isinstance(m, FrozenLinear)]
    linear, plain = torch.nn.Linear, torch.nn.Linear.forward
    others = [m for m in model.modules() if isinstance(m, linear) and type(m).forward is not plain]  # torchao's
    try:
        for layer, form in layers:
            layer.form = STORED.get(form, form)
        for other in others:
            other.__dict__["forward"] = types.MethodType(plain, other)
        yield
    finally:
        for layer, form in layers:
            layer.form = form
        for other in others:
            del other.__dict__["forward"]


class _Product(torch.autograd.Function):
    """x wᵀ + bias + (x downᵀ) upᵀ for a frozen weight w in one of the forms."""

    @staticmethod
    def forward(ctx: Any, x, w, scale, bias, down, up, turned, form):  # type: ignore[no-untyped-def]
        h_MR = None if down is None else x @ down.t()
        ctx.form, ctx.width = form, x.shape[1]
        ctx.save_for_backward(None if down is None else x, h_MR, w, scale, down, up, turned)
        return FORMS[form].product(x, w, scale, bias, h_MR, up)

    @staticmethod
    def backward(ctx: Any, g):  # type: ignore[no-untyped-def]
        x, h_MR, w, scale, down, up, turned = ctx.saved_tensors
        g = g.contiguous()
        gh_MR = None if up is None else g @ up
        gx = None
        if ctx.needs_input_grad[0]:
            gx = FORMS[ctx.form].gradient(g, w, scale, gh_MR, down, turned, ctx.width)
        if gh_MR is None:
            return gx, None, None, None, None, None, None, None
        return gx, None, None, None, gh_MR.t() @ x, g.t() @ h_MR, None, None


@torch.compiler.allow_in_graph
def product(x, w, scale, bias, down, up, turned, form):  # type: ignore[no-untyped-def]
    """`_Product`, which the compiler need not look into to differentiate."""
    return _Product.apply(x, w, scale, bias, down, up, turned, form)


class FrozenLinear(torch.nn.Module):
    """A linear layer whose weight is kept in 8 bits or 4 and never trained. `form`: a key of `FORMS`.

    `rank`: of the adapter that it will get. Where it multiplies in FP8, there are columns beside the weight for that.
    """

    weight_NF: torch.Tensor
    scale_1N: torch.Tensor
    turned_KF: torch.Tensor | None

    def __init__(self, linear: torch.nn.Linear, form: str, rank: int = 0) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = linear.in_features, linear.out_features, form
        worth = self.in_fp8 and fits_beside(rank, min(linear.weight.shape))
        self.rank = rank if worth and linear.weight.abs().max() >= LEAST else 0
        room = room_for(self.rank, self.in_features)
        values, scales = FORMS[form].store(linear.weight.detach(), room)
        self.width = values.shape[1] - room
        self.register_buffer("weight_NF", values)
        self.register_buffer("scale_1N", scales)
        self.register_buffer("turned_KF", None)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    @property
    def in_fp8(self) -> bool:
        """Whether it multiplies in FP8, both ways."""
        return FORMS[self.form].turns

    @property
    def weight_NK(self) -> torch.Tensor:
        """As it is kept, without what is beside it."""
        return self.weight_NF[:, : self.width]

    def turn(self, keep: bool) -> None:
        """Keep a copy of the weight turned round, or do not: the way back then need not turn it each time."""
        room = room_for(self.rank, self.out_features)
        self.turned_KF = transpose(self.weight_NK, room) if keep and self.in_fp8 else None

    def narrow(self) -> None:
        """Give up the columns beside the weight."""
        self.rank, self.weight_NF = 0, self.weight_NK.contiguous()

    @property
    def weight(self) -> torch.Tensor:
        """The weight that it stands for, (N, K), made anew each time."""
        return FORMS[self.form].whole(self.weight_NK, self.scale_1N, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, None, None)

    def product(self, x: torch.Tensor, down_RK: Rows, up_NR: Rows) -> torch.Tensor:
        """x wᵀ + bias + (x downᵀ) upᵀ, (…, N)."""
        rows = x.reshape(-1, self.in_features)
        w = self.weight_NF if self.in_fp8 else self.weight_NK
        y = product(rows, w, self.scale_1N, self.bias, down_RK, up_NR, self.turned_KF, self.form)
        return y.view(*x.shape[:-1], self.out_features)


class Adapted(peft_lora.Linear):
    """peft's LoRA layer; on a frozen layer the adapter is part of its product. Adapters are kept in fp32."""

    ready: tuple[torch.Tensor, torch.Tensor] | None = None  # its halves, where they are made for all (trainer.halves)

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether it is the product of two matrices, and no more, that peft need not compute."""
        special = self.disable_adapters or self.merged or self.lora_variant
        # In fp32 peft's own arithmetic is as good; in 16 bits it would compute the adapter's part in fp32.
        return not special and dtype != torch.float32 and isinstance(self.lora_dropout["default"], torch.nn.Identity)

    def halves(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Its two matrices, the second one scaled; None where peft has to compute it."""
        if not self.is_plain(dtype):
            return None
        if self.ready is not None and self.ready[0].dtype == dtype:
            return self.ready
        up = (self.lora_B["default"].weight * self.scaling["default"]).to(dtype)
        return self.lora_A["default"].weight.to(dtype), up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = self.halves(x.dtype)
        if halves is None:
            return super().forward(x)
        down, up = halves
        if isinstance(self.base_layer, FrozenLinear):
            return self.base_layer.product(x, down, up)
        return self.base_layer(x) + F.linear(F.linear(x, down), up)


def freeze(block: torch.nn.Module, form: str, rank: Callable[[str], int] = lambda _: 0) -> None:
    """Replace the linear layers in `block`, in place. Modulations, with one row a picture, are only stored in 8 bits.

    Layers whose sides are no multiples of what the form needs stay as they are. `rank`: of the adapter that the layer
    of a name will get.
    """
    if form == "torchao":
        _train_in_float8(block)
        return
    stored = STORED.get(form, form)
    for name, layer in list(block.named_modules()):
        if not isinstance(layer, torch.nn.Linear):
            continue
        here = stored if "norm" in name else form
        if layer.in_features % FORMS[here].multiple or layer.out_features % FORMS[here].multiple:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, FrozenLinear(layer, here, rank(name)))


def _train_in_float8(block: torch.nn.Module) -> None:
    """torchao's float8 training: weights in 16 bits, quantised tensor by tensor in each product.

    As in its published recipe for diffusion models, `proj_out` and sizes that 16 does not divide stay as they are.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(layer: torch.nn.Module, name: str) -> bool:
        sides = (layer.in_features, layer.out_features) if isinstance(layer, torch.nn.Linear) else (1,)
        return "proj_out" not in name and not any(side % 16 for side in sides)

    on_cpu = next(block.parameters()).device.type == "cpu"  # which has no such products
    convert_to_float8_training(
        block, module_filter_fn=fits, config=Float8LinearConfig(pad_inner_dim=True, emulate=on_cpu)
    )
