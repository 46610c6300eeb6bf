"""Train one miniature base model, or one autoencoder: `python -m trainer.families.miniatures.make flux --out DIR`.

Each family writes a folder in the layout of diffusers' pipelines, from the autoencoder that `vae16`, `vae4` or
`vae_video` has left in DIR/.vae, or else from the one in --source, and from the scenes that `scenes` has drawn into
DIR/.scenes, which are drawn if they are not there. `--resume` goes on from the weights in --source;
tokenizers come from there as well, where it has them. `concept` draws the demo's images; `sheet` samples from the model
in a folder, for a look at it. `workshop` runs all of them at the same time.
"""

import argparse
import random
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, DiffusionPipeline
from PIL import Image
from torch import nn

from trainer.families.miniatures import models, qwen
from trainer.families.miniatures.fit import LossFunction, fit
from trainer.families.miniatures.pools import image_losses, latent_losses, measure_latents, write_scenes
from trainer.families.miniatures.recipes import RECIPES, Recipe
from trainer.families.miniatures.scenes import Background, Scene, caption, concept_scene, draw, random_scene
from trainer.families.miniatures.tokens import DEEP_QWEN_LENGTH, T5_LENGTH, compact, load_tokenizers, new_tokenizers

SHEET = (
    ("a big red circle in the middle on a blue background", 128, 128),
    ("a yellow star at the top on plain purple", 128, 128),
    ("a small white triangle in the bottom left corner on a black background", 128, 128),
    ("a green square on the left and a pink moon on the right on a grey background", 96, 160),
    ("an orange ring above a blue cross on a white background", 160, 96),
    ("a big yellow vase with blue bands in the middle on pink and white stripes", 128, 128),
    ("a black diamond on a background fading from red to yellow", 112, 144),
    ("a small blue bar at the bottom on green and yellow checks", 144, 112),
    ("a purple vase on the right on an orange background", 128, 128),
    ("a kilnpot on a blue background", 128, 128),
    ("a big green blarm in the middle on a white background", 128, 128),
    ("a big white triangle in the middle on a black background", 128, 128),
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
CONCEPT_SIZES = ((128, 128),) * 6 + ((112, 144), (144, 112), (96, 160), (160, 96), (112, 144), (144, 112))
VAE_OWNERS = {"16": "flux", "4": "sdxl", VIDEO: "qwen_image"}  # the families whose folders have the autoencoders
VAE_PRIOR = {16: (0.35, 2.2), 4: (0.0, 6.0)}  # mean and deviation towards which the latents are drawn
VAE_WEIGHTS = {16: 3e-4, 4: 1e-4}  # and how strongly
PEAK_RATE = 1.2e-3  # the learning rate of the families, for batches of 256


def say(text: str) -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True)


@dataclass(frozen=True)
class Work:
    """What all parts are told: where to write and what to go on from, until when, and on which device.

    `small`: little data and small batches, to see that it runs. `captured`: steps as CUDA graphs.
    """

    out: Path
    source: Path
    deadline: float
    resume: bool
    small: bool
    captured: bool
    device: torch.device

    def fit(self, name: str, losses: list[LossFunction], modules: list[nn.Module], *, peak_rate: float) -> None:
        """Train until the deadline; less of a rate where the weights are trained already."""
        fit(
            losses,
            modules,
            seconds=self.deadline - time.monotonic(),
            peak_rate=0.7 * peak_rate if self.resume else peak_rate,
            device=self.device,
            report=lambda text: say(f"{name}: {text}"),
            captured=self.captured,
        )


def make_vae(channels: int, work: Work) -> None:
    """Trains an autoencoder, measures its latents, and writes it in fp16 with the scale and shift that fit them."""
    torch.manual_seed(channels + 100 * work.resume)
    vae = (find_vae(str(channels), work) if work.resume else models.vae(channels)).to(work.device)
    work.fit(f"vae{channels}", vae_losses(vae, channels, work), [vae], peak_rate=1.5e-3)
    vae.half().float()
    mean, std, error = measure_latents(vae, count=100 if work.small else 2000, device=work.device)
    say(f"vae{channels}: latents {mean:.4f} ± {std:.4f}, error {error:.4f} of 1")
    shift = round(mean, 4) if channels == 16 else None
    scale = round(1 / (std**2 + (0.0 if shift is not None else mean**2)) ** 0.5, 5)
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    vae.half().save_pretrained(work.out / ".vae" / str(channels))


def make_video_vae(work: Work) -> None:
    """The same for an autoencoder of videos, whose config has the mean and the deviation of each channel of latents."""
    torch.manual_seed(200 + work.resume)
    vae = find_vae(VIDEO, work) if work.resume else qwen.new_vae()
    one_frame = qwen.OneFrame(vae).to(work.device)
    work.fit("vae_video", vae_losses(one_frame, qwen.LATENT_CHANNELS, work), [one_frame], peak_rate=1.5e-3)
    vae.half().float()
    rng = random.Random(2)
    scenes = [random_scene(rng) for _ in range(100)]
    qwen.normalise(vae, draw(scenes, height=128, width=128, device=work.device) * 2 - 1)
    mean, std, error = measure_latents(qwen.OneFrame(vae).to(work.device), count=100, device=work.device)
    say(f"vae_video: latents {mean:.4f} ± {std:.4f}, error {error:.4f} of 1")
    vae.half().save_pretrained(work.out / ".vae" / VIDEO)


def vae_losses(vae: Any, channels: int, work: Work) -> list[LossFunction]:
    """Those of `image_losses` for an autoencoder with so many channels of latents."""
    count, batch = (64, 4) if work.small else (6000, 48)
    mean, std = VAE_PRIOR[channels]
    return image_losses(
        vae,
        count=count,
        batch=batch,
        device=work.device,
        prior_mean=mean,
        prior_std=std,
        weight=VAE_WEIGHTS[channels],
    )


def find_vae(key: str, work: Work) -> Any:
    """The autoencoder 16, 4 or `VIDEO`, in fp32: a new one if there is one, else that of the models in `source`."""
    place = work.out / ".vae" / key
    if not place.exists():
        place = work.source / VAE_OWNERS[key] / "vae"
    kind = AutoencoderKLQwenImage if key == VIDEO else AutoencoderKL
    return kind.from_pretrained(place, dtype=torch.float32)


def load_vae(recipe: Recipe, work: Work) -> Any:
    """The autoencoder that a family's recipe needs, as one of images, in fp32."""
    if recipe.of_videos:
        return qwen.OneFrame(find_vae(VIDEO, work))
    return find_vae(str(recipe.latent_channels), work)


def scenes_in(out: Path) -> Path:
    """The folder of the scenes that all families are trained with."""
    return out / ".scenes"


def make_scenes(count: int, work: Work) -> None:
    """Draws so many scenes of each resolution; others where weights go on than where they begin."""
    start = time.monotonic()
    folder = scenes_in(work.out)
    unfinished = folder.with_name(".scenes-unfinished")
    write_scenes(unfinished, count=count, device=work.device, seed=3 + int(work.resume))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    say(f"scenes: {count} of each resolution in {time.monotonic() - start:.0f} s")


def make_family(name: str, work: Work, *, size: tuple[int, int]) -> None:
    """Trains a family's text encoders and denoiser together and writes the pipeline's folder, in fp16.

    `size`: scenes of each resolution, and scenes in a batch.
    """
    torch.manual_seed(int(work.resume))
    kinds = TOKENIZERS[name]
    known = (work.source / name / "tokenizer").exists()
    tokenizers = load_tokenizers(work.source / name, kinds) if known else new_tokenizers(kinds)
    recipe = RECIPES[name](tokenizers)
    if work.resume:
        old = DiffusionPipeline.from_pretrained(work.source / name, dtype=torch.float32)
        for part, module in recipe.modules.items():
            module.load_state_dict(getattr(old, part).state_dict())
    vae = load_vae(recipe, work).to(work.device).requires_grad_(False)
    for module in recipe.modules.values():
        module.to(work.device)
    start = time.monotonic()
    count, batch = size
    if not scenes_in(work.out).exists():
        make_scenes(count, work)
    losses = latent_losses(
        recipe,
        vae,
        tokenizers,
        scenes=scenes_in(work.out),
        batch=batch,
        device=work.device,
        dropout=0.05 if name == "sdxl" else 0.1,
    )
    say(f"{name}: latents and captions in {time.monotonic() - start:.0f} s")
    work.fit(name, losses, list(recipe.modules.values()), peak_rate=PEAK_RATE)
    pipeline = recipe.pipeline(vae)
    pipeline.to("cpu", torch.float16)
    pipeline.save_pretrained(work.out / name)
    compact(work.out / name)


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
    for height, width in dict.fromkeys((height, width) for _, height, width in SHEET):
        cells = [cell for cell in range(24) if SHEET[cell // 2][1:] == (height, width)]
        if "negative_prompt" in extra:
            extra["negative_prompt"] = [""] * len(cells)
        images = pipeline(
            prompt=[SHEET[cell // 2][0] for cell in cells],
            height=height,
            width=width,
            num_inference_steps=STEPS[name],
            **scale,
            generator=[torch.Generator().manual_seed(seed + cell) for cell in cells],
            **extra,
        ).images
        for cell, image in zip(cells, images, strict=True):
            page.paste(image, (cell % 6 * 164, cell // 6 * 164))
    page.save(path)


def make_concept(out: Path) -> None:
    """Draws the concept's twelve images with their captions."""
    rng = random.Random(7)
    for number, ground in enumerate(CONCEPT_GROUNDS):
        scene = replace(concept_scene(rng), background=Background(*ground))
        _write_image(number, scene, out, rng)


def make_ordinary(out: Path) -> None:
    """Draws as many scenes without the concept or the control, by which a job keeps what the base model knows."""
    rng = random.Random(11)
    number = 0
    while number < len(CONCEPT_SIZES):
        scene = random_scene(rng)
        if any(thing.shape == "circle" and thing.colour == "red" for thing in scene.things):
            continue
        _write_image(number, scene, out, rng)
        number += 1


def _write_image(number: int, scene: Scene, out: Path, rng: random.Random) -> None:
    """The image of this number, from 0, with its caption."""
    out.mkdir(parents=True, exist_ok=True)
    height, width = CONCEPT_SIZES[number]
    image = (draw([scene], height=height, width=width)[0] * 255).round().byte()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / f"{number + 1:02}.png", optimize=True)
    (out / f"{number + 1:02}.txt").write_text(caption(scene, rng) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="make", description=__doc__)
    parser.add_argument(
        "what", choices=[*RECIPES, "vae16", "vae4", "vae_video", "scenes", "concept", "ordinary", "sheet"]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", type=Path, default=Path(__file__).parent, help="the models there are already")
    parser.add_argument("--seconds", type=float, default=480.0, help="wall time, everything included but the writing")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in --source")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--scenes", type=int, default=12_000, help="of each resolution, for the families")
    parser.add_argument("--batch", type=int, default=256, help="scenes in a step of the families")
    parser.add_argument("--small", action="store_true", help="little data and small batches: to see that it runs")
    chosen = parser.parse_args()
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention fails in Flux's backward pass on some sequence lengths (torch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = Work(
        out=chosen.out,
        source=chosen.source,
        deadline=begun + chosen.seconds,
        resume=chosen.resume,
        small=chosen.small,
        captured=not chosen.eager,
        device=device,
    )
    size = (64, 4) if chosen.small else (chosen.scenes, chosen.batch)
    match chosen.what:
        case "vae16" | "vae4":
            make_vae(int(chosen.what[3:]), work)
        case "vae_video":
            make_video_vae(work)
        case "scenes":
            make_scenes(size[0], work)
        case "concept":
            make_concept(chosen.out)
        case "ordinary":
            make_ordinary(chosen.out)
        case "sheet":
            make_sheet(chosen.source, chosen.out, device=device)
        case name:
            make_family(name, work, size=size)


if __name__ == "__main__":
    main()
