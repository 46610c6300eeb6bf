"""SDXL: its objective against diffusers, texts, adapters. What all families have in common: test_families.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from trainer.data import batches
from trainer.data.order.variants import Example
from trainer.data.records import ImageRecord, View
from trainer.engine import adapters
from trainer.families import sdxl
from trainer.spec.errors import SettingsError
from trainer.spec.plan import TrainPlan
from trainer.training.objective import Denoising, make_objective, noise, scheduler_changes

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # as SDXL ships
MINIATURE = Path(sdxl.FACTS.models["mini-sdxl"].source)
PREDICTIONS = ("epsilon", "v_prediction")


def scheduler_of(prediction="epsilon", **more):
    return DDPMScheduler(**BETAS, prediction_type=prediction, **more)


def objective(prediction="epsilon", *, gamma=0.0, **more):
    return Denoising(scheduler_of(prediction, **more).alphas_cumprod, prediction, gamma)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("zero", [False, True])
def test_noisy_latents_and_targets_are_those_of_the_scheduler(prediction, zero):
    scheduler = scheduler_of(prediction, rescale_betas_zero_snr=zero)
    latents, noise_, steps = torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4), torch.tensor([0, 333, 998, 999])
    drawn = objective(prediction, rescale_betas_zero_snr=zero).at(latents, steps / 1000, noise_)
    velocity = scheduler.get_velocity(latents, noise_, steps)
    torch.testing.assert_close(drawn.noisy_BCHW, scheduler.add_noise(latents, noise_, steps))
    torch.testing.assert_close(drawn.target_BCHW, velocity if prediction == "v_prediction" else noise_)
    assert torch.equal((drawn.t_B * 1000).round().long(), steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_maths_agrees_with_float64(prediction):
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    signal = torch.from_numpy(np.cumprod(1 - betas))[[5, 500, 999]][:, None, None, None]
    latents, noise_, steps = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.tensor([5, 500, 999])
    drawn = objective(prediction).at(latents, steps / 1000, noise_)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise_
    velocity = signal.sqrt() * noise_ - (1 - signal).sqrt() * latents
    target = velocity if prediction == "v_prediction" else noise_.double()
    torch.testing.assert_close(drawn.noisy_BCHW.double(), noisy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(drawn.target_BCHW.double(), target, atol=1e-5, rtol=1e-5)


def test_the_target_leads_back_to_the_latents():
    latents, noise_ = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    for prediction in PREDICTIONS:
        scheduler = scheduler_of(prediction, clip_sample=False)
        drawn = objective(prediction).at(latents, torch.full((3,), 0.7), noise_)
        back = scheduler.step(drawn.target_BCHW, 700, drawn.noisy_BCHW).pred_original_sample
        torch.testing.assert_close(back, latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_the_paper(gamma):
    scheduler, steps, zeros = scheduler_of(), torch.arange(1000), torch.zeros(1000, 4, 1, 1)
    snr = compute_snr(scheduler, steps)
    least = torch.minimum(snr, torch.full_like(snr, gamma))
    for prediction, expected in (("epsilon", least / snr), ("v_prediction", least / (snr + 1))):
        drawn = objective(prediction, gamma=gamma).at(zeros, steps / 1000, zeros)
        torch.testing.assert_close(drawn.weight_B, expected, rtol=1e-4, atol=1e-6)


def test_both_predictions_weigh_the_same_error_of_the_latents_alike():
    """An error of x0 weighs min(SNR, gamma): it is SNR times as large in the noise, SNR + 1 times in the velocity."""
    snr = compute_snr(scheduler_of(), torch.arange(1000))
    zeros = torch.zeros(1000, 4, 1, 1)
    epsilon, v = (objective(p, gamma=5.0).at(zeros, torch.arange(1000) / 1000, zeros).weight_B for p in PREDICTIONS)
    torch.testing.assert_close(epsilon * snr, v * (snr + 1), rtol=1e-4, atol=1e-6)


def test_without_signal_the_weights_stay_finite():
    zeros = torch.zeros(1, 4, 1, 1)
    for prediction, weight in (("epsilon", 1.0), ("v_prediction", 0.0)):
        drawn = objective(prediction, gamma=5.0, rescale_betas_zero_snr=True).at(zeros, torch.tensor([0.999]), zeros)
        assert drawn.weight_B.item() == weight


def test_steps_are_whole_and_all_alike_probable():
    drawn = objective().add_noise(torch.zeros(20_000, 1, 1, 1), torch.Generator().manual_seed(0))
    steps = drawn.t_B * 1000
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.min() == 0 and steps.max().round() == 999
    assert (drawn.t_B.sort().values - torch.arange(20_000) / 20_000).abs().max() < 0.0138


def test_noise_offset_is_in_the_noise_and_in_the_target():
    latents, generator = torch.randn(2, 4, 4, 4), torch.Generator()
    some = Denoising(scheduler_of().alphas_cumprod, noise_offset=0.5)
    drawn = some.add_noise(latents, generator.manual_seed(3))
    torch.randint(1000, (2,), generator=generator.manual_seed(3))
    assert torch.equal(drawn.target_BCHW, noise(latents, offset=0.5, generator=generator))
    assert torch.equal(drawn.noisy_BCHW, some.at(latents, drawn.t_B, drawn.target_BCHW).noisy_BCHW)


# ---- the objective from the model's scheduler and the plan


def made(folder, plan, **config):
    EulerDiscreteScheduler(**{**BETAS, **config}).save_pretrained(folder)
    return make_objective(sdxl.FACTS, plan, scheduler=folder, device="cpu")


def test_auto_means_what_the_scheduler_says(tmp_path):
    plain = made(tmp_path / "a", TrainPlan(min_snr_gamma=5.0, noise_offset=0.2))
    assert (plain.prediction, plain.min_snr_gamma, plain.noise_offset) == ("epsilon", 5.0, 0.2)
    assert torch.equal(plain.signal_T, scheduler_of().alphas_cumprod)
    other = made(tmp_path / "b", TrainPlan(), prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert other.prediction == "v_prediction" and other.signal_T[-1] == 0
    betas = made(tmp_path / "c", TrainPlan(), beta_schedule="linear", beta_end=0.02)
    assert not torch.equal(betas.signal_T, plain.signal_T)


def test_the_plan_overrides_the_scheduler_in_training_and_sampling(tmp_path):
    plan = TrainPlan(prediction_type="v_prediction", zero_terminal_snr=True)
    asked = made(tmp_path, plan)
    assert asked.prediction == "v_prediction" and asked.signal_T[-1] == 0
    sampler = EulerDiscreteScheduler.from_pretrained(tmp_path, **scheduler_changes(plan))
    sampler.set_timesteps(10)
    assert sampler.config.prediction_type == "v_prediction" and sampler.timesteps[0] == 999
    assert scheduler_changes(TrainPlan()) == {}


@pytest.mark.parametrize(
    ("plan", "config", "variable"),
    [
        (TrainPlan(zero_terminal_snr=True), {}, "PARAMS_ZERO_TERMINAL_SNR"),
        (TrainPlan(), {"prediction_type": "sample"}, "PARAMS_PREDICTION_TYPE"),
    ],
)
def test_what_the_model_cannot_do_is_refused(tmp_path, plan, config, variable):
    with pytest.raises(SettingsError, match=variable):
        made(tmp_path, plan, **config)


# ---- images and texts


def test_geometry_is_original_size_corner_of_the_cut_and_its_size():
    image = ImageRecord("x.png", Path("x.png"), "0" * 64, 3000, 2000, 0, 0, "x")
    view = View((1024, 768), (1152, 768), (100, 0))
    flipped = View((1024, 768), (1152, 768), (100, 0), flip=True)
    assert batches.geometry(Example(image, view, "x")) == (2000, 3000, 0, 100, 768, 1024)
    assert batches.geometry(Example(image, flipped, "x")) == (2000, 3000, 0, 28, 768, 1024)


def test_texts_are_the_last_but_one_states_of_both_encoders_and_the_pooled_of_the_second():
    encoders = sdxl.load_encoders(MINIATURE, device="cpu", dtype=torch.float32)
    words = ["a red spot", ""]
    states = []
    for kind, suffix in ((CLIPTextModel, ""), (CLIPTextModelWithProjection, "_2")):
        tokenizer = AutoTokenizer.from_pretrained(MINIATURE / f"tokenizer{suffix}")
        ids = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
        model = kind.from_pretrained(MINIATURE / f"text_encoder{suffix}", dtype=torch.float32)
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        states.append(out.hidden_states[-2])
    for i, got in enumerate(sdxl.encode_text(encoders, words)):
        torch.testing.assert_close(got["tokens"], torch.cat(states, dim=-1)[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got["pooled"], out.text_embeds[i], atol=1e-5, rtol=1e-5)


# ---- adapters


def test_every_linear_layer_of_the_transformers_gets_an_adapter_and_no_other(sdxl_denoiser):
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    expected = {
        f"{outer}.{inner}"
        for outer, transformer in sdxl_denoiser.named_modules()
        if isinstance(transformer, Transformer2DModel)
        for inner, layer in transformer.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    options = {"targets": sdxl.FACTS.targets, "fused": {}, "rank": 3, "alpha": 2.0, "seed": 7}
    adapters.add_adapters(sdxl_denoiser, sdxl.blocks(sdxl_denoiser), **options)
    assert {key.rpartition(".lora_")[0] for key in adapters.state(sdxl_denoiser)} == expected
