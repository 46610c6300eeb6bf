"""Every weight format: how the frozen weights are stored and multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Precision:
    """One value of PARAMS_PRECISION. Bytes are of one stored weight."""

    dtype: str  # torch's name of the type that activations are computed in
    bytes: float

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("float32", 4),
    "bf16": Precision("bfloat16", 2),
}
