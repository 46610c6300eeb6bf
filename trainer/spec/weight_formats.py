"""Every weight format: what hardware it needs, and how the frozen weights are stored and multiplied.

No torch at import: plans are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FormatSupport:
    """One value of PARAMS_PRECISION."""

    needs: str  # in words, for a refusal
    nvidia: tuple[int, ...]  # lowest compute capability
    amd: tuple[str, ...]  # what the names of its architectures begin with
    bytes: float | None = None  # of one stored weight of a linear layer in the blocks; None: as many as `dtype` has
    weight_format: str | None = (
        None  # a key of trainer.engine.quantization.formats.WEIGHT_FORMATS; None: weights in `dtype`
    )
    dtype: str | None = None  # what activations are computed in; None: 16 bits, whichever kind the hardware has


ANY = "compute capability 7.5 or above, or any GPU of AMD"
FP8_TYPES = "tensor cores for FP8: compute capability 8.9 or above, or gfx942 or gfx950"
CDNA = ("gfx942", "gfx950")
PRECISIONS: dict[str, FormatSupport] = {
    "fp32": FormatSupport("any accelerator", (), ("",), dtype="float32"),
    "bf16": FormatSupport("compute capability 8.0 or above, or any GPU of AMD", (8, 0), ("",), dtype="bfloat16"),
    "fp16": FormatSupport(ANY, (7, 5), ("",), dtype="float16"),
    "fp8": FormatSupport(FP8_TYPES, (8, 9), CDNA, 1, "fp8", "bfloat16"),  # multiplied in 8 bits as well
    "fp8-storage": FormatSupport(ANY, (7, 5), ("",), 1, "fp8-storage"),  # multiplied in 16
    "int8": FormatSupport("tensor cores for int8: compute capability 7.5 or above", (7, 5), (), 1, "int8"),
    "int8-storage": FormatSupport(ANY, (7, 5), ("",), 1, "int8-storage"),
    # Blocks of 64 numbers of 4 bits share a scale of 32 (QLoRA, arXiv 2305.14314).
    "nf4": FormatSupport(ANY, (7, 5), ("",), 0.5625, "nf4"),
    # Weights stay in 16 bits and are quantised in each step: torchao's recipe, to compare with.
    "torchao": FormatSupport(FP8_TYPES, (8, 9), CDNA, weight_format="torchao", dtype="bfloat16"),
}


def supported_formats(*, nvidia: tuple[int, ...] | None = None, amd: str | None = None) -> tuple[str, ...]:
    """The formats that a GPU of this compute capability, or of this architecture, runs."""
    return tuple(
        name
        for name, p in PRECISIONS.items()
        if (nvidia is not None and nvidia >= p.nvidia) or (amd is not None and amd.startswith(p.amd))
    )
