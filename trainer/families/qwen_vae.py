"""Qwen-Image's VAE, which other families use as well: one for videos, which sees an image as a single frame.

No family itself; torch and diffusers are imported inside the functions, as in `common`.

The VAE's own `encode` and `decode` keep the last frames of every layer for the frames that follow. An image has one
frame, so the functions here leave that out: the same numbers with half the memory (4.9 GiB become 2.3 for each 2^20
pixels that are encoded, 6.8 become 2.6 for those decoded, counted on the device "meta").

Shapes: B batch, C channels, F frames (1), H and W height and width (of pixels, or of latents: 1/8 of them).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.families import common
from trainer.families.published import configs

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLQwenImage


def load_vae(folder: Path, *, device: str) -> AutoencoderKLQwenImage:
    """The frozen VAE, in fp32. Raises SettingsError."""
    vae: AutoencoderKLQwenImage = common.load_vae(folder, device=device, kind=configs.QWEN_VAE)
    return vae


def encode_images(vae: AutoencoderKLQwenImage, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of the latents, (B, 2C, H/8, W/8), each channel normalised by the VAE's numbers."""
    import torch
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    with torch.no_grad():
        moments_BCFHW = vae.quant_conv(vae.encoder(pixels_BCHW.to(vae.device, vae.dtype).unsqueeze(2)))
    distribution = DiagonalGaussianDistribution(moments_BCFHW)
    usual_mean_C11, usual_std_C11 = _usual(vae)
    mean_BCHW = (distribution.mean.squeeze(2) - usual_mean_C11) / usual_std_C11
    return torch.cat([mean_BCHW, distribution.std.squeeze(2) / usual_std_C11], dim=1).float()


def decode_latents(vae: AutoencoderKLQwenImage, latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, 8H, 8W) in [-1, 1]; reverses `encode_images`."""
    usual_mean_C11, usual_std_C11 = _usual(vae)
    latents_BCFHW = (latents_BCHW.float() * usual_std_C11 + usual_mean_C11).unsqueeze(2)

    def at_once(latents_BCFHW: torch.Tensor) -> torch.Tensor:
        pixels_BCFHW: torch.Tensor = vae.decoder(vae.post_quant_conv(latents_BCFHW)).clamp(-1, 1)
        return pixels_BCFHW

    return common.decoded(vae, latents_BCFHW, None if vae.use_tiling else at_once).squeeze(2)


def _usual(vae: AutoencoderKLQwenImage) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel over the images that the VAE was made for, (C, 1, 1)."""
    import torch

    numbers = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=vae.device)
    mean_C11, std_C11 = numbers[..., None, None]
    return mean_C11, std_C11
