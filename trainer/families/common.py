"""Code that several families share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def traced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, as an input that gradients reach: so the first block is compiled like the others."""
    import torch

    return tensor if tensor.requires_grad else tensor.detach().requires_grad_(torch.is_grad_enabled())
