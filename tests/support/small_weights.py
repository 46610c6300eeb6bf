"""The bytes of a small safetensors file, without torch."""

from __future__ import annotations

import json


def small_weights(seed: int = 0, *, count: int = 3) -> bytes:
    """A header, and `count` tensors of 40,000 bytes each."""
    header, end = {}, 0
    for number in range(count):
        header[f"block.{number}.weight"] = {"dtype": "F16", "shape": [100, 200], "data_offsets": [end, end + 40_000]}
        end += 40_000
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes((i * 7 + seed) % 256 for i in range(end))
