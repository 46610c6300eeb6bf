"""Flux.1 (dev, schnell, Krea): a transformer of 19 double and 38 single blocks, trained by flow matching.

torch and diffusers are imported inside the functions: a plan needs only FACTS.

Shapes: B batch, C channels of latents, H and W their height and width, L tokens, D features.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.families import common
from trainer.families.published import flux as published
from trainer.families.published import licences
from trainer.spec.family import (
    CLIP_TOKENS,
    BaseModel,
    ClipOutput,
    Facts,
    Footprint,
    LoraKeys,
    MeasuredStep,
    OriginalLayer,
    tokenizer_files,
    weights,
)

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
    from PIL import Image

    from trainer.spec.plan import Prompt

KINDS = published.KINDS
MINIATURE = str(Path(__file__).with_name("miniatures") / "flux")

# GiB: fitted to peaks of `python -m bench step --family flux …` at 1280 x 768 pixels
# (tests/trainer/spec/test_memory_model.py).
FOOTPRINT = Footprint(
    block_weights=11.82e9,
    other_weights=0.08e9,
    adapter_weights_per_rank=3.63e6,
    kohya_weights_per_rank=4.436e6,
    split_kohya_weights_per_rank=7.238e6,
    peft_weights_per_rank=4.086e6,
    region_count=57,
    text_tokens=512,
    caption_values=512 * 4096 + 768,  # of T5, and the pooled output of CLIP
    latent_channels=16,
    saved_gib={"none": 4.6, "products": 3.25, "attention": 0.673, "all": 0.334, "host": 0.02},
    working_gib=0.136,
    largest_region_weights=0.34e9,
    fp8_weights=8.6e9,
    encoder_weights=4.89e9,
    hidden_size=3072,
    measured_steps={1: MeasuredStep("none", 4.02), 4: MeasuredStep("products", 4.39)},
    measured_pixels=1280 * 768,
)
DEV = BaseModel(
    "black-forest-labs/FLUX.1-dev",
    31.5,
    FOOTPRINT,
    gated=True,
    published=published.DEV,
    licence=licences.flux_dev("black-forest-labs/FLUX.1-dev"),
)

T5_TOKENS = 512

FACTS = Facts(
    name="flux",
    models={
        "flux": dataclasses.replace(DEV, aliases=("flux.1", "flux1")),
        "flux-dev": DEV,
        "flux-krea": dataclasses.replace(
            DEV,
            source="black-forest-labs/FLUX.1-Krea-dev",
            licence=licences.flux_dev("black-forest-labs/FLUX.1-Krea-dev"),
        ),
        "flux-schnell": BaseModel(
            "black-forest-labs/FLUX.1-schnell",
            files_gib=31.4,
            footprint=FOOTPRINT,
            gated=True,
            defaults={"steps": 4, "guidance": 0.0},
            published=published.SCHNELL,
            licence=licences.APACHE,
        ),
        "mini-flux": BaseModel(MINIATURE, files_gib=0.0, resolution=128),
    },
    files=(
        "model_index.json",
        "scheduler/scheduler_config.json",
        *weights("transformer", "vae", "text_encoder", "text_encoder_2"),
        *tokenizer_files("tokenizer", "tokenizer_2"),
    ),
    multiple=16,
    objective="flow",
    timestep_samplings=("sigmoid", "uniform", "shift", "flux_shift", "logit_normal"),
    targets=(
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
        "proj_out",
    ),
    lora_prefix="transformer",
    architecture="flux-1-dev",
    base_version="flux1",
    fused_targets={
        "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    parts={"denoiser": "transformer", "vae": "vae", "clip_l": "text_encoder", "t5": "text_encoder_2"},
    landmarks=("single_blocks.0.modulation.lin.weight", "single_transformer_blocks.0.proj_mlp.weight"),
    text_readers={"tokenizer_2": ("T5", T5_TOKENS)},
    lookalikes=published.LOOKALIKES,
    pipelines=published.PIPELINES,
    hub_tags=("flux",),
    kinds=published.KINDS,
    same_sizes=published.same_sizes,
    pipeline_cfg="true_cfg_scale",
    prompt_steps=20,
    prompt_guidance=3.5,
    prompt_cfg=1.0,
)


def load_encoders(folder: Path, *, device: str, dtype: torch.dtype) -> FluxPipeline:
    """A FluxPipeline of the two tokenizers and text encoders alone (CLIP-L's pooled output and T5's tokens)."""
    from diffusers import FluxPipeline

    from trainer.base_model.loading import load_tokenizer

    tokenizers = {name: load_tokenizer(folder / name, KINDS[name]) for name in ("tokenizer", "tokenizer_2")}

    def encoder(name: str) -> Any:
        own = tokenizers[name.replace("text_encoder", "tokenizer")]
        return common.load_encoder(KINDS[name], folder / name, tokenizer=own, device=device, dtype=dtype)

    return FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        **tokenizers,
        text_encoder=encoder("text_encoder"),
        text_encoder_2=encoder("text_encoder_2"),
    )


def encode_text(
    encoders: FluxPipeline,
    captions: list[str],
    *,
    max_tokens: int = CLIP_TOKENS,  # noqa: ARG001 (CLIP gives the pooled output alone, which is that of its first tokens)
) -> list[dict[str, torch.Tensor]]:
    """`tokens` (L, 4096) of T5 and `pooled` (768,) of CLIP-L for each caption, padded as the pipeline pads."""
    import torch

    length = min(T5_TOKENS, encoders.tokenizer_2.model_max_length)
    with torch.no_grad(), common.without_warnings():
        tokens_BLD, pooled_BD, _ = encoders.encode_prompt(
            captions, captions, device=encoders.text_encoder.device, max_sequence_length=length
        )
    return common.split_captions(tokens_BLD, pooled_BD)


def with_clip_outputs(text: dict[str, torch.Tensor], outputs: dict[str, ClipOutput]) -> dict[str, torch.Tensor]:
    """The family uses only CLIP-L's pooled output."""
    if "text_encoder" not in outputs:
        return text
    return {**text, "pooled": outputs["text_encoder"].pooled_BD}


load_vae = common.load_vae
encode_images = common.encode_images


def load_denoiser(folder: Path, *, device: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    from trainer.families.fused_blocks.flux import PartlyJoinedProcessor

    denoiser: FluxTransformer2DModel = common.load_denoiser(
        KINDS["transformer"], folder / "transformer", device=device, dtype=dtype
    )
    for block in denoiser.transformer_blocks:
        block.attn.set_processor(PartlyJoinedProcessor())
    return denoiser


def from_original(
    state: dict[str, torch.Tensor],
    config: dict[str, Any],  # noqa: ARG001 (the names suffice)
) -> dict[str, torch.Tensor]:
    """Convert by the table of this family's LoRA keys, which holds at any width.

    diffusers' own function splits the rows of `linear1` at the widths of the full-size model, so miniatures fail.
    """
    layers = {layer.name: layer for layer in LORA_KEYS.layers}
    converted = {}
    for name, tensor in state.items():
        path, end = name.rsplit(".", 1)  # end: weight or bias
        template, number = _without_block_number(path)
        if template in NORMS:
            converted[f"{NORMS[template].format(number)}.weight"] = tensor
            continue
        layer = layers.get(template)
        if layer is None:
            converted[name] = tensor  # the caller refuses it by this name
            continue
        unit = tensor.shape[0] // sum(layer.row_ratio)
        pieces = tensor.split([unit * n for n in layer.row_ratio]) if len(layer.diffusers_names) > 1 else (tensor,)
        if layer.halves_swapped:
            pieces = (tensor.roll(tensor.shape[0] // 2, 0),)
        for part, piece in zip(layer.diffusers_names, pieces, strict=True):
            converted[f"{part.format(number)}.{end}"] = piece
    return converted


def _without_block_number(path: str) -> tuple[str, str]:
    """`double_blocks.7.img_mlp.0` → `double_blocks.{}.img_mlp.0` and `7`; other paths as they are, and ``."""
    if "_blocks." not in path:
        return path, ""
    number = next((part for part in path.split(".") if part.isdecimal()), "")
    if not number:
        return path, ""
    return path.replace(f".{number}.", ".{}.", 1), number


def blocks(denoiser: FluxTransformer2DModel) -> list[tuple[str, torch.nn.Module]]:
    double = [(f"transformer_blocks.{i}", b) for i, b in enumerate(denoiser.transformer_blocks)]
    return double + [(f"single_transformer_blocks.{i}", b) for i, b in enumerate(denoiser.single_transformer_blocks)]


def regions(denoiser: FluxTransformer2DModel) -> list[torch.nn.Module]:
    return [block for _, block in blocks(denoiser)]


def fused_forwards() -> dict[type, type]:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

    from trainer.families.fused_blocks.flux import FusedDoubleBlock, FusedSingleBlock

    return {FluxTransformerBlock: FusedDoubleBlock, FluxSingleTransformerBlock: FusedSingleBlock}


def predict(
    denoiser: FluxTransformer2DModel,
    noisy_BCHW: torch.Tensor,
    t_B: torch.Tensor,
    *,
    text: dict[str, torch.Tensor],
    guidance: float,
    geometry_B6: torch.Tensor | None = None,  # noqa: ARG001 (the model gets the patches' positions, no sizes)
) -> torch.Tensor:
    """The velocity (noise - latents). `guidance`: the embedded scale; schnell has no such embedding.

    Patches of 2 x 2 latents are the tokens, as in diffusers' FluxPipeline.
    """
    import torch

    b, _, h, w = noisy_BCHW.shape
    patches_BLD = common.patch_tokens(noisy_BCHW)
    img_ids = torch.zeros(h // 2, w // 2, 3, device=noisy_BCHW.device, dtype=denoiser.dtype)
    img_ids[..., 1] = torch.arange(h // 2, device=noisy_BCHW.device)[:, None]
    img_ids[..., 2] = torch.arange(w // 2, device=noisy_BCHW.device)
    out_BLD = denoiser(
        hidden_states=common.traced(patches_BLD.to(denoiser.dtype)),
        timestep=t_B,
        guidance=t_B.new_full((b,), guidance) if denoiser.config.guidance_embeds else None,
        pooled_projections=text["pooled"],
        encoder_hidden_states=common.traced(text["tokens"]),
        txt_ids=img_ids.new_zeros(text["tokens"].shape[1], 3),
        img_ids=img_ids.view(-1, 3),
        return_dict=False,
    )[0]
    return common.latents_of_patches(out_BLD, h, w)


def sample(
    denoiser: FluxTransformer2DModel,
    vae: AutoencoderKL,
    folder: Path,
    *,
    prompt: Prompt,
    text: dict[str, torch.Tensor],
    negative: dict[str, torch.Tensor],
    scheduler: dict[str, Any] | None = None,
) -> Image.Image:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    pipe = FluxPipeline(
        scheduler=common.load_scheduler(FlowMatchEulerDiscreteScheduler, folder, KINDS["scheduler"], scheduler),
        vae=vae,
        transformer=denoiser,
        **common.without_text_encoders(LORA_KEYS.encoders),
    )
    pipe.set_progress_bar_config(disable=True)
    packed_BLD = pipe(
        true_cfg_scale=prompt.cfg,
        guidance_scale=prompt.guidance,
        **common.pipeline_arguments(prompt, text, negative),
    ).images
    latents_BCHW = pipe._unpack_latents(packed_BLD, prompt.height, prompt.width, pipe.vae_scale_factor)
    return common.to_image(pipe, common.decode_latents(vae, latents_BCHW))


# ---- key names of LoRA files. Original: the modules of black-forest-labs/flux, which kohya's and ComfyUI's keys name.
_DOUBLE = "transformer_blocks.{}"
_SINGLE = "single_transformer_blocks.{}"

LORA_KEYS = LoraKeys(
    layers=(
        OriginalLayer("double_blocks.{}.img_attn.qkv", tuple(f"{_DOUBLE}.attn.to_{x}" for x in "qkv"), (1, 1, 1)),
        OriginalLayer("double_blocks.{}.txt_attn.qkv", tuple(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv"), (1, 1, 1)),
        OriginalLayer("double_blocks.{}.img_attn.proj", (f"{_DOUBLE}.attn.to_out.0",)),
        OriginalLayer("double_blocks.{}.txt_attn.proj", (f"{_DOUBLE}.attn.to_add_out",)),
        OriginalLayer("double_blocks.{}.img_mlp.0", (f"{_DOUBLE}.ff.net.0.proj",), rows_per_column=4.0),
        OriginalLayer("double_blocks.{}.img_mlp.2", (f"{_DOUBLE}.ff.net.2",), rows_per_column=1 / 4),
        OriginalLayer("double_blocks.{}.txt_mlp.0", (f"{_DOUBLE}.ff_context.net.0.proj",), rows_per_column=4.0),
        OriginalLayer("double_blocks.{}.txt_mlp.2", (f"{_DOUBLE}.ff_context.net.2",), rows_per_column=1 / 4),
        OriginalLayer("double_blocks.{}.img_mod.lin", (f"{_DOUBLE}.norm1.linear",)),
        OriginalLayer("double_blocks.{}.txt_mod.lin", (f"{_DOUBLE}.norm1_context.linear",)),
        OriginalLayer(
            "single_blocks.{}.linear1",
            (*(f"{_SINGLE}.attn.to_{x}" for x in "qkv"), f"{_SINGLE}.proj_mlp"),
            (1, 1, 1, 4),  # the MLP is four times as wide as the model
            rows_per_column=7.0,
        ),
        OriginalLayer("single_blocks.{}.linear2", (f"{_SINGLE}.proj_out",), rows_per_column=1 / 5),
        OriginalLayer("single_blocks.{}.modulation.lin", (f"{_SINGLE}.norm.linear",)),
        OriginalLayer("img_in", ("x_embedder",)),
        OriginalLayer("txt_in", ("context_embedder",)),
        OriginalLayer("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
        OriginalLayer("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
        OriginalLayer("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
        OriginalLayer("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
        OriginalLayer("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
        OriginalLayer("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
        OriginalLayer("final_layer.linear", ("proj_out",)),
        OriginalLayer("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True),
    ),
    encoders={"text_encoder": "te1", "text_encoder_2": "te3"},  # CLIP-L and T5
    other_names=(
        # XLabs' x-flux, without the level `processor`: 1 is the image's stream and 2 the text's.
        OriginalLayer("double_blocks.{}.qkv_lora1", tuple(f"{_DOUBLE}.attn.to_{x}" for x in "qkv"), (1, 1, 1)),
        OriginalLayer("double_blocks.{}.qkv_lora2", tuple(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv"), (1, 1, 1)),
        OriginalLayer("double_blocks.{}.proj_lora1", (f"{_DOUBLE}.attn.to_out.0",)),
        OriginalLayer("double_blocks.{}.proj_lora2", (f"{_DOUBLE}.attn.to_add_out",)),
        OriginalLayer("single_blocks.{}.qkv", tuple(f"{_SINGLE}.attn.to_{x}" for x in "qkv"), (1, 1, 1)),
        OriginalLayer("single_blocks.{}.proj", (f"{_SINGLE}.proj_out",)),
        OriginalLayer("img_in.proj", ("x_embedder",)),  # OMI
    ),
    one_width=True,
)
NORMS = {  # of queries and keys: they have weights, but never adapters
    "double_blocks.{}.img_attn.norm.query_norm": f"{_DOUBLE}.attn.norm_q",
    "double_blocks.{}.img_attn.norm.key_norm": f"{_DOUBLE}.attn.norm_k",
    "double_blocks.{}.txt_attn.norm.query_norm": f"{_DOUBLE}.attn.norm_added_q",
    "double_blocks.{}.txt_attn.norm.key_norm": f"{_DOUBLE}.attn.norm_added_k",
    "single_blocks.{}.norm.query_norm": f"{_SINGLE}.attn.norm_q",
    "single_blocks.{}.norm.key_norm": f"{_SINGLE}.attn.norm_k",
}
