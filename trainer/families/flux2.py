"""FLUX.2 klein base (4B, 9B) and dev: double blocks, then single ones, over text and image tokens, by flow matching.

Three things differ from Flux.1. A caption is a message to a language model, filled up to 512 tokens, and three of its
hidden states, side by side, are the text. All blocks of a kind share one modulation. And latents are normalised channel
by channel, after 2 x 2 of them have become one, by the running statistics of the VAE's BatchNorm.

dev differs from klein in two things: it is told the guidance, and so draws without a negative caption; and its language
model is a Mistral and not Qwen3. So it has facts, a template and a pipeline of its own, and all else is one.

torch and diffusers are imported inside the functions: a plan needs only FACTS.

Shapes: B batch, C channels of latents, H and W their height and width, L tokens, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.base_model import configs
from trainer.families import common
from trainer.families.published import flux2 as published
from trainer.families.published import licences
from trainer.families.published.common import MISTRAL_SMALL, QWEN3_4B, QWEN3_8B, caption_gib
from trainer.spec.family import (
    CLIP_TOKENS,
    BaseModel,
    Config,
    Facts,
    Footprint,
    LoraKeys,
    OriginalLayer,
    tokenizer_files,
    weights,
)

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
    from PIL import Image

    from trainer.spec.plan import Prompt
    from trainer.spec.rules.config_rules import ConfigKind

KINDS = published.KINDS
TEXT_TOKENS = 512  # the default of diffusers' pipelines
MINIATURE = str(Path(__file__).with_name("miniatures") / "flux2")
DEV_MINIATURE = str(Path(__file__).with_name("miniatures") / "flux2_dev")


def _footprint(
    *,
    width: int,
    double: int,
    single: int,
    other_weights: float,
    encoder: Config,
    encoder_weights: float,
    states: tuple[int, ...] = published.KLEIN_STATES,
) -> Footprint:
    """Of a model of so many blocks. The numbers of weights are those of the architecture.

    The GiB are computed, not measured on a GPU: `none`, `products` and what is saved without fused blocks from the
    tensors that autograd saves of one fused or other block of each kind on a CPU, uncompiled; the others from the sizes
    of attention's output and of inputs; the working memory as the saved tensors of a block that is not fused and a
    sixth.
    """
    gib_per_kilotoken = 2 * width * 1024 / 2**30  # one tensor of this width in 16 bits
    blocks = double + single
    return Footprint(
        block_weights=(26 * double + 13 * single) * width**2,
        other_weights=other_weights,
        adapter_weights_per_rank=(34 * double + 15 * single) * width,
        kohya_weights_per_rank=(34 * double + 15 * single) * width,
        split_kohya_weights_per_rank=(50 * double + 15 * single) * width,
        peft_weights_per_rank=(38 * double + 15 * single) * width,
        region_count=blocks,
        text_tokens=TEXT_TOKENS,
        caption_values=TEXT_TOKENS * published.STATES * encoder["hidden_size"],
        latent_channels=32,
        saved_gib={
            "none": (16.3 * double + 14.1 * single) * gib_per_kilotoken,
            "products": (13.3 * double + 12.1 * single) * gib_per_kilotoken,
            "attention": 2 * blocks * gib_per_kilotoken,
            "all": blocks * gib_per_kilotoken,
            "host": 0.02,
        },
        working_gib=30 * gib_per_kilotoken,
        largest_region_weights=26 * width**2,
        fp8_weights=(26 * double + 13 * single) * width**2,
        encoder_weights=encoder_weights,
        hidden_size=width,
        # Kept are the embeddings and what each layer gives; then those that are read stand side by side.
        caption_gib=caption_gib(encoder, tokens=TEXT_TOKENS, states=1 + states[-1] + published.STATES),
        unfused_factor=(25.4 * double + 26.2 * single) / (16.3 * double + 14.1 * single),
    )


KLEIN_4B = _footprint(width=3072, double=5, single=20, other_weights=0.195e9, encoder=QWEN3_4B, encoder_weights=4.02e9)
KLEIN_9B = _footprint(width=4096, double=8, single=24, other_weights=0.354e9, encoder=QWEN3_8B, encoder_weights=7.57e9)
DEV = _footprint(
    width=6144,
    double=8,
    single=48,
    other_weights=0.816e9,
    encoder=MISTRAL_SMALL,
    encoder_weights=17.34e9,
    states=published.DEV_STATES,
)


class _Reader(NamedTuple):
    """How a language model reads captions."""

    kinds: dict[str, ConfigKind]
    states: tuple[int, ...]  # the hidden states that are the text, by the layers that they went through
    before: str  # what its chat template makes of a message, written out: a template is a program of its repository
    after: str
    tokens_before: int  # the tokens behind the caption are the first that a long one pushes out
    padding_side: str


# enable_thinking=False: the thought is there, and empty. Before the caption: <|im_start|>, user, a new line.
QWEN3 = _Reader(
    KINDS,
    published.KLEIN_STATES,
    before="<|im_start|>user\n",
    after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    tokens_before=3,
    padding_side="right",
)
# The system message of diffusers' pipeline, of 28 tokens, and four marks.
MISTRAL = _Reader(
    published.DEV_KINDS,
    published.DEV_STATES,
    before="<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses "
    "focusing on object relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]",
    after="[/INST]",
    tokens_before=32,
    padding_side="left",
)
IMAGE_MARK = "[IMG]"  # stands for an image in what Mistral reads; the pipeline removes it from captions

DEV_FACTS: dict[str, Any] = {
    "parts": {"denoiser": "transformer", "vae": "vae", "mistral3": "text_encoder"},
    "text_readers": {"tokenizer": ("Mistral", TEXT_TOKENS - MISTRAL.tokens_before)},
    "pipelines": published.DEV_PIPELINES,
    "kinds": published.DEV_KINDS,
    "same_sizes": published.dev_same_sizes,
    "prompt_guidance": 4.0,
    "prompt_cfg": 1.0,
    "draws_with_cfg": False,
}

FACTS = Facts(
    name="flux2",
    models={
        "flux2-klein-4b": BaseModel(
            "black-forest-labs/FLUX.2-klein-base-4B",
            files_gib=14.9,
            footprint=KLEIN_4B,
            aliases=("flux2-klein", "flux2-klein-base-4b", "flux.2-klein-base-4b", "flux.2-klein-4b"),
            published=published.KLEIN_4B,
            licence=licences.APACHE,
        ),
        "flux2-klein-9b": BaseModel(
            "black-forest-labs/FLUX.2-klein-base-9B",
            files_gib=32.3,
            footprint=KLEIN_9B,
            gated=True,
            aliases=("flux2-klein-base-9b", "flux.2-klein-base-9b", "flux.2-klein-9b"),
            published=published.KLEIN_9B,
            licence=licences.flux2("black-forest-labs/FLUX.2-klein-base-9B"),
        ),
        "flux2-dev": BaseModel(
            "black-forest-labs/FLUX.2-dev",
            files_gib=105.0,
            footprint=DEV,
            gated=True,
            aliases=("flux.2-dev",),
            published=published.DEV,
            licence=licences.flux2("black-forest-labs/FLUX.2-dev"),
            own_facts=DEV_FACTS,
        ),
        "mini-flux2": BaseModel(MINIATURE, files_gib=0.0, resolution=128, defaults={"steps": 20}),
        "mini-flux2-dev": BaseModel(
            DEV_MINIATURE, files_gib=0.0, resolution=128, defaults={"steps": 20}, own_facts=DEV_FACTS
        ),
    },
    files=(
        "model_index.json",
        "scheduler/scheduler_config.json",
        *weights("transformer", "vae", "text_encoder"),
        *tokenizer_files("tokenizer"),
    ),
    multiple=16,
    objective="flow",
    # musubi-tuner's default for this model is this shift too, by the name flux2_shift.
    timestep_samplings=("flux_shift", "shift", "sigmoid", "logit_normal", "uniform"),
    flow_shift=3.0,
    targets=(
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "attn.to_qkv_mlp_proj",
        "attn.to_out",
    ),
    lora_prefix="transformer",
    architecture="flux-2",
    base_version="flux2",
    fused_targets={
        "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    parts={"denoiser": "transformer", "vae": "vae", "qwen3": "text_encoder"},
    landmarks=("double_stream_modulation_img.lin.weight", "double_stream_modulation_img.linear.weight"),
    text_readers={"tokenizer": ("Qwen3", TEXT_TOKENS - QWEN3.tokens_before)},
    lookalikes=(),
    name_cautions=published.NAME_CAUTIONS,
    pipelines=published.PIPELINES,
    hub_tags=("flux2",),
    kinds=published.KINDS,
    same_sizes=published.same_sizes,
    index_rules=published.INDEX_RULES,
    distilled_defaults={"steps": 4, "cfg": 1.0},  # as the distilled klein models are made to draw
    pipeline_negative="negative_prompt_embeds=pipe.encode_prompt({})[0]",
    prompt_steps=50,
    prompt_guidance=1.0,
    prompt_cfg=4.0,
)

# ---- text


def load_encoders(folder: Path, *, device: str, dtype: torch.dtype) -> Flux2KleinPipeline | Flux2Pipeline:
    """A pipeline of the tokenizer and the language model alone, without the layers whose output is not used."""
    from diffusers import Flux2KleinPipeline, Flux2Pipeline
    from torch import nn

    from trainer.base_model.loading import load_tokenizer

    pipeline_class, reader = Flux2KleinPipeline, QWEN3
    if configs.pipeline_name(folder) in published.DEV_PIPELINES:
        pipeline_class, reader = Flux2Pipeline, MISTRAL
    tokenizer = load_tokenizer(folder / "tokenizer", reader.kinds["tokenizer"])
    encoder = common.load_encoder(
        reader.kinds["text_encoder"],
        folder / "text_encoder",
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        depth=reader.states[-1],
    )
    encoder.norm = nn.Identity()  # of what the last layer of a whole model gives: here it is one in the middle
    return pipeline_class(scheduler=None, vae=None, transformer=None, tokenizer=tokenizer, text_encoder=encoder)


def encode_text(
    encoders: Flux2KleinPipeline | Flux2Pipeline,
    captions: list[str],
    *,
    max_tokens: int = CLIP_TOKENS,  # noqa: ARG001 (of CLIP; this family has none)
) -> list[dict[str, torch.Tensor]]:
    """Three hidden states side by side: `tokens` (L, 3 * the model's width), L the same for every caption."""
    import torch
    from diffusers import Flux2Pipeline

    reader = QWEN3
    if isinstance(encoders, Flux2Pipeline):
        reader = MISTRAL
        captions = [caption.replace(IMAGE_MARK, "") for caption in captions]
    length = min(TEXT_TOKENS, encoders.tokenizer.model_max_length)
    texts = [f"{reader.before}{caption}{reader.after}" for caption in captions]
    with torch.no_grad(), common.without_warnings():
        read = encoders.tokenizer(
            texts,
            padding="max_length",
            padding_side=reader.padding_side,
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).to(encoders.text_encoder.device)
        states = encoders.text_encoder(
            input_ids=read.input_ids, attention_mask=read.attention_mask, output_hidden_states=True, use_cache=False
        ).hidden_states
    tokens_BLD = torch.cat([states[number] for number in reader.states], dim=-1)
    return [{"tokens": tokens_LD.cpu()} for tokens_LD in tokens_BLD]


with_clip_outputs = common.without_clip_outputs

# ---- images


def load_vae(folder: Path, *, device: str) -> AutoencoderKLFlux2:
    vae: AutoencoderKLFlux2 = common.load_vae(folder, device=device, kind=KINDS["vae"])
    return vae


def encode_images(vae: AutoencoderKLFlux2, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """The mean of the latents' distribution, normalised, and a deviation of 0.

    The model was trained on means: those who made it, diffusers and the other trainers draw nothing from the VAE.
    """
    import torch

    with torch.no_grad():
        latents_BCHW = vae.encode(pixels_BCHW.to(vae.device, vae.dtype)).latent_dist.mean
    mean_1C11, std_1C11 = _statistics(vae)
    normal_BCHW = _from_patches((_to_patches(latents_BCHW) - mean_1C11) / std_1C11).float()
    return torch.cat([normal_BCHW, torch.zeros_like(normal_BCHW)], dim=1)


def _statistics(vae: AutoencoderKLFlux2) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (1, 4C, 1, 1) of each channel of 2 x 2 latents."""
    shape = (1, -1, 1, 1)
    variance = vae.bn.running_var.view(shape) + vae.config.batch_norm_eps
    return vae.bn.running_mean.view(shape), variance.sqrt()


def _to_patches(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """2 x 2 latents become one: (B, 4C, H/2, W/2)."""
    b, c, h, w = latents_BCHW.shape
    return latents_BCHW.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)


def _from_patches(patches_BCHW: torch.Tensor) -> torch.Tensor:
    """The reverse of `_to_patches`."""
    b, c, h, w = patches_BCHW.shape
    return patches_BCHW.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, h * 2, w * 2)


# ---- the denoiser


def load_denoiser(folder: Path, *, device: str, dtype: torch.dtype) -> Flux2Transformer2DModel:
    from trainer.families.fused_blocks.flux2 import PartlyJoinedFlux2Processor

    denoiser: Flux2Transformer2DModel = common.load_denoiser(
        KINDS["transformer"], folder / "transformer", device=device, dtype=dtype
    )
    for block in denoiser.transformer_blocks:
        block.attn.set_processor(PartlyJoinedFlux2Processor())
    return denoiser


def from_original(
    state: dict[str, torch.Tensor],
    config: dict[str, Any],  # noqa: ARG001 (the names suffice)
) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers as convert

    return dict(convert(dict(state)))


def blocks(denoiser: Flux2Transformer2DModel) -> list[tuple[str, torch.nn.Module]]:
    double = [(f"transformer_blocks.{i}", b) for i, b in enumerate(denoiser.transformer_blocks)]
    return double + [(f"single_transformer_blocks.{i}", b) for i, b in enumerate(denoiser.single_transformer_blocks)]


def regions(denoiser: Flux2Transformer2DModel) -> list[torch.nn.Module]:
    return [block for _, block in blocks(denoiser)]


def fused_forwards() -> dict[type, type]:
    from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock

    from trainer.families.fused_blocks.flux2 import FusedFlux2DoubleBlock, FusedFlux2SingleBlock

    return {
        Flux2TransformerBlock: FusedFlux2DoubleBlock,
        Flux2SingleTransformerBlock: FusedFlux2SingleBlock,
    }


def predict(
    denoiser: Flux2Transformer2DModel,
    noisy_BCHW: torch.Tensor,
    t_B: torch.Tensor,
    *,
    text: dict[str, torch.Tensor],
    guidance: float,
    geometry_B6: torch.Tensor | None = None,  # noqa: ARG001 (the model gets the patches' positions, no sizes)
) -> torch.Tensor:
    """The velocity (noise - latents). `guidance`: the embedded scale; klein has no such embedding, and dev has.

    A place has four coordinates: an image's patches differ in the second and third, the text's tokens in the fourth.
    """
    import torch

    patches_BCHW = _to_patches(noisy_BCHW)
    b, _, rows, columns = patches_BCHW.shape
    length = text["tokens"].shape[1]
    places_HW4 = torch.zeros(rows, columns, 4, device=noisy_BCHW.device)
    places_HW4[..., 1] = torch.arange(rows, device=noisy_BCHW.device)[:, None]
    places_HW4[..., 2] = torch.arange(columns, device=noisy_BCHW.device)
    places_L4 = torch.zeros(length, 4, device=noisy_BCHW.device)
    places_L4[:, 3] = torch.arange(length, device=noisy_BCHW.device)
    out_BTD = denoiser(
        hidden_states=common.traced(patches_BCHW.flatten(2).transpose(1, 2).to(denoiser.dtype)),
        timestep=t_B,
        guidance=t_B.new_full((b,), guidance) if denoiser.config.guidance_embeds else None,
        encoder_hidden_states=common.traced(text["tokens"].to(denoiser.dtype)),
        txt_ids=places_L4,
        img_ids=places_HW4.flatten(0, 1),
        return_dict=False,
    )[0]
    return _from_patches(out_BTD.transpose(1, 2).unflatten(2, (rows, columns)))


# ---- samples


def sample(
    denoiser: Flux2Transformer2DModel,
    vae: AutoencoderKLFlux2,
    folder: Path,
    *,
    prompt: Prompt,
    text: dict[str, torch.Tensor],
    negative: dict[str, torch.Tensor],
    scheduler: dict[str, Any] | None = None,
) -> Image.Image:
    """klein goes by `prompt.cfg` and `negative`, dev by `prompt.guidance`: its pipeline has no negative caption."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline

    components = {
        "scheduler": common.load_scheduler(FlowMatchEulerDiscreteScheduler, folder, KINDS["scheduler"], scheduler),
        "vae": vae,
        "transformer": denoiser,
        **common.without_text_encoders(LORA_KEYS.encoders),
    }
    arguments = {
        "prompt_embeds": text["tokens"],
        "num_inference_steps": prompt.steps,
        "width": prompt.width,
        "height": prompt.height,
        "generator": torch.Generator("cpu").manual_seed(prompt.seed),
        "output_type": "latent",
    }
    if denoiser.config.guidance_embeds:
        pipe = Flux2Pipeline(**components)
        pipe.set_progress_bar_config(disable=True)
        tokens_BTD = pipe(**arguments, guidance_scale=prompt.guidance).images
        # Unlike klein's pipeline, this one returns the denoiser's own tokens.
        patches_BCHW = tokens_BTD.transpose(1, 2).unflatten(2, (prompt.height // 16, prompt.width // 16))
        mean_1C11, std_1C11 = _statistics(vae)
        latents_BCHW = _from_patches(patches_BCHW * std_1C11.to(patches_BCHW) + mean_1C11.to(patches_BCHW))
    else:
        pipe = Flux2KleinPipeline(**components, is_distilled=configs.is_distilled(folder))
        pipe.set_progress_bar_config(disable=True)
        latents_BCHW = pipe(**arguments, negative_prompt_embeds=negative["tokens"], guidance_scale=prompt.cfg).images
    return common.to_image(pipe, common.decoded(vae, latents_BCHW.float()))


# ---- key names of LoRA files. Original: the modules of black-forest-labs/flux2, which kohya's and ComfyUI's keys name.
_DOUBLE = "transformer_blocks.{}"
_SINGLE = "single_transformer_blocks.{}"
_TIME = "time_guidance_embed"

LORA_KEYS = LoraKeys(
    layers=(
        OriginalLayer("double_blocks.{}.img_attn.qkv", tuple(f"{_DOUBLE}.attn.to_{x}" for x in "qkv"), (1, 1, 1)),
        OriginalLayer("double_blocks.{}.txt_attn.qkv", tuple(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv"), (1, 1, 1)),
        OriginalLayer("double_blocks.{}.img_attn.proj", (f"{_DOUBLE}.attn.to_out.0",)),
        OriginalLayer("double_blocks.{}.txt_attn.proj", (f"{_DOUBLE}.attn.to_add_out",)),
        OriginalLayer("double_blocks.{}.img_mlp.0", (f"{_DOUBLE}.ff.linear_in",), rows_per_column=6.0),
        OriginalLayer("double_blocks.{}.img_mlp.2", (f"{_DOUBLE}.ff.linear_out",), rows_per_column=1 / 3),
        OriginalLayer("double_blocks.{}.txt_mlp.0", (f"{_DOUBLE}.ff_context.linear_in",), rows_per_column=6.0),
        OriginalLayer("double_blocks.{}.txt_mlp.2", (f"{_DOUBLE}.ff_context.linear_out",), rows_per_column=1 / 3),
        OriginalLayer("single_blocks.{}.linear1", (f"{_SINGLE}.attn.to_qkv_mlp_proj",), rows_per_column=9.0),
        OriginalLayer("single_blocks.{}.linear2", (f"{_SINGLE}.attn.to_out",), rows_per_column=1 / 4),
        OriginalLayer("double_stream_modulation_img.lin", ("double_stream_modulation_img.linear",)),
        OriginalLayer("double_stream_modulation_txt.lin", ("double_stream_modulation_txt.linear",)),
        OriginalLayer("single_stream_modulation.lin", ("single_stream_modulation.linear",)),
        OriginalLayer("img_in", ("x_embedder",)),
        OriginalLayer("txt_in", ("context_embedder",)),
        OriginalLayer("time_in.in_layer", (f"{_TIME}.timestep_embedder.linear_1",)),
        OriginalLayer("time_in.out_layer", (f"{_TIME}.timestep_embedder.linear_2",)),
        OriginalLayer("guidance_in.in_layer", (f"{_TIME}.guidance_embedder.linear_1",)),
        OriginalLayer("guidance_in.out_layer", (f"{_TIME}.guidance_embedder.linear_2",)),
        OriginalLayer("final_layer.linear", ("proj_out",)),
        OriginalLayer("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True),
    ),
    encoders={"text_encoder": "qwen3"},  # no tool trains it, nor dev's
    namesake="flux",
    one_width=True,
    file_formats=("native",),  # ComfyUI and diffusers read it; musubi-tuner alone wants kohya's keys
    dora_formats=("native", "peft"),
)
