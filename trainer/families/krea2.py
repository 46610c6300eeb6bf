"""Krea 2 (Raw and Turbo): 28 blocks over text and image tokens in one row, trained by flow matching.

The text is that of a language model which also reads images, Qwen3-VL: of each token, the states after twelve of its
layers, which a small transformer of the denoiser's own makes one of (`text_fusion`). A caption stands in Qwen-Image's
template. diffusers' pipeline fills every caption up to 512 tokens before the template ends; here a caption is as long
as it is, which is the same: nothing attends to what fills it up, and no place counts it. In the rotary embedding all
of the text is at (0, 0, 0), and an image's tokens at (0, row, column).

Turbo is distilled to few steps, and its schedule has one shift for every size. Nothing in its tensors tells it from
Raw: model_index.json says is_distilled.

torch and diffusers are imported inside the functions: a plan needs only FACTS.

Shapes: B batch, C channels of latents, H and W their height and width, L tokens of text, S states of a token of text,
T tokens of the image, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.base_model import configs
from trainer.families import common, qwen_vae
from trainer.families.published import krea2 as published
from trainer.families.published import licences
from trainer.families.published.common import QWEN3_VL_4B, caption_gib
from trainer.families.qwen_image import AFTER, BEFORE, DROPPED_TOKENS  # the same template
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
    from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel
    from PIL import Image

    from trainer.spec.plan import Prompt

KINDS = published.KINDS
MINIATURE = str(Path(__file__).with_name("miniatures") / "krea2")

# The numbers of weights are those of the architecture. The GiB are computed, not measured on a GPU: `none` from what
# autograd saves of one fused block on a CPU (FP8, rank 16: 168 kB for each token; 313 of one that is not fused, in
# bf16), the others from the sizes of the products' outputs (9.8 times the width, for each token), of attention's and of
# inputs. A caption's 512 tokens count as 721: `text_fusion` keeps 26 times 74 kB of each besides, where the other
# blocks keep 28 times 168 kB of a token (138 and 313 where they are not fused).
FOOTPRINT = Footprint(
    block_weights=12.499e9,
    other_weights=0.322e9,
    adapter_weights_per_rank=3.571e6,
    kohya_weights_per_rank=3.571e6,
    split_kohya_weights_per_rank=3.571e6,
    peft_weights_per_rank=3.571e6,
    region_count=32,
    text_tokens=721,
    caption_values=160 * 12 * 2560,  # of usual length: 512 tokens would have 31 MB
    latent_channels=16,
    saved_gib={"none": 4.49, "products": 3.88, "attention": 0.66, "all": 0.33, "host": 0.02},
    working_gib=0.6,
    largest_region_weights=0.434e9,
    fp8_weights=12.499e9,
    encoder_weights=4.02e9,
    hidden_size=6144,
    caption_gib=caption_gib(QWEN3_VL_4B, tokens=34 + 512, states=1 + 36 + 12),  # all are kept, and 12 put together
    unfused_factor=1.87,
)

TEXT_TOKENS = 512  # of a caption and of what the template puts behind it: the default of diffusers' pipeline
SUFFIX_TOKENS = 5  # <|im_end|>, a new line, <|im_start|>, assistant, a new line: they are read whatever the caption
TAPS = published.TAPS

_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate", "attn.to_out.0"),
    *("ff.gate", "ff.up", "ff.down"),
)

DISTILLED_DEFAULTS: dict[str, Any] = {"steps": 8, "cfg": 1.0}  # of prompts: Turbo's

FACTS = Facts(
    name="krea2",
    models={
        "krea2": BaseModel(
            "krea/Krea-2-Raw",
            files_gib=33.0,
            footprint=FOOTPRINT,
            gated=True,
            aliases=("krea-2", "krea2-raw", "krea-2-raw"),
            published=published.RAW,
            licence=licences.KREA_2,
        ),
        "krea2-turbo": BaseModel(
            "krea/Krea-2-Turbo",
            files_gib=33.0,
            footprint=FOOTPRINT,
            gated=True,
            defaults=DISTILLED_DEFAULTS,
            aliases=("krea-2-turbo",),
            published=published.TURBO,
            licence=licences.KREA_2,
            caution=(
                "is distilled to few steps, which training on its own weights undoes: images become blurred. Fix: "
                "BASE_MODEL=krea2, whose LoRAs work on Turbo as well, as those who made it recommend; or "
                "PARAMS_TRAINING_ADAPTER=ostris/krea2_turbo_training_adapter/"
                "krea2_turbo_training_adapter_v1.safetensors, which is part of the weights while they train and of "
                "nothing else"
            ),
        ),
        "mini-krea2": BaseModel(MINIATURE, files_gib=0.0, resolution=128, defaults={"cfg": 3.0}),
    },
    files=(
        "model_index.json",
        "scheduler/scheduler_config.json",
        *weights("transformer", "vae", "text_encoder"),
        *tokenizer_files("tokenizer"),
    ),
    multiple=16,
    objective="flow",
    timestep_samplings=("krea2_shift", "shift", "sigmoid", "logit_normal", "uniform", "flux_shift"),
    flow_shift=2.5,  # musubi-tuner's; krea2_shift's at 1024 x 1024 pixels
    targets=_LAYERS,
    lora_prefix="transformer",
    architecture="krea-2",
    base_version="krea2",
    fused_targets={},
    parts={"denoiser": "transformer", "vae": "vae", "qwen3_vl": "text_encoder"},
    landmarks=("txtfusion.projector.weight", "text_fusion.projector.weight"),
    text_readers={"tokenizer": ("Qwen3-VL", TEXT_TOKENS - SUFFIX_TOKENS)},
    masks_captions=True,
    lookalikes=(),
    pipelines=published.PIPELINES,
    name_cautions=published.NAME_CAUTIONS,
    hub_tags=("krea2",),
    kinds=published.KINDS,
    index_rules=published.INDEX_RULES,
    distilled_defaults=DISTILLED_DEFAULTS,
    same_sizes=published.same_sizes,
    pipeline_cfg_none=0.0,
    prompt_steps=28,
    prompt_guidance=1.0,
    prompt_cfg=5.5,  # guidance_scale=4.5 of diffusers' pipeline, which counts from 0
)

# ---- text


def load_encoders(folder: Path, *, device: str, dtype: torch.dtype) -> Krea2Pipeline:
    """A Krea2Pipeline of the tokenizer and the language model of Qwen3-VL alone."""
    from diffusers import Krea2Pipeline

    from trainer.base_model.loading import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer", KINDS["tokenizer"])
    encoder = common.load_encoder(
        KINDS["text_encoder"], folder / "text_encoder", tokenizer=tokenizer, device=device, dtype=dtype
    )
    return Krea2Pipeline(scheduler=None, vae=None, transformer=None, tokenizer=tokenizer, text_encoder=encoder)


def encode_text(
    encoders: Krea2Pipeline,
    captions: list[str],
    *,
    max_tokens: int = CLIP_TOKENS,  # noqa: ARG001 (of CLIP; this family has none)
) -> list[dict[str, torch.Tensor]]:
    """Twelve hidden states of Qwen3-VL for each token: `tokens` (L, 12, 2560), of the caption and of what the template
    puts behind it; at most 512.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    device = encoders.text_encoder.device
    longest = DROPPED_TOKENS + TEXT_TOKENS - SUFFIX_TOKENS
    with torch.no_grad(), common.without_warnings():
        behind = encoders.tokenizer(AFTER).input_ids
        begun = encoders.tokenizer([f"{BEFORE}{text}" for text in captions], max_length=longest, truncation=True)
        ids = [torch.tensor([*each, *behind]) for each in begun.input_ids]
        mask_BL = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
        # Tokens stand in a row, and attend to those before them: what fills up a caption changes nothing before it.
        states = encoders.text_encoder(
            input_ids=pad_sequence(ids, batch_first=True).to(device),
            attention_mask=mask_BL.to(device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
    tokens_BLSD = torch.stack([states[number] for number in TAPS], dim=2)
    found = []
    for tokens_LSD, each in zip(tokens_BLSD, ids, strict=True):
        found.append({"tokens": tokens_LSD[DROPPED_TOKENS : len(each)].cpu()})
    return found


with_clip_outputs = common.without_clip_outputs

# ---- models

load_vae = qwen_vae.load_vae
encode_images = qwen_vae.encode_images


def load_denoiser(folder: Path, *, device: str, dtype: torch.dtype) -> Krea2Transformer2DModel:
    denoiser: Krea2Transformer2DModel = common.load_denoiser(
        KINDS["transformer"], folder / "transformer", device=device, dtype=dtype
    )
    return denoiser


def from_original(
    state: dict[str, torch.Tensor],
    config: dict[str, Any],  # noqa: ARG001 (the names suffice)
) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers as convert

    return dict(convert(dict(state)))


def blocks(denoiser: Krea2Transformer2DModel) -> list[tuple[str, torch.nn.Module]]:
    """The blocks that fuse the states of a token, those over the caption's tokens, then those of text and image."""
    named = []
    for part in ("layerwise_blocks", "refiner_blocks"):
        found = getattr(denoiser.text_fusion, part)
        named += [(f"text_fusion.{part}.{i}", block) for i, block in enumerate(found)]
    return named + [(f"transformer_blocks.{i}", block) for i, block in enumerate(denoiser.transformer_blocks)]


def regions(denoiser: Krea2Transformer2DModel) -> list[torch.nn.Module]:
    return [block for _, block in blocks(denoiser)]


def fused_forwards() -> dict[type, type]:
    from diffusers.models.transformers.transformer_krea2 import Krea2TextFusionBlock, Krea2TransformerBlock

    from trainer.families.fused_blocks.krea2 import FusedKrea2Block, FusedKrea2TextBlock

    return {Krea2TransformerBlock: FusedKrea2Block, Krea2TextFusionBlock: FusedKrea2TextBlock}


# ---- prediction


def predict(
    denoiser: Krea2Transformer2DModel,
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
    h, w = noisy_BCHW.shape[2:]
    tokens_BLSD = text["tokens"].to(denoiser.dtype)
    patches_BTD = common.patch_tokens(noisy_BCHW)
    out_BTD = denoiser(
        hidden_states=common.traced(patches_BTD.to(denoiser.dtype)),
        encoder_hidden_states=common.traced(tokens_BLSD),
        timestep=t_B,
        position_ids=_places(tokens_BLSD.shape[1], (h // 2, w // 2), noisy_BCHW.device),
        encoder_attention_mask=~text["padding"].bool() if "padding" in text else None,
        return_dict=False,
    )[0]
    return common.latents_of_patches(out_BTD, h, w)


def _places(text_length: int, size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Where the tokens of text and image stand: time, row and column (L + T, 3)."""
    import torch

    rows, columns = size
    image_HW3 = torch.zeros(rows, columns, 3, device=device)
    image_HW3[..., 1] = torch.arange(rows, device=device)[:, None]
    image_HW3[..., 2] = torch.arange(columns, device=device)
    return torch.cat([torch.zeros(text_length, 3, device=device), image_HW3.flatten(0, 1)])


# ---- samples


def sample(
    denoiser: Krea2Transformer2DModel,
    vae: AutoencoderKLQwenImage,
    folder: Path,
    *,
    prompt: Prompt,
    text: dict[str, torch.Tensor],
    negative: dict[str, torch.Tensor],
    scheduler: dict[str, Any] | None = None,
) -> Image.Image:
    """`prompt.cfg` counts as in every family, from 1 (none): the pipeline's guidance_scale is one less."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline

    pipe = Krea2Pipeline(
        scheduler=common.load_scheduler(FlowMatchEulerDiscreteScheduler, folder, KINDS["scheduler"], scheduler),
        vae=vae,
        transformer=denoiser,
        is_distilled=configs.is_distilled(folder),
        **common.without_text_encoders(LORA_KEYS.encoders),
    )
    pipe.set_progress_bar_config(disable=True)
    # The pipeline wants both texts to be of one length.
    length = text["tokens"].shape[1]
    if prompt.cfg > 1:
        length = max(length, negative["tokens"].shape[1])
    embeddings = _embeddings("", text, length)
    if prompt.cfg > 1:
        embeddings |= _embeddings("negative_", negative, length)
    tokens_BTD = pipe(
        **embeddings,
        guidance_scale=prompt.cfg - 1,
        **common.drawing_arguments(prompt),
    ).images
    latents_BCHW = common.latents_of_patches(tokens_BTD, prompt.height // 8, prompt.width // 8)
    return common.to_image(pipe, qwen_vae.decode_latents(vae, latents_BCHW))


def _embeddings(prefix: str, text: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """The pipeline's arguments for a text, of which every token counts; filled up to `length` tokens, which do not."""
    import torch

    real = text["tokens"].shape[1]
    tokens_BLSD = torch.nn.functional.pad(text["tokens"], (0, 0, 0, 0, 0, length - real))
    mask_L = torch.arange(length, device=tokens_BLSD.device) < real
    mask_BL = mask_L.expand(tokens_BLSD.shape[0], -1)
    return {f"{prefix}prompt_embeds": tokens_BLSD, f"{prefix}prompt_embeds_mask": mask_BL}


# ---- key names of LoRA files: those of the model's own implementation (krea-ai/krea-2), which ComfyUI has too.
_PARTS = {
    "blocks.{}": "transformer_blocks.{}",
    "txtfusion.layerwise_blocks.{}": "text_fusion.layerwise_blocks.{}",
    "txtfusion.refiner_blocks.{}": "text_fusion.refiner_blocks.{}",
}
_ORIGINAL_LAYERS = (
    *("attn.wq", "attn.wk", "attn.wv", "attn.gate", "attn.wo"),
    *("mlp.gate", "mlp.up", "mlp.down"),
)
_SINGLE = {
    "first": "img_in",
    "last.linear": "final_layer.linear",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
}

LORA_KEYS = LoraKeys(
    layers=(
        *(
            OriginalLayer(f"{part}.{layer}", (f"{ours}.{our_layer}",))
            for part, ours in _PARTS.items()
            for layer, our_layer in zip(_ORIGINAL_LAYERS, _LAYERS, strict=True)
        ),
        *(OriginalLayer(layer, (ours,)) for layer, ours in _SINGLE.items()),
    ),
    encoders={"text_encoder": "qwen3_vl"},  # no tool trains it
    file_formats=("native",),  # ComfyUI and diffusers read it; musubi-tuner alone wants kohya's keys
    dora_formats=("native", "peft"),
)
