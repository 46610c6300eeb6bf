"""Tensors that are read only when they are written: a model is taken apart and put together without holding it.

Functions written for whole state dicts, such as diffusers' conversions of single files, work on `LazyTensor`s. Each
one records the operations on it, and computes them when it is written, from the mapped file, one tensor at a time.
A model of 24 GB would otherwise need 24 GB of the host's memory, and some hosts of large GPUs have less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch.utils._pytree import tree_map_only

from trainer.base_model import weight_check
from trainer.storage import safetensors_header, safetensors_writer

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")  # of a layer in files with scaled fp8 (ComfyUI)
# Tensors that say how a layer is quantised, and are no weights.
QUANTISATION_SUFFIXES = (*SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)
DTYPE_NAMES = {dtype: safetensors_writer.DTYPES[dtype] for dtype in WEIGHT_DTYPES}  # in a header


class LazyTensor(torch.Tensor):
    """A tensor whose shape and dtype are known, and whose content `read` makes."""

    like: torch.Tensor  # the same shape and dtype on the device "meta"
    read: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(cls, like: torch.Tensor, read: Callable[[], torch.Tensor]) -> LazyTensor:
        lazy: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )
        lazy.like = like
        lazy.read = read
        return lazy

    def __init__(self, like: torch.Tensor, read: Callable[[], torch.Tensor]) -> None:
        """Everything is done in __new__, which torch's wrapper subclasses need."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it with *args and **kwargs
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run `func` on meta tensors for the shapes, and record it for `read`."""
        arguments = (args, kwargs or {})
        positional, named = tree_map_only(LazyTensor, lambda lazy: lazy.like, arguments)
        like = func(*positional, **named)

        def read() -> Any:
            positional, named = tree_map_only(LazyTensor, lambda lazy: lazy.read(), arguments)
            return func(*positional, **named)

        if isinstance(like, torch.Tensor):
            return LazyTensor(like, read)
        return [LazyTensor(part, partial(_read_part, read, i)) for i, part in enumerate(like)]  # chunk, split


def _read_part(read: Callable[[], Any], i: int) -> torch.Tensor:
    """Copied, so that the whole tensor is freed as soon as its part is read."""
    part: torch.Tensor = read()[i].clone()
    return part


def load_file(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Lazy tensors of a safetensors file whose names begin with `prefix`, which is removed.

    fp8 weights become bf16, times their scale where the file has one. Raises ValueError for a damaged file, for one
    that was never downloaded, and for other kinds of quantisation.
    """
    safetensors_header.check_is_here(safetensors_header.read_header(path))
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is no dictionary)
            for name in names:
                short = name.removeprefix(prefix)
                if not name.endswith(QUANTISATION_SUFFIXES) and short != "scaled_fp8":
                    tensors[short] = _load_tensor(path, file, name, scale=_scale_name(name, names))
    except SafetensorError as problem:
        raise ValueError(f"it cannot be read ({problem})") from problem
    return tensors


def _scale_name(name: str, names: list[str]) -> str | None:
    """The name of the scale of the weight `name`; None if it has none."""
    layer = name.removesuffix(".weight")
    if layer == name:
        return None
    for suffix in SCALE_SUFFIXES:
        if f"{layer}{suffix}" in names:
            return f"{layer}{suffix}"
    return None


def _load_tensor(path: Path, file: Any, name: str, *, scale: str | None) -> LazyTensor:
    stored = file.get_tensor(name).to("meta")  # its bytes are mapped, not read
    is_fp8 = stored.dtype in FP8_DTYPES
    if scale and not (is_fp8 and file.get_slice(scale).get_shape() in ([], [1])):
        raise ValueError(f"{name} is quantised in a way that is not read here: take the bf16, fp16 or fp8 file")

    def read() -> torch.Tensor:
        with safe_open(path, framework="pt") as again:
            tensor: torch.Tensor = again.get_tensor(name)
            if scale:
                return (tensor.float() * again.get_tensor(scale).float()).bfloat16()
            return tensor.bfloat16() if is_fp8 else tensor

    return LazyTensor(stored.to(torch.bfloat16) if is_fp8 else stored, read)


def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file, one tensor after the other.

    Raises ValueError for a dtype that no weight has, and NotFiniteError for NaN and infinite values.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    begin = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which is not a format of weights")
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    with path.open("wb") as file:
        file.write(safetensors_writer.encode_header(entries))
        for name, tensor in tensors.items():
            _append(file, name, tensor)


def _append(file: BinaryIO, name: str, tensor: torch.Tensor) -> None:
    """A function of its own, so that a tensor is freed before the next one is read."""
    content = tensor.read() if isinstance(tensor, LazyTensor) else tensor
    weight_check.check_tensor(name, content)
    content.contiguous().flatten().view(torch.uint8).numpy().tofile(file)
