"""What the fused blocks of several families share.

Letters: B images, T tokens, D features of a token or of a head, H heads, F = H D, R pairs of a head's features.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.engine.fused_linear import gelu_linear, norm_linear
from trainer.engine.rope import can_fuse_rope, head_norm_rope


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


def turned_heads(projected_BTF: torch.Tensor, norm: Any, turns_BTR: torch.Tensor | None, heads: int) -> torch.Tensor:
    """Normalised and rotated queries or keys, (B, T, H, D), of a layer of their own.

    `turns`: each pair's rotation as a complex number, of every image or, (1, T, R), the same for all; None: none.
    """
    if turns_BTR is not None and projected_BTF.dtype != torch.float32 and norm is not None and can_fuse_rope(norm):
        return head_norm_rope(projected_BTF, norm.weight, torch.view_as_real(turns_BTR), norm.eps)
    heads_BTHD = projected_BTF.unflatten(-1, (heads, -1))
    if norm is not None:
        heads_BTHD = norm(heads_BTHD)
    if turns_BTR is None:
        return heads_BTHD
    pairs = torch.view_as_complex(heads_BTHD.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns_BTR[:, :, None]).flatten(3).type_as(heads_BTHD)


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
