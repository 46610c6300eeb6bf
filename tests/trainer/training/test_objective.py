"""The objectives against their papers' formulas in float64, and against diffusers' own functions."""

import dataclasses
import json
import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from hypothesis import given
from hypothesis import strategies as st

from trainer.spec.errors import SettingsError
from trainer.spec.family import get_family
from trainer.training import objective
from trainer.training.objective import Denoising, FlowMatching, NoisedBatch

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LATENTS = torch.randn(3, 4, 6, 10, generator=torch.Generator().manual_seed(5))
NOISE = torch.randn(3, 4, 6, 10, generator=torch.Generator().manual_seed(6))


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def close(found, expected, tolerance=1e-5):
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


# ---- flow matching


def test_flow_matching_is_a_straight_line_from_the_image_to_the_noise():
    times = torch.tensor([0.0, 0.25, 1.0])
    found = FlowMatching().at(LATENTS.half(), times, NOISE)
    clean = LATENTS.half().double()
    for i, t in enumerate(times.tolist()):
        close(found.noisy_BCHW[i], (1 - t) * clean[i] + t * NOISE[i].double())
        close(found.target_BCHW[i], NOISE[i].double() - clean[i])
    assert found.t_B.tolist() == times.tolist() and found.weight_B.tolist() == [1.0] * 3


def normals(count):
    """The normal numbers that a generator of this seed draws first."""
    return torch.randn(count, generator=seeded()).double()


@pytest.mark.parametrize("sampling", ["sigmoid", "logit_normal", "shift", "flux_shift"])
@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096])
def test_times_are_a_normal_number_through_a_sigmoid_and_the_shift(sampling, tokens):
    found = FlowMatching(sampling, shift=2.5).times(7, tokens=tokens, generator=seeded())
    expected = 1 / (1 + torch.exp(-normals(7)))
    if sampling == "shift":
        expected = 2.5 * expected / (1 + 1.5 * expected)
    if sampling == "flux_shift":
        s = math.exp(calculate_shift(tokens, 256, 4096, 0.5, 1.15))
        expected = s * expected / (1 + (s - 1) * expected)
    close(found, expected)


def test_uniform_times_are_uniform():
    found = FlowMatching("uniform").times(7, tokens=4, generator=seeded())
    assert torch.equal(found, torch.rand(7, generator=seeded()))
    with pytest.raises(ValueError, match="unknown timestep sampling other"):
        FlowMatching("other").times(7, tokens=4, generator=seeded())


def test_the_tokens_of_an_image_are_its_latents_in_squares_of_two():
    """6 × 10 latents are 15 tokens. Times are drawn first, then the noise, from one generator."""
    generator = seeded()
    times = FlowMatching("flux_shift").times(3, tokens=15, generator=generator)
    noise = torch.randn(LATENTS.shape, generator=generator)
    found = FlowMatching("flux_shift").add_noise(LATENTS, seeded())
    assert torch.equal(found.t_B, times)
    close(found.target_BCHW, noise - LATENTS)
    large = torch.zeros(1, 1, 128, 128)
    t = FlowMatching("flux_shift").add_noise(large, seeded()).t_B.double()
    s = math.exp(1.15)
    raw = 1 / (1 + torch.exp(-normals(1)))
    close(t.float(), s * raw / (1 + (s - 1) * raw))


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_by_time_are_diffusers(weighting):
    times = torch.tensor([0.001, 0.1, 0.5, 0.9, 1.0])
    found = FlowMatching(weighting=weighting).weight(times)
    close(found, compute_loss_weighting_for_sd3(weighting, times), 1e-4)
    assert FlowMatching(weighting="sigma_sqrt").weight(torch.zeros(1)).item() == pytest.approx(1e8)  # and no more
    with pytest.raises(ValueError, match="unknown loss weighting other"):
        FlowMatching(weighting="other").weight(times)
    assert torch.equal(FlowMatching(weighting=weighting).at(LATENTS, times[:3], NOISE).weight_B, found[:3])


@given(st.floats(0.01, 0.99), st.floats(0.2, 8.0))
def test_a_shift_moves_times_towards_noise_and_its_inverse_moves_them_back(t, shift):
    moved = objective.shifted(torch.tensor([t], dtype=torch.float64), shift)
    assert moved.item() == pytest.approx(shift * t / (1 + (shift - 1) * t))
    assert objective.shifted(moved, 1 / shift).item() == pytest.approx(t)
    assert (moved.item() > t) == (shift > 1 + 1e-12) or shift == pytest.approx(1, abs=1e-6)


# ---- diffusion in steps


def schedule(prediction="epsilon", **keys):
    return DDPMScheduler(**BETAS, prediction_type=prediction, **keys)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 5.0])
def test_denoising_is_diffusers_scheduler_at_every_step(prediction, gamma):
    theirs = schedule(prediction)
    ours = Denoising(theirs.alphas_cumprod, prediction, min_snr_gamma=gamma)
    steps = torch.tensor([0, 500, 999])
    found = ours.at(LATENTS.half(), steps / 1000, NOISE)
    clean = LATENTS.half().float()
    close(found.noisy_BCHW, theirs.add_noise(clean, NOISE, steps))
    target = NOISE if prediction == "epsilon" else theirs.get_velocity(clean, NOISE, steps)
    close(found.target_BCHW, target)
    assert found.t_B.tolist() == pytest.approx([0.0, 0.5, 0.999])
    snr = compute_snr(theirs, steps).double()
    expected = torch.ones(3)
    if gamma:
        expected = torch.minimum(snr, torch.tensor(gamma)) / (snr + 1 if prediction == "v_prediction" else snr)
    close(found.weight_B, expected, 1e-4)


def test_times_are_rounded_to_steps_and_stay_in_the_schedule():
    ours = Denoising(schedule().alphas_cumprod)
    found = ours.at(LATENTS, torch.tensor([0.0004, 0.0006, 1.0]), NOISE)
    assert found.t_B.tolist() == pytest.approx([0.0, 0.001, 0.999])
    below = ours.at(LATENTS, torch.tensor([-0.5, 0.4996, 2.0]), NOISE)
    assert below.t_B.tolist() == pytest.approx([0.0, 0.5, 0.999])


def test_steps_are_drawn_first_and_then_the_noise():
    generator = seeded()
    steps = torch.randint(1000, (3,), generator=generator)
    noise = torch.randn(LATENTS.shape, generator=generator)
    ours = Denoising(schedule().alphas_cumprod)
    found = ours.add_noise(LATENTS, seeded())
    assert found.t_B.tolist() == pytest.approx((steps / 1000).tolist())
    close(found.target_BCHW, noise)
    drawn = {
        round(t * 1000)
        for seed in range(40)
        for t in ours.add_noise(torch.zeros(200, 1, 1, 1), seeded(seed)).t_B.tolist()
    }
    assert min(drawn) == 0 and max(drawn) == 999


# ---- noise and loss


@pytest.mark.parametrize("offset", [0.0, 0.1, 1.0])
def test_the_offset_is_one_number_for_each_image_and_channel(offset):
    generator = seeded()
    expected = torch.randn(LATENTS.shape, generator=generator)
    if offset:
        expected = expected + offset * torch.randn(3, 4, 1, 1, generator=generator)
    close(objective.noise(LATENTS, offset=offset, generator=seeded()), expected)
    generator = seeded()
    torch.randint(1000, (3,), generator=generator)
    expected = objective.noise(LATENTS, offset=offset, generator=generator)
    found = Denoising(schedule().alphas_cumprod, noise_offset=offset).add_noise(LATENTS, seeded())
    close(found.target_BCHW, expected)
    flow = FlowMatching("uniform", noise_offset=offset)
    generator = seeded()
    torch.rand(3, generator=generator)
    expected = objective.noise(LATENTS, offset=offset, generator=generator)
    close(flow.add_noise(LATENTS, seeded()).target_BCHW, expected - LATENTS)


def test_the_loss_is_the_weighted_mean_of_squares_of_each_image():
    predicted = torch.randn(3, 4, 6, 10, generator=seeded(9)).half()
    by_time, by_image = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 0.25, 3.0])
    mask = torch.rand(3, 1, 6, 10, generator=seeded(10))
    noised = NoisedBatch(LATENTS, NOISE, torch.zeros(3), by_time)
    square = (predicted.double() - NOISE.double()) ** 2
    found = objective.loss(predicted, noised, mask_B1HW=None, weight_B=by_image)
    close(found, square.mean((1, 2, 3)) * by_time * by_image)
    found = objective.loss(predicted, noised, mask_B1HW=mask, weight_B=by_image)
    close(found, (square * mask.double()).sum((1, 2, 3)) / 240 * by_time * by_image)


def test_a_part_has_the_same_rows_of_everything():
    whole = NoisedBatch(LATENTS, NOISE, torch.arange(3.0), torch.arange(3.0) + 5)
    part = whole.part(slice(1, 3))
    for field in dataclasses.fields(NoisedBatch):
        assert torch.equal(getattr(part, field.name), getattr(whole, field.name)[1:3])


# ---- from a plan


@pytest.fixture
def made(job_plan, tmp_path):
    """`made(name, config, **fields)`: the objective of a plan with these fields, and a scheduler's config."""

    def make(name, config, **fields):
        train = dataclasses.replace(job_plan("sdxl").train, **fields)
        (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "EulerDiscreteScheduler", **config}))
        facts = get_family({"flow": "flux", "denoising": "sdxl"}[name]).FACTS
        return objective.make_objective(facts, train, scheduler=tmp_path, device="cpu")

    return make


def test_a_flow_has_the_fields_of_the_plan(made):
    values = {
        "timestep_sampling": "shift",
        "discrete_flow_shift": 2.25,
        "loss_weighting": "cosmap",
        "noise_offset": 0.3,
    }
    assert made("flow", {}, **values) == FlowMatching("shift", 2.25, "cosmap", 0.3)


def test_a_denoising_has_the_models_schedule_with_the_changes_of_the_plan(made):
    found = made(
        "denoising", BETAS, min_snr_gamma=3.0, noise_offset=0.2, prediction_type="auto", zero_terminal_snr=None
    )
    assert (found.prediction, found.min_snr_gamma, found.noise_offset) == ("epsilon", 3.0, 0.2)
    close(found.signal_T, schedule().alphas_cumprod)
    v = {**BETAS, "prediction_type": "v_prediction"}
    assert made("denoising", v, prediction_type="auto", zero_terminal_snr=None).prediction == "v_prediction"
    found = made("denoising", BETAS, prediction_type="v_prediction", zero_terminal_snr=True)
    assert found.prediction == "v_prediction"
    close(found.signal_T, schedule(rescale_betas_zero_snr=True).alphas_cumprod)
    assert found.signal_T[-1] == 0
    zero = {**v, "rescale_betas_zero_snr": True}
    assert made("denoising", zero, prediction_type="auto", zero_terminal_snr=False).signal_T[-1] > 0
    with pytest.raises(SettingsError, match="the model's scheduler says sample"):
        made("denoising", {**BETAS, "prediction_type": "sample"}, prediction_type="auto", zero_terminal_snr=None)
    with pytest.raises(SettingsError, match="PARAMS_ZERO_TERMINAL_SNR"):
        made("denoising", BETAS, prediction_type="auto", zero_terminal_snr=True)


@pytest.mark.parametrize(
    ("prediction", "zero", "changes"),
    [
        ("auto", None, {}),
        ("epsilon", None, {"prediction_type": "epsilon"}),
        ("auto", False, {"rescale_betas_zero_snr": False}),
        ("auto", True, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ],
)
def test_a_scheduler_is_changed_only_where_the_plan_says_so(prediction, zero, changes, job_plan):
    train = dataclasses.replace(job_plan("sdxl").train, prediction_type=prediction, zero_terminal_snr=zero)
    assert objective.scheduler_changes(train) == changes


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_noise_is_where_its_generator_is(offset):
    with torch.device("meta"):  # where numbers are that name no device
        found = objective.noise(LATENTS, offset=offset, generator=seeded())
    assert found.device.type == "cpu" and torch.equal(
        found, objective.noise(LATENTS, offset=offset, generator=seeded())
    )
