"""Procedural colour textures, so that the miniature autoencoders also cope with images that are no scene."""

import torch
import torch.nn.functional as F


def _noise(batch: int, height: int, width: int, *, octaves: int, device: torch.device | str) -> torch.Tensor:
    """Smooth noise, (B, 1, H, W), about zero mean and unit variance: octaves of stretched random grids."""
    total = torch.zeros(batch, 1, height, width, device=device)
    for octave in range(octaves):
        cells = 2 << octave
        grid = torch.randn(batch, 1, cells + 1, cells + 1, device=device)
        strength = torch.rand(batch, 1, 1, 1, device=device) + 0.25
        total += strength * 0.7**octave * F.interpolate(grid, (height, width), mode="bicubic", align_corners=True)
    return total / total.std(dim=(2, 3), keepdim=True).clamp_min(1e-4)


def textures(batch: int, height: int, width: int, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """Random images, float32 (batch, 3, height, width) in 0..1: fields of colour, soft or hard edged, with grain.

    Uses torch's global random state.
    """
    colours = torch.rand(4, batch, 3, 1, 1, device=device)
    image = colours[0].expand(-1, -1, height, width)
    for colour in colours[1:]:
        field = (
            _noise(batch, height, width, octaves=5, device=device) + torch.randn(batch, 1, 1, 1, device=device) * 0.5
        )
        sharpness = 10 ** (torch.rand(batch, 1, 1, 1, device=device) * 1.8 - 0.3)
        image = torch.lerp(image, colour, torch.sigmoid(field * sharpness))
    light = _noise(batch, height, width, octaves=3, device=device) * 0.12 * torch.rand(batch, 1, 1, 1, device=device)
    grain = torch.randn(batch, 3, height, width, device=device) * 0.06 * torch.rand(batch, 1, 1, 1, device=device) ** 2
    return (image * (1 + light) + light * 0.3 + grain).clamp(0, 1)
