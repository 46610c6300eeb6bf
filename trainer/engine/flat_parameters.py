"""Adapters as views of a few flat parameters, so that an optimiser launches a few kernels instead of hundreds.

With 532 adapters AdamW takes 15 ms of host time a step, and 0.1 with flat parameters (docs/lab-notes.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trainer.spec.optimizers import OPTIMIZERS

MAX_PIECE_ELEMENTS = 2**24  # an optimiser's intermediate results are as large as a parameter


def split_into_pieces(sizes: Sequence[int], *, separate: Callable[[int], bool] = lambda _: False) -> list[list[int]]:
    """Group neighbouring sizes into pieces of at most `MAX_PIECE_ELEMENTS`; returns the indices of each piece.

    A size that is larger, or `separate`, is a piece of its own.
    """
    pieces: list[list[int]] = []
    remaining = 0  # elements that still fit into the last piece
    for index, size in enumerate(sizes):
        if size > remaining or separate(size):
            pieces.append([])
            remaining = MAX_PIECE_ELEMENTS
        pieces[-1].append(index)
        remaining = 0 if separate(size) else remaining - size
    return pieces


def flatten_parameters(name: str, params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """The parameters that the optimiser `name` trains instead of `params`, which become views of them.

    `params` are returned as they are for optimisers that look at shapes (rows, columns, norms). A parameter with so few
    elements that the optimiser treats it differently stays separate.
    """
    spec = OPTIMIZERS[name]
    if spec.by_shape:
        return params
    flat_params: list[torch.nn.Parameter] = []
    sizes = [p.numel() for p in params]
    for indices in split_into_pieces(sizes, separate=lambda size: size < spec.least):
        piece = [params[i] for i in indices]
        flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in piece]))
        for p, view in zip(piece, flat.detach().split([p.numel() for p in piece]), strict=True):
            p.data = view.view_as(p)
        flat_params.append(flat)
    return flat_params
