"""Denoisers of miniatures with adapters, whose frozen weights wait elsewhere than on the device."""

import contextlib

import torch

from tests.support.miniatures import folder as miniature
from tests.support.miniatures import random_text
from trainer.engine import adapters
from trainer.engine.load import place_denoiser
from trainer.spec.family import get_family


def model(name, precision, *, streamed=False, shards=None, fused=False):
    """A denoiser with adapters, and its weight streamer, if its weights wait on the host or in `shards`.

    `fused`: with our own forward passes of its blocks.
    """
    kind = get_family(name)
    denoiser = kind.load_denoiser(miniature(name), device="cpu", dtype=torch.float32)
    options = {"fused": kind.FACTS.fused_targets, "targets": kind.FACTS.targets}
    regions = kind.regions(denoiser)
    through = place_denoiser(
        denoiser, kind.blocks(denoiser), precision=precision, dtype=torch.bfloat16, device="cpu", rank=4, **options,
        streamed=regions if streamed or shards else (), shards=shards,
        forwards=kind.fused_forwards() if fused else None,
    )  # fmt: skip
    adapters.add_adapters(denoiser, kind.blocks(denoiser), **options, rank=4, alpha=4, seed=0)
    torch.manual_seed(2)
    for parameter in (p for n, p in denoiser.named_parameters() if "lora_" in n):
        torch.nn.init.normal_(parameter, std=0.05)
    return denoiser, through


def inputs(name, denoiser, seed):
    torch.manual_seed(seed)
    text = {key: value.bfloat16() for key, value in random_text(name, denoiser, 8).items()}
    channels = denoiser.config.in_channels
    if name in ("flux", "flux2", "qwen_image", "krea2"):
        channels //= 4
    return torch.randn(1, channels, 16, 16), text


def step(name, denoiser, hooks=None, seed=3):
    """The output, and the gradient of every adapter. `hooks`: makes the context of the forward pass."""
    noisy, text = inputs(name, denoiser, seed)
    geometry = torch.tensor([[128, 128, 0, 0, 128, 128]])
    denoiser.zero_grad()
    with hooks() if hooks else contextlib.nullcontext():
        out = get_family(name).predict(
            denoiser, noisy, torch.tensor([0.6]), text=text, guidance=1.0, geometry_B6=geometry
        )
    out.float().square().mean().backward()
    return [out.detach(), *(p.grad for p in denoiser.parameters() if p.grad is not None)]


def fetched_again(through):
    """The hooks of a streamer: weights that autograd would save are fetched again."""
    return lambda: torch.autograd.graph.saved_tensors_hooks(through.pack, through.unpack)
