"""What the fused blocks of several families share. Letters: B images, T tokens, D features of a token."""

from __future__ import annotations

from typing import Any

import torch

from trainer.engine.fused_linear import gelu_linear, norm_linear


def feed_forward(
    ff: Any,
    x_BTD: torch.Tensor,
    norm: Any,
    modulation: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    geglu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' FeedForward `ff` on the normalised and modulated x; and x, to continue with (see `norm_linear`)."""
    hidden, x_BTD = norm_linear(x_BTD, norm, modulation, [ff.net[0].proj])
    return gelu_linear(hidden, ff.net[2], geglu=geglu), x_BTD


def split_tokens(x_BTD: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `length` tokens, and the others; views."""
    first, second = x_BTD.split_with_sizes([length, x_BTD.shape[1] - length], dim=1)
    return first, second


def join_tokens(first_BTD: torch.Tensor, second_BTD: torch.Tensor) -> torch.Tensor:
    """The tokens of both, one after the other; without a copy if they came from `split_tokens` of one tensor.

    diffusers' single blocks take and return text and image separately, so each would otherwise copy both.
    """
    base = first_BTD._base
    length = first_BTD.shape[1]
    if torch.compiler.is_compiling() or base is None or base is not second_BTD._base:
        return torch.cat([first_BTD, second_BTD], dim=1)
    if base.dim() != 3 or base.shape[1] != length + second_BTD.shape[1]:
        return torch.cat([first_BTD, second_BTD], dim=1)
    parts = split_tokens(base.detach(), length)
    if _layout(first_BTD) == _layout(parts[0]) and _layout(second_BTD) == _layout(parts[1]):
        return base
    return torch.cat([first_BTD, second_BTD], dim=1)


def _layout(tensor: torch.Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    """Where in its storage a tensor is."""
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())
