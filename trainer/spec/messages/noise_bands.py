"""Bands of noise levels: the loss of each is recorded, since one number hides where a run learns.

At much noise the model decides what an image shows, at little noise its details; the losses differ several times over,
and a step of few images draws few noise levels, which is most of what makes the loss of single steps jump.
"""

from __future__ import annotations

import itertools

COUNT = 4  # few enough that each has images in a short run
EDGES = tuple(100 * i // COUNT for i in range(COUNT + 1))  # percent of noise: 0 is clean, 100 is pure noise
# Keys of metrics.jsonl and names on TensorBoard: loss_noise_0_25 and so on.
KEYS = tuple(f"loss_noise_{low}_{high}" for low, high in itertools.pairwise(EDGES))


def label(key: str) -> str:
    """A band for people: "0–25 % noise"."""
    low, high = key.rsplit("_", 2)[1:]
    return f"{low}–{high} % noise"
