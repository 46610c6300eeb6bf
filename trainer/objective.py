"""What the denoiser is trained to predict: noisy latents, the target, and the weight of each picture, in fp32.

Shapes: B pictures, C latent channels, H and W latent rows and columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Drawn:
    """One micro-batch, ready for the denoiser."""

    noisy_BCHW: torch.Tensor
    target_BCHW: torch.Tensor
    t_B: torch.Tensor  # 0: clean, 1: pure noise
    weight_B: torch.Tensor


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow as Flux.1 and SD3 are trained (Esser et al. 2024, arXiv:2403.03206).

    noisy = (1 - t) latents + t noise;  target = noise - latents.
    """

    sampling: str = "sigmoid"
    shift: float = 3.1582
    weighting: str = "none"
    noise_offset: float = 0.0

    def draw(self, latents_BCHW: torch.Tensor, generator: torch.Generator) -> Drawn:
        """Random times and noise for `latents_BCHW`, from `generator` (on the same device)."""
        b, _, h, w = latents_BCHW.shape
        t_B = self.times(b, tokens=h * w // 4, generator=generator)
        return self.at(latents_BCHW, t_B, noise(latents_BCHW, offset=self.noise_offset, generator=generator))

    def at(self, latents_BCHW: torch.Tensor, t_B: torch.Tensor, noise_BCHW: torch.Tensor) -> Drawn:
        """The same at given times with given noise."""
        clean, t_B111 = latents_BCHW.float(), t_B.float()[:, None, None, None]
        noisy = (1 - t_B111) * clean + t_B111 * noise_BCHW
        return Drawn(noisy, noise_BCHW - clean, t_B.float(), self.weight(t_B.float()))

    def times(self, count: int, *, tokens: int, generator: torch.Generator) -> torch.Tensor:
        """`count` times in (0, 1). `tokens`: of one picture after 2×2 patches; used by flux_shift alone.

        uniform; sigmoid and logit_normal: sigmoid of a standard normal; shift: that, moved towards noise by
        s·t / (1 + (s - 1)·t); flux_shift: the same with the s = exp(mu) of Flux.1, where mu grows linearly from 0.5
        at 256 tokens to 1.15 at 4,096 (diffusers' `calculate_shift`).
        """
        device = generator.device
        if self.sampling == "uniform":
            return torch.rand(count, generator=generator, device=device)
        t_B = torch.sigmoid(torch.randn(count, generator=generator, device=device))
        if self.sampling in ("sigmoid", "logit_normal"):
            return t_B
        if self.sampling == "shift":
            return shifted(t_B, self.shift)
        if self.sampling == "flux_shift":
            return shifted(t_B, math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)))
        raise ValueError(f"unknown timestep sampling {self.sampling}")

    def weight(self, t_B: torch.Tensor) -> torch.Tensor:
        """Loss weights by time: none, sigma_sqrt (t^-2), cosmap (as in diffusers' SD3 training)."""
        if self.weighting == "none":
            return torch.ones_like(t_B)
        if self.weighting == "sigma_sqrt":
            return t_B.clamp(min=1e-4) ** -2.0
        if self.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * t_B + 2 * t_B**2))
        raise ValueError(f"unknown loss weighting {self.weighting}")


def shifted(t_B: torch.Tensor, shift: float) -> torch.Tensor:
    """Move times towards noise; shift 1 changes nothing."""
    return shift * t_B / (1 + (shift - 1) * t_B)


def noise(latents_BCHW: torch.Tensor, *, offset: float, generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise, plus `offset` times one normal number for each picture and channel (Guttenberg 2023)."""
    shape, device = latents_BCHW.shape, generator.device
    noise_BCHW = torch.randn(shape, generator=generator, device=device)
    if offset:
        noise_BCHW += offset * torch.randn(*shape[:2], 1, 1, generator=generator, device=device)
    return noise_BCHW


def loss(
    predicted_BCHW: torch.Tensor, drawn: Drawn, *, mask_B1HW: torch.Tensor | None, weight_B: torch.Tensor
) -> torch.Tensor:
    """Weighted mean squared error of each picture, shape (B,); a mask weighs the latents' pixels."""
    error_BCHW = F.mse_loss(predicted_BCHW.float(), drawn.target_BCHW, reduction="none")
    if mask_B1HW is not None:
        error_BCHW = error_BCHW * mask_B1HW
    return error_BCHW.mean(dim=(1, 2, 3)) * drawn.weight_B * weight_B
