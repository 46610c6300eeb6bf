"""Write a safetensors file straight from the memory of its tensors.

The library's `save` copies all tensors into one block and holds Python's lock meanwhile: for 0.5 GB other threads
waited 1.2 s (docs/reliability.md), and training is one of them.
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
    """The header's entries for `tensors`, and their bytes in this order.

    As in the library, tensors of the widest type come first, so that all are aligned. The bytes are views of tensors
    on the host that are contiguous, and copies of others. Raises TypeError for a type that the format does not have.
    """
    entries: dict[str, Any] = {}
    data = []
    begin = 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].itemsize, n)):
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.dtype not in DTYPES:
            raise TypeError(f"a file cannot hold {tensor.dtype}")
        end = begin + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        array = tensor.reshape(-1).view(torch.uint8).numpy()
        data.append(memoryview(array))  # type: ignore[arg-type]  # numpy's stubs do not know that arrays are buffers
        begin = end
    return entries, data


def encode_header(entries: dict[str, Any]) -> bytes:
    """The first bytes of the file: the length of the header and its JSON text."""
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    return len(text).to_bytes(8, "little") + text


def sha256(pieces: Iterable[bytes | memoryview]) -> str:
    """Hex digest of the pieces, one after the other."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether type, shape and every bit are the same; unlike `torch.equal`, also of NaN and of -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a = a.reshape(-1).view(torch.uint8)
    b = b.reshape(-1).view(torch.uint8)
    if int(a.storage_offset()) % 8 or int(b.storage_offset()) % 8:
        return torch.equal(a, b)
    whole_words = len(a) // 8 * 8  # comparing eight bytes at a time is four times as fast
    return torch.equal(a[:whole_words].view(torch.int64), b[:whole_words].view(torch.int64)) and torch.equal(
        a[whole_words:], b[whole_words:]
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN: from the least and the largest, ten times as fast as `isfinite` of all."""
    if tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
