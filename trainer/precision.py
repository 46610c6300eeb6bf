"""Every weight format: what hardware it needs, and how the frozen weights are stored and multiplied.

No torch at import: plans are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """One value of PARAMS_PRECISION."""

    needs: str  # in words, for a refusal
    nvidia: tuple[int, ...]  # lowest compute capability
    amd: tuple[str, ...]  # what the names of its architectures begin with
    bytes: float | None = None  # of one stored weight of a linear layer in the blocks; None: as many as `dtype` has
    form: str | None = None  # a key of trainer.frozen.FORMS; None: weights in `dtype`
    dtype: str | None = None  # what activations are computed in; None: 16 bits, whichever kind the hardware has


ANY = "compute capability 7.5 or above, or any GPU of AMD"
FP8_TYPES = "tensor cores for FP8: compute capability 8.9 or above, or gfx942 or gfx950"
CDNA = ("gfx942", "gfx950")
PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("any accelerator", (), ("",), dtype="float32"),
    "bf16": Precision("compute capability 8.0 or above, or any GPU of AMD", (8, 0), ("",), dtype="bfloat16"),
    "fp16": Precision(ANY, (7, 5), ("",), dtype="float16"),
    "fp8": Precision(FP8_TYPES, (8, 9), CDNA, 1, "fp8", "bfloat16"),  # multiplied in 8 bits as well
    "fp8-storage": Precision(ANY, (7, 5), ("",), 1, "fp8-storage"),  # multiplied in 16
    "int8": Precision("tensor cores for int8: compute capability 7.5 or above", (7, 5), (), 1, "int8"),
    "int8-storage": Precision(ANY, (7, 5), ("",), 1, "int8-storage"),
    # Blocks of 64 numbers of 4 bits share a scale of 32 (QLoRA, arXiv 2305.14314).
    "nf4": Precision(ANY, (7, 5), ("",), 0.5625, "nf4"),
    # Weights stay in 16 bits and are quantised in each step: torchao's recipe, to compare with.
    "torchao": Precision(FP8_TYPES, (8, 9), CDNA, form="torchao", dtype="bfloat16"),
}


def supported(*, nvidia: tuple[int, ...] | None = None, amd: str | None = None) -> tuple[str, ...]:
    """The formats that a GPU of this compute capability, or of this architecture, runs."""
    return tuple(
        name
        for name, p in PRECISIONS.items()
        if (nvidia is not None and nvidia >= p.nvidia) or (amd is not None and amd.startswith(p.amd))
    )


def form_for(precision: str, device: str) -> str | None:
    """The key of `trainer.frozen.FORMS` for a value of PARAMS_PRECISION on a torch device type; None: as they are."""
    import torch

    form = PRECISIONS[precision].form
    if form == "fp8" and device == "cuda" and torch.version.hip:
        # CDNA 3 multiplies in the types without negative zero alone; CDNA 4 in those that NVIDIA has.
        return "fp8-fnuz" if "gfx94" in torch.cuda.get_device_properties(0).gcnArchName else form
    return form


# ---- an adapter has its place beside a weight that is multiplied in FP8 (`trainer.quantize.beside`)
THIRDS, ALIGNED = 3, 16  # columns for each of its ranks; what tensor cores want a multiple of
LINE = 128  # bytes: where rows begin at no multiple of it, products take a quarter longer
ROOMY = 5  # times as many columns as an adapter takes beside a weight, its shorter side has at least


def columns(rank: int) -> int:
    """How many columns an adapter takes beside a row (`beside`)."""
    return -(-THIRDS * rank // ALIGNED) * ALIGNED


def fits_beside(rank: int, side: int) -> bool:
    """Whether an adapter has its place beside a weight whose shorter side is `side`."""
    return rank > 0 and ROOMY * columns(rank) <= side


def room_for(rank: int, width: int) -> int:
    """How many columns there are after rows of `width` numbers, that an adapter has its place; 0 without one."""
    return -(-(width + columns(rank)) // LINE) * LINE - width if rank else 0
