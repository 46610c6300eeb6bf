"""Whole jobs on the miniatures against a straightforward loop: the same losses step by step, and the same LoRA.

The loop is diffusers' pipeline and torch: it opens the pictures with Pillow, encodes them and their captions, loads the
LoRA file that the job begins with, and knows of Kiln only the order of the pictures and of the random numbers.
"""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.miniatures import encoded, pipeline
from tests.support.reference_losses import LINES
from trainer.data.batches import MicroBatch
from trainer.data.epochs import EpochSampler
from trainer.job.prepare import scan_and_report
from trainer.job.run import run
from trainer.spec.family import get_family
from trainer.training.gradients import seeded
from trainer.training.stop_flag import StopFlag

STEPS, RANK, RATE, SEED = 6, 4, 0.004, 42
ENDS = {
    "flux": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_k_proj", "ff.net.2", "proj_mlp"),
    "sd3": ("attn.to_q", "attn.add_v_proj", "attn.to_out.0", "ff.net.0.proj"),
    "sdxl": ("attn1.to_q", "attn2.to_v", "attn2.to_out.0", "ff.net.2", "proj_in"),
}
CASES = {
    "flux": ("flux", {}),
    "sd3": ("sd3", {}),
    "sdxl, epsilon": ("sdxl", {}),
    "sdxl, v-prediction, min-SNR, zero terminal SNR": (
        "sdxl",
        {
            "PARAMS_PREDICTION_TYPE": "v_prediction",
            "PARAMS_ZERO_TERMINAL_SNR": "true",
            "PARAMS_MIN_SNR_GAMMA": "5",
        },
    ),
}


def started_lora(name, model, path):
    """A LoRA file of random numbers for some layers of the blocks, by diffusers' names."""
    generator = torch.Generator().manual_seed(5)
    prefix, tensors = get_family(name).FACTS.lora_prefix, {}
    for module, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and any(f".{module}".endswith(f".{end}") for end in ENDS[name]):
            down = torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5
            up = 0.05 * torch.randn(layer.out_features, RANK, generator=generator)
            tensors |= {f"{prefix}.{module}.lora_A.weight": down, f"{prefix}.{module}.lora_B.weight": up}
    save_file(tensors, path)


def dataset(tmp_path):
    """Two pictures with an alpha that weighs the loss, one with a mask beside it, one for regularisation; all 128²."""
    rng = np.random.default_rng(3)
    noise = [Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((128, 128)) for _ in range(4)]
    for folder in ("alpha", "own", "masks", "reg"):
        (tmp_path / folder).mkdir()
    for i, image in enumerate(noise[:2]):
        alpha = Image.new("L", (128, 128), 255)
        alpha.paste(40 * i, (0, 0, 64, 48 + 32 * i))
        image.putalpha(alpha)
        image.save(tmp_path / "alpha" / f"a{i}.png")
        (tmp_path / "alpha" / f"a{i}.txt").write_text(f"a red circle, number {i}")
    noise[2].save(tmp_path / "own" / "b.png")
    (tmp_path / "own" / "b.txt").write_text("a blue square")
    Image.fromarray(rng.integers(0, 255, (128, 128), np.uint8)).save(tmp_path / "masks" / "b.png")
    noise[3].save(tmp_path / "reg" / "r.png")
    (tmp_path / "reg" / "r.txt").write_text("a ring")
    subsets = [
        {"image_dir": str(tmp_path / "alpha"), "alpha_mask": True},
        {"image_dir": str(tmp_path / "own"), "conditioning_data_dir": str(tmp_path / "masks")},
        {"image_dir": str(tmp_path / "reg"), "is_reg": True},
    ]
    for subset in subsets:
        subset["caption_extension"] = ".txt"
    return json.dumps({"datasets": [{"resolution": 128, "batch_size": 2, "subsets": subsets}]})


def opened(path):
    """Pixels in [-1, 1] over white, and the mask at the latents' size, 1 where there is none."""
    image, mask_path = Image.open(path).convert("RGBA"), path.parent.parent / "masks" / path.name
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    pixels = torch.from_numpy(np.asarray(flat, np.float32)).permute(2, 0, 1) / 127.5 - 1
    mask = Image.open(mask_path) if path.parent.name == "own" else image.getchannel("A")
    mask = torch.from_numpy(np.asarray(mask, np.float32))[None] / 255
    return pixels, torch.nn.functional.avg_pool2d(mask, 8)


def micro_batch(name, pipe, batch):
    """What diffusers' VAE and text encoders make of one batch."""
    read = [opened(example.image.file) for example in batch]
    captions = [example.image.file.with_suffix(".txt").read_text() for example in batch]
    with torch.no_grad():
        spread = pipe.vae.encode(torch.stack([pixels for pixels, _ in read])).latent_dist
        text = encoded(name, pipe, captions)
    shift = pipe.vae.config.shift_factor or 0.0
    moments = torch.cat([spread.mean - shift, spread.std], dim=1) * pipe.vae.config.scaling_factor
    sizes = torch.tensor([[128.0, 128, 0, 0, 128, 128]] * len(batch))
    weights = torch.tensor([0.5 if example.image.file.parent.name == "reg" else 1.0 for example in batch])
    masks = torch.stack([mask for _, mask in read])
    return MicroBatch(moments, text, sizes, masks, weights, tuple(captions))


def scheduler(name, pipe, asked):
    if name != "sdxl":
        return FlowMatchEulerDiscreteScheduler()
    changes = {}
    if "PARAMS_PREDICTION_TYPE" in asked:
        changes = {"prediction_type": asked["PARAMS_PREDICTION_TYPE"], "rescale_betas_zero_snr": True}
    return DDPMScheduler.from_config(pipe.scheduler.config, **changes)


def straightforward(name, asked, batches, file):
    """The losses, and the LoRA's matrices at the end, by diffusers' names."""
    pipe = pipeline(name)
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, getattr(pipe, "text_encoder_3", None)):
        if part is not None:
            part.requires_grad_(False)
    component = get_family(name).FACTS.lora_prefix
    model = getattr(pipe, component).requires_grad_(False)
    pipe.load_lora_weights(file)
    trained = {f"{component}.{n}".replace(".default_0", ""): p for n, p in model.named_parameters() if ".lora_" in n}
    for p in trained.values():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.1)
    schedule, losses = scheduler(name, pipe, asked), []
    for step, batch in enumerate(batches, 1):
        made = micro_batch(name, pipe, batch)
        generator = seeded(torch.Generator(), SEED, step, 0)
        gamma = float(asked.get("PARAMS_MIN_SNR_GAMMA", 0))
        error, weight = LINES[name](model, schedule, made, generator, gamma=gamma)
        loss = ((error * made.mask_B1HW).mean((1, 2, 3)) * weight * made.weight_B).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, trained


@pytest.mark.parametrize("case", CASES)
def test_a_job_has_the_losses_of_a_straightforward_loop_and_ends_with_its_weights(case, job_plan, tmp_path):
    name, asked = CASES[case]
    started_lora(name, getattr(pipeline(name), get_family(name).FACTS.lora_prefix), tmp_path / "start.safetensors")
    plan = job_plan(
        name,
        **asked,
        DATASET_NAME="",
        DATASET_CONFIG=dataset(tmp_path),
        PARAMS_RESUME_FROM=str(tmp_path / "start.safetensors"),
        PARAMS_MAX_STEPS=str(STEPS),
        PARAMS_OPTIMIZER_TYPE="adamw",
        PARAMS_LEARNING_RATE=str(RATE),
        PARAMS_PRIOR_LOSS_WEIGHT="0.5",
        PARAMS_SEED=str(SEED),
        PARAMS_SAVE_PRECISION="fp32",
    )
    run(plan, StopFlag())
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    got = [row["loss"] for row in rows if "loss" in row]

    sampler = EpochSampler(
        scan_and_report(plan.data, report=tmp_path / "report.txt").images, plan.data, seed=SEED, prior_loss_weight=0.5
    )
    batches = [batch for epoch in range(STEPS) for batch in sampler.epoch(epoch)][:STEPS]
    assert {len(batch) for batch in batches} == {2} and any(e.weight == 0.5 for batch in batches for e in batch)
    expected, trained = straightforward(name, asked, batches, tmp_path / "start.safetensors")
    assert len(set(expected)) == STEPS
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    final = load_file(tmp_path / "out" / "x-diffusers.safetensors")
    assert final.keys() == trained.keys()
    start = load_file(tmp_path / "start.safetensors")
    for key, p in trained.items():
        torch.testing.assert_close(final[key], p.detach(), rtol=1e-3, atol=1e-4, msg=key)
    assert sum((final[k] - start[k]).abs().max() > RATE for k in start) > len(start) / 2
