"""The loop against a straightforward one of diffusers' own parts, for each family: the same losses, step by step.

First the loop alone, on small models with made-up latents and texts; then whole jobs on the miniatures, against a loop
that reads the pictures, encodes them and their captions, and begins with the same LoRA file.
"""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict

from tests.support.reference_losses import LINES, OFFSET
from trainer.data.batches import MicroBatch
from trainer.engine import adapters
from trainer.spec.family import get_family
from trainer.training.gradients import seeded
from trainer.training.loop import train, validation_loss
from trainer.training.objective import Denoising, FlowMatching
from trainer.training.step_guard import StepGuard

STEPS, SEED, RATE, CLIP, GAMMA = 10, 42, 0.02, 1.0, 5.0
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SIGNAL = DDPMScheduler(**BETAS).alphas_cumprod
ZERO = DDPMScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True)


@dataclass
class Case:
    """One family's training: what the loop is given, and diffusers' own scheduler for the same."""

    family: str
    objective: FlowMatching | Denoising
    schedule: object
    channels: int = 16
    fused: dict = field(default_factory=dict)
    gamma: float = 0.0  # of min-SNR


CASES = {
    "flux": Case(
        "flux",
        FlowMatching(noise_offset=OFFSET),
        FlowMatchEulerDiscreteScheduler(),
        fused=get_family("flux").FACTS.fused_targets,
    ),
    "sd3": Case("sd3", FlowMatching(noise_offset=OFFSET), FlowMatchEulerDiscreteScheduler()),
    "sdxl, epsilon": Case("sdxl", Denoising(SIGNAL, noise_offset=OFFSET), DDPMScheduler(**BETAS), channels=4),
    "sdxl, epsilon, min-SNR": Case(
        "sdxl", Denoising(SIGNAL, "epsilon", GAMMA, OFFSET), DDPMScheduler(**BETAS), channels=4, gamma=GAMMA
    ),
    "sdxl, v-prediction": Case(
        "sdxl",
        Denoising(SIGNAL, "v_prediction", noise_offset=OFFSET),
        DDPMScheduler(**BETAS, prediction_type="v_prediction"),
        channels=4,
    ),
    "sdxl, v-prediction, min-SNR": Case(
        "sdxl",
        Denoising(SIGNAL, "v_prediction", GAMMA, OFFSET),
        DDPMScheduler(**BETAS, prediction_type="v_prediction"),
        channels=4,
        gamma=GAMMA,
    ),
    "sdxl, v-prediction, zero terminal SNR": Case(
        "sdxl",
        Denoising(ZERO.alphas_cumprod, "v_prediction", GAMMA, OFFSET),
        ZERO,
        channels=4,
        gamma=GAMMA,
    ),
}


def micro_batches(channels):
    """Two of different sizes, and a step of accumulation takes both."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for count, height, width in ((2, 4, 8), (1, 8, 8)):
        mean, std = torch.randn(2, count, channels, height, width, generator=generator)
        sizes = [8.0 * height + 40, 8.0 * width, 3, 0, 8.0 * height, 8.0 * width]
        words = {
            "tokens": torch.randn(count, 7, 24, generator=generator),
            "pooled": torch.randn(count, 20, generator=generator),
        }
        moments = torch.cat([mean, 0.1 * std.abs()], dim=1)
        names = tuple(f"{i}.png" for i in range(count))
        out.append(MicroBatch(moments, words, torch.tensor([sizes] * count), None, torch.ones(count), names))
    return out


def ours(case, denoiser, batches):
    """The losses of Kiln's loop, and the adapters as they were before it."""
    kind = get_family(case.family)
    adapters.fuse_projections(kind.blocks(denoiser), fused=case.fused, targets=kind.FACTS.targets)
    params = adapters.add_adapters(
        denoiser, kind.blocks(denoiser), targets=kind.FACTS.targets, fused=case.fused, rank=4, alpha=2.0, seed=SEED
    )
    start = {k: v.clone() for k, v in adapters.state(denoiser).items()}
    optimizer = torch.optim.AdamW(params, lr=RATE, weight_decay=0.0)
    steps = train(
        ((1, batches) for _ in range(STEPS)),
        predict=lambda noisy, t, batch: kind.predict(
            denoiser, noisy, t, text=batch.text, guidance=1.0, geometry_B6=batch.geometry_B6
        ),
        objective=case.objective,
        params=params,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        max_grad_norm=CLIP,
        guard=StepGuard(),
        device="cpu",
        seed=SEED,
        first_step=1,
    )
    return [step.loss for step in steps], start


def straightforward(case, denoiser, batches, start):
    """The losses of a loop that knows nothing of Kiln but its order of random numbers."""
    if case.fused:
        denoiser.fuse_qkv_projections()
    denoiser.add_adapter(
        LoraConfig(r=4, lora_alpha=2.0, target_modules=sorted({k.rpartition(".lora_")[0] for k in start}))
    )
    set_peft_model_state_dict(denoiser, start)
    params = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(1, STEPS + 1):
        total = 0.0
        for i, batch in enumerate(batches):
            generator = seeded(torch.Generator(), SEED, step, i)
            error, weight = LINES[case.family](denoiser, case.schedule, batch, generator, gamma=case.gamma)
            loss = (error.mean((1, 2, 3)) * weight).sum() / 3  # three pictures a step
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_have_the_losses_of_a_straightforward_loop(name, request):
    case = CASES[name]
    denoiser, batches = request.getfixturevalue(f"{case.family}_denoiser"), micro_batches(case.channels)
    plain = copy.deepcopy(denoiser)
    got, start = ours(case, denoiser, batches)
    expected = straightforward(case, plain, batches, start)
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    idle = [k for k, v in adapters.state(denoiser).items() if ".lora_B." in k and v.abs().max() == 0]
    # Nobody reads what the text asks for in SD3's last block; every other adapter learns.
    assert idle == (["transformer_blocks.2.attn.add_q_proj.lora_B.weight"] if name == "sd3" else [])


def test_the_validation_loss_is_that_of_fixed_times_and_noise():
    """By the definition: five times, noise by seed and batch, the middle of the latents' distribution, no offset."""
    batches, seen = micro_batches(16), []

    def predict(noisy, t, batch):
        seen.append((noisy, t))
        return noisy * 0.5

    def measured(seed=SEED):
        objective = FlowMatching(noise_offset=OFFSET)
        return validation_loss(batches, predict=predict, objective=objective, device="cpu", seed=seed)

    expected = []
    for i, batch in enumerate(batches):
        generator, mean = seeded(torch.Generator(), SEED, i), batch.moments_B2CHW.chunk(2, dim=1)[0].double()
        for t in (0.1, 0.3, 0.5, 0.7, 0.9):
            noise = torch.randn(mean.shape, generator=generator).double()
            noisy = (1 - t) * mean + t * noise
            expected += [*((0.5 * noisy - (noise - mean)) ** 2).mean((1, 2, 3)).tolist()]
    first = measured()
    assert first == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    before = list(seen)
    seen.clear()
    torch.manual_seed(7)  # whatever training did to the global generator
    assert measured() == first
    assert all(torch.equal(a, b) for old, new in zip(before, seen, strict=True) for a, b in zip(old, new, strict=True))
    assert measured(SEED + 1) != first
