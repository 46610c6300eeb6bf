"""A safetensors file straight from the memory of its tensors.

The library's `save` copies all of it, and lets no other thread run meanwhile: it would hold up the training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}


def layout(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Any], list[memoryview]]:
    """What the header says of `tensors`, and their bytes in this order. The widest come first, so that all are aligned.

    Not copies where they are on the host and in one piece. Raises TypeError for a type that files do not have.
    """
    entries: dict[str, Any] = {}
    data, end = [], 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].itemsize, n)):
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.dtype not in DTYPES:
            raise TypeError(f"a file cannot hold {tensor.dtype}")
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        data.append(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return entries, data


def encode_header(entries: dict[str, Any]) -> bytes:
    """The beginning of the file."""
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    return len(text).to_bytes(8, "little") + text


def sha256(pieces: Iterable[bytes | memoryview]) -> str:
    """Hex digest of all of them, one after the other."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (x.reshape(-1).view(torch.uint8) for x in (a, b))
    if int(a.storage_offset()) % 8 or int(b.storage_offset()) % 8:
        return torch.equal(a, b)
    wide = len(a) // 8 * 8  # eight bytes at a time are four times as fast
    return torch.equal(a[:wide].view(torch.int64), b[:wide].view(torch.int64)) and torch.equal(a[wide:], b[wide:])


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are; ten times as fast as to look at each."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
