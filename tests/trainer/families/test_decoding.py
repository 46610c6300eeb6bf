"""The VAE of samples in half precision: as good as an image of 8 bits, and in fp32 where it overflows."""

import pytest
import torch

from tests.support.miniatures import folder
from trainer.families import common
from trainer.spec.family import get_family


def pixels_of(decoded):
    return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()


def vae_and_latents(name):
    family = get_family(name)
    vae = family.load_vae(folder(name), device="cpu")
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    image = torch.stack([x, y, (x**2 + y**2 < 0.4) * 1.6 - 0.8])[None]
    means = family.encode_images(vae, image).chunk(2, dim=1)[0]
    return vae, means


@pytest.mark.parametrize("name", ["flux", "sdxl", "sd3"])
def test_half_precision_differs_by_little_from_fp32(name):
    vae, latents = vae_and_latents(name)
    with torch.no_grad():
        wanted = common.decode_latents(vae, latents)
        found = common.decode_latents(vae.half(), latents)
    assert found.dtype == torch.float32 and vae.dtype == torch.float16
    off = (pixels_of(found) - pixels_of(wanted)).abs()
    assert off.max() <= 3 and off.mean() < 0.4
    assert not torch.equal(found, wanted)


def test_a_vae_that_overflows_half_precision_decodes_in_fp32_from_then_on():
    vae, latents = vae_and_latents("sdxl")
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(3e4)  # the norm that follows divides by it again
        vae.decoder.conv_in.bias.mul_(3e4)
        wanted = common.decode_latents(vae, latents)
        found = common.decode_latents(vae.half(), latents)
    assert vae.dtype == torch.float32 and found.isfinite().all()
    assert (pixels_of(found) - pixels_of(wanted)).abs().mean() < 1
