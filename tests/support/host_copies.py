"""Finds what no CUDA graph can hold, on the device "meta": copies from the host, and numbers that the host waits for.

The latter raise an error by themselves: nothing on "meta" has a value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They make a tensor of numbers on the host, and copy it to the device unless that is "meta".
FROM_NUMBERS = (torch.as_tensor, torch.tensor, torch.from_numpy, torch.Tensor.new_tensor)


def _devices(values: Any) -> set[str]:
    return {value.device.type for value in tree_leaves(values) if isinstance(value, torch.Tensor)}


class _Numbers(TorchFunctionMode):
    def __init__(self, noted: list[str]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FROM_NUMBERS and "meta" in _devices(result):
            self.noted.append(func.__name__)
        return result


class _Moves(TorchDispatchMode):
    def __init__(self, noted: list[str]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A number on the host, such as a slice's, is an argument of the kernel.
        wide = [value for value in tree_leaves(args) if not isinstance(value, torch.Tensor) or value.dim() > 0]
        if len(_devices(wide) | _devices(result)) > 1:
            self.noted.append(func.name())
        return result


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """The list gets the name of each operation that copies between devices, inside."""
    names: list[str] = []
    with _Numbers(names), _Moves(names):
        yield names
