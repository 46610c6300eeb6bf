"""Linear layers whose weight is frozen and stored in 8 or 4 bits, with an optional LoRA term in their product.

The weight is quantised once, when the model is loaded, and only the quantised copy is kept. No gradient of the weight
is ever formed. See the package for which products run in which format.

Letters: M rows (tokens), K input and N output features, R the adapter's rank, F = K + padding (the length of a row of
an FP8 matrix). `down` is A (R, K) and `up` is B (N, R), both in 16 bits, B times alpha / rank.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from trainer.engine.kernels.dispatch import transpose
from trainer.engine.quantization.formats import MIN_LARGEST_WEIGHT, STORAGE_ONLY, WEIGHT_FORMATS
from trainer.spec.adapter_columns import fits_adapter_columns, padding_for

MODULATIONS = ("norm", "modulation", "_mod.")  # parts of the names of layers that compute scales, shifts and gates


@contextlib.contextmanager
def dequantized_matmul(model: torch.nn.Module) -> Iterator[None]:
    """Inside, products of frozen weights run in 16 bits or more, so that results can be compared closely.

    With FP8 products, the last bit of an input can become a step of 3 bits: two outputs of the same weights were 2.4e-2
    apart, and a correct file was refused.
    """
    layers: list[tuple[FrozenLinear, str]] = []
    torchao_layers: list[torch.nn.Module] = []
    plain_forward = torch.nn.Linear.forward
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            layers.append((module, module.weight_format))
        elif isinstance(module, torch.nn.Linear) and type(module).forward is not plain_forward:
            torchao_layers.append(module)
    try:
        for layer, weight_format in layers:
            layer.weight_format = STORAGE_ONLY.get(weight_format, weight_format)
        for torchao_layer in torchao_layers:
            torchao_layer.__dict__["forward"] = types.MethodType(plain_forward, torchao_layer)
        yield
    finally:
        for layer, weight_format in layers:
            layer.weight_format = weight_format
        for torchao_layer in torchao_layers:
            del torchao_layer.__dict__["forward"]


class _LinearFunction(torch.autograd.Function):
    """y = x wᵀ + bias + (x Aᵀ) Bᵀ for a frozen weight w. Saves x and h = x Aᵀ only if there is an adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        weight_t: Tensor | None,
        weight_format: str,
    ) -> Tensor:
        h_MR = None if down is None else x @ down.t()
        ctx.weight_format = weight_format
        ctx.in_features = x.shape[1]
        x_for_adapter = None if down is None else x  # only A's gradient needs it
        ctx.save_for_backward(x_for_adapter, h_MR, w, scale, down, up, weight_t)
        return WEIGHT_FORMATS[weight_format].linear(x, w, scale, bias, h_MR, up)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, h_MR, w, scale, down, up, weight_t = ctx.saved_tensors
        g = g.contiguous()  # a gradient may be part of longer rows
        gh_MR = None if up is None else g @ up
        gx = None
        if ctx.needs_input_grad[0]:
            weight_format = WEIGHT_FORMATS[ctx.weight_format]
            gx = weight_format.input_gradient(g, w, scale, gh_MR, down, weight_t, ctx.in_features)
        if gh_MR is None:
            return gx, None, None, None, None, None, None, None
        return gx, None, None, None, gh_MR.t() @ x, g.t() @ h_MR, None, None


@torch.compiler.allow_in_graph
def linear_function(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    weight_t: Tensor | None,
    weight_format: str,
) -> Tensor:
    """`_LinearFunction`. The compiler takes it into its graph without tracing it and differentiates by its backward.

    Without `allow_in_graph`, dynamo fails on an autograd function inside a checkpoint inside a compiled region.
    """
    y: Tensor = _LinearFunction.apply(x, w, scale, bias, down, up, weight_t, weight_format)
    return y


class FrozenLinear(torch.nn.Module):
    """A linear layer whose weight is stored in 8 or 4 bits and never trained.

    `weight_format`: a key of `WEIGHT_FORMATS`. `rank`: of the adapter that the layer will get. An FP8 layer that is
    large enough gets columns for it; `self.rank` is 0 if it has none.
    """

    weight_NF: Tensor  # nf4: (N, K / 2)
    scale_1N: Tensor
    weight_t_KN: Tensor | None  # the transposed copy, (K, N + padding); see keep_transposed

    def __init__(self, linear: torch.nn.Linear, weight_format: str, rank: int = 0) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight_format = weight_format
        fits = self.in_fp8 and fits_adapter_columns(rank, min(linear.weight.shape))
        self.rank = 0
        if fits and linear.weight.abs().max() >= MIN_LARGEST_WEIGHT:
            self.rank = rank
        padding = padding_for(self.rank, self.in_features)
        values, scales = WEIGHT_FORMATS[weight_format].store(linear.weight.detach(), padding)
        self.stored_columns = values.shape[1] - padding
        self.register_buffer("weight_NF", values)
        self.register_buffer("scale_1N", scales)
        self.register_buffer("weight_t_KN", None)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    @property
    def in_fp8(self) -> bool:
        """Whether the layer multiplies in FP8, forward and backward."""
        return WEIGHT_FORMATS[self.weight_format].transposes

    @property
    def weight_NK(self) -> Tensor:
        """The stored values without the adapter columns. nf4: (N, K / 2)."""
        return self.weight_NF[:, : self.stored_columns]

    def keep_transposed(self, keep: bool) -> None:
        """Keep a transposed copy of an FP8 weight, or drop it; without it, the backward pass transposes each time.

        At 512 x 512, copies save Flux.1 266 kernels of 22 µs a step. They take as much memory as the weights.
        """
        self.weight_t_KN = None
        if keep and self.in_fp8:
            self.weight_t_KN = transpose(self.weight_NK, padding_for(self.rank, self.out_features))

    def drop_adapter_columns(self) -> None:
        """Store the weight without adapter columns. The LoRA term is then added after the product."""
        self.rank = 0
        self.weight_NF = self.weight_NK.contiguous()

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, (N, K), computed anew each time."""
        return WEIGHT_FORMATS[self.weight_format].dequantize(self.weight_NK, self.scale_1N, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, None, None)

    def linear(self, x: Tensor, down_RK: Tensor | None, up_NR: Tensor | None) -> Tensor:
        """x wᵀ + bias + (x downᵀ) upᵀ, (…, N), for x (…, K). down and up: both or neither."""
        rows_MK = x.reshape(-1, self.in_features)
        w = self.weight_NF if self.in_fp8 else self.weight_NK  # inside `dequantized_matmul`: without columns
        y_MN = linear_function(
            rows_MK, w, self.scale_1N, self.bias, down_RK, up_NR, self.weight_t_KN, self.weight_format
        )
        return y_MN.view(*x.shape[:-1], self.out_features)


def freeze(block: torch.nn.Module, weight_format: str, rank: Callable[[str], int] = lambda _: 0) -> None:
    """Replace the linear layers in `block` by frozen ones, in place.

    Layers whose sides are not multiples of what the format needs stay as they are. Modulations (`MODULATIONS`) only
    store 8 bits and multiply in 16: they have one row an image, so FP8 products would save nothing.
    `rank`: of the adapter that the layer of this name will get; 0 for none.
    """
    if weight_format == "torchao":
        _train_in_float8(block)
        return
    storage_format = STORAGE_ONLY.get(weight_format, weight_format)
    for name, layer in list(block.named_modules()):
        if not isinstance(layer, torch.nn.Linear):
            continue
        is_modulation = any(part in name for part in MODULATIONS)
        layer_format = storage_format if is_modulation else weight_format
        multiple = WEIGHT_FORMATS[layer_format].multiple
        if layer.in_features % multiple or layer.out_features % multiple:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, FrozenLinear(layer, layer_format, rank(name)))


def _train_in_float8(block: torch.nn.Module) -> None:
    """torchao's float8 training, to compare with: weights stay in 16 bits, and each product quantises both tensors.

    As in torchao's published recipe for diffusion models, `proj_out` and sizes that 16 does not divide are left out.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # heavy, and only this format needs it

    def fits(layer: torch.nn.Module, name: str) -> bool:
        if not isinstance(layer, torch.nn.Linear) or "proj_out" in name:
            return False
        return layer.in_features % 16 == 0 and layer.out_features % 16 == 0

    on_cpu = next(block.parameters()).device.type == "cpu"  # where torch has no FP8 products with these scales
    convert_to_float8_training(
        block, module_filter_fn=fits, config=Float8LinearConfig(pad_inner_dim=True, emulate=on_cpu)
    )
