"""Tensors that are only read when they are written: a model is taken apart and put together without holding it.

Functions written for whole state dicts, like diffusers' conversions of single files, work on `LazyTensor`s. Each one
remembers what was done to it, and does that when its time comes, to one tensor of the mapped file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch.utils._pytree import tree_map_only

from trainer.storage import safetensors_writer

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".scale_weight", ".weight_scale")  # of a layer in files with scaled fp8
MARKS = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant")
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)
DTYPE_NAMES = {dtype: safetensors_writer.DTYPES[dtype] for dtype in WEIGHTS}  # of dtypes, in a header


class LazyTensor(torch.Tensor):
    """A tensor whose content is made by `read`; its shape and dtype are known."""

    like: torch.Tensor  # on the device "meta"
    read: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(cls, like: torch.Tensor, read: Callable[[], torch.Tensor]) -> LazyTensor:
        made: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )
        made.like, made.read = like, read
        return made

    def __init__(self, like: torch.Tensor, read: Callable[[], torch.Tensor]) -> None:
        """All is done in __new__."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = (args, kwargs or {})
        positional, named = tree_map_only(LazyTensor, lambda s: s.like, given)
        like = func(*positional, **named)

        def read() -> Any:
            positional, named = tree_map_only(LazyTensor, lambda s: s.read(), given)
            return func(*positional, **named)

        if isinstance(like, torch.Tensor):
            return LazyTensor(like, read)
        return [LazyTensor(one, partial(_piece, read, i)) for i, one in enumerate(like)]


def _piece(read: Callable[[], Any], i: int) -> torch.Tensor:
    """Copied, so that the whole is gone as soon as its piece is there."""
    piece: torch.Tensor = read()[i].clone()
    return piece


def load_file(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Stand-ins for the tensors of a safetensors file whose names begin with `prefix`, which is removed.

    fp8 weights become bf16, times their scale where the file has one. Raises ValueError for what cannot be read so.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [n for n in file.keys() if n.startswith(prefix)]  # noqa: SIM118 (it is no dictionary)
            weights = [n for n in names if not n.endswith(MARKS) and n.removeprefix(prefix) != "scaled_fp8"]
            return {n.removeprefix(prefix): _of_tensor(path, file, n, scale=_scale(n, names)) for n in weights}
    except SafetensorError as problem:
        raise ValueError(f"it cannot be read ({problem})") from problem


def _scale(name: str, names: list[str]) -> str | None:
    layer = name.removesuffix(".weight")
    return next((f"{layer}{end}" for end in SCALES if name != layer and f"{layer}{end}" in names), None)


def _of_tensor(path: Path, file: Any, name: str, *, scale: str | None) -> LazyTensor:
    stored = file.get_tensor(name).to("meta")  # its bytes are mapped, not read
    is_fp8 = stored.dtype in FP8
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
    """Write a safetensors file, one tensor after the other. Raises ValueError for a dtype that no weight has."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which is not a format of weights")
        end = place + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    with path.open("wb") as file:
        file.write(safetensors_writer.encode_header(header))
        for tensor in tensors.values():
            _append(file, tensor)


def _append(file: BinaryIO, tensor: torch.Tensor) -> None:
    """A function of its own, so that no tensor is there while the next one is read."""
    content = tensor.read() if isinstance(tensor, LazyTensor) else tensor
    content.contiguous().flatten().view(torch.uint8).numpy().tofile(file)
