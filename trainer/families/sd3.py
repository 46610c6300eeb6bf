"""Stable Diffusion 3 and 3.5: a transformer of joint blocks over image and text tokens, trained by flow matching.

torch and diffusers are imported inside the functions: a plan needs only FACTS.

Shapes: B batch, C channels of latents, H and W their height and width, L tokens, D features.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.families import common
from trainer.families.published import licences
from trainer.families.published import sd3 as published
from trainer.spec.family import (
    CLIP_TOKENS,
    OPTIONAL,
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
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
    from PIL import Image

    from trainer.spec.plan import Prompt

KINDS = published.KINDS
MINIATURE = str(Path(__file__).with_name("miniatures") / "sd3")
# GiB: fitted to peaks of `python -m bench step --family sd3 …` at 1024 x 1024 pixels
# (tests/trainer/spec/test_memory_model.py).
FOOTPRINT = Footprint(
    block_weights=2.01e9,
    other_weights=0.02e9,
    adapter_weights_per_rank=1.31e6,
    kohya_weights_per_rank=1.751e6,
    split_kohya_weights_per_rank=1.751e6,
    peft_weights_per_rank=1.309e6,
    region_count=24,
    text_tokens=333,
    caption_values=333 * 4096 + 2048,  # of both CLIPs and T5, and the pooled outputs of the CLIPs
    latent_channels=16,
    saved_gib={"none": 0.81, "products": 0.66, "attention": 0.14, "all": 0.07, "host": 0.02},
    working_gib=0.077,
    largest_region_weights=0.085e9,
    fp8_weights=1.33e9,
    encoder_weights=5.58e9,
    hidden_size=1536,
    measured_steps={4: MeasuredStep("none", 20.2)},
    measured_pixels=1024 * 1024,
)
MEDIUM_3 = BaseModel(
    "stabilityai/stable-diffusion-3-medium-diffusers",
    files_gib=14.5,
    footprint=FOOTPRINT,
    gated=True,
    aliases=("stable-diffusion-3-medium", "stable-diffusion-3"),
    published=published.MEDIUM,
    licence=licences.stability_community("stabilityai/stable-diffusion-3-medium"),
)
# Not measured: scaled from FOOTPRINT by the hidden size and the number of blocks.
LARGE = Footprint(
    block_weights=8.0e9,
    other_weights=0.06e9,
    adapter_weights_per_rank=3.3e6,
    kohya_weights_per_rank=4.407e6,
    split_kohya_weights_per_rank=4.407e6,
    peft_weights_per_rank=3.298e6,
    region_count=38,
    text_tokens=333,
    caption_values=333 * 4096 + 2048,  # of both CLIPs and T5, and the pooled outputs of the CLIPs
    latent_channels=16,
    saved_gib={"none": 2.1, "products": 1.6, "attention": 0.35, "all": 0.18, "host": 0.02},
    working_gib=0.12,
    largest_region_weights=0.213e9,
    fp8_weights=5.3e9,
    encoder_weights=5.58e9,
    hidden_size=2432,
)
# SD3.5 medium: FOOTPRINT with a second attention in the first 13 of 24 blocks.
MEDIUM_35 = dataclasses.replace(
    FOOTPRINT,
    block_weights=2.2e9,
    adapter_weights_per_rank=1.6e6,
    kohya_weights_per_rank=2.031e6,
    split_kohya_weights_per_rank=2.031e6,
    peft_weights_per_rank=1.468e6,
    fp8_weights=1.4e9,
    saved_gib={**FOOTPRINT.saved_gib, "none": 1.07, "products": 0.86},
)
T5_TOKENS = 256  # the default of diffusers' pipeline, so training and users' tools see the same tokens

FACTS = Facts(
    name="sd3",
    models={
        "sd3": MEDIUM_3,
        "sd3-medium": MEDIUM_3,
        "sd3.5-medium": BaseModel(
            "stabilityai/stable-diffusion-3.5-medium",
            15.2,
            MEDIUM_35,
            gated=True,
            published=published.MEDIUM_35,
            licence=licences.stability_community("stabilityai/stable-diffusion-3.5-medium"),
        ),
        "sd3.5-large": BaseModel(
            "stabilityai/stable-diffusion-3.5-large",
            25.7,
            LARGE,
            gated=True,
            published=published.LARGE_35,
            licence=licences.stability_community("stabilityai/stable-diffusion-3.5-large"),
        ),
        "mini-sd3": BaseModel(MINIATURE, files_gib=0.0, resolution=128, defaults={"cfg": 3.0}),
    },
    files=(
        "model_index.json",
        "scheduler/scheduler_config.json",
        *weights("transformer", "vae", "text_encoder", "text_encoder_2"),
        *tokenizer_files("tokenizer", "tokenizer_2"),
        *(f"{OPTIONAL}{pattern}" for pattern in (*weights("text_encoder_3"), *tokenizer_files("tokenizer_3"))),
    ),
    multiple=16,
    objective="flow",
    timestep_samplings=("sigmoid", "logit_normal", "uniform", "shift"),
    flow_shift=3.0,
    attention_backends=False,
    targets=(
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "attn2.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
    lora_prefix="transformer",
    architecture="stable-diffusion-3-medium",
    base_version="sd3",
    fused_targets={},  # diffusers' fused attention skips the norms of q and k, and has no second attention
    parts={
        "denoiser": "transformer",
        "vae": "vae",
        "clip_l": "text_encoder",
        "clip_g": "text_encoder_2",
        "t5": "text_encoder_3",
    },
    landmarks=("joint_blocks.0.x_block.attn.qkv.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
    text_readers={"tokenizer_3": ("T5", T5_TOKENS), "tokenizer": ("CLIP", CLIP_TOKENS)},
    lookalikes=published.LOOKALIKES,
    pipelines=published.PIPELINES,
    hub_tags=("sd3", "stable-diffusion-3"),
    kinds=published.KINDS,
    same_sizes=published.same_sizes,
    prompt_steps=28,
    prompt_guidance=1.0,
    prompt_cfg=5.0,
)


def load_encoders(folder: Path, *, device: str, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """A pipeline of the tokenizers and text encoders alone: CLIP-L, CLIP-G, and T5 if the model has it."""
    from diffusers import StableDiffusion3Pipeline

    from trainer.base_model.loading import empty_model, load_tokenizer

    has_t5 = (folder / "text_encoder_3").is_dir()
    tokenizers: dict[str, Any] = {"tokenizer_3": None}
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3")[: 3 if has_t5 else 2]:
        tokenizers[name] = load_tokenizer(folder / name, KINDS[name])

    def encoder(name: str) -> Any:
        own = tokenizers[name.replace("text_encoder", "tokenizer")]
        return common.load_encoder(KINDS[name], folder / name, tokenizer=own, device=device, dtype=dtype)

    # Without T5, the pipeline reads the width of the zeros in its place from the denoiser's config.
    return StableDiffusion3Pipeline(
        scheduler=None,
        vae=None,
        transformer=empty_model(KINDS["transformer"], folder / "transformer"),
        **tokenizers,
        text_encoder=encoder("text_encoder"),
        text_encoder_2=encoder("text_encoder_2"),
        text_encoder_3=encoder("text_encoder_3") if has_t5 else None,
    )


def encode_text(
    encoders: StableDiffusion3Pipeline,
    captions: list[str],
    *,
    max_tokens: int = CLIP_TOKENS,  # noqa: ARG001 (other trainers do not read CLIP in chunks here: T5 reads the rest)
) -> list[dict[str, torch.Tensor]]:
    """`tokens` (77 + 256, 4096): both CLIPs side by side, padded with zeros, then T5 or zeros; `pooled` (2048,)."""
    import torch

    length = min(T5_TOKENS, encoders.tokenizer_3.model_max_length) if encoders.tokenizer_3 else T5_TOKENS
    with torch.no_grad(), common.without_warnings():
        tokens_BLD, _, pooled_BD, _ = encoders.encode_prompt(
            captions,
            captions,
            captions,
            device=encoders.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
    return common.split_captions(tokens_BLD, pooled_BD)


def with_clip_outputs(text: dict[str, torch.Tensor], outputs: dict[str, ClipOutput]) -> dict[str, torch.Tensor]:
    """Replace the CLIP part of the tokens and of the pooled output.

    Tokens (B, 77 + 256, 4096): in the first 77, CLIP-L's 768 features, CLIP-G's 1280, then zeros; below them T5's.
    Pooled (B, 2048): CLIP-L's 768 features, then CLIP-G's 1280.
    """
    import torch

    tokens_BLD = text["tokens"]
    pooled_BD = text["pooled"]
    clip_l = outputs.get("text_encoder")
    if clip_l is not None:
        _, length, width = clip_l.tokens_BLD.shape
        pooled_width = clip_l.pooled_BD.shape[-1]
        top_BLD = torch.cat([clip_l.tokens_BLD, tokens_BLD[:, :length, width:]], dim=-1)
        tokens_BLD = torch.cat([top_BLD, tokens_BLD[:, length:]], dim=1)
        pooled_BD = torch.cat([clip_l.pooled_BD, pooled_BD[:, pooled_width:]], dim=-1)
    clip_g = outputs.get("text_encoder_2")
    if clip_g is not None:
        _, length, width = clip_g.tokens_BLD.shape
        # Both projections are as wide as their encoders, so CLIP-G's tokens begin where its pooled output begins.
        begin = pooled_BD.shape[-1] - clip_g.pooled_BD.shape[-1]
        left_BLD = tokens_BLD[:, :length, :begin]
        right_BLD = tokens_BLD[:, :length, begin + width :]
        top_BLD = torch.cat([left_BLD, clip_g.tokens_BLD, right_BLD], dim=-1)
        tokens_BLD = torch.cat([top_BLD, tokens_BLD[:, length:]], dim=1)
        pooled_BD = torch.cat([pooled_BD[:, :begin], clip_g.pooled_BD], dim=-1)
    return {"tokens": tokens_BLD, "pooled": pooled_BD}


load_vae = common.load_vae
encode_images = common.encode_images


def load_denoiser(folder: Path, *, device: str, dtype: torch.dtype) -> SD3Transformer2DModel:
    denoiser: SD3Transformer2DModel = common.load_denoiser(
        KINDS["transformer"], folder / "transformer", device=device, dtype=dtype
    )
    return denoiser


def from_original(
    state: dict[str, torch.Tensor],
    config: dict[str, Any],  # noqa: ARG001 (the names suffice)
) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    return dict(convert(dict(state)))


def blocks(denoiser: SD3Transformer2DModel) -> list[tuple[str, torch.nn.Module]]:
    return [(f"transformer_blocks.{i}", b) for i, b in enumerate(denoiser.transformer_blocks)]


def regions(denoiser: SD3Transformer2DModel) -> list[torch.nn.Module]:
    return [block for _, block in blocks(denoiser)]


def fused_forwards() -> dict[type, type]:
    from diffusers.models.attention import JointTransformerBlock

    from trainer.families.fused_blocks.sd3 import FusedJointBlock

    return {JointTransformerBlock: FusedJointBlock}


def predict(
    denoiser: SD3Transformer2DModel,
    noisy_BCHW: torch.Tensor,
    t_B: torch.Tensor,
    *,
    text: dict[str, torch.Tensor],
    guidance: float = 1.0,  # noqa: ARG001 (this family has no embedded guidance)
    geometry_B6: torch.Tensor | None = None,  # noqa: ARG001 (the model is not conditioned on sizes)
) -> torch.Tensor:
    """The velocity (noise - latents)."""
    velocity_BCHW: torch.Tensor = denoiser(
        hidden_states=common.traced(noisy_BCHW.to(denoiser.dtype)),
        timestep=t_B * 1000,
        encoder_hidden_states=common.traced(text["tokens"]),
        pooled_projections=text["pooled"],
        return_dict=False,
    )[0]
    return velocity_BCHW


def sample(
    denoiser: SD3Transformer2DModel,
    vae: AutoencoderKL,
    folder: Path,
    *,
    prompt: Prompt,
    text: dict[str, torch.Tensor],
    negative: dict[str, torch.Tensor],
    scheduler: dict[str, Any] | None = None,
) -> Image.Image:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline(
        scheduler=common.load_scheduler(FlowMatchEulerDiscreteScheduler, folder, KINDS["scheduler"], scheduler),
        vae=vae,
        transformer=denoiser,
        **common.without_text_encoders(LORA_KEYS.encoders),
    )
    pipe.set_progress_bar_config(disable=True)
    latents_BCHW = pipe(
        guidance_scale=prompt.cfg,
        **common.pipeline_arguments(prompt, text, negative),
    ).images
    return common.to_image(pipe, common.decode_latents(vae, latents_BCHW))


# ---- key names of LoRA files. Original: the modules of Stability-AI/sd3.5, which kohya's and ComfyUI's keys name.
_BLOCK = "transformer_blocks.{}"
_X = "joint_blocks.{}.x_block"
_CONTEXT = "joint_blocks.{}.context_block"

LORA_KEYS = LoraKeys(
    layers=(
        OriginalLayer(f"{_X}.attn.qkv", tuple(f"{_BLOCK}.attn.to_{x}" for x in "qkv"), (1, 1, 1)),
        OriginalLayer(f"{_X}.attn2.qkv", tuple(f"{_BLOCK}.attn2.to_{x}" for x in "qkv"), (1, 1, 1)),
        OriginalLayer(f"{_CONTEXT}.attn.qkv", tuple(f"{_BLOCK}.attn.add_{x}_proj" for x in "qkv"), (1, 1, 1)),
        OriginalLayer(f"{_X}.attn.proj", (f"{_BLOCK}.attn.to_out.0",)),
        OriginalLayer(f"{_X}.attn2.proj", (f"{_BLOCK}.attn2.to_out.0",)),
        OriginalLayer(f"{_CONTEXT}.attn.proj", (f"{_BLOCK}.attn.to_add_out",)),
        OriginalLayer(f"{_X}.mlp.fc1", (f"{_BLOCK}.ff.net.0.proj",)),
        OriginalLayer(f"{_X}.mlp.fc2", (f"{_BLOCK}.ff.net.2",)),
        OriginalLayer(f"{_CONTEXT}.mlp.fc1", (f"{_BLOCK}.ff_context.net.0.proj",)),
        OriginalLayer(f"{_CONTEXT}.mlp.fc2", (f"{_BLOCK}.ff_context.net.2",)),
        OriginalLayer(f"{_X}.adaLN_modulation.1", (f"{_BLOCK}.norm1.linear",)),
        # Six or nine parts in the same order. Only the last block has two, scale and shift, and they are swapped.
        OriginalLayer(f"{_CONTEXT}.adaLN_modulation.1", (f"{_BLOCK}.norm1_context.linear",), halves_swapped=True),
        OriginalLayer("context_embedder", ("context_embedder",)),
        OriginalLayer("x_embedder.proj", ("pos_embed.proj",)),
        *(
            OriginalLayer(f"t_embedder.mlp.{2 * n - 2}", (f"time_text_embed.timestep_embedder.linear_{n}",))
            for n in (1, 2)
        ),
        *(OriginalLayer(f"y_embedder.mlp.{2 * n - 2}", (f"time_text_embed.text_embedder.linear_{n}",)) for n in (1, 2)),
        OriginalLayer("final_layer.linear", ("proj_out",)),
        OriginalLayer("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True),
    ),
    encoders={"text_encoder": "te1", "text_encoder_2": "te2", "text_encoder_3": "te3"},  # CLIP-L, CLIP-G, T5
    # The last block ends with the image; the second attention is in the first blocks of SD3.5 medium.
    not_in_every_block=(
        *(f"attn2.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        *("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    one_width=True,
    file_formats=("kohya", "peft"),  # every tool but diffusers reads kohya's keys, and few others read diffusers'
)
