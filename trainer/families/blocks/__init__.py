"""The blocks of diffusers' models, each with a forward pass of ours: the same but for the passes that `fused` joins.

A block becomes one of these by its class (`fused.install`), where it multiplies in FP8; its weights and names stay.
What training does not use, and some pipelines do, is left to diffusers' forward pass. None of them has a dropout.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.fused import activated, normed


def feed_forward(
    ff: Any, x: torch.Tensor, norm: Any, modulation: tuple[torch.Tensor, torch.Tensor] | None, *, gated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' FeedForward of the normed x; and x, to go on with."""
    y, x = normed(x, norm, modulation, [ff.net[0].proj])
    return activated(y, ff.net[2], gated=gated), x
