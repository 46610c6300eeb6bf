"""Qwen-Image and Qwen-Image-2512: 60 double blocks over text and image tokens, trained by flow matching.

The text is that of a language model which also reads images, Qwen2.5-VL: a caption stands in a template that asks for a
description of an image, and the states of the template's first 34 tokens are left out. In the rotary embedding an
image's rows and columns count from its middle, and the text stands behind the larger half, so that the place of a
caption depends on the size of the image.

torch and diffusers are imported inside the functions: a plan needs only FACTS.

Shapes: B batch, C channels of latents, H and W their height and width, L tokens of text, T tokens of the image, D
features.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.families import common, qwen_vae
from trainer.families.published import licences
from trainer.families.published import qwen_image as published
from trainer.families.published.common import QWEN2_5_VL_7B, caption_gib
from trainer.spec.family import (
    CLIP_TOKENS,
    BaseModel,
    Facts,
    Footprint,
    LoraKeys,
    OriginalLayer,
    tokenizer_files,
    weights,
)

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from PIL import Image

    from trainer.spec.plan import Prompt

KINDS = published.KINDS
MINIATURE = str(Path(__file__).with_name("miniatures") / "qwen_image")

# The numbers of weights are those of the architecture. The GiB are computed, not measured on a GPU: `none` from what
# autograd saves of one fused block on a CPU (FP8, rank 16: 84 kB for each token; 154 of one that is not fused, in
# bf16), the others from the sizes of the products' outputs (9 times the width, for each token), of attention's and of
# inputs.
FOOTPRINT = Footprint(
    block_weights=20.384e9,
    other_weights=0.046e9,
    adapter_weights_per_rank=6.636e6,
    kohya_weights_per_rank=6.636e6,
    split_kohya_weights_per_rank=6.636e6,
    peft_weights_per_rank=6.636e6,
    region_count=60,
    text_tokens=512,
    caption_values=512 * 3584,
    latent_channels=16,
    saved_gib={"none": 4.82, "products": 3.87, "attention": 0.70, "all": 0.35, "host": 0.02},
    working_gib=0.3,
    largest_region_weights=0.340e9,
    fp8_weights=13.590e9,
    encoder_weights=7.07e9,
    hidden_size=3072,
    caption_gib=caption_gib(QWEN2_5_VL_7B, tokens=34 + 512),  # with those before it
    unfused_factor=1.83,
)

TEXT_TOKENS = 512  # of a caption that the pipeline reads, and the tokens that the template puts behind it
# The template of diffusers' pipeline, which drops what stands before the caption after the text encoder has read it.
BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
DROPPED_TOKENS = 34

FACTS = Facts(
    name="qwen_image",
    models={
        "qwen-image": BaseModel(
            "Qwen/Qwen-Image",
            files_gib=53.7,
            footprint=FOOTPRINT,
            aliases=("qwenimage", "qwen_image"),
            published=published.PUBLISHED,
            licence=licences.APACHE,
        ),
        "qwen-image-2512": BaseModel(
            "Qwen/Qwen-Image-2512",
            files_gib=53.7,
            footprint=FOOTPRINT,
            aliases=("qwenimage-2512", "qwen_image_2512"),
            published=published.PUBLISHED,
            licence=licences.APACHE,
        ),
        "mini-qwen-image": BaseModel(MINIATURE, files_gib=0.0, resolution=128),
    },
    files=(
        "model_index.json",
        "scheduler/scheduler_config.json",
        *weights("transformer", "vae", "text_encoder"),
        *tokenizer_files("tokenizer"),
    ),
    multiple=16,
    objective="flow",
    timestep_samplings=("shift", "qwen_shift", "sigmoid", "logit_normal", "uniform", "flux_shift"),
    flow_shift=2.2,  # musubi-tuner's
    targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ),
    lora_prefix="transformer",
    architecture="qwen-image",
    base_version="qwen_image",
    fused_targets={},
    parts={"denoiser": "transformer", "vae": "vae", "qwen2_5_vl": "text_encoder"},
    landmarks=("txt_norm.weight", "txt_norm.weight"),
    text_readers={"tokenizer": ("Qwen2.5-VL", TEXT_TOKENS)},
    masks_captions=True,
    lookalikes=published.LOOKALIKES,
    pipelines=published.PIPELINES,
    name_cautions=published.NAME_CAUTIONS,
    hub_tags=("qwen-image",),
    kinds=published.KINDS,
    same_sizes=published.same_sizes,
    pipeline_cfg="true_cfg_scale",
    prompt_steps=30,
    prompt_guidance=1.0,
    prompt_cfg=4.0,
)

# ---- text


def load_encoders(folder: Path, *, device: str, dtype: torch.dtype) -> QwenImagePipeline:
    """A QwenImagePipeline of the tokenizer and the language model of Qwen2.5-VL alone."""
    from diffusers import QwenImagePipeline

    from trainer.base_model.loading import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer", KINDS["tokenizer"])
    encoder = common.load_encoder(
        KINDS["text_encoder"], folder / "text_encoder", tokenizer=tokenizer, device=device, dtype=dtype
    )
    return QwenImagePipeline(scheduler=None, vae=None, transformer=None, tokenizer=tokenizer, text_encoder=encoder)


def encode_text(
    encoders: QwenImagePipeline,
    captions: list[str],
    *,
    max_tokens: int = CLIP_TOKENS,  # noqa: ARG001 (of CLIP; this family has none)
) -> list[dict[str, torch.Tensor]]:
    """The language model's last hidden states: `tokens` (L, 3584), of the caption and of what the template puts
    behind it; at most 512.
    """
    import torch

    texts = [f"{BEFORE}{caption}{AFTER}" for caption in captions]
    with torch.no_grad(), common.without_warnings():
        read = encoders.tokenizer(
            texts,
            padding="longest",
            padding_side="right",
            max_length=DROPPED_TOKENS + TEXT_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).to(encoders.text_encoder.device)
        states_BLD = encoders.text_encoder(
            input_ids=read.input_ids, attention_mask=read.attention_mask, use_cache=False
        ).last_hidden_state
    found = []
    for states_LD, mask_L in zip(states_BLD, read.attention_mask.bool(), strict=True):
        found.append({"tokens": states_LD[mask_L][DROPPED_TOKENS:].cpu()})
    return found


with_clip_outputs = common.without_clip_outputs

# ---- models

load_vae = qwen_vae.load_vae
encode_images = qwen_vae.encode_images


def load_denoiser(folder: Path, *, device: str, dtype: torch.dtype) -> QwenImageTransformer2DModel:
    denoiser: QwenImageTransformer2DModel = common.load_denoiser(
        KINDS["transformer"], folder / "transformer", device=device, dtype=dtype
    )
    return denoiser


def from_original(
    state: dict[str, torch.Tensor],
    config: dict[str, Any],  # noqa: ARG001 (the names suffice)
) -> dict[str, torch.Tensor]:
    """The same: diffusers kept the original names, and so does ComfyUI."""
    return dict(state)


def blocks(denoiser: QwenImageTransformer2DModel) -> list[tuple[str, torch.nn.Module]]:
    return [(f"transformer_blocks.{i}", block) for i, block in enumerate(denoiser.transformer_blocks)]


def regions(denoiser: QwenImageTransformer2DModel) -> list[torch.nn.Module]:
    return [block for _, block in blocks(denoiser)]


def fused_forwards() -> dict[type, type]:
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    from trainer.families.fused_blocks.qwen_image import FusedQwenImageBlock

    return {QwenImageTransformerBlock: FusedQwenImageBlock}


# ---- prediction


def predict(
    denoiser: QwenImageTransformer2DModel,
    noisy_BCHW: torch.Tensor,
    t_B: torch.Tensor,
    *,
    text: dict[str, torch.Tensor],
    guidance: float = 1.0,  # noqa: ARG001 (this family has no embedded guidance)
    geometry_B6: torch.Tensor | None = None,  # noqa: ARG001 (the model gets the patches' positions, no sizes)
) -> torch.Tensor:
    """The velocity (noise - latents).

    `text["padding"]` (B, L) is there where captions differ in length: these tokens are not attended to.
    """
    from diffusers.models.transformers import transformer_qwenimage

    transformer_qwenimage.compute_text_seq_len_from_mask = _text_length
    b, _, h, w = noisy_BCHW.shape
    patches_BTD = common.patch_tokens(noisy_BCHW)
    out_BTD = denoiser(
        hidden_states=common.traced(patches_BTD.to(denoiser.dtype)),
        timestep=t_B,
        encoder_hidden_states=common.traced(text["tokens"].to(denoiser.dtype)),
        encoder_hidden_states_mask=~text["padding"].bool() if "padding" in text else None,
        img_shapes=[[(1, h // 2, w // 2)]] * b,
        return_dict=False,
    )[0]
    return common.latents_of_patches(out_BTD, h, w)


def _text_length(tokens_BLD: torch.Tensor, mask_BL: torch.Tensor | None) -> tuple[int, None, torch.Tensor | None]:
    """In the place of diffusers' function, which also counts each caption's tokens. Nobody reads the counts.

    For them it copies a number from the host, which no captured step can.
    """
    return tokens_BLD.shape[1], None, None if mask_BL is None else mask_BL.bool()


# ---- samples


def sample(
    denoiser: QwenImageTransformer2DModel,
    vae: AutoencoderKLQwenImage,
    folder: Path,
    *,
    prompt: Prompt,
    text: dict[str, torch.Tensor],
    negative: dict[str, torch.Tensor],
    scheduler: dict[str, Any] | None = None,
) -> Image.Image:
    """With `prompt.cfg` above 1, the pipeline gives what it predicts the length that it has with the prompt alone."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    pipe = QwenImagePipeline(
        scheduler=common.load_scheduler(FlowMatchEulerDiscreteScheduler, folder, KINDS["scheduler"], scheduler),
        vae=vae,
        transformer=denoiser,
        **common.without_text_encoders(LORA_KEYS.encoders),
    )
    pipe.set_progress_bar_config(disable=True)
    embeddings = _embeddings("", text)
    if prompt.cfg > 1:
        embeddings |= _embeddings("negative_", negative)
    tokens_BTD = pipe(
        **embeddings,
        true_cfg_scale=prompt.cfg,
        num_inference_steps=prompt.steps,
        width=prompt.width,
        height=prompt.height,
        generator=torch.Generator("cpu").manual_seed(prompt.seed),
        output_type="latent",
    ).images
    latents_BCHW = common.latents_of_patches(tokens_BTD, prompt.height // 8, prompt.width // 8)
    return common.to_image(pipe, qwen_vae.decode_latents(vae, latents_BCHW))


def _embeddings(prefix: str, text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The pipeline's arguments for a text, of which every token counts."""
    import torch

    tokens_BLD = text["tokens"]
    mask_BL = torch.ones(tokens_BLD.shape[:2], dtype=torch.long, device=tokens_BLD.device)
    return {f"{prefix}prompt_embeds": tokens_BLD, f"{prefix}prompt_embeds_mask": mask_BL}


# ---- key names of LoRA files. diffusers kept the names of the model's own implementation, and ComfyUI did too.
_LAYERS = (*FACTS.targets, "img_mod.1", "txt_mod.1")
_SINGLE = (
    *("img_in", "txt_in", "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
    *("norm_out.linear", "proj_out"),
)

LORA_KEYS = LoraKeys(
    layers=(
        *(OriginalLayer(f"transformer_blocks.{{}}.{x}", (f"transformer_blocks.{{}}.{x}",)) for x in _LAYERS),
        *(OriginalLayer(layer, (layer,)) for layer in _SINGLE),
    ),
    encoders={"text_encoder": "qwen2_5_vl"},  # no tool trains it
    one_width=True,
    file_formats=("native",),  # ComfyUI and diffusers read it; musubi-tuner alone wants kohya's keys
    dora_formats=("native", "peft"),
)
