"""Flux.1 against diffusers' own pipeline, scheduler and training helpers."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from trainer.engine import adapters
from trainer.families import flux
from trainer.lora_files import convert, peft_bridge, write
from trainer.training.objective import FlowMatching, noise

FUSED = flux.FACTS.fused_targets


def pipeline(denoiser, vae, scheduler):
    pipe = FluxPipeline(
        scheduler=scheduler, vae=vae, transformer=denoiser,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_euler_steps_with_predict_are_those_of_the_pipeline(flux_denoiser, flux_vae, flux_scheduler, text):
    start_BCHW = torch.randn(2, 16, 6, 10)
    packed_BLD = FluxPipeline._pack_latents(start_BCHW, 2, 16, 6, 10)
    expected_BLD = pipeline(flux_denoiser, flux_vae, flux_scheduler)(
        prompt_embeds=text["tokens"],
        pooled_prompt_embeds=text["pooled"],
        guidance_scale=2.5,
        num_inference_steps=5,
        height=48,
        width=80,
        latents=packed_BLD,
        output_type="latent",
    ).images

    x_BCHW = start_BCHW
    for now, after in zip(flux_scheduler.sigmas[:-1], flux_scheduler.sigmas[1:], strict=True):
        with torch.no_grad():
            velocity = flux.predict(flux_denoiser, x_BCHW, now.expand(2), text=text, guidance=2.5)
        x_BCHW = x_BCHW + (after - now) * velocity
    got_BLD = FluxPipeline._pack_latents(x_BCHW, 2, 16, 6, 10)
    torch.testing.assert_close(got_BLD, expected_BLD, rtol=1e-4, atol=1e-4)


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


def test_latents_are_what_the_pipeline_decodes(flux_vae):
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    moments = flux.encode_images(flux_vae, pixels)
    mean = moments.chunk(2, dim=1)[0]
    with torch.no_grad():
        expected = flux_vae.decode(flux_vae.encode(pixels).latent_dist.mean).sample
        # The two lines of FluxPipeline before it decodes.
        got = flux_vae.decode(mean / flux_vae.config.scaling_factor + flux_vae.config.shift_factor).sample
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def adapted(denoiser, *, split, rank=3, alpha=2.0):
    fused = {} if split else FUSED
    adapters.fuse_projections(flux.blocks(denoiser), fused=fused, targets=flux.FACTS.targets)
    params = adapters.add_adapters(
        denoiser, flux.blocks(denoiser), targets=flux.FACTS.targets, fused=fused, rank=rank, alpha=alpha, seed=7
    )
    torch.manual_seed(3)
    for p in params:
        torch.nn.init.normal_(p, std=0.3)
    return params


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


@pytest.mark.parametrize("split", [True, False])
def test_the_file_gives_the_trained_model_in_diffusers(flux_denoiser, flux_vae, flux_scheduler, text, tmp_path, split):
    import copy

    plain = copy.deepcopy(flux_denoiser)
    adapted(flux_denoiser, split=split)
    trained = velocity(flux_denoiser, text)
    modules = peft_bridge.from_peft_state(
        adapters.state(flux_denoiser), prefix="transformer", fused=FUSED, scale=2.0 / 3
    )
    tensors = convert.to_file(modules, "peft", "flux").tensors
    write.write_lora(tmp_path / "x.safetensors", tensors, {"ss_network_dim": "3"})

    pipe = pipeline(plain, flux_vae, flux_scheduler)
    assert (velocity(plain, text) - trained).abs().max() > 0.1
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    torch.testing.assert_close(velocity(plain, text), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("split", [True, False])
def test_a_file_begins_a_new_run_where_it_ended(flux_denoiser, text, tmp_path, split):
    import copy

    other = copy.deepcopy(flux_denoiser)
    adapted(flux_denoiser, split=split)
    modules = peft_bridge.from_peft_state(
        adapters.state(flux_denoiser), prefix="transformer", fused=FUSED, scale=2.0 / 3
    )
    tensors = convert.to_file(modules, "peft", "flux").tensors
    write.write_lora(tmp_path / "x.safetensors", tensors, {})
    adapted(other, split=split)
    for p in (q for q in other.parameters() if q.requires_grad):
        torch.nn.init.zeros_(p)
    back = convert.load(tmp_path / "x.safetensors", "flux")
    adapters.load(
        other, peft_bridge.to_peft_state(back, adapters.state(other), prefix="transformer", fused=FUSED, scale=2.0 / 3)
    )
    torch.testing.assert_close(velocity(other, text), velocity(flux_denoiser, text), atol=1e-5, rtol=1e-5)


def test_adapters_are_fp32_on_a_bf16_model(flux_denoiser):
    assert {p.dtype for p in adapted(flux_denoiser.to(torch.bfloat16), split=False)} == {torch.float32}


def test_the_final_layer_gets_no_adapter(flux_denoiser):
    adapted(flux_denoiser, split=True)
    assert not any(key.startswith("proj_out.") for key in adapters.state(flux_denoiser))
