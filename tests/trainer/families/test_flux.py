"""Flux.1's objective against diffusers' scheduler and training helpers, and its adapters. More: test_families.py."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from trainer.engine import adapters
from trainer.families import flux
from trainer.training.objective import FlowMatching, noise

FUSED = flux.FACTS.fused_targets


def test_noisy_latents_are_those_of_the_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler()
    latents, noise_ = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 4, 4)
    steps = scheduler.timesteps[[100, 500, 900]]
    drawn = FlowMatching().at(latents, steps / 1000, noise_)
    torch.testing.assert_close(drawn.noisy_BCHW, scheduler.scale_noise(latents, steps, noise_))


def test_one_euler_step_along_the_target_recovers_the_latents():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    latents, noise_ = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    x, target = noise_, FlowMatching().at(latents, torch.ones(1), noise_).target_BCHW
    for t in scheduler.timesteps:
        x = scheduler.step(target, t, x).prev_sample
    torch.testing.assert_close(x, latents, atol=1e-5, rtol=1e-5)


def test_the_maths_agrees_with_float64():
    latents, noise_, t = torch.randn(4, 16, 4, 4), torch.randn(4, 16, 4, 4), torch.rand(4)
    drawn = FlowMatching().at(latents, t, noise_)
    t64 = t.double()[:, None, None, None]
    torch.testing.assert_close(
        drawn.noisy_BCHW.double(), (1 - t64) * latents.double() + t64 * noise_.double(), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(drawn.target_BCHW.double(), noise_.double() - latents.double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tokens", [64, 256, 1024, 3840, 4096])
def test_flux_shift_is_that_of_the_scheduler(tokens):
    generator = torch.Generator().manual_seed(5)
    got = FlowMatching("flux_shift").times(1000, tokens=tokens, generator=generator)
    plain = FlowMatching("sigmoid").times(1000, tokens=tokens, generator=generator.manual_seed(5))
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    expected = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).time_shift(mu, 1.0, plain.double())
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)


def test_shift_is_that_of_a_scheduler_with_a_fixed_shift():
    generator = torch.Generator().manual_seed(5)
    got = FlowMatching("shift", shift=3.1582).times(1000, tokens=64, generator=generator)
    plain = FlowMatching("sigmoid").times(1000, tokens=64, generator=generator.manual_seed(5))
    mu = math.log(3.1582)
    expected = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).time_shift(mu, 1.0, plain.double())
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sampling", ["sigmoid", "logit_normal"])
def test_logit_normal_has_the_distribution_of_diffusers(sampling):
    count = 20_000
    got = FlowMatching(sampling).times(count, tokens=64, generator=torch.Generator().manual_seed(0)).sort().values
    expected = compute_density_for_timestep_sampling(
        "logit_normal", count, logit_mean=0.0, logit_std=1.0, generator=torch.Generator().manual_seed(1)
    )
    # Two-sample Kolmogorov-Smirnov distance; 0.0195 is its 0.1 % bound at this count.
    places = torch.searchsorted(expected.sort().values, got) / count
    assert (places - torch.arange(count) / count).abs().max() < 0.0195


def test_uniform_times_are_uniform():
    got = FlowMatching("uniform").times(20_000, tokens=64, generator=torch.Generator().manual_seed(0)).sort().values
    assert (got - torch.arange(20_000) / 20_000).abs().max() < 0.0138


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_loss_weights_are_those_of_diffusers(scheme):
    t = torch.rand(100) * 0.98 + 0.01
    torch.testing.assert_close(FlowMatching(weighting=scheme).weight(t), compute_loss_weighting_for_sd3(scheme, t))


def test_noise_offset_shifts_whole_channels():
    latents = torch.zeros(64, 16, 32, 32)
    got = noise(latents, offset=0.5, generator=torch.Generator().manual_seed(0))
    means = got.mean(dim=(2, 3))
    assert abs(means.std().item() - math.sqrt(0.5**2 + 1 / 1024)) < 0.02
    assert abs((got - means[:, :, None, None]).std().item() - 1) < 0.01


def velocity(denoiser, text):
    torch.manual_seed(4)
    x, t = torch.randn(2, 16, 4, 6), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        return flux.predict(denoiser, x, t, text=text, guidance=1.0)


def test_fused_projections_compute_the_same(flux_denoiser, text):
    before = velocity(flux_denoiser, text)
    adapters.fuse_projections(flux.blocks(flux_denoiser), fused=FUSED, targets=flux.FACTS.targets)
    assert not hasattr(flux_denoiser.transformer_blocks[0].attn, "to_q")
    torch.testing.assert_close(velocity(flux_denoiser, text), before, atol=1e-5, rtol=1e-5)


def test_the_final_layer_gets_no_adapter(flux_denoiser):
    options = {"targets": flux.FACTS.targets, "fused": {}, "rank": 3, "alpha": 2.0, "seed": 7}
    adapters.add_adapters(flux_denoiser, flux.blocks(flux_denoiser), **options)
    state = adapters.state(flux_denoiser)
    assert state and not any(key.startswith("proj_out.") for key in state)
