"""Which kernels run: Triton's on an accelerator where Triton is installed, else their references in plain torch.

The only place that decides it. `self_test` compares what is chosen here with the references on the job's own device.

On CPU tensors the references run whether Triton is installed or not. They are called here, and not registered as the
operators' kernels for the CPU: the compiler takes an operator of Triton apart, and would compile it for a CPU as well.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.nn import Parameter

from trainer.engine.kernels import reference, rope_reference

Result = TypeVar("Result")


def _first_tensor(arguments: tuple[object, ...]) -> Tensor | None:
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument
    return None


def _on_cpu(arguments: tuple[object, ...]) -> bool:
    """Whether the first tensor among the arguments is on the CPU; they all are on one device."""
    tensor = _first_tensor(arguments)
    return tensor is None or tensor.is_cpu


def _by_device(kernel: Callable[..., Result], plain: Callable[..., Result]) -> Callable[..., Result]:
    """`kernel` on an accelerator, `plain` on a CPU.

    Only the compiler needs to see an operator. Elsewhere its own function is called, without torch's dispatcher, on
    which the host spends several times as long as on the launch itself. The compiler is known by its tensors, which are
    of classes that hold no data: `torch.compiler.is_compiling()` is false in functions that it takes into its graph
    without tracing them (`torch.compiler.allow_in_graph`).
    """
    launch: Callable[..., Result] = getattr(kernel, "_init_fn", kernel)

    @functools.wraps(plain)
    def chosen(*args: object) -> Result:
        if _on_cpu(args):
            return plain(*args)
        if torch.compiler.is_compiling() or type(_first_tensor(args)) not in (Tensor, Parameter):
            return kernel(*args)
        with set_wrap_triton_enabled(enabled=False):
            return launch(*args)

    return chosen


append_adapter_columns: Callable[..., None] = reference.append_adapter_columns
can_dequantize: Callable[..., bool] = reference.can_dequantize
dequantize_rows: Callable[..., Tensor] = reference.dequantize_rows
gated_residual: Callable[..., Tensor] = reference.gated_residual
gelu_gradient: Callable[..., tuple[Tensor, Tensor, Tensor]] = reference.gelu_gradient
gelu_rows: Callable[..., tuple[Tensor, Tensor, Tensor]] = reference.gelu_rows
norm_gradient: Callable[..., tuple[Tensor, Tensor]] = reference.norm_gradient
norm_residual: Callable[..., Tensor] = reference.norm_residual
norm_rows: Callable[..., tuple[Tensor, Tensor, Tensor]] = reference.norm_rows
quantize_rows: Callable[..., tuple[Tensor, Tensor]] = reference.quantize_rows
rotate: Callable[..., tuple[Tensor, Tensor, Tensor]] = rope_reference.rotate
rotate_gradient: Callable[..., Tensor] = rope_reference.rotate_gradient
rotate_heads: Callable[..., Tensor] = rope_reference.rotate_heads
rotate_heads_gradient: Callable[..., Tensor] = rope_reference.rotate_heads_gradient
swiglu_gradient: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = reference.swiglu_gradient
swiglu_rows: Callable[..., tuple[Tensor, Tensor, Tensor]] = reference.swiglu_rows
transpose: Callable[..., Tensor] = reference.transpose

if importlib.util.find_spec("triton"):
    from trainer.engine.kernels import norm_gelu_triton, quantize_triton, rope_triton, swiglu_triton

    append_adapter_columns = _by_device(quantize_triton.append_adapter_columns, append_adapter_columns)
    can_dequantize = _by_device(quantize_triton.can_dequantize, can_dequantize)
    dequantize_rows = _by_device(quantize_triton.dequantize_rows, dequantize_rows)
    gated_residual = _by_device(quantize_triton.gated_residual, gated_residual)
    gelu_gradient = _by_device(norm_gelu_triton.gelu_gradient, gelu_gradient)
    gelu_rows = _by_device(norm_gelu_triton.gelu_rows, gelu_rows)
    norm_gradient = _by_device(norm_gelu_triton.norm_gradient, norm_gradient)
    norm_residual = _by_device(norm_gelu_triton.norm_residual, norm_residual)
    norm_rows = _by_device(norm_gelu_triton.norm_rows, norm_rows)
    quantize_rows = _by_device(quantize_triton.quantize_rows, quantize_rows)
    rotate = _by_device(rope_triton.rotate, rotate)
    rotate_gradient = _by_device(rope_triton.rotate_gradient, rotate_gradient)
    rotate_heads = _by_device(rope_triton.rotate_heads, rotate_heads)
    rotate_heads_gradient = _by_device(rope_triton.rotate_heads_gradient, rotate_heads_gradient)
    swiglu_gradient = _by_device(swiglu_triton.swiglu_gradient, swiglu_gradient)
    swiglu_rows = _by_device(swiglu_triton.swiglu_rows, swiglu_rows)
    transpose = _by_device(quantize_triton.transpose, transpose)
