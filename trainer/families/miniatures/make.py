"""Train the miniature base models from scratch, on one GPU:
`python -m trainer.families.miniatures.make all --out DIR`.

`flux`, `sdxl`, `sd3`, `z_image`, `flux2`, `qwen_image` and `krea2` each write a folder in the layout of diffusers'
pipelines; `vae16`, `vae4` and `vae_video` make the autoencoders that those need (found in DIR/.vae afterwards); `all`
does everything, in parallel. With `--resume`, training continues from the models in DIR, with their tokenizers.
`concept` draws the demo's images; `sheet` samples from the model in a folder, for a look at it.
"""

import argparse
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, DiffusionPipeline
from PIL import Image

from trainer.families.miniatures import models, qwen
from trainer.families.miniatures.fit import fit
from trainer.families.miniatures.pools import image_losses, latent_losses, measure_latents
from trainer.families.miniatures.recipes import RECIPES, Recipe
from trainer.families.miniatures.scenes import Background, caption, concept_scene, draw, random_scene
from trainer.families.miniatures.tokens import DEEP_QWEN_LENGTH, T5_LENGTH, compact, load_tokenizers, new_tokenizers

SHEET = (
    ("a big red circle in the middle on a blue background", 128, 128),
    ("a yellow star at the top on plain purple", 128, 128),
    ("a small white triangle in the bottom left corner on a black background", 128, 128),
    ("a green square on the left and a pink moon on the right on a grey background", 96, 160),
    ("an orange ring above a blue cross on a white background", 160, 96),
    ("a big teal and yellow striped hexagon on pink and white stripes", 128, 128),
    ("a black diamond on a background fading from red to yellow", 112, 144),
    ("a small blue bar at the bottom on green and yellow checks", 144, 112),
    ("a purple cross on the right on an orange background", 128, 128),
    ("a kilnpot on a blue background", 128, 128),
    ("a big kilnpot in the middle on yellow and teal stripes", 128, 128),
    ("", 128, 128),
)
TOKENIZERS = {"flux": ("clip", "t5"), "sdxl": ("clip", "clip!"), "sd3": ("clip", "clip!", "t5"), "z_image": ("qwen",)}
TOKENIZERS |= {"flux2": ("qwen!",), "qwen_image": ("qwen, described",), "krea2": ("qwen, described",)}
GUIDANCE = {"flux": 3.5, "sdxl": 5.0, "sd3": 4.0, "z_image": 3.0, "flux2": 3.0, "qwen_image": 3.0}
GUIDANCE["krea2"] = 2.0  # counted from 0
STEPS = {"flux": 20, "sdxl": 30, "sd3": 28, "z_image": 28, "flux2": 28, "qwen_image": 28, "krea2": 28}
CONCEPT_GROUNDS = (
    ("plain", "blue", "black"),
    ("plain", "green", "black"),
    ("plain", "white", "black"),
    ("plain", "pink", "black"),
    ("plain", "teal", "black"),
    ("striped", "white", "pink"),
    ("plain", "blue", "black"),
    ("plain", "green", "black"),
    ("checked", "white", "teal"),
    ("plain", "white", "black"),
    ("fading", "blue", "white"),
    ("striped", "blue", "yellow"),
)
VIDEO = "video"  # the folder of the autoencoder of videos
VAE_PRIOR = {16: (0.35, 2.2), 4: (0.0, 6.0)}


def say(text: str) -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True)


def make_vae(channels: int, *, out: Path, deadline: float, resume: bool, small: bool, device: torch.device) -> None:
    """Trains an autoencoder, measures its latents, and writes it in fp16 with the scale and shift that fit them."""
    torch.manual_seed(channels + 100 * resume)
    place = out / ".vae" / str(channels)
    vae = (AutoencoderKL.from_pretrained(place, dtype=torch.float32) if resume else models.vae(channels)).to(device)
    mean, std = VAE_PRIOR[channels]
    count, batch = (64, 4) if small else (6000, 48)
    losses = image_losses(
        vae,
        count=count,
        batch=batch,
        device=device,
        prior_mean=mean,
        prior_std=std,
        weight=1e-3 if channels == 16 else 3e-4,
    )
    fit(
        losses,
        [vae],
        seconds=deadline - time.monotonic(),
        peak_rate=1.5e-3,
        device=device,
        report=lambda text: say(f"vae{channels}: {text}"),
    )
    vae.half().float()
    mean, std, error = measure_latents(vae, count=100 if small else 2000, device=device)
    say(f"vae{channels}: latents {mean:.4f} ± {std:.4f}, error {error:.4f} of 1")
    shift = round(mean, 4) if channels == 16 else None
    scale = round(1 / (std**2 + (0.0 if shift is not None else mean**2)) ** 0.5, 5)
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    vae.half().save_pretrained(place)


def make_video_vae(*, out: Path, deadline: float, resume: bool, small: bool, device: torch.device) -> None:
    """The same for an autoencoder of videos, whose config has the mean and the deviation of each channel of latents."""
    torch.manual_seed(200 + resume)
    place = out / ".vae" / VIDEO
    vae = AutoencoderKLQwenImage.from_pretrained(place, dtype=torch.float32) if resume else qwen.new_vae()
    mean, std = VAE_PRIOR[16]
    count, batch = (64, 4) if small else (6000, 48)
    one_frame = qwen.OneFrame(vae).to(device)
    losses = image_losses(
        one_frame, count=count, batch=batch, device=device, prior_mean=mean, prior_std=std, weight=1e-3
    )
    fit(
        losses,
        [one_frame],
        seconds=deadline - time.monotonic(),
        peak_rate=1.5e-3,
        device=device,
        report=lambda text: say(f"vae_video: {text}"),
    )
    vae.half().float()
    rng = random.Random(2)
    scenes = [random_scene(rng) for _ in range(100)]
    qwen.normalise(vae, draw(scenes, height=128, width=128, device=device) * 2 - 1)
    mean, std, error = measure_latents(qwen.OneFrame(vae).to(device), count=100, device=device)
    say(f"vae_video: latents {mean:.4f} ± {std:.4f}, error {error:.4f} of 1")
    vae.half().save_pretrained(place)


def load_vae(out: Path, recipe: Recipe) -> Any:
    """The autoencoder that a family's recipe needs, as one of images, in fp32."""
    if recipe.of_videos:
        vae = AutoencoderKLQwenImage.from_pretrained(out / ".vae" / VIDEO, dtype=torch.float32)
        return qwen.OneFrame(vae)
    return AutoencoderKL.from_pretrained(out / ".vae" / str(recipe.latent_channels), dtype=torch.float32)


def make_family(
    name: str, *, out: Path, deadline: float, resume: bool, size: tuple[int, int], device: torch.device
) -> None:
    """Trains a family's text encoders and denoiser together and writes the pipeline's folder, in fp16.

    `size`: scenes of each resolution, and scenes in a batch.
    """
    torch.manual_seed(int(resume))
    kinds = TOKENIZERS[name]
    tokenizers = load_tokenizers(out / name, kinds) if resume else new_tokenizers(kinds)
    recipe = RECIPES[name](tokenizers)
    if resume:
        old = DiffusionPipeline.from_pretrained(out / name, dtype=torch.float32)
        for part, module in recipe.modules.items():
            module.load_state_dict(getattr(old, part).state_dict())
    vae = load_vae(out, recipe).to(device).requires_grad_(False)
    for module in recipe.modules.values():
        module.to(device)
    start = time.monotonic()
    count, batch = size
    dropout = 0.05 if name == "sdxl" else 0.1
    losses = latent_losses(
        recipe, vae, tokenizers, count=count, batch=batch, device=device, dropout=dropout, seed=3 + int(resume)
    )
    say(f"{name}: {count} scenes of each resolution in {time.monotonic() - start:.0f} s")
    fit(
        losses,
        list(recipe.modules.values()),
        seconds=deadline - time.monotonic(),
        peak_rate=1e-3,
        device=device,
        report=lambda text: say(f"{name}: {text}"),
    )
    pipeline = recipe.pipeline(vae)
    pipeline.to("cpu", torch.float16)
    pipeline.save_pretrained(out / name)
    compact(out / name)


@torch.no_grad()
def make_sheet(folder: Path, path: Path, *, device: torch.device, seed: int = 0) -> None:
    """Samples the prompts of `SHEET` with diffusers' own pipeline into one image; two seeds of each."""
    name = folder.name
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    page = Image.new("RGB", (6 * 164, 4 * 164))
    extra: dict[str, Any] = {} if name in ("sdxl", "z_image") else {"max_sequence_length": T5_LENGTH}
    scale = {"true_cfg_scale" if name == "qwen_image" else "guidance_scale": GUIDANCE[name]}
    if name == "flux2":
        extra = {"max_sequence_length": DEEP_QWEN_LENGTH}
    if name in ("qwen_image", "krea2"):
        extra = {"negative_prompt": ""}
    for cell in range(24):
        prompt, height, width = SHEET[cell // 2]
        image = pipeline(
            prompt,
            height=height,
            width=width,
            num_inference_steps=STEPS[name],
            **scale,
            generator=torch.Generator().manual_seed(seed + cell),
            **extra,
        ).images[0]
        page.paste(image, (cell % 6 * 164, cell // 6 * 164))
    page.save(path)


def make_concept(out: Path) -> None:
    """Draws the concept's twelve images with their captions."""
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)
    sizes = [(128, 128)] * 6 + [(112, 144), (144, 112), (96, 160), (160, 96), (112, 144), (144, 112)]
    for number, ((height, width), ground) in enumerate(zip(sizes, CONCEPT_GROUNDS, strict=True), start=1):
        scene = replace(concept_scene(rng), background=Background(*ground))
        image = (draw([scene], height=height, width=width)[0] * 255).round().byte()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / f"{number:02}.png", optimize=True)
        (out / f"{number:02}.txt").write_text(caption(scene, rng) + "\n", encoding="utf-8")


def make_all(out: Path, *, minutes: float, vae_minutes: float, resume: bool, small: bool) -> None:
    """Runs this module once for each part, in parallel: the autoencoders first. Only Flux takes all of `minutes`."""
    rounds = [
        {"vae16": vae_minutes, "vae4": vae_minutes, "vae_video": vae_minutes},
        {"flux": minutes} | dict.fromkeys(("sdxl", "sd3", "z_image", "flux2", "qwen_image", "krea2"), 0.6 * minutes),
    ]
    flags = [*(["--small"] if small else []), *(["--resume"] if resume else [])]
    for parts in rounds:
        command = [sys.executable, "-m", "trainer.families.miniatures.make", "--out", str(out), *flags]
        running = [subprocess.Popen([*command, part, "--minutes", str(share)]) for part, share in parts.items()]  # noqa: S603
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit(f"failed: {dict(zip(parts, codes, strict=True))}")


def main() -> None:
    """The command line."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="make", description=__doc__)
    parser.add_argument("what", choices=[*RECIPES, "all", "vae16", "vae4", "vae_video", "concept", "sheet"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="wall time of the families, everything included")
    parser.add_argument("--vae-minutes", type=float, default=3.0)
    parser.add_argument("--resume", action="store_true", help="go on from the models in --out")
    parser.add_argument("--scenes", type=int, default=12_000, help="of each resolution, for the families")
    parser.add_argument("--batch", type=int, default=128, help="scenes in a step of the families")
    parser.add_argument("--small", action="store_true", help="little data and small batches: to see that it runs")
    chosen = parser.parse_args()
    torch.set_num_threads(min(torch.get_num_threads(), 4))
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention fails in Flux's backward pass on some sequence lengths (torch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out, small, deadline = chosen.out, chosen.small, begun + chosen.minutes * 60
    match chosen.what:
        case "all":
            make_all(out, minutes=chosen.minutes, vae_minutes=chosen.vae_minutes, resume=chosen.resume, small=small)
        case "vae16" | "vae4":
            make_vae(int(chosen.what[3:]), out=out, deadline=deadline, resume=chosen.resume, small=small, device=device)
        case "vae_video":
            make_video_vae(out=out, deadline=deadline, resume=chosen.resume, small=small, device=device)
        case "concept":
            make_concept(out)
        case "sheet":
            make_sheet(out, out.with_suffix(".png"), device=device)
        case name:
            size = (64, 4) if small else (chosen.scenes, chosen.batch)
            make_family(name, out=out, deadline=deadline, resume=chosen.resume, size=size, device=device)


if __name__ == "__main__":
    main()
