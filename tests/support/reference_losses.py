"""The error of each picture as diffusers' own training scripts have it, with Kiln's order of random numbers."""

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from diffusers.training_utils import compute_snr

OFFSET = 0.1  # of the noise


def drawn_latents(batch, generator):
    mean, std = batch.moments_B2CHW.chunk(2, dim=1)
    return mean + std * torch.randn(mean.shape, generator=generator)


def drawn_noise(latents, generator):
    noise = torch.randn(latents.shape, generator=generator)
    return noise + OFFSET * torch.randn(*latents.shape[:2], 1, 1, generator=generator)


def flow(schedule, batch, generator):
    """Noisy latents, the velocity, and the scheduler's timesteps: sigma times 1000."""
    latents = drawn_latents(batch, generator)
    sigma = torch.sigmoid(torch.randn(len(latents), generator=generator))
    noise = drawn_noise(latents, generator)
    # scale_noise looks its sigmas up by their timestep.
    schedule.timesteps, schedule.sigmas = sigma * 1000, sigma
    return schedule.scale_noise(latents, sigma * 1000, noise), noise - latents, sigma * 1000


def flux_error(model, schedule, batch, generator, *, gamma=0.0):
    noisy, target, timesteps = flow(schedule, batch, generator)
    b, c, h, w = noisy.shape
    packed = model(
        hidden_states=FluxPipeline._pack_latents(noisy, b, c, h, w),
        timestep=timesteps / 1000,
        guidance=torch.ones(b),
        pooled_projections=batch.text["pooled"],
        encoder_hidden_states=batch.text["tokens"],
        txt_ids=torch.zeros(batch.text["tokens"].shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32),
    ).sample
    predicted = FluxPipeline._unpack_latents(packed, h * 8, w * 8, 8)
    return F.mse_loss(predicted, target, reduction="none"), torch.ones(b)


def sd3_error(model, schedule, batch, generator, *, gamma=0.0):
    noisy, target, timesteps = flow(schedule, batch, generator)
    predicted = model(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=batch.text["tokens"],
        pooled_projections=batch.text["pooled"],
    ).sample
    return F.mse_loss(predicted, target, reduction="none"), torch.ones(len(noisy))


def sdxl_error(model, schedule, batch, generator, *, gamma=0.0):
    latents = drawn_latents(batch, generator)
    steps = torch.randint(schedule.config.num_train_timesteps, (len(latents),), generator=generator)
    noise = drawn_noise(latents, generator)
    predicted = model(
        schedule.add_noise(latents, noise, steps),
        steps,
        encoder_hidden_states=batch.text["tokens"],
        added_cond_kwargs={"text_embeds": batch.text["pooled"], "time_ids": batch.geometry_B6},
    ).sample
    is_v = schedule.config.prediction_type == "v_prediction"
    target = schedule.get_velocity(latents, noise, steps) if is_v else noise
    snr = compute_snr(schedule, steps)
    least = torch.stack([snr, torch.full_like(snr, gamma)], dim=1).min(dim=1).values
    weights = least / (snr + 1 if is_v else snr) if gamma else torch.ones(len(latents))
    return F.mse_loss(predicted, target, reduction="none"), weights


LINES = {"flux": flux_error, "sd3": sd3_error, "sdxl": sdxl_error}
