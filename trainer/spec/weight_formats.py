"""The values of PARAMS_PRECISION: which hardware each needs, and how frozen weights are stored and multiplied.

And those of PARAMS_SAVE_PRECISION, for LoRA files. `trainer.engine.quantization.formats` has the arithmetic of each
weight format, `trainer.lora_files.precision` that of files. No torch here: plans are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FormatSupport:
    """One value of PARAMS_PRECISION."""

    needs: str  # in words, for a refusal
    nvidia: tuple[int, ...]  # lowest compute capability; (): any
    amd: tuple[str, ...]  # prefixes of the names of its architectures; "": any; (): none
    bytes: float | None = None  # of a weight of a linear layer in the blocks; None: as many as `dtype` has
    # A key of trainer.engine.quantization.formats.WEIGHT_FORMATS; None: weights stay in `dtype`.
    weight_format: str | None = None
    dtype: str | None = None  # of activations; None: the 16-bit type that the hardware computes fastest in


ANY_GPU = "compute capability 7.5 or above, or any GPU of AMD"
FP8_TENSOR_CORES = "tensor cores for FP8: compute capability 8.9 or above, or gfx942 or gfx950"
CDNA_WITH_FP8 = ("gfx942", "gfx950")
# 4 bits, and an fp32 scale for each block of 64 weights (QLoRA, arXiv:2305.14314).
NF4_BYTES = 4 / 8 + 4 / 64
PRECISIONS: dict[str, FormatSupport] = {
    "fp32": FormatSupport("any accelerator", (), ("",), dtype="float32"),
    "bf16": FormatSupport("compute capability 8.0 or above, or any GPU of AMD", (8, 0), ("",), dtype="bfloat16"),
    "fp16": FormatSupport(ANY_GPU, (7, 5), ("",), dtype="float16"),
    # Multiplied in 8 bits as well; the formats called "storage" are multiplied in 16 bits.
    "fp8": FormatSupport(FP8_TENSOR_CORES, (8, 9), CDNA_WITH_FP8, 1, "fp8", "bfloat16"),
    "fp8-storage": FormatSupport(ANY_GPU, (7, 5), ("",), 1, "fp8-storage"),
    "int8": FormatSupport("tensor cores for int8: compute capability 7.5 or above", (7, 5), (), 1, "int8"),
    "int8-storage": FormatSupport(ANY_GPU, (7, 5), ("",), 1, "int8-storage"),
    "nf4": FormatSupport(ANY_GPU, (7, 5), ("",), NF4_BYTES, "nf4"),
    # Weights stay in 16 bits and are quantised in each step: torchao's recipe, for comparison.
    "torchao": FormatSupport(FP8_TENSOR_CORES, (8, 9), CDNA_WITH_FP8, weight_format="torchao", dtype="bfloat16"),
}


def supported_formats(*, nvidia: tuple[int, ...] | None = None, amd: str | None = None) -> tuple[str, ...]:
    """The precisions that a GPU of this compute capability, or of this architecture, can train in."""
    names: list[str] = []
    for name, support in PRECISIONS.items():
        on_nvidia = nvidia is not None and nvidia >= support.nvidia
        on_amd = amd is not None and amd.startswith(support.amd)
        if on_nvidia or on_amd:
            names.append(name)
    return tuple(names)


@dataclass(frozen=True)
class SaveFormat:
    """One value of PARAMS_SAVE_PRECISION: how the matrices of a LoRA are stored in its file."""

    bytes: int  # of a number
    significand: int  # bits, with the one that is not stored: a number is rounded by 2^-significand of it at most

    @property
    def bound(self) -> float:
        """How far a layer's change may be off, relative to its size: both of its matrices were rounded."""
        return float(2 * 2.0**-self.significand)


SAVE_PRECISIONS = {"fp16": SaveFormat(2, 11), "bf16": SaveFormat(2, 8), "fp32": SaveFormat(4, 24)}
