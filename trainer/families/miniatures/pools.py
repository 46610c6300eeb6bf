"""The data that the miniatures are made from: drawn once, the families' into files that they share."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from trainer.families.miniatures.fit import LossFunction, difference
from trainer.families.miniatures.recipes import Recipe, Texts
from trainer.families.miniatures.scenes import RESOLUTIONS, Scene, caption, draw, random_scene
from trainer.families.miniatures.textures import textures
from trainer.families.miniatures.tokens import token_ids

CHUNK = 1000  # images drawn at once; many, because each drawing waits for the host


def _scenes(count: int, rng: random.Random) -> list[Scene]:
    return [random_scene(rng) for _ in range(count)]


ImageLoss = Callable[[torch.Tensor], torch.Tensor]
"""A loss of pixels (B, 3, H, W) in -1..1."""


def copying_loss(vae: AutoencoderKL, *, prior_mean: float, prior_std: float, weight: float) -> ImageLoss:
    """How badly `vae` copies images, to train all of it.

    The latents are drawn, with `weight`, towards a normal prior that is not centred on zero: as in the published
    models, a trainer that forgets the shift or the scale is then plainly wrong.
    """

    def loss(x_BCHW: torch.Tensor) -> torch.Tensor:
        moments = vae.encode(x_BCHW.to(vae.dtype)).latent_dist
        mean = moments.mean.float()
        spread = moments.std.float()
        y_BCHW = vae.decode((mean + spread * torch.randn_like(mean)).to(vae.dtype)).sample.float()
        kl = (((mean - prior_mean) / prior_std) ** 2 + (spread / prior_std) ** 2 - 1).mean() / 2
        kl = kl - (spread / prior_std).log().mean()
        return difference(y_BCHW, x_BCHW) + weight * kl

    return loss


def decoding_loss(vae: AutoencoderKL) -> ImageLoss:
    """How badly `vae` decodes what it has encoded, to train its decoder alone: its latents stay what they are."""

    def loss(x_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            latents_BCHW = vae.encode(x_BCHW).latent_dist.sample()
        decoder_type = next(vae.decoder.parameters()).dtype
        return difference(vae.decode(latents_BCHW.to(decoder_type)).sample.float(), x_BCHW)

    return loss


def image_losses(image_loss: ImageLoss, *, count: int, batch: int, device: torch.device) -> list[LossFunction]:
    """`image_loss` of a batch out of `count` images, for each resolution; five of six of them are scenes."""
    rng = random.Random(1)

    def loss_over(pool_NCHW: torch.Tensor) -> LossFunction:
        def loss() -> torch.Tensor:
            rows = torch.randint(len(pool_NCHW), (batch,), device=device)
            return image_loss(_recolour(pool_NCHW[rows].float() / 255) * 2 - 1)

        return loss

    losses = []
    for height, width in RESOLUTIONS:
        parts = []
        for _ in range(max(count // CHUNK, 1)):
            share = min(CHUNK, count)
            drawn = draw(_scenes(share - share // 6, rng), height=height, width=width, device=device)
            parts.append((torch.cat([drawn, textures(share // 6, height, width, device=device)]) * 255).round().byte())
        losses.append(loss_over(torch.cat(parts)))
    return losses


def _recolour(x: torch.Tensor) -> torch.Tensor:
    """Half of the images with their colours mixed at random, so that no palette is special to the autoencoder."""
    batch = len(x)
    mixer = torch.rand(batch, 3, 3, device=x.device) ** 3
    mixer = mixer / mixer.sum(dim=2, keepdim=True)
    mixed = torch.einsum("bij,bjhw->bihw", mixer, x)
    gain = 0.7 + 0.3 * torch.rand(batch, 3, 1, 1, device=x.device)
    plain = torch.rand(batch, 1, 1, 1, device=x.device) < 0.5
    return torch.where(plain, x, mixed * gain + (1 - gain) * torch.rand(batch, 3, 1, 1, device=x.device))


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, *, count: int, device: torch.device) -> tuple[float, float, float]:
    """Mean and standard deviation of the latents of `count` scenes, and their copies' mean absolute error (of 1)."""
    rng = random.Random(2)
    total = square = error = 0.0
    chunks = 0
    for start in range(0, count, 100):
        height, width = RESOLUTIONS[(start // 100) % len(RESOLUTIONS)]
        x = draw(_scenes(100, rng), height=height, width=width, device=device) * 2 - 1
        z = vae.encode(x).latent_dist.sample()
        y = vae.decode(z).sample.clamp(-1, 1)
        total += z.mean().item()
        square += z.square().mean().item()
        error += (y - x).abs().mean().item() / 2
        chunks += 1
    mean = total / chunks
    return mean, (square / chunks - mean**2) ** 0.5, error / chunks


def write_scenes(folder: Path, *, count: int, device: torch.device, seed: int) -> None:
    """Draw `count` scenes of each resolution into `folder`, for all families: 3 GB of pixels with 12,000 of each."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for size in RESOLUTIONS:
        drawn = []
        texts = []
        for start in range(0, count, CHUNK):
            scenes = _scenes(min(CHUNK, count - start), rng)
            texts += [caption(scene, rng, unknown=0.06) for scene in scenes]
            pixels = draw(scenes, height=size[0], width=size[1], device=device)
            drawn.append((pixels * 255).round().byte().cpu())
        save_file({"pixels": torch.cat(drawn)}, _scene_file(folder, size))
        _scene_file(folder, size).with_suffix(".json").write_text(json.dumps(texts), encoding="utf-8")


def _scene_file(folder: Path, size: tuple[int, int]) -> Path:
    return folder / f"{size[0]}x{size[1]}.safetensors"


def latent_losses(
    recipe: Recipe,
    vae: AutoencoderKL,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    *,
    scenes: Path,
    batch: int,
    device: torch.device,
    dropout: float,
    frozen: bool,
) -> list[LossFunction]:
    """One loss for each resolution, over scenes of `write_scenes`; a share of `dropout` of captions is emptied.

    `frozen`: the text encoders do not train, so that each caption is encoded once, now.
    """
    nothing = [token_ids(tokenizer, [""]).to(device).long() for tokenizer in tokenizers]
    encode = _encoded_once if frozen else _encoded_each_time

    def loss_over(pool_NCHW: torch.Tensor, captions: list[str]) -> LossFunction:
        pool_ids = [token_ids(tokenizer, captions).to(device) for tokenizer in tokenizers]
        texts_of = encode(recipe, pool_ids, nothing)

        def loss() -> torch.Tensor:
            rows = torch.randint(len(pool_NCHW), (batch,), device=device)
            emptied = torch.rand(batch, device=device) < dropout
            return recipe.loss(pool_NCHW[rows].float(), texts_of(rows, emptied))

        return loss

    return [loss_over(*encoded(vae, _scene_file(scenes, size), device=device)) for size in RESOLUTIONS]


TextsOf = Callable[[torch.Tensor, torch.Tensor], Texts]
"""Of rows (B,) of the captions, and which of them are emptied (B,)."""


def _encoded_each_time(recipe: Recipe, pool_ids: list[torch.Tensor], nothing: list[torch.Tensor]) -> TextsOf:
    def texts_of(rows: torch.Tensor, emptied: torch.Tensor) -> Texts:
        pairs = zip(nothing, pool_ids, strict=True)
        return recipe.texts([torch.where(emptied[:, None], none, pool[rows]).long() for none, pool in pairs])

    return texts_of


@torch.no_grad()
def _encoded_once(recipe: Recipe, pool_ids: list[torch.Tensor], nothing: list[torch.Tensor]) -> TextsOf:
    empty = recipe.texts(nothing)
    parts: list[Texts] = []
    for start in range(0, len(pool_ids[0]), CHUNK):
        part = recipe.texts([ids[start : start + CHUNK].long() for ids in pool_ids])
        parts.append({name: _stored(values) for name, values in part.items()})
    pool = {name: torch.cat([part[name] for part in parts]) for name in empty}

    def texts_of(rows: torch.Tensor, emptied: torch.Tensor) -> Texts:
        texts = {}
        for name, none in empty.items():
            here = emptied.view(-1, *[1] * (none.dim() - 1))
            texts[name] = torch.where(here, none.to(pool[name].dtype), pool[name][rows])
        return texts

    return texts_of


def _stored(values: torch.Tensor) -> torch.Tensor:
    """In the type in which `fit` computes: bf16 on a GPU."""
    if values.is_cuda and values.is_floating_point():
        return values.bfloat16()
    return values


@torch.no_grad()
def encoded(vae: AutoencoderKL, file: Path, *, device: torch.device) -> tuple[torch.Tensor, list[str]]:
    """Normalised latents (N, C, H, W) of the scenes in a file of `write_scenes`, in fp16, and their captions."""
    shift = vae.config.shift_factor or 0.0
    latents = []
    with safe_open(file, framework="pt") as opened:
        pixels = opened.get_slice("pixels")
        for start in range(0, pixels.get_shape()[0], CHUNK):
            x = pixels[start : start + CHUNK].to(device).float() / 127.5 - 1
            latents.append(((vae.encode(x).latent_dist.sample() - shift) * vae.config.scaling_factor).half())
    return torch.cat(latents), json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
