"""Adapters as a few long parameters, so that the optimiser launches a few kernels instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
from trainer.spec.optimizers import OPTIMIZERS

PIECE = 2**24  # numbers: an optimiser's intermediate results are as large as a parameter


def pieces(sizes: Sequence[int], *, alone: Callable[[int], bool] = lambda _: False) -> list[list[int]]:
    """Places of neighbours with `PIECE` numbers at most together; what is `alone`, or larger, is a piece by itself."""
    found: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if size > room or alone(size):
            found.append([])
            room = PIECE
        found[-1].append(i)
        room = 0 if alone(size) else room - size
    return found


def joined(name: str, params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """What the optimiser `name` shall train in their place: a few long parameters, of which they are views from now on.

    What an optimiser costs the host is so much for each parameter, and adapters are hundreds of small ones. They stay
    as they are where their shapes matter to it, or their size.
    """
    import torch

    spec = OPTIMIZERS[name]
    if spec.by_shape:
        return params
    wholes = []
    for places in pieces([p.numel() for p in params], alone=lambda count: count < spec.least):
        piece = [params[i] for i in places]
        wholes.append(torch.nn.Parameter(torch.cat([p.detach().flatten() for p in piece])))
        for p, view in zip(piece, wholes[-1].detach().split([p.numel() for p in piece]), strict=True):
            p.data = view.view_as(p)
    return wholes
