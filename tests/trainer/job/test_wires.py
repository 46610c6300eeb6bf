"""Every variable, at a value that is not its default, reaches what it configures in a whole job.

A few jobs on the miniatures take all of the variables between them (JOBS). What they hand to the denoiser and to the
optimiser is compared with straightforward formulas (`Reference`) or with the value that was asked for (SEEN). Each
variable is alive: with its default, the formula gives other numbers, or the usual job shows another value.

A new variable without a place in one of the tables fails the first test.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import random
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from entrypoint.settings.variables import ROWS
from tests.support.machines import LARGE_GPU
from tests.support.miniatures import encoded, folder, pipeline
from tests.support.recordings import described, pictures, planned, recorded, samples, vector
from trainer.engine import execution
from trainer.job import build
from trainer.job.prepare import PreparedData
from trainer.spec.family import get_family
from trainer.spec.optimizers import SCHEDULERS
from trainer.spec.weight_formats import SAVE_PRECISIONS

PROMPTS = (
    '[{"prompt": "a fox", "seed": 5, "steps": 3, "cfg": 2.5, "guidance": 1.75, "negative": "blurry", "width": 64, '
    '"height": 32}, {"prompt": "an owl", "steps": 2}]'
)
JOBS = {  # name → family, prompts, and the variables that are not as usual
    "flux": ("flux", None, {}),
    "flux, optimiser": (
        "flux",
        PROMPTS,
        {
            "PARAMS_OPTIMIZER_TYPE": "adamw",
            "PARAMS_OPTIMIZER_ARGS": "betas=0.7,0.8 eps=1e-3",
            "PARAMS_LEARNING_RATE": "0.02",
            "PARAMS_TEXT_ENCODER_LR": "0.005",
            "PARAMS_WEIGHT_DECAY": "0.3",
            "PARAMS_LEARNING_SCHEDULER": "cosine_with_restarts",
            "PARAMS_WARMUP_STEPS": "2",
            "PARAMS_NUM_CYCLES": "2",
            "PARAMS_SAVE_PRECISION": "fp32",
            "PARAMS_MAX_STEPS": "9",
            "PARAMS_GRADIENT_ACCUMULATION": "3",
            "PARAMS_MAX_GRAD_NORM": "0.05",
            "PARAMS_SEED": "7",
            "PARAMS_EMA_DECAY": "0.3",
            "PARAMS_MAX_SKIPPED_STEPS": "8",
            "PARAMS_MAX_LOSS_SPIKE": "31",
            "PARAMS_SPLIT_QKV": "true",
            "PARAMS_NETWORK_DIM": "3",
            "PARAMS_NETWORK_ALPHA": "6",
            "PARAMS_STEP_TIMEOUT": "777",
            "PARAMS_SAMPLE_EVERY_N_STEPS": "99",
            "PARAMS_VALIDATE_EVERY_N_STEPS": "99",
        },
    ),
    "flux, noise": (
        "flux",
        PROMPTS,
        {
            "PARAMS_TIMESTEP_SAMPLING": "shift",
            "PARAMS_DISCRETE_FLOW_SHIFT": "2.5",
            "PARAMS_LOSS_WEIGHTING": "cosmap",
            "PARAMS_GUIDANCE_SCALE": "2.5",
            "PARAMS_NOISE_OFFSET": "0.3",
            "PARAMS_PRIOR_LOSS_WEIGHT": "0.25",
            "PARAMS_BATCH_SIZE": "2",
            "PARAMS_RESOLUTION": "64x32",
            "PARAMS_NUM_REPEATS": "2",
            "PARAMS_CAPTION_DROPOUT_RATE": "1",
            "PARAMS_MAX_STEPS": "",
            "PARAMS_MAX_EPOCHS": "2",
            "PARAMS_SAMPLE_EVERY_N_STEPS": "3",
            "PARAMS_SAVE_EVERY_N_STEPS": "1",
            "PARAMS_VALIDATE_EVERY_N_STEPS": "2",
            "KEEP_CHECKPOINTS": "2",
            "PARAMS_TARGET_MODULES": "attn.to_out.0,proj_mlp",
        },
    ),
    "flux, engine": (
        "flux",
        None,
        {
            "PARAMS_D_COEF": "0.5",
            "PARAMS_LORA_TYPE": "rslora",
            "PARAMS_PRECISION": "int8-storage",
            "PARAMS_GRADIENT_CHECKPOINTING": "true",
            "PARAMS_ATTENTION": "_native_math",
            "PARAMS_DETERMINISTIC": "true",
            "TRIGGER_WORD": "ohwx",
        },
    ),
    "sdxl": ("sdxl", PROMPTS, {"PARAMS_SAMPLE_EVERY_N_STEPS": "9"}),
    "sdxl, velocity": (
        "sdxl",
        PROMPTS,
        {
            "PARAMS_PREDICTION_TYPE": "v_prediction",
            "PARAMS_ZERO_TERMINAL_SNR": "true",
            "PARAMS_MIN_SNR_GAMMA": "0.5",
            "PARAMS_NOISE_OFFSET": "0.2",
            "PARAMS_MAX_TOKEN_LENGTH": "150",
            "PARAMS_OPTIMIZER_TYPE": "adamw",
            "PARAMS_TEXT_ENCODER_LR": "0.002,0.001",
            "PARAMS_SAMPLE_EVERY_N_STEPS": "9",
        },
    ),
    "sd3": (
        "sd3",
        None,
        {
            "PARAMS_TIMESTEP_SAMPLING": "uniform",
            "PARAMS_LOSS_WEIGHTING": "sigma_sqrt",
            "PARAMS_MAX_GRAD_NORM": "0",
            "PARAMS_LORA_TYPE": "dora",
        },
    ),
}
# What the formulas below take, and the defaults.
USUAL = {
    "PARAMS_SEED": "42",
    "PARAMS_TIMESTEP_SAMPLING": "sigmoid",
    "PARAMS_DISCRETE_FLOW_SHIFT": "3.1582",
    "PARAMS_LOSS_WEIGHTING": "none",
    "PARAMS_NOISE_OFFSET": "0.1",
    "PARAMS_PRIOR_LOSS_WEIGHT": "1",
    "PARAMS_PREDICTION_TYPE": "epsilon",
    "PARAMS_ZERO_TERMINAL_SNR": "false",
    "PARAMS_MIN_SNR_GAMMA": "0",
    "PARAMS_LEARNING_RATE": "1e-4",
    "PARAMS_TEXT_ENCODER_LR": "0",
    "PARAMS_WEIGHT_DECAY": "0.1",
    "PARAMS_LEARNING_SCHEDULER": "constant",
    "PARAMS_WARMUP_STEPS": "0",
    "PARAMS_NUM_CYCLES": "1",
    "PARAMS_OPTIMIZER_ARGS": "betas=0.9,0.999 eps=1e-8",
    "PARAMS_MAX_GRAD_NORM": "1",
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """`jobs(name)`: the recording of one of JOBS, run once."""

    @functools.cache
    def run(name):
        family, prompts, variables = JOBS[name]
        place = pictures(tmp_path_factory.mktemp("job"))
        return recorded(place, family, described(place), prompts, **variables)

    return run


# ---- the formulas


def seed_of(*parts):
    mixed = 0
    for part in parts:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return mixed


def schedule_of(asked):
    config = DDPMScheduler.load_config(folder("sdxl") / "scheduler")
    changes = {
        "prediction_type": asked["PARAMS_PREDICTION_TYPE"],
        "rescale_betas_zero_snr": asked["PARAMS_ZERO_TERMINAL_SNR"] == "true",
    }
    return DDPMScheduler.from_config({**config, **changes})


def drawn_times(asked, count, tokens, generator):
    kind = asked["PARAMS_TIMESTEP_SAMPLING"]
    if kind == "uniform":
        return torch.rand(count, generator=generator)
    times = 1 / (1 + torch.exp(-torch.randn(count, generator=generator)))
    shift = {
        "shift": float(asked["PARAMS_DISCRETE_FLOW_SHIFT"]),
        "flux_shift": math.exp(0.5 + 0.65 * (tokens - 256) / 3840),
    }
    factor = shift.get(kind, 1.0)
    return factor * times / (1 + (factor - 1) * times)


def flow_weight(asked, times):
    kind = asked["PARAMS_LOSS_WEIGHTING"]
    if kind == "sigma_sqrt":
        return 1 / times**2
    if kind == "cosmap":
        return 2 / (math.pi * (1 - 2 * times + 2 * times**2))
    return torch.ones_like(times)


def noised(asked, family, moments, generator):
    """Noisy latents, times, target and weights as a micro-batch has them, drawn in the documented order."""
    mean, deviation = moments.chunk(2, dim=1)
    latents = mean + deviation * torch.randn(mean.shape, generator=generator)
    count, _, height, width = latents.shape
    schedule = schedule_of(asked)
    if family == "sdxl":
        steps = torch.randint(1000, (count,), generator=generator)
    else:
        times = drawn_times(asked, count, height * width // 4, generator)
    noise = torch.randn(latents.shape, generator=generator)
    offset = float(asked["PARAMS_NOISE_OFFSET"])
    noise = noise + offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    if family != "sdxl":
        at = times[:, None, None, None]
        return (1 - at) * latents + at * noise, times, noise - latents, flow_weight(asked, times)
    snr = compute_snr(schedule, steps)
    gamma = float(asked["PARAMS_MIN_SNR_GAMMA"])
    weight = torch.ones(count)
    is_velocity = asked["PARAMS_PREDICTION_TYPE"] == "v_prediction"
    if gamma:
        weight = snr.clamp(max=gamma) / (snr + 1 if is_velocity else snr)
    target = schedule.get_velocity(latents, noise, steps) if is_velocity else noise
    return schedule.add_noise(latents, noise, steps), steps / 1000, target, weight


def expected_loss(asked, job, step, update):
    """The mean over the step's images by the formulas; None where other noise reached the denoiser than they say."""
    total, images = 0.0, 0
    for index, call in enumerate(update.calls):
        generator = torch.Generator().manual_seed(seed_of(int(asked["PARAMS_SEED"]), step, index))
        noisy, times, target, weight = noised(asked, job.plan.model.family, call.batch.moments_B2CHW, generator)
        if not torch.allclose(noisy, call.noisy, atol=1e-5) or not torch.allclose(times, call.t, atol=1e-5):
            return None
        is_reg = torch.tensor([name.startswith("reg") for name in call.batch.names])
        weight = torch.where(is_reg, float(asked["PARAMS_PRIOR_LOSS_WEIGHT"]), 1.0) * weight
        total += (((call.output - target) ** 2).mean((1, 2, 3)) * weight).sum().item()
        images += len(is_reg)
    return total / images


def fits(job, **changes):
    """Whether noise and losses of all steps are those of the formulas, with `changes` of what was asked for."""
    asked = {**USUAL, **job.asked, **changes}
    assert len(job.losses) == len(job.updates) > 2
    for step, (update, loss) in enumerate(zip(job.updates, job.losses, strict=True), 1):
        expected = expected_loss(asked, job, step, update)
        if expected is None or loss != pytest.approx(expected, rel=1e-4):
            return False
    return True


def course(kind, step, *, warmup, total, cycles):
    """The factor of the learning rate at a step, counted from 0."""
    if step < warmup and kind != "constant":
        return step / warmup
    done = (step - warmup) / (total - warmup)
    if kind == "linear":
        return 1 - done
    if kind == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if kind == "cosine_with_restarts":
        return (1 + math.cos(math.pi * (cycles * done % 1))) / 2
    return 1.0


def rates(asked, total):
    """Of the denoiser's adapters and the encoder's, for each step."""
    bases = [float(asked["PARAMS_LEARNING_RATE"]), float(asked["PARAMS_TEXT_ENCODER_LR"])]
    options = {"warmup": int(asked["PARAMS_WARMUP_STEPS"]), "cycles": int(asked["PARAMS_NUM_CYCLES"])}
    kind = asked["PARAMS_LEARNING_SCHEDULER"]
    return [[base * course(kind, step, total=total, **options) for base in bases] for step in range(total)]


def adamw(asked, job):
    """The weights after each step by the recurrence of AdamW, from the gradients that the job had."""
    pairs = dict(pair.split("=") for pair in asked["PARAMS_OPTIMIZER_ARGS"].split())
    first, second = map(float, pairs["betas"].split(","))
    epsilon, decay = float(pairs["eps"]), float(asked["PARAMS_WEIGHT_DECAY"])
    text = sum(p.numel() for model in job.state.texts.models.values() for p in model.parameters() if p.requires_grad)
    weights = job.updates[0].before.clone()
    group = torch.zeros(len(weights), dtype=torch.long)
    group[len(weights) - text :] = 1
    mean, square, out = torch.zeros_like(weights), torch.zeros_like(weights), []
    for step, rate in enumerate(rates(asked, len(job.updates)), 1):
        grad = job.updates[step - 1].grad
        rate_of = torch.tensor(rate, dtype=torch.float64)[group]
        weights = weights * (1 - rate_of * decay)
        mean = first * mean + (1 - first) * grad
        square = second * square + (1 - second) * grad**2
        weights = weights - rate_of * (mean / (1 - first**step)) / ((square / (1 - second**step)).sqrt() + epsilon)
        out.append(weights)
    return out


def same_weights(job, **changes):
    expected = adamw({**USUAL, **job.asked, **changes}, job)
    return all(torch.allclose(u.after, w, rtol=1e-4, atol=2e-6) for u, w in zip(job.updates, expected, strict=True))


FORMULAS = {  # variable → the job that has it, and the formula
    "PARAMS_SEED": ("flux, optimiser", fits),
    "PARAMS_TIMESTEP_SAMPLING": ("flux, noise", fits),
    "PARAMS_DISCRETE_FLOW_SHIFT": ("flux, noise", fits),
    "PARAMS_LOSS_WEIGHTING": ("flux, noise", fits),
    "PARAMS_NOISE_OFFSET": ("flux, noise", fits),
    "PARAMS_PRIOR_LOSS_WEIGHT": ("flux, noise", fits),
    "PARAMS_PREDICTION_TYPE": ("sdxl, velocity", fits),
    "PARAMS_ZERO_TERMINAL_SNR": ("sdxl, velocity", fits),
    "PARAMS_MIN_SNR_GAMMA": ("sdxl, velocity", fits),
    "PARAMS_LEARNING_RATE": ("flux, optimiser", same_weights),
    "PARAMS_WEIGHT_DECAY": ("flux, optimiser", same_weights),
    "PARAMS_LEARNING_SCHEDULER": ("flux, optimiser", same_weights),
    "PARAMS_WARMUP_STEPS": ("flux, optimiser", same_weights),
    "PARAMS_NUM_CYCLES": ("flux, optimiser", same_weights),
    "PARAMS_OPTIMIZER_ARGS": ("flux, optimiser", same_weights),
    "PARAMS_TEXT_ENCODER_LR": ("flux, optimiser", same_weights),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_number_of_the_training_is_in_every_step(name, jobs):
    which, formula = FORMULAS[name]
    job = jobs(which)
    assert formula(job)
    usual = USUAL[name]
    assert job.asked[name] != usual
    assert not formula(job, **{name: usual})


@pytest.mark.parametrize("which", JOBS)
def test_every_job_has_the_noise_and_the_losses_of_the_formulas(which, jobs):
    assert fits(jobs(which))


# ---- the values


def in_groups(name):
    return lambda job: {group[name] for update in job.updates for group in update.groups}


def in_training(see):
    return lambda job: {see(call) for call in job.of("train")}


def endings(job):
    return {name.split(".lora_")[0].split(".", 2)[2] for name in job.first}


def adapter_layers(job):
    return [module for module in job.state.denoiser.modules() if hasattr(module, "lora_A")]


def norms(job):
    """Each gradient's norm as the optimiser gets it, and as the log has it, before clipping."""
    logged = [round(row["grad_norm"], 3) for row in job.rows if "grad_norm" in row]
    return [(round(update.grad.norm().item(), 3), norm) for update, norm in zip(job.updates, logged, strict=True)]


def sampled_steps(job):
    return [int(name[5:13]) for name in samples(job) if name.endswith("-00.png")]


def saved_steps(job):
    return [int(path.stem[-8:]) for path in sorted((job.folder / "out").glob("x-step*[0-9].safetensors"))]


def times_in_epoch(job):
    """How often the first epoch has each image, without those of regularisation."""
    per_epoch = job.session.steps_per_epoch
    names = [n for update in job.updates[:per_epoch] for call in update.calls for n in call.batch.names]
    return {names.count(name) for name in names if name.startswith("own")}


def text_lengths(job):
    lengths = {inputs["encoder_hidden_states"].shape[1] for _, inputs in job.inputs}
    return lengths if {where for where, _ in job.inputs} == {"rehearsal", "train", "sample", "export"} else None


def weight_formats(job):
    """How the frozen weights below the adapters are stored; the type's name where they are not quantised."""
    layers = [adapter.base_layer for adapter in adapter_layers(job)]
    return {getattr(layer, "weight_format", type(layer).__name__) for layer in layers}


SEEN = {  # variable → the job that has it, what is looked at, and what it is; the usual job shows something else
    "PARAMS_OPTIMIZER_TYPE": ("flux, optimiser", lambda job: type(job.state.optimizer).__name__, "AdamW"),
    "PARAMS_D_COEF": ("flux, engine", in_groups("d_coef"), {0.5}),
    "PARAMS_MAX_STEPS": ("flux, optimiser", lambda job: len(job.updates), 9),
    "PARAMS_MAX_EPOCHS": ("flux, noise", lambda job: len(job.updates), 8),  # 4 + 4 images in batches of 2, twice
    "PARAMS_GRADIENT_ACCUMULATION": (
        "flux, optimiser",
        lambda job: [len(u.calls) for u in job.updates][:4],
        [3, 1, 3, 1],
    ),
    "PARAMS_MAX_SKIPPED_STEPS": ("flux, optimiser", lambda job: job.state.guard.limit, 8),
    "PARAMS_MAX_LOSS_SPIKE": ("flux, optimiser", lambda job: job.state.guard.spike, 31.0),
    "PARAMS_SPLIT_QKV": ("flux, optimiser", lambda job: sum(e.endswith("to_q") for e in endings(job)), 1),
    "PARAMS_NETWORK_DIM": (
        "flux, optimiser",
        lambda job: {t.shape[0] for n, t in job.first.items() if "_A." in n},
        {3},
    ),
    "PARAMS_NETWORK_ALPHA": ("flux, optimiser", lambda job: {a.scaling["default"] for a in adapter_layers(job)}, {2.0}),
    "PARAMS_STEP_TIMEOUT": ("flux, optimiser", lambda job: job.session.watchdog.timeout_s, 777.0),
    "PARAMS_GUIDANCE_SCALE": (
        "flux, noise",
        lambda job: {g for where, i in job.inputs if where != "sample" for g in i["guidance"].tolist()},
        {2.5},
    ),
    "PARAMS_BATCH_SIZE": ("flux, noise", in_training(lambda call: len(call.batch.names)), {2}),
    "PARAMS_RESOLUTION": ("flux, noise", in_training(lambda call: tuple(call.noisy.shape[2:])), {(4, 8)}),
    "PARAMS_NUM_REPEATS": ("flux, noise", times_in_epoch, {2}),
    "PARAMS_CAPTION_DROPOUT_RATE": ("flux, noise", in_training(lambda call: set(call.batch.captions) == {""}), {True}),
    "PARAMS_SAMPLE_EVERY_N_STEPS": ("flux, noise", sampled_steps, [0, 3, 6, 8]),
    "PARAMS_SAVE_EVERY_N_STEPS": ("flux, noise", saved_steps, [7, 8]),
    "PARAMS_VALIDATE_EVERY_N_STEPS": (
        "flux, noise",
        lambda job: [row["step"] for row in job.rows if "validation_loss" in row],
        [2, 4, 6, 8],
    ),
    "PARAMS_TARGET_MODULES": ("flux, noise", endings, {"attn.to_out.0", "proj_mlp"}),
    "PARAMS_LORA_TYPE": (
        "flux, engine",
        lambda job: {a.scaling["default"] for a in adapter_layers(job)},
        {4 / 32**0.5},
    ),
    "PARAMS_PRECISION": ("flux, engine", weight_formats, {"int8-storage"}),
    "PARAMS_GRADIENT_CHECKPOINTING": ("flux, engine", lambda job: job.passes.count("train") / len(job.of("train")), 2),
    "PARAMS_ATTENTION": (
        "flux, engine",
        lambda job: {
            str(m.processor._attention_backend) for m in job.state.denoiser.modules() if hasattr(m, "processor")
        },
        {"AttentionBackendName._NATIVE_MATH"},
    ),
    "PARAMS_DETERMINISTIC": ("flux, engine", lambda job: job.deterministic, {True}),
    "TRIGGER_WORD": ("flux, engine", in_training(lambda call: call.batch.captions[0][:8]), {"ohwx, a ", "a reg 0,"}),
    "KEEP_CHECKPOINTS": ("flux, noise", lambda job: len(saved_steps(job)), 2),
    "PARAMS_MAX_TOKEN_LENGTH": ("sdxl, velocity", text_lengths, {152}),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_value_is_where_it_belongs(name, jobs):
    which, see, expected = SEEN[name]
    assert see(jobs(which)) == expected
    assert see(jobs(JOBS[which][0])) != expected


# ---- what needs more than one look


def euler(job, inputs):
    """The latents after one step of a sampler with guidance of 2.5, from the inputs with and without the prompt."""
    velocities = [job.state.denoiser(**{**own, "return_dict": False})[0] for own in inputs[:2]]
    guided = velocities[1] + 2.5 * (velocities[0] - velocities[1])
    size = inputs[2]["timestep"] - inputs[0]["timestep"]
    return inputs[0]["hidden_states"] + size[:, None, None] * guided


@contextlib.contextmanager
def weights_of(job, weights):
    """Inside, the adapters have these numbers, as one vector."""
    params = job.state.adapter_params
    latest = vector(params)

    def put(values):
        with torch.no_grad():
            for p, part in zip(params, values.split([p.numel() for p in params]), strict=True):
                p.copy_(part.view_as(p))

    put(weights)
    try:
        yield
    finally:
        put(latest)


def test_a_limit_of_the_gradient_holds_and_0_is_no_limit(jobs):
    limited = norms(jobs("flux, optimiser"))
    assert all(norm == pytest.approx(min(0.05, logged), abs=1e-3) for norm, logged in limited)
    assert max(logged for _, logged in limited) > 0.1
    free = norms(jobs("sd3"))
    assert all(norm == pytest.approx(logged, abs=2e-3) for norm, logged in free)
    assert max(norm for norm, _ in free) > 2  # the usual limit is 1


def test_an_accumulated_gradient_is_that_of_one_large_batch(jobs):
    job = jobs("flux, optimiser")
    asked = {**USUAL, **job.asked}
    family, state = get_family("flux"), job.state
    for step in (1, 2, 9):
        update = job.updates[step - 1]
        losses = []
        with weights_of(job, update.before):
            for index, call in enumerate(update.calls):
                generator = torch.Generator().manual_seed(seed_of(7, step, index))
                noisy, times, target, _ = noised(asked, "flux", call.batch.moments_B2CHW, generator)
                text = state.texts.encode_trained(call.batch.text, call.batch.captions)
                losses.append((family.predict(state.denoiser, noisy, times, text=text, guidance=1.0) - target) ** 2)
            grad = vector(torch.autograd.grad(torch.cat(losses).mean(), state.adapter_params))
        torch.testing.assert_close(update.grad, grad * min(1, 0.05 / grad.norm().item()), rtol=1e-3, atol=1e-6)


def test_the_average_is_in_the_file_the_samples_and_the_validation(jobs):
    job = jobs("flux, optimiser")
    average = job.updates[0].before
    for number, update in enumerate(job.updates, 1):
        decay = min(0.3, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * update.after
    assert torch.allclose(vector(job.state.ema.shadow), average, atol=1e-6)
    assert not torch.allclose(vector(job.state.ema.shadow), job.updates[-1].after, atol=1e-4)

    tensors = load_file(job.folder / "out" / "x-diffusers.safetensors")
    sizes = [p.numel() for p in job.state.adapter_params]
    parts = [part.view_as(p) for part, p in zip(average.split(sizes), job.state.adapter_params, strict=True)]
    names = [name for name in job.first if ".lora_A." in name]
    assert len(names) * 2 < len(parts)  # the others are the text encoder's
    for index, name in enumerate(names):
        down, up = parts[2 * index], parts[2 * index + 1]
        in_file = tensors[f"transformer.{name}"], tensors[f"transformer.{name.replace('_A.', '_B.')}"]
        torch.testing.assert_close(in_file[1].double() @ in_file[0].double(), 6 / 3 * up @ down, rtol=1e-4, atol=1e-6)
    assert jobs("flux").state.ema is None

    checked = job.of("validate")[-1]
    drawn = [inputs for where, inputs in job.inputs if where == "sample"][8:11]  # of the end: the first prompt
    for weights, is_right in ((average, True), (job.updates[-1].after, False)):
        with torch.no_grad(), weights_of(job, weights):
            output = job.session.predict(checked.noisy, checked.t, checked.batch)
            pooled = job.state.texts.encode_trained({"pooled": drawn[0]["pooled_projections"]}, ["a fox"])["pooled"]
            assert torch.allclose(output, checked.output, rtol=1e-4, atol=1e-5) == is_right
            assert torch.allclose(pooled, drawn[0]["pooled_projections"], rtol=1e-4, atol=1e-5) == is_right
            assert torch.allclose(euler(job, drawn), drawn[2]["hidden_states"], rtol=1e-4, atol=1e-4) == is_right


def test_the_validation_is_of_the_held_out_image_at_the_weights_and_the_noise_of_the_seed(jobs):
    job = jobs("flux, noise")
    logged = [row["validation_loss"] for row in job.rows if "validation_loss" in row]
    calls = job.of("validate")
    trained = {name for call in job.of("train") for name in call.batch.names}
    assert len(calls) == 5 * len(logged) and not trained & {name for call in calls for name in call.batch.names}
    losses = []
    for index, call in enumerate(calls):
        mean = call.batch.moments_B2CHW.chunk(2, dim=1)[0]
        if index % 5 == 0:
            generator = torch.Generator().manual_seed(seed_of(42, 0))
        noise = torch.randn(mean.shape, generator=generator)
        at = (0.1, 0.3, 0.5, 0.7, 0.9)[index % 5]
        torch.testing.assert_close(call.noisy, (1 - at) * mean + at * noise)
        weight = flow_weight(job.asked, torch.tensor(at))
        losses.append((((call.output - (noise - mean)) ** 2).mean() * weight).item())
    assert logged == pytest.approx([sum(losses[i : i + 5]) / 5 for i in range(0, len(losses), 5)], rel=1e-4)
    last = calls[-1]
    with torch.no_grad(), weights_of(job, job.updates[-1].after):
        torch.testing.assert_close(job.session.predict(last.noisy, last.t, last.batch), last.output)


@pytest.mark.parametrize("which", ["flux, optimiser", "flux", "sd3"])
def test_adapters_begin_at_random_numbers_of_the_seed(which, jobs):
    """peft's own on diffusers' own model, after torch's own seed."""
    job = jobs(which)
    family = get_family(job.plan.model.family)
    model = family.load_denoiser(folder(family.FACTS.name), device="cpu", dtype=torch.float32)
    if not job.plan.lora.split_qkv and family.FACTS.fused_targets:
        model.fuse_qkv_projections()
    torch.manual_seed(int(job.asked.get("PARAMS_SEED", 42)))
    names = [name.removesuffix(".lora_A.weight") for name in job.first if name.endswith(".lora_A.weight")]
    is_dora = job.asked.get("PARAMS_LORA_TYPE") == "dora"
    model.add_adapter(
        LoraConfig(r=int(job.asked.get("PARAMS_NETWORK_DIM", 32)), target_modules=names, use_dora=is_dora)
    )
    expected = {name.replace(".default", ""): p for name, p in model.named_parameters() if ".lora_A." in name}
    assert expected.keys() == {f"{name}.lora_A.weight" for name in names}
    for name, p in expected.items():
        assert torch.equal(job.first[name], p.detach()), name
    assert not any(tensor.any() for name, tensor in job.first.items() if ".lora_B." in name)
    assert is_dora == any("magnitude" in name for name in job.first)


@pytest.mark.parametrize("which", ["flux", "flux, optimiser"])
def test_the_order_of_the_images_is_that_of_the_seed(which, jobs):
    job, seed = jobs(which), jobs(which).asked.get("PARAMS_SEED", "42")
    files = {path.name: path for path in sorted((job.folder / "own").glob("*.png"))}
    held = min(
        files,
        key=lambda n: hashlib.sha256(f"{seed}/{hashlib.sha256(files[n].read_bytes()).hexdigest()}".encode()).digest(),
    )
    examples = [*(name for name in files if name != held), "reg0.png", "reg0.png"]
    got = [name for update in job.updates for call in update.calls for name in call.batch.names]
    expected = []
    for epoch in range(len(got) // 4 + 1):
        rng = random.Random(f"{seed}/epoch/{epoch}")
        for _ in examples:  # the view, the caption, whether it is dropped
            rng.choice((0,))
            rng.choice((0,))
            rng.random()
        order = list(examples)
        rng.shuffle(order)
        rng.shuffle(order)  # first within the bucket, then all batches
        expected += order
    assert got == expected[: len(got)]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_schedule_has_its_course_over_all_steps_and_groups(kind, tmp_path):
    warmup = {} if kind == "constant" else {"PARAMS_WARMUP_STEPS": "3"}
    variables = {"PARAMS_OPTIMIZER_TYPE": "adamw", "PARAMS_LEARNING_RATE": "0.02", "PARAMS_LEARNING_SCHEDULER": kind}
    cycles = {"PARAMS_NUM_CYCLES": "2"} if kind == "cosine_with_restarts" else {}
    plan = planned(tmp_path, "flux", described(pictures(tmp_path)), **variables, **warmup, **cycles)
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], **own} for own in ({}, {"lr": 0.005})]
    optimizer = build.make_optimizer(plan.optim, groups)
    schedule = build.make_schedule(plan.optim, optimizer, total=13)
    for step in range(13):
        factor = course(kind, step, warmup=3 if warmup else 0, total=13, cycles=2)
        if kind == "polynomial":
            factor = step / 3 if step < 3 else 1 - (step - 3) / 10
        got = [group["lr"] for group in optimizer.param_groups]
        assert got == pytest.approx([0.02 * factor, 0.005 * factor], abs=2e-7), step
        optimizer.step()
        schedule.step()


def test_each_group_of_a_job_has_its_rate_and_the_decay(jobs):
    job = jobs("flux, optimiser")
    got = [[group["lr"] for group in update.groups] for update in job.updates]
    assert got == [pytest.approx(pair, rel=1e-6, abs=1e-9) for pair in rates({**USUAL, **job.asked}, 9)]
    assert in_groups("weight_decay")(job) == {0.3}
    both = jobs("sdxl, velocity")
    assert [group["lr"] for group in both.updates[0].groups] == [1e-4, 0.002, 0.001]
    assert list(both.state.texts.models) == ["text_encoder", "text_encoder_2"]
    assert [type(model).__name__ for model in both.state.texts.models.values()] == [
        "CLIPTextModel",  # CLIP-L
        "CLIPTextModelWithProjection",  # CLIP-G
    ]
    for group, model in zip(both.state.optimizer.param_groups[1:], both.state.texts.models.values(), strict=True):
        first = next(p for p in model.parameters() if p.requires_grad)
        assert group["params"][0].data_ptr() == first.data_ptr()  # of which that is a view


@pytest.mark.parametrize(
    ("family", "kind"), [(f, k) for f in ("flux", "sd3") for k in get_family(f).FACTS.timestep_samplings]
)
def test_every_way_to_draw_noise_levels_is_drawn_with_its_numbers(family, kind, tmp_path):
    shift = {"PARAMS_DISCRETE_FLOW_SHIFT": "2.5"} if kind == "shift" else {}
    plan = planned(tmp_path, family, described(pictures(tmp_path)), PARAMS_TIMESTEP_SAMPLING=kind, **shift)
    objective = PreparedData(plan, *[None] * 4).objective
    moments = torch.randn(3, 32, 48, 40, generator=torch.Generator().manual_seed(1))
    got = objective.add_noise(moments[:, :16], torch.Generator().manual_seed(9))
    asked = {**USUAL, "PARAMS_TIMESTEP_SAMPLING": kind, "PARAMS_DISCRETE_FLOW_SHIFT": "2.5"}
    expected = drawn_times(asked, 3, 48 * 40 // 4, torch.Generator().manual_seed(9))
    torch.testing.assert_close(got.t_B, expected)
    usual = get_family(family).FACTS.flow_shift
    bare = planned(tmp_path, family, described(tmp_path), PARAMS_TIMESTEP_SAMPLING="shift")
    assert PreparedData(bare, *[None] * 4).objective.shift == usual != 2.5


# ---- samples


def packed(latents):
    count, channels, height, width = latents.shape
    patches = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(count, height * width // 4, channels * 4)


def test_samples_have_the_seed_the_steps_the_guidance_and_the_texts_of_their_prompts(jobs):
    job = jobs("flux, noise")
    inputs = [i for where, i in job.inputs if where == "sample"][:8]  # of step 0: before any training
    guided, plain = inputs[:6], inputs[6:]  # 3 steps, each with and without the negative prompt; then 2
    assert [i["guidance"].tolist() for i in inputs] == [[1.75]] * 6 + [[3.5]] * 2
    assert len({tuple(i["timestep"].tolist()) for i in guided}) == 3
    assert len({tuple(i["timestep"].tolist()) for i in plain}) == 2
    # Where a prompt has no seed, it is the run's plus its number; the latents of 64 x 32 pixels are 8 x 4.
    for first, seed, size in ((guided[0], 5, (4, 8)), (plain[0], 43, (4, 8))):
        noise = torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(first["hidden_states"], packed(noise))
    own = encoded("flux", pipeline("flux"), ["a fox", "blurry", "an owl"])
    for index, words in ((0, 0), (1, 1), (6, 2)):
        torch.testing.assert_close(
            inputs[index]["encoder_hidden_states"][0], own["tokens"][words], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(inputs[index]["pooled_projections"][0], own["pooled"][words], rtol=1e-4, atol=1e-4)
    drawn = samples(job)
    assert [image.size for image in drawn.values()] == [(64, 32)] * len(drawn)
    shown = drawn["step-00000000-00.png"].info["parameters"]
    assert shown == (
        "a fox\nNegative prompt: blurry\nSteps: 3, CFG scale: 2.5, Distilled CFG Scale: 1.75, Seed: 5, Size: 64x32"
    )


def test_classifier_free_guidance_goes_its_scale_beyond(jobs):
    """From one step of the sampler to the next: Euler along the guided velocity."""
    job = jobs("flux, noise")
    first = [inputs for where, inputs in job.inputs if where == "sample"][:3]
    with torch.no_grad(), weights_of(job, job.updates[0].before):
        torch.testing.assert_close(first[2]["hidden_states"], euler(job, first), rtol=1e-3, atol=1e-3)


def test_samples_follow_the_changes_of_the_schedule(jobs):
    """With zero terminal SNR the sampler begins at the last step, and otherwise where the model's own does."""

    def times(which):
        return [round(float(t)) for t in jobs(which).seen("sample", "timestep")[:3]]

    assert times("sdxl, velocity") == [999, 666, 332]
    assert times("sdxl") != times("sdxl, velocity")
    doubled = jobs("sdxl").seen("sample", "hidden_states")
    assert [len(states) for states in doubled[:5]] == [2] * 5  # classifier-free guidance, in one batch


# ---- the files, in diffusers' own loader


def trained(job):
    """Layer of diffusers' pipeline → alpha / rank * B A of what trains, in float64; q, k and v apart."""
    family = get_family(job.plan.model.family)
    state = job.state
    alpha, rank = float(job.asked.get("PARAMS_NETWORK_ALPHA", 4)), int(job.asked.get("PARAMS_NETWORK_DIM", 32))
    scale = alpha / (rank**0.5 if job.asked.get("PARAMS_LORA_TYPE") == "rslora" else rank)
    models = {family.FACTS.lora_prefix: state.denoiser, **state.texts.models}
    joined = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
    deltas, magnitudes = {}, {}
    with state.inference_weights():
        for component, model in models.items():
            for path, layer in model.named_modules():
                if not hasattr(layer, "lora_A"):
                    continue
                up, down = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
                parent, _, leaf = path.rpartition(".")
                names = [f"{parent}.{part}" for part in joined.get(leaf, (leaf,))]
                for name, rows in zip(names, up.chunk(len(names)), strict=True):
                    deltas[f"{component}.{name}"] = scale * rows.double() @ down.double()
                if layer.lora_magnitude_vector:
                    magnitudes[f"{component}.{path}"] = layer.lora_magnitude_vector["default"].weight.detach().clone()
    return deltas, magnitudes


@pytest.mark.parametrize("which", JOBS)
def test_diffusers_loads_from_the_file_what_was_trained(which, jobs):
    job = jobs(which)
    name = job.plan.model.family
    pipe = pipeline(name)
    pipe.load_lora_weights(job.folder / "out" / "x-diffusers.safetensors", adapter_name="x")
    expected, magnitudes = trained(job)
    found = {}
    for component in {key.partition(".")[0] for key in expected}:
        for path, layer in getattr(pipe, component).named_modules():
            if "x" in getattr(layer, "lora_A", {}):
                found[f"{component}.{path}"] = layer
    assert found.keys() == expected.keys()
    for key, layer in found.items():
        found_change = layer.scaling["x"] * layer.lora_B["x"].weight.double() @ layer.lora_A["x"].weight.double()
        if job.plan.output.save_precision == "fp32":
            torch.testing.assert_close(found_change, expected[key], rtol=1e-4, atol=1e-7, msg=key)
        # diffusers folds alpha into matrices of 16 bits, which rounds them once more.
        bound = 1.5 * SAVE_PRECISIONS[job.plan.output.save_precision].bound + 1e-5
        assert (found_change - expected[key]).norm() <= bound * expected[key].norm(), key
        if magnitudes:
            torch.testing.assert_close(layer.lora_magnitude_vector["x"].weight.detach(), magnitudes[key])
    assert bool(magnitudes) == (job.asked.get("PARAMS_LORA_TYPE") == "dora")
    assert sum(delta.abs().max() > 0 for delta in expected.values()) > len(expected) / 2


HEADERS = {  # job → what the header of its kohya file says
    "flux": {"ss_network_dim": "32", "ss_network_alpha": "4.0", "ss_seed": "42", "ss_optimizer": "prodigy"},
    "flux, optimiser": {
        # The commonest rank of the file: q, k and v of three adapters are one layer of rank 9, and alpha grows with it.
        "kiln_rank": "3",
        "kiln_alpha": "6.0",
        "ss_seed": "7",
        "ss_optimizer": "adamw",
        "ss_learning_rate": "0.02",
        "ss_lr_scheduler": "cosine_with_restarts",
        "ss_text_encoder_lr": "[0.005]",
        "ss_steps": "9",
        "kiln_split_qkv": "true",
        "modelspec.architecture": "flux-1-dev/lora",
    },
    "flux, noise": {
        "ss_noise_offset": "0.3",
        "ss_resolution": "(64, 32)",
        "modelspec.resolution": "64x32",
        "ss_epoch": "2",
    },
    "flux, engine": {"kiln_lora_type": "rslora", "ss_network_dim": "32", "modelspec.trigger_phrase": "ohwx"},
    "sdxl": {"modelspec.prediction_type": "epsilon", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
    "sdxl, velocity": {
        "modelspec.prediction_type": "v",
        "ss_max_token_length": "150",
        "ss_text_encoder_lr": "[0.002, 0.001]",
    },
    "sd3": {"kiln_lora_type": "dora", "modelspec.architecture": "stable-diffusion-3-medium/lora"},
}


@pytest.mark.parametrize("which", JOBS)
def test_the_header_has_the_settings_of_its_job(which, jobs):
    with safe_open(jobs(which).folder / "out" / "x.safetensors", "pt") as file:
        header = file.metadata()
        alphas = {file.get_tensor(key).item() for key in file.keys() if key.endswith(".alpha")}  # noqa: SIM118
        ranks = [file.get_slice(key).get_shape()[0] for key in file.keys() if key.endswith(".lora_down.weight")]  # noqa: SIM118
    assert {key: header.get(key) for key in HEADERS[which]} == HEADERS[which]
    assert [*alphas] == [pytest.approx(float(header["ss_network_alpha"]))]
    assert int(header["ss_network_dim"]) == max(ranks, key=ranks.count)


# ---- the engine


class Offloads:
    """Stands for the real one, which needs an accelerator's streams."""

    def __init__(self, model, weight_streamer, limit_gib):
        self.streams = weight_streamer is not None


def engine_of(tmp_path, monkeypatch, **variables):
    monkeypatch.setattr(execution, "ActivationOffload", Offloads)
    plan = planned(tmp_path, "flux", described(tmp_path), hardware=LARGE_GPU, BACKEND="", **variables)
    family = get_family("flux")
    denoiser = family.load_denoiser(folder("flux"), device="cpu", dtype=torch.float32)
    denoiser.requires_grad_(False)
    return execution.Engine(denoiser, family.regions(denoiser), dataclasses.replace(plan.engine, device="cpu"))


def test_offloading_and_compiling_are_what_the_engine_does(tmp_path, monkeypatch):
    pictures(tmp_path)
    usual = engine_of(tmp_path, monkeypatch)
    activations = engine_of(tmp_path, monkeypatch, PARAMS_OFFLOAD="activations")
    weights = engine_of(tmp_path, monkeypatch, PARAMS_OFFLOAD="weights")
    assert [usual.offload, activations.offload.streams, weights.offload.streams] == [None, False, True]
    assert [e.weight_streamer is not None for e in (usual, activations, weights)] == [False, False, True]
    compiled = {}
    for asked in ("true", "false"):
        engine = engine_of(tmp_path, monkeypatch, PARAMS_COMPILE=asked)
        compiled[asked] = {region._compiled_call_impl is not None for region in engine.regions}
        assert engine.compiled == (asked == "true")
    assert compiled == {"true": {True}, "false": {False}}


# ---- the tables are complete

ELSEWHERE = {  # variable → the test that holds its wire
    "PARAMS_MAX_GRAD_NORM": "test_wires.py::test_a_limit_of_the_gradient_holds_and_0_is_no_limit",
    "PARAMS_EMA_DECAY": "test_wires.py::test_the_average_is_in_the_file_the_samples_and_the_validation",
    "PARAMS_RESUME_FROM": "test_job_loop.py::test_a_job_has_the_losses_of_a_straightforward_loop_and_ends_with",
    "PARAMS_TRAINING_ADAPTER": "../../jobs/test_training_adapter.py::test_the_lora_trains_on_top_of_it_and_is_drawn",
    "PARAMS_OFFLOAD": "test_wires.py::test_offloading_and_compiling_are_what_the_engine_does",
    "PARAMS_COMPILE": "test_wires.py::test_offloading_and_compiling_are_what_the_engine_does",
    "PARAMS_SAVE_PRECISION": "test_verify.py::test_a_wrong_file_keeps_its_lora_and_the_state_and_is_not_tried_again",
}


def test_every_parameter_has_a_wire():
    assert {*FORMULAS, *SEEN, *ELSEWHERE} >= {name for name in ROWS if name.startswith("PARAMS_")}
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        assert f"def {name}" in (Path(__file__).parent / file).read_text()
