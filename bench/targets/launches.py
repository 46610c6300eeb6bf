"""What the engine launches: each Triton kernel with its constants, types and alignments.

Import this module before any of `trainer.engine`. It makes our operators plain functions, so that a step on tensors of
the device "meta" reaches the launches themselves.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction, MockTensor

ALIGNMENT = 16  # bytes of an address, or of an integer: Triton compiles its multiples, and 1, separately
LAUNCH = JITFunction.run
KERNEL_MODULES = ("norm_gelu_triton", "quantize_triton", "rope_triton", "swiglu_triton")
FP8 = ("float8_e4m3fn", "float8_e4m3fnuz")


class _PlainOperator:
    """An operator of `torch.library.triton_op` that is called like the function that it is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


_OPERATORS: dict[str, Callable[..., Any]] = {}  # of `quantization.formats`, by the name in their schema


def import_kernels() -> None:
    """Import the engine with its operators as plain functions. Once in a process, and for nothing else in it."""

    def remember(library: Any, name: Any, function: Any, *args: Any, **kwargs: Any) -> None:
        _OPERATORS[str(name)] = function
        register(library, name, function, *args, **kwargs)

    register = torch.library.Library.impl
    originals = torch.library.triton_op, torch.library.wrap_triton
    torch.library.triton_op = lambda _name, mutates_args: _PlainOperator  # noqa: ARG005
    torch.library.wrap_triton = lambda kernel: kernel
    torch.library.Library.impl = remember
    try:
        for module in KERNEL_MODULES:
            importlib.import_module(f"trainer.engine.kernels.{module}")
        formats = importlib.import_module("trainer.engine.quantization.formats")
    finally:
        torch.library.triton_op, torch.library.wrap_triton = originals
        torch.library.Library.impl = register
    formats.fp8_product = _OPERATORS["fp8_product"]
    importlib.import_module("trainer.engine.fused_linear").fp8_product = _OPERATORS["fp8_product"]


class Pointer(NamedTuple):
    """A tensor, as a compiler sees it."""

    dtype: str
    aligned: bool


class Launch(NamedTuple):
    """A kernel, its arguments as far as they decide what is compiled, and how many warps run it."""

    module: str
    kernel: str
    arguments: tuple[Any, ...]
    num_warps: int

    @property
    def has_fp8(self) -> bool:
        return any(isinstance(argument, Pointer) and argument.dtype in FP8 for argument in self.arguments)

    @property
    def weight(self) -> tuple[int, int, int]:
        """For choosing the launch of a kernel that needs most: options that are on, warps, then sizes."""
        sizes = sum(int(argument) for argument in self.arguments if isinstance(argument, (int, float)))
        return sum(argument is True for argument in self.arguments), self.num_warps, sizes

    def function(self) -> JITFunction:
        function: JITFunction = getattr(importlib.import_module(self.module), self.kernel)
        return function

    def mocked_arguments(self) -> list[Any]:
        """Arguments for `JITFunction.warmup`, which compiles and does not run."""
        return [_mocked(argument) if isinstance(argument, Pointer) else argument for argument in self.arguments]


def _mocked(pointer: Pointer) -> MockTensor:
    tensor = MockTensor(getattr(torch, pointer.dtype))
    if not pointer.aligned:
        tensor.data_ptr = lambda: 1
    return tensor


def _essence(argument: Any, *, constant: bool) -> Any:
    """An argument without what makes no difference to the compiler: of integers, only their divisibility is left."""
    if isinstance(argument, torch.Tensor):
        offset = argument.storage_offset() * argument.element_size()
        return Pointer(str(argument.dtype).removeprefix("torch."), offset % ALIGNMENT == 0)
    if constant or isinstance(argument, bool) or argument == 1:
        return argument
    if isinstance(argument, float):
        return 0.5
    if argument >= 2**31:
        return 2**31 if argument % ALIGNMENT == 0 else 2**31 + 1
    return ALIGNMENT if argument % ALIGNMENT == 0 else ALIGNMENT + 1


@contextlib.contextmanager
def recorded() -> Iterator[set[Launch]]:
    """Inside, kernels are noted in the set that is given, and not run."""
    launches: set[Launch] = set()

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, num_warps: int = 4) -> None:  # noqa: ARG001
        essences: list[Any] = []
        for argument, parameter in zip(args, kernel.params, strict=True):
            essences.append(_essence(argument, constant=parameter.is_constexpr))
        launches.add(Launch(kernel.fn.__module__, kernel.fn.__name__, tuple(essences), num_warps))

    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = LAUNCH
