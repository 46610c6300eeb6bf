"""Small models whose layers are wide enough for FP8, with adapters, and one step of each.

What tests of fused blocks share: those that compare them on a CPU, and those in Triton's interpreter
(`tests.support.interpreted_blocks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tests.support.variants import CLASSES, VARIANTS, config
from trainer.engine import adapters
from trainer.engine.load import place_denoiser
from trainer.engine.quantization.frozen_linear import FrozenLinear
from trainer.families.fused_blocks.flux2 import PartlyJoinedFlux2Processor
from trainer.spec.family import Family, get_family

RANK = 4
WIDE: dict[str, dict[str, Any]] = {  # sides that are multiples of 16, where variants.NARROW has smaller ones
    "flux-dev": {"attention_head_dim": 16, "axes_dims_rope": (4, 4, 8), "num_layers": 2, "num_single_layers": 2},
    "flux2-klein-4b": {
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "joint_attention_dim": 48,
        "num_layers": 2,
        "num_single_layers": 2,
    },
    "krea2": {
        "attention_head_dim": 16,
        "num_key_value_heads": 2,
        "axes_dims_rope": (4, 6, 6),
        "text_hidden_dim": 32,
        "text_intermediate_size": 64,
        "num_text_layers": 3,
        "num_layers": 3,
    },
    "qwen-image": {
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 48,
        "num_layers": 3,
    },
    "sd3-medium": {"num_layers": 3},
    "sd3.5-medium": {"num_layers": 3, "dual_attention_layers": (0, 1)},
    "sdxl-base": {
        "block_out_channels": (16, 32, 64),
        "transformer_layers_per_block": (1, 1, 1),
        "cross_attention_dim": 32,
    },
    "z-image": {"dim": 48, "n_heads": 3, "n_kv_heads": 3, "n_layers": 3, "cap_feat_dim": 32, "axes_dims": [4, 6, 6]},
}
PATCHED = ("flux", "flux2", "qwen_image", "krea2")  # families whose `in_channels` are those of 2 x 2 latents


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(1e-30)).item()


def model(base: str, seed: int = 0, **changes: Any) -> tuple[Family, Any]:
    """The family, and a denoiser of random weights. `changes`: to its options."""
    name, _ = VARIANTS[base]
    torch.manual_seed(seed)
    denoiser = CLASSES[name](**{**config(base, narrow=True), **WIDE[base], **changes}).requires_grad_(False)
    for part, p in denoiser.named_parameters():  # which a new model has as zeros
        if "scale_shift_table" in part or (name == "krea2" and "norm" in part):
            torch.nn.init.normal_(p, std=0.3)
    if name == "flux2":  # as its `load_denoiser` does
        for block in denoiser.transformer_blocks:
            block.attn.set_processor(PartlyJoinedFlux2Processor())
    return get_family(name), denoiser


def texts(options: Mapping[str, Any], dtype: torch.dtype, lengths: Sequence[int] = (6, 4)) -> dict[str, torch.Tensor]:
    """A caption for each of `lengths`; the longest fills up the others, where the family's captions differ in length.

    Z-Image fills its own up to multiples of 32; here they have 40 tokens and 7.
    """
    if "cap_feat_dim" in options:
        tokens = torch.arange(64)
        real, padding = torch.stack([tokens < 40, tokens < 7]), torch.stack([tokens >= 64, tokens >= 32])
        return {"tokens": torch.randn(2, 64, options["cap_feat_dim"]).to(dtype), "real": real, "padding": padding}
    pooled = options.get("pooled_projection_dim") or 20
    if "text_hidden_dim" in options:  # several states of each token
        features: tuple[int, ...] = (options["num_text_layers"], options["text_hidden_dim"])
    else:
        features = (options.get("joint_attention_dim") or options["cross_attention_dim"],)
    images, longest = len(lengths), max(lengths)
    text = {
        "tokens": torch.randn(images, longest, *features).to(dtype),
        "pooled": torch.randn(images, pooled).to(dtype),
    }
    if min(lengths) < longest:  # which only Qwen-Image and Krea 2 look at
        text["padding"] = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    return text


def predicted(
    family: Family,
    denoiser: Any,
    dtype: torch.dtype,
    *,
    lengths: Sequence[int] = (6, 4),
    size: tuple[int, int] = (8, 8),
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The model's output for one batch, an image for each of `lengths`, and a loss's gradients of what trains.

    `size`: height and width of the latents.
    """
    torch.manual_seed(3)
    options = denoiser.config
    text = texts(options, dtype, lengths)
    channels = options["in_channels"] // (4 if family.FACTS.name in PATCHED else 1)
    images = len(lengths)
    noisy, geometry = torch.randn(images, channels, *size), torch.full((images, 6), 64.0)
    t = torch.tensor([0.6, 0.3, 0.8])[:images]
    out = family.predict(denoiser, noisy, t, text=text, guidance=1.0, geometry_B6=geometry)
    out.float().square().mean().backward()
    gradients = {}
    for name, p in denoiser.named_parameters():
        if p.grad is not None:
            gradients[name] = p.grad
    return out.detach(), gradients


def adapted(
    family: Family,
    denoiser: Any,
    *,
    precision: str,
    dtype: torch.dtype,
    forwards: Mapping[type, type] | None,
    targets: Sequence[str] | None = None,
    kind: str = "lora",
    joined: bool = True,
) -> Any:
    """The denoiser as a job places it, with adapters that are not zero."""
    fused = family.FACTS.fused_targets if joined else {}
    options: dict[str, Any] = {"fused": fused, "targets": targets or family.FACTS.targets}
    rank = 0 if kind == "dora" else RANK  # an adapter of DoRA has no columns in its layer's weight
    where = {"precision": precision, "dtype": dtype, "device": "cpu", "rank": rank}
    place_denoiser(denoiser, family.blocks(denoiser), **where, forwards=forwards, **options)
    has_columns = any(m.rank for m in denoiser.modules() if isinstance(m, FrozenLinear))
    assert precision != "fp8" or has_columns == (rank > 0)
    blocks = family.blocks(denoiser)
    adapters.add_adapters(denoiser, blocks, **options, rank=RANK, alpha=4, seed=0, kind=kind)
    torch.manual_seed(2)
    for name, p in denoiser.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return denoiser
