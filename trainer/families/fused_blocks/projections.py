"""The blocks of diffusers' models, each with a forward pass of ours: the same but for the passes that `fused` joins.

A block becomes one of these by its class (`fused.install`), where it multiplies in FP8; its weights and names stay.
What training does not use, and some pipelines do, is left to diffusers' forward pass. None of them has a dropout.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.engine.fused_linear import activated, normed


def feed_forward(
    ff: Any, x: torch.Tensor, norm: Any, modulation: tuple[torch.Tensor, torch.Tensor] | None, *, gated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' FeedForward of the normed x; and x, to go on with."""
    y, x = normed(x, norm, modulation, [ff.net[0].proj])
    return activated(y, ff.net[2], gated=gated), x


def halves(x_BTD: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first so many tokens, and the others."""
    first, second = x_BTD.split_with_sizes([length, x_BTD.shape[1] - length], dim=1)
    return first, second


def whole(first_BTD: torch.Tensor, second_BTD: torch.Tensor) -> torch.Tensor:
    """One behind the other; without a copy where they are the `halves` of a tensor."""
    x, length = first_BTD._base, first_BTD.shape[1]
    if torch.compiler.is_compiling() or x is None or x is not second_BTD._base:
        return torch.cat([first_BTD, second_BTD], dim=1)
    if x.dim() == 3 and x.shape[1] == length + second_BTD.shape[1]:
        found = [
            (t.shape, t.stride(), t.storage_offset()) for t in (first_BTD, second_BTD, *halves(x.detach(), length))
        ]
        if found[:2] == found[2:]:
            return x
    return torch.cat([first_BTD, second_BTD], dim=1)
