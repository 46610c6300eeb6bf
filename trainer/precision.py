"""Every weight format: how the frozen weights are stored and multiplied. No torch at import: plans are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Precision:
    """One value of PARAMS_PRECISION. Bytes are of one stored weight of a linear layer in the blocks."""

    dtype: str  # torch's name of the type that activations are computed in
    bytes: float
    form: str | None = None  # a key of trainer.frozen.FORMS; None: weights in `dtype`

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("float32", 4),
    "bf16": Precision("bfloat16", 2),
    "fp8": Precision("bfloat16", 1, "fp8"),  # multiplied in 8 bits as well
    "fp8-storage": Precision("bfloat16", 1, "fp8-storage"),  # multiplied in bf16
    "int8": Precision("bfloat16", 1, "int8"),
    "int8-storage": Precision("bfloat16", 1, "int8-storage"),
}


def form_for(precision: str, device: str) -> str | None:
    """The key of `trainer.frozen.FORMS` for a value of PARAMS_PRECISION on a torch device type; None: as they are."""
    import torch

    form = PRECISIONS[precision].form
    if form == "fp8" and device == "cuda" and torch.version.hip:
        # CDNA 3 multiplies in the types without negative zero alone; CDNA 4 in those that NVIDIA has.
        return "fp8-fnuz" if "gfx94" in torch.cuda.get_device_properties(0).gcnArchName else form
    return form
