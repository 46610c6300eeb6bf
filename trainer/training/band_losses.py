"""The loss by noise level of one step (`trainer.spec.messages.noise_bands`), without waiting for the device.

Letters: B images, K bands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.spec.messages.noise_bands import COUNT


def sums(losses: Sequence[torch.Tensor], times: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """A tensor (2K,) on `device`: for each band the sum of its images' losses, then for each the number of its images.

    `losses`, `times`: (B,) for each micro-batch; times from 0 (clean) to 1 (pure noise). Sums of several processes can
    be added up.
    """
    if not losses:
        return torch.zeros(2 * COUNT, device=device)
    loss_B = torch.cat(list(losses)).float()
    band_B = (torch.cat(list(times)) * COUNT).long().clamp(0, COUNT - 1)
    is_in_KB = band_B[None] == torch.arange(COUNT, device=device)[:, None]
    # Not a product, which would carry a loss that is not finite into every band; not index_add, whose order varies.
    sums_K = torch.where(is_in_KB, loss_B[None], 0.0).sum(dim=1)
    return torch.cat([sums_K, is_in_KB.sum(dim=1, dtype=torch.float32)])


def means(sums_2K: Sequence[float]) -> tuple[float | None, ...]:
    """The mean loss of each band, of what `sums` has made; None for a band without images."""
    found = []
    for total, count in zip(sums_2K[:COUNT], sums_2K[COUNT:], strict=True):
        found.append(total / count if count else None)
    return tuple(found)
