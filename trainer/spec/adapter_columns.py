"""How many columns a LoRA term adds to an FP8 matrix, and which layers get them.

`trainer.engine.quantization` explains the columns. The numbers are here, without torch, because the planner predicts
memory from them: engine and planner must agree.

Letters: K input features of a layer, R the adapter's rank, F = K + padding, the length of a row of an FP8 matrix.
"""

from __future__ import annotations

COLUMNS_PER_RANK = 3  # high, low and high, or high, high and low: the low-low product is left out
COLUMN_MULTIPLE = 16  # columns; torch._scaled_mm wants both sides of an FP8 matrix to be multiples of 16
# Bytes, and so FP8 values. With rows of 3,120 bytes a GEMM took 277 µs, with rows of 3,200 bytes 230, without columns
# 221 (M 4,352, K 3,072, N 12,288; docs/lab-notes.md, "Unaligned rows").
ROW_ALIGNMENT_BYTES = 128
# A layer gets columns if its shorter side is at least so many times as long as they are wide: in a small layer the
# wider GEMM would cost more than a separate one for the LoRA term.
MIN_SIDE_PER_COLUMN = 5


def adapter_columns(rank: int) -> int:
    """How many columns an adapter of this rank takes: 48 for rank 16."""
    return -(-COLUMNS_PER_RANK * rank // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def fits_adapter_columns(rank: int, shorter_side: int) -> bool:
    """Whether a layer, whose shorter side has `shorter_side` features, gets columns for an adapter of this rank."""
    return rank > 0 and MIN_SIDE_PER_COLUMN * adapter_columns(rank) <= shorter_side


def padding_for(rank: int, in_features: int) -> int:
    """F - K: the columns after rows of K = `in_features` values. They hold the adapter's and align the rows.

    0 without an adapter (rank 0): rows then are as long as the layer has features.
    """
    if rank == 0:
        return 0
    aligned_row = -(-(in_features + adapter_columns(rank)) // ROW_ALIGNMENT_BYTES) * ROW_ALIGNMENT_BYTES
    return aligned_row - in_features
