"""How a LoRA's matrices are stored in 16 bits without losing anything: balanced, measured, and fp32 where need be.

The arithmetic. A type with p bits of significand (fp16: 11, bf16: 8) holds x as x (1 + d), |d| <= u = 2^-p, while x is
in its normal range. With A' = A + E_A and B' = B + E_B in the file, the layer's change is off by

    B'A' - BA = E_B A + B' E_A,    entry by entry at most (2u + u²) |B| |A|.

The errors of single numbers are independent, so their sum over the rank is far below that: with |d| uniform, each of
the two terms has about 0.4 u of the norm of BA, where the rank-one terms do not cancel. The bound that is promised is
2u of the norm (Frobenius) of BA: 2^-10 = 0.001 for fp16, 2^-7 = 0.008 for bf16. Images have 8 bits a channel: an error
of a thousandth of what the LoRA changes is below one step of them.

It fails in three cases: numbers below the normal range, where the error no longer shrinks with the number (fp16: below
2^-14; above 65504 there are none); terms that cancel, so that BA is small beside |B||A|; and both together. So

1. A and B are balanced: A 2^k and B 2^-k, with k such that both have the same size (root mean square of the numbers
   that are not zero). That is exact, and BA stays the same. A begins at about 0.02 and B at zero: after one step of
   Prodigy, B is at 1e-6, the balanced matrices at 1e-4, and fp16 holds them to 2^-11. B alone is held to a hundredth
   there, and below 3e-8 nothing of it is left.
2. The error of each part of a layer (q, k and v are parts) is computed, as ‖E_B A‖ + ‖B' E_A‖. Where it is above the
   bound, the pair stays as it is, in fp32. Readers take files of several types. That happens at products below 1e-9.

Norms of products come from Gram matrices of the rank's size, ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ), in float64: no product is made.

Training goes on from a file (PARAMS_RESUME_FROM) with A and B as they were, not as they are balanced: their sizes
decide how fast each of them learns. So the header has every k (`BALANCE`), and `unbalanced` undoes them. A wrong header
does no harm, since BA does not depend on k.

Magnitudes of DoRA stay in fp32: they are whole lengths of rows, of which training changes the last bits.

Shapes: r rank, in and out the sides of a layer; down (r, in, …), up (out, r, …).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from trainer.lora_files.weights import LoraWeights
from trainer.spec.weight_formats import SAVE_PRECISIONS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BALANCE = "kiln_balance"  # key of a header: the exponent k of each pair, in the order of the sorted stems, as JSON
PRECISION = "kiln_save_precision"  # key of a header
# Far more than 16 bits need, and few enough that no number of a 16-bit file leaves fp32's range when it is undone.
MOST_BALANCE = 60


@dataclass(frozen=True)
class Pair:
    """The two matrices under one stem of a file. `heights`: the rows of each part of the layer, from top to bottom."""

    down: torch.Tensor
    up: torch.Tensor
    heights: Sequence[int]


@dataclass(frozen=True)
class Stored:
    """The matrices as the file has them, by their stems."""

    pairs: dict[str, Pair]
    exponents: dict[str, int]  # stem → k; those that are 0 too
    wide: tuple[str, ...]  # stems whose pairs stay in fp32, since 16 bits would lose something

    @property
    def header(self) -> dict[str, str]:
        """What the file's header says of this, for `unbalanced`."""
        if not any(self.exponents.values()):
            return {}
        return {BALANCE: json.dumps([self.exponents[stem] for stem in sorted(self.exponents)], separators=(",", ":"))}


def store(pairs: Mapping[str, Pair], precision: str) -> Stored:
    """The pairs as a file of `precision` has them, a key of SAVE_PRECISIONS.

    Pairs with equal down matrices (q, k and v with one adapter) are stored alike, so that these stay equal. Modules of
    other types (fp64, or fp16 where a file is converted) are taken as the fp32 numbers that they are nearest to.
    """
    pairs = {stem: replace(pair, down=pair.down.float(), up=pair.up.float()) for stem, pair in pairs.items()}
    if precision == "fp32":
        return Stored(pairs, dict.fromkeys(pairs, 0), ())
    groups: dict[str, list[str]] = {}
    for stem, pair in pairs.items():
        groups.setdefault(_digest(pair.down), []).append(stem)
    stored: dict[str, Pair] = {}
    exponents: dict[str, int] = {}
    wide: list[str] = []
    for stems in groups.values():
        group = [pairs[stem] for stem in stems]
        exponent = _exponent(group)
        rounded = [_rounded(pair, exponent, DTYPES[precision]) for pair in group]
        bound = SAVE_PRECISIONS[precision].bound
        if not all(_is_within(pair, exponent, narrow, bound) for pair, narrow in zip(group, rounded, strict=True)):
            wide += stems
            rounded, exponent = group, 0
        stored |= dict(zip(stems, rounded, strict=True))
        exponents |= dict.fromkeys(stems, exponent)
    return Stored({stem: stored[stem] for stem in pairs}, exponents, tuple(wide))


def _digest(tensor: torch.Tensor) -> str:
    """Of its shape and bytes."""
    return f"{tuple(tensor.shape)} {hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()}"


def _exponent(group: Sequence[Pair]) -> int:
    """k for pairs with one down matrix: with it, down and up have the same size; or one, if the other is zero."""
    down = _size([group[0].down])
    up = _size([pair.up for pair in group])
    if down and up:
        k = round((math.log2(up) - math.log2(down)) / 2)
    elif down:
        k = -round(math.log2(down))
    elif up:
        k = round(math.log2(up))
    else:
        k = 0
    return max(-MOST_BALANCE, min(MOST_BALANCE, k))


def _size(matrices: Sequence[torch.Tensor]) -> float:
    """Root mean square of the numbers that are not zero; 0 where all are."""
    count = sum(int(torch.count_nonzero(matrix)) for matrix in matrices)
    total = math.fsum(float(matrix.double().square().sum()) for matrix in matrices)
    return math.sqrt(total / count) if count else 0.0


def _rounded(pair: Pair, exponent: int, dtype: torch.dtype) -> Pair:
    down = (pair.down * 2.0**exponent).to(dtype)
    up = (pair.up * 2.0**-exponent).to(dtype)
    return replace(pair, down=down, up=up)


def _is_within(pair: Pair, exponent: int, narrow: Pair, bound: float) -> bool:
    """Whether each part of `narrow`, which is `pair` balanced and rounded, is off by `bound` of its size at most."""
    if not bool(narrow.down.isfinite().all() and narrow.up.isfinite().all()):
        return False
    down = pair.down.flatten(1).double() * 2.0**exponent
    error_of_down = narrow.down.flatten(1).double() - down
    up = pair.up.flatten(1).double() * 2.0**-exponent
    narrow_up = narrow.up.flatten(1).double()
    gram = down @ down.T
    gram_of_error = error_of_down @ error_of_down.T
    top = 0
    for height in pair.heights:
        rows = slice(top, top + height)
        top += height
        size = _product_norm(up[rows], gram)
        error = _product_norm(narrow_up[rows] - up[rows], gram) + _product_norm(narrow_up[rows], gram_of_error)
        if error > bound * size:
            return False
    return True


def _product_norm(up: torch.Tensor, gram: torch.Tensor) -> float:
    """‖up @ down‖, with the Gram matrix down @ downᵀ. Rounding may make the square negative where terms cancel."""
    return math.sqrt(max(0.0, float(((up.T @ up) * gram).sum())))


# ---- reading


def balance(metadata: Mapping[str, str], stems: Sequence[str]) -> dict[str, int]:
    """The exponent k of each stem, as the header has it; all 0 where it has none that fit."""
    none = dict.fromkeys(stems, 0)
    try:
        exponents = json.loads(metadata.get(BALANCE, "[]"))
    except (ValueError, RecursionError):
        return none
    if not isinstance(exponents, list) or len(exponents) != len(stems):
        return none
    if not all(type(k) is int and abs(k) <= MOST_BALANCE for k in exponents):
        return none
    return dict(zip(sorted(stems), exponents, strict=True))


def unbalanced(weights: LoraWeights, exponent: int) -> LoraWeights:
    """`weights` of a file, in fp32, as they were before they were balanced by `exponent`."""
    if not exponent:
        return weights
    down = weights.down * 2.0**-exponent
    up = weights.up * 2.0**exponent
    if not bool(down.isfinite().all() and up.isfinite().all()):  # a header that belongs to another file
        return weights
    return replace(weights, down=down, up=up)
