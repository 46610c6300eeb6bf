"""Adapters as a few long parameters, so that the optimiser launches a few kernels instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
from trainer.spec.optimizers import OPTIMIZERS

MAX_PIECE_ELEMENTS = 2**24  # numbers: an optimiser's intermediate results are as large as a parameter


def split_into_pieces(sizes: Sequence[int], *, separate: Callable[[int], bool] = lambda _: False) -> list[list[int]]:
    """Group neighbouring sizes into pieces of at most `MAX_PIECE_ELEMENTS`; returns the indices of each piece.

    A size that is larger, or `separate`, is a piece of its own.
    """
    found: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if size > room or separate(size):
            found.append([])
            room = MAX_PIECE_ELEMENTS
        found[-1].append(i)
        room = 0 if separate(size) else room - size
    return found


def flatten_parameters(name: str, params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """What the optimiser `name` shall train in their place: a few long parameters, of which they are views from now on.

    What an optimiser costs the host is so much for each parameter, and adapters are hundreds of small ones. They stay
    as they are where their shapes matter to it, or their size.
    """
    import torch

    spec = OPTIMIZERS[name]
    if spec.by_shape:
        return params
    wholes = []
    for places in split_into_pieces([p.numel() for p in params], separate=lambda count: count < spec.least):
        piece = [params[i] for i in places]
        wholes.append(torch.nn.Parameter(torch.cat([p.detach().flatten() for p in piece])))
        for p, view in zip(piece, wholes[-1].detach().split([p.numel() for p in piece]), strict=True):
            p.data = view.view_as(p)
    return wholes
