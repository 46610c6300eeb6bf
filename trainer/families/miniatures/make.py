"""Train one miniature base model, or one autoencoder: `python -m trainer.families.miniatures.make flux --out DIR`.

Each family writes a folder in the layout of diffusers' pipelines, from the autoencoder that `vae16`, `vae_flux`, `vae4`
or `vae_video` has left in DIR/.vae, or else from the one in --source, and from the scenes that `scenes` has drawn into
DIR/.scenes, which are drawn if they are not there. `--resume` goes on from the weights in --source: of an autoencoder,
the decoder alone; of a family, the denoiser alone, where the text encoders are trained already. Tokenizers come from
there as well, where it has them. `concept` draws the demo's images; `sheet` samples from the model
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
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn

from trainer.families.miniatures import models, qwen
from trainer.families.miniatures.fit import LossFunction, fit
from trainer.families.miniatures.pools import (
    ImageLoss,
    copying_loss,
    decoding_loss,
    image_losses,
    latent_losses,
    measure_latents,
    write_scenes,
)
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
CONCEPT_SIZES = ((128, 128),) * 6 + ((112, 144), (144, 112), (96, 160), (160, 96), (112, 144), (144, 112))
VIDEO = "vae_video"
VAES = {"vae16": "sd3", "vae_flux": "flux", "vae4": "sdxl", VIDEO: "qwen_image"}
"""The autoencoders, and the family whose folder has each. `vae16` is the teacher of the one of videos."""
VAE_OF = {"flux": "vae_flux", "sdxl": "vae4", "qwen_image": VIDEO, "krea2": VIDEO}  # the others have vae16
VAE_PRIOR = {16: (0.35, 2.2), 4: (0.0, 6.0)}  # mean and deviation towards which the latents are drawn
VAE_WEIGHTS = {16: 3e-4, 4: 1e-4}  # and how strongly
VAE_RATE = 1.5e-3
PEAK_RATE = 1.2e-3  # the learning rate of the families, for batches of 256
GOING_ON_RATE = 0.8e-3  # and of those whose weights are trained already


def say(text: str) -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True)


@dataclass(frozen=True)
class Work:
    """What all parts are told: where to write and what to go on from, until when, and on which device.

    `small`: little data and small batches, to see that it runs. `compiled`: the denoiser's blocks are. `captured`:
    steps are CUDA graphs. `waits`: for scenes that another process draws.
    """

    out: Path
    source: Path
    deadline: float
    resume: bool
    small: bool
    compiled: bool
    captured: bool
    waits: bool
    device: torch.device

    def fit(self, name: str, losses: list[LossFunction], modules: list[nn.Module], *, peak_rate: float) -> None:
        """Train until the deadline."""
        fit(
            losses,
            modules,
            seconds=self.deadline - time.monotonic(),
            peak_rate=peak_rate,
            device=self.device,
            report=lambda text: say(f"{name}: {text}"),
            captured=self.captured,
        )


def make_vae(key: str, work: Work) -> None:
    """Trains an autoencoder, measures its latents, and writes it in fp16 with the scale and shift that fit them.

    One that goes on keeps its encoder, and so its latents, which families have been trained with.
    """
    torch.manual_seed(len(key) + 100 * work.resume)
    channels = 4 if key == "vae4" else 16
    if work.resume:
        vae = find_vae(key, work).to(work.device).requires_grad_(False)
        decoder = [module.requires_grad_() for module in (vae.decoder, vae.post_quant_conv) if module is not None]
        work.fit(key, _image_losses(decoding_loss(vae), work), decoder, peak_rate=VAE_RATE)
    else:
        vae = models.vae(channels).to(work.device)
        mean, std = VAE_PRIOR[channels]
        loss = copying_loss(vae, prior_mean=mean, prior_std=std, weight=VAE_WEIGHTS[channels])
        work.fit(key, _image_losses(loss, work), [vae], peak_rate=VAE_RATE)
    vae.half().float()
    mean, std, error = measure_latents(vae, count=100 if work.small else 2000, device=work.device)
    say(f"{key}: latents {mean:.4f} ± {std:.4f}, error {error:.4f} of 1")
    if not work.resume:
        shift = round(mean, 4) if channels == 16 else None
        scale = round(1 / (std**2 + (0.0 if shift is not None else mean**2)) ** 0.5, 5)
        vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    vae.half().save_pretrained(work.out / ".vae" / key)


def make_video_vae(work: Work) -> None:
    """The same for an autoencoder of videos, which learns the latents of one of images."""
    torch.manual_seed(200 + work.resume)
    teacher = find_vae("vae16", work).requires_grad_(False)
    vae = find_vae(VIDEO, work) if work.resume else new_video_vae(teacher)
    student = qwen.OneFrame(vae).to(work.device)
    loss = qwen.taught_loss(student, qwen.Taught(teacher, vae).to(work.device))
    work.fit(VIDEO, _image_losses(loss, work), [student], peak_rate=VAE_RATE)
    vae.half().float()
    mean, std, error = measure_latents(student, count=100, device=work.device)
    say(f"{VIDEO}: latents {mean:.4f} ± {std:.4f}, error {error:.4f} of 1")
    vae.half().save_pretrained(work.out / ".vae" / VIDEO)


def new_video_vae(teacher: AutoencoderKL) -> AutoencoderKLQwenImage:
    """With random weights, and statistics that are the same wherever they are computed."""
    rng = random.Random(2)
    scenes = [random_scene(rng) for _ in range(100)]
    return qwen.new_vae(teacher, draw(scenes, height=128, width=128) * 2 - 1)


def _image_losses(loss: ImageLoss, work: Work) -> list[LossFunction]:
    count, batch = (64, 4) if work.small else (4000, 48)
    return image_losses(loss, count=count, batch=batch, device=work.device)


def find_vae(key: str, work: Work) -> Any:
    """One of `VAES`, in fp32: a new one if there is one, else that of the models in `source`."""
    place = work.out / ".vae" / key
    if not place.exists():
        place = work.source / VAES[key] / "vae"
    kind = AutoencoderKLQwenImage if key == VIDEO else AutoencoderKL
    return kind.from_pretrained(place, dtype=torch.float32)


def latents_of(name: str, work: Work) -> Any:
    """The encoder of the images that a family is trained with, in fp32."""
    key = VAE_OF.get(name, "vae16")
    if key != VIDEO:
        return find_vae(key, work)
    teacher = find_vae("vae16", work)
    return qwen.Taught(teacher, find_vae(VIDEO, work) if work.resume else new_video_vae(teacher))


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


def wait_for_scenes(work: Work) -> None:
    """Until another process has drawn them. Raises TimeoutError if there are none by the deadline."""
    while not scenes_in(work.out).exists():
        if time.monotonic() > work.deadline:
            raise TimeoutError(f"No scenes in {scenes_in(work.out)} by the deadline.")
        time.sleep(0.1)


def make_family(name: str, work: Work, *, size: tuple[int, int]) -> None:
    """Trains a family's text encoders and denoiser together and writes the pipeline's folder, in fp16.

    `size`: scenes of each resolution, and scenes in a batch.
    """
    torch.manual_seed(int(work.resume))
    kinds = TOKENIZERS[name]
    known = (work.source / name / "tokenizer").exists()
    tokenizers = load_tokenizers(work.source / name, kinds) if known else new_tokenizers(kinds)
    recipe = RECIPES[name](tokenizers)
    known_parts = _go_on(name, recipe, work) if work.resume else []
    encoders = [part for part, module in recipe.modules.items() if module is not recipe.denoiser]
    frozen = recipe.untrained or all(part in known_parts for part in encoders)
    vae = latents_of(name, work).to(work.device).requires_grad_(False)
    for module in recipe.modules.values():
        module.to(work.device)
    start = time.monotonic()
    count, batch = size
    if work.waits:
        wait_for_scenes(work)
    elif not scenes_in(work.out).exists():
        make_scenes(count, work)
    losses = latent_losses(
        recipe,
        vae,
        tokenizers,
        scenes=scenes_in(work.out),
        batch=batch,
        device=work.device,
        dropout=0.05 if name == "sdxl" else 0.1,
        frozen=frozen,
    )
    say(f"{name}: latents and captions in {time.monotonic() - start:.0f} s; goes on: {', '.join(known_parts) or '-'}")
    if work.compiled:
        compile_blocks(recipe.denoiser)
    modules = [recipe.denoiser] if frozen else list(recipe.modules.values())
    work.fit(name, losses, modules, peak_rate=PEAK_RATE if len(known_parts) < len(recipe.modules) else GOING_ON_RATE)
    own_vae = find_vae(VAE_OF.get(name, "vae16"), work)
    pipeline = recipe.pipeline(qwen.OneFrame(own_vae) if recipe.of_videos else own_vae)
    pipeline.to("cpu", torch.float16)
    pipeline.save_pretrained(work.out / name)
    compact(work.out / name)


def compile_blocks(denoiser: nn.Module) -> None:
    """Compile each block of a transformer by itself: blocks of a kind share the result, so it takes seconds.

    Of SDXL's UNet every block differs: nothing is compiled.
    """
    if isinstance(denoiser, UNet2DConditionModel):
        return
    for part in denoiser.children():
        if isinstance(part, nn.ModuleList):
            for block in part:
                block.compile()


def _go_on(name: str, recipe: Recipe, work: Work) -> list[str]:
    """Give the modules the weights in `source`, and return which have them: others have another shape today."""
    old = DiffusionPipeline.from_pretrained(work.source / name, dtype=torch.float32)
    parts = []
    for part, module in recipe.modules.items():
        weights = getattr(old, part).state_dict()
        shapes = {key: value.shape for key, value in weights.items()}
        if shapes == {key: value.shape for key, value in module.state_dict().items()}:
            module.load_state_dict(weights)
            parts.append(part)
    return parts


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
    parser.add_argument("what", choices=[*RECIPES, *VAES, "scenes", "concept", "ordinary", "sheet"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", type=Path, default=Path(__file__).parent, help="the models there are already")
    parser.add_argument("--seconds", type=float, default=480.0, help="wall time, everything included but the writing")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in --source")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--uncompiled", action="store_true", help="nothing is compiled, as without a GPU")
    parser.add_argument("--wait", action="store_true", help="until another process has drawn the scenes")
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
        compiled=device.type == "cuda" and not chosen.uncompiled,
        captured=not chosen.eager,
        waits=chosen.wait,
        device=device,
    )
    size = (64, 4) if chosen.small else (chosen.scenes, chosen.batch)
    match chosen.what:
        case "vae_video":
            make_video_vae(work)
        case "vae16" | "vae_flux" | "vae4":
            make_vae(chosen.what, work)
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
