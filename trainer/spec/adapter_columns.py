"""The LoRA term inside an FP8 product: how many columns it appends to a weight, and when there is room for them."""

from __future__ import annotations

# ---- an adapter has its place beside a weight that is multiplied in FP8 (`trainer.engine.kernels.reference.beside`)
THIRDS, ALIGNED = 3, 16  # columns for each of its ranks; what tensor cores want a multiple of
LINE = 128  # bytes: where rows begin at no multiple of it, products take a quarter longer
MIN_SIDE_PER_COLUMN = 5  # times as many columns as an adapter takes beside a weight, its shorter side has at least


def columns(rank: int) -> int:
    """How many columns an adapter takes beside a row (`beside`)."""
    return -(-THIRDS * rank // ALIGNED) * ALIGNED


def fits_adapter_columns(rank: int, side: int) -> bool:
    """Whether an adapter has its place beside a weight whose shorter side is `side`."""
    return rank > 0 and MIN_SIDE_PER_COLUMN * columns(rank) <= side


def padding_for(rank: int, width: int) -> int:
    """How many columns there are after rows of `width` numbers, that an adapter has its place; 0 without one."""
    return -(-(width + columns(rank)) // LINE) * LINE - width if rank else 0
