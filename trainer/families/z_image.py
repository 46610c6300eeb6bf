"""Z-Image (base and Turbo): a transformer of 30 blocks over image and text tokens in one row, trained by flow matching.

Three conventions differ from other families'. The model's time runs backwards: it gets 1 - t, and predicts latents -
noise, so that `predict` negates its output. A caption is as long as it is: only the tokens of the text are read, filled
up to a multiple of 32 with a token that the model has learnt for that. And an image's first coordinate is the number of
the caption's tokens, so that text and image stand one behind the other.

torch and diffusers are imported inside the functions: a plan needs only FACTS.

Shapes: B batch, C channels of latents, H and W their height and width, L tokens of text, T tokens of the image or of
both, D features, R pairs of features that are rotated.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.families import common
from trainer.families.published import licences
from trainer.families.published import z_image as published
from trainer.families.published.common import QWEN3_4B, caption_gib
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
    from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
    from PIL import Image

    from trainer.spec.plan import Prompt

KINDS = published.KINDS
MINIATURE = str(Path(__file__).with_name("miniatures") / "z_image")

# The numbers of weights are those of the architecture. The GiB are computed, not measured on a GPU: `none` from the
# tensors that autograd saves of one block on a CPU, fused (15.4 times the width, for each token) and as diffusers has
# it, uncompiled; the others from the sizes of the products' outputs (12.3 times the width), of attention's, and of
# inputs.
FOOTPRINT = Footprint(
    block_weights=6.142e9,
    other_weights=0.013e9,
    adapter_weights_per_rank=2.189e6,
    kohya_weights_per_rank=2.189e6,
    split_kohya_weights_per_rank=2.189e6,
    peft_weights_per_rank=2.189e6,
    region_count=34,
    text_tokens=512,
    caption_values=512 * 2560,
    latent_channels=16,
    saved_gib={"none": 3.4, "products": 2.71, "attention": 0.44, "all": 0.22, "host": 0.02},
    working_gib=0.3,
    largest_region_weights=0.181e9,
    fp8_weights=6.016e9,
    encoder_weights=4.02e9,
    hidden_size=3840,
    caption_gib=caption_gib(QWEN3_4B, tokens=512),
    unfused_factor=2.3,
)

TEXT_TOKENS = 512  # the default of diffusers' pipeline
TEXT_MULTIPLE = 32  # a caption's tokens, and an image's, are filled up to a multiple of this
# What Qwen3's chat template makes of one message with enable_thinking=True. A text between a model's own marks.
BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
TOKENS_BEFORE = 3  # <|im_start|>, user, a new line: what a long text takes no place from

FACTS = Facts(
    name="z_image",
    models={
        "z-image": BaseModel(
            "Tongyi-MAI/Z-Image",
            files_gib=19.1,
            footprint=FOOTPRINT,
            aliases=("z-image-base", "zimage", "zimage-base"),
            published=published.BASE,
            licence=licences.APACHE,
        ),
        "z-image-turbo": BaseModel(
            "Tongyi-MAI/Z-Image-Turbo",
            files_gib=30.6,
            footprint=FOOTPRINT,
            defaults={"steps": 9, "cfg": 1.0},
            aliases=("zimage-turbo",),
            published=published.TURBO,
            licence=licences.APACHE,
            caution=(
                "is distilled to few steps, which training on its own weights undoes: images become blurred. Fix: "
                "PARAMS_TRAINING_ADAPTER=ostris/zimage_turbo_training_adapter/"
                "zimage_turbo_training_adapter_v2.safetensors, which is part of the weights while they train and of "
                "nothing else; or BASE_MODEL=z-image, whose LoRAs work on Turbo as well, at a strength of 1 to 2; or "
                "BASE_MODEL=z-image with MODEL_PATH=the file of a Turbo without distillation, such as "
                "ostris/Z-Image-De-Turbo"
            ),
        ),
        "mini-z-image": BaseModel(MINIATURE, files_gib=0.0, resolution=128, defaults={"cfg": 3.0}),
    },
    files=(
        "model_index.json",
        "scheduler/scheduler_config.json",
        *weights("transformer", "vae", "text_encoder"),
        *tokenizer_files("tokenizer"),
    ),
    multiple=16,
    objective="flow",
    timestep_samplings=("shift", "sigmoid", "logit_normal", "uniform", "flux_shift"),
    flow_shift=2.0,  # musubi-tuner's
    targets=(
        "layers.*.attention.to_q",
        "layers.*.attention.to_k",
        "layers.*.attention.to_v",
        "layers.*.attention.to_out.0",
        "layers.*.feed_forward.w1",
        "layers.*.feed_forward.w2",
        "layers.*.feed_forward.w3",
    ),
    lora_prefix="transformer",
    architecture="z-image",
    base_version="zimage",
    fused_targets={},
    parts={"denoiser": "transformer", "vae": "vae", "qwen3": "text_encoder"},
    landmarks=("layers.0.attention.qkv.weight", "layers.0.attention.to_q.weight"),
    text_readers={"tokenizer": ("Qwen3", TEXT_TOKENS - TOKENS_BEFORE)},
    masks_captions=True,
    lookalikes=published.LOOKALIKES,
    pipelines=published.PIPELINES,
    name_cautions=published.NAME_CAUTIONS,
    hub_tags=("z-image",),
    kinds=published.KINDS,
    same_sizes=published.same_sizes,
    pipeline_cfg_none=0.0,
    prompt_steps=30,
    prompt_guidance=1.0,
    prompt_cfg=5.0,  # guidance_scale=4 of diffusers' pipeline, which counts from 0
)

# ---- text


def load_encoders(folder: Path, *, device: str, dtype: torch.dtype) -> ZImagePipeline:
    """A ZImagePipeline of the tokenizer and Qwen3 alone, up to the last layer but one.

    The state before the last layer is what is read. Without that layer and the norm behind it, it is what Qwen3
    returns: to ask for all hidden states would keep 37 of them in memory.
    """
    import torch
    from diffusers import ZImagePipeline

    from trainer.base_model.loading import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer", KINDS["tokenizer"])
    encoder = common.load_encoder(
        KINDS["text_encoder"], folder / "text_encoder", tokenizer=tokenizer, device=device, dtype=dtype
    )
    del encoder.layers[-1]
    encoder.config.num_hidden_layers = len(encoder.layers)
    encoder.norm = torch.nn.Identity()
    return ZImagePipeline(scheduler=None, vae=None, transformer=None, tokenizer=tokenizer, text_encoder=encoder)


def encode_text(
    encoders: ZImagePipeline,
    captions: list[str],
    *,
    max_tokens: int = CLIP_TOKENS,  # noqa: ARG001 (of CLIP; this family has none)
) -> list[dict[str, torch.Tensor]]:
    """Qwen3's hidden states before its last layer: `tokens` (L, 2560), zeros after those of the text; `real` (L,),
    which of them are the text's. L is a multiple of 32.
    """
    import torch

    # The template is written out: one that a tokenizer brings along is a program of its repository.
    texts = [f"{BEFORE}{caption}{AFTER}" for caption in captions]
    with torch.no_grad(), common.without_warnings():
        read = encoders.tokenizer(
            texts, padding="longest", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        ).to(encoders.text_encoder.device)
        mask_BL = read.attention_mask.bool()
        states_BLD = encoders.text_encoder(
            input_ids=read.input_ids, attention_mask=mask_BL, use_cache=False
        ).last_hidden_state
    found = []
    for states_LD, mask_L in zip(states_BLD, mask_BL, strict=True):
        text_LD = states_LD[mask_L].cpu()
        length = _filled(len(text_LD))
        tokens_LD = text_LD.new_zeros(length, text_LD.shape[1])
        tokens_LD[: len(text_LD)] = text_LD
        found.append({"tokens": tokens_LD, "real": torch.arange(length) < len(text_LD)})
    return found


def _filled(length: int) -> int:
    """The next multiple of 32."""
    return -(-length // TEXT_MULTIPLE) * TEXT_MULTIPLE


with_clip_outputs = common.without_clip_outputs

# ---- models

load_vae = common.load_vae
encode_images = common.encode_images


def load_denoiser(folder: Path, *, device: str, dtype: torch.dtype) -> ZImageTransformer2DModel:
    denoiser: ZImageTransformer2DModel = common.load_denoiser(
        KINDS["transformer"], folder / "transformer", device=device, dtype=dtype
    )
    return denoiser


def from_original(
    state: dict[str, torch.Tensor],
    config: dict[str, Any],  # noqa: ARG001 (the names suffice)
) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers as convert

    return dict(convert(dict(state)))


def blocks(denoiser: ZImageTransformer2DModel) -> list[tuple[str, torch.nn.Module]]:
    """The blocks of the image alone, those of the text alone, then those of both; the latter alone are targets."""
    named = []
    for part in ("noise_refiner", "context_refiner", "layers"):
        named += [(f"{part}.{i}", block) for i, block in enumerate(getattr(denoiser, part))]
    return named


def regions(denoiser: ZImageTransformer2DModel) -> list[torch.nn.Module]:
    return [block for _, block in blocks(denoiser)]


def fused_forwards() -> dict[type, type]:
    from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

    from trainer.families.fused_blocks.z_image import FusedZImageBlock

    return {ZImageTransformerBlock: FusedZImageBlock}


# ---- prediction


def predict(
    denoiser: ZImageTransformer2DModel,
    noisy_BCHW: torch.Tensor,
    t_B: torch.Tensor,
    *,
    text: dict[str, torch.Tensor],
    guidance: float = 1.0,  # noqa: ARG001 (this family has no embedded guidance)
    geometry_B6: torch.Tensor | None = None,  # noqa: ARG001 (the model gets the patches' positions, no sizes)
) -> torch.Tensor:
    """The velocity (noise - latents).

    The same as the model's own forward pass, which takes lists of captions and asks the host for their lengths: that
    could not be captured in a CUDA graph. `text["padding"]` (B, L) is there where captions differ in length.
    """
    import torch

    b, c, h, w = noisy_BCHW.shape
    tokens_BLD = text["tokens"].to(denoiser.dtype)
    real_BL = text["real"].bool()
    time_BD = denoiser.t_embedder((1 - t_B) * denoiser.t_scale).to(denoiser.dtype)

    # Patches of 2 x 2 latents are the tokens; each has its channels last.
    patches_BTD = noisy_BCHW.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, c * 4)
    count = patches_BTD.shape[1]
    image_BTD = denoiser.all_x_embedder["2-1"](patches_BTD.to(denoiser.dtype))
    padding_BTD = denoiser.x_pad_token.to(image_BTD.dtype).expand(b, _filled(count) - count, -1)
    image_BTD = torch.cat([image_BTD, padding_BTD], dim=1)
    turns_BTR = _image_turns(denoiser, real_BL, (h // 2, w // 2), image_BTD.shape[1])
    for block in denoiser.noise_refiner:
        image_BTD = block(image_BTD, None, turns_BTR, time_BD)

    text_BLD = denoiser.cap_embedder(tokens_BLD)
    text_BLD = torch.where(real_BL[..., None], text_BLD, denoiser.cap_pad_token.to(text_BLD.dtype))
    text_turns_BLR = _text_turns(denoiser, real_BL)
    attended_BL = None
    attended_BT = None
    if "padding" in text:
        attended_BL = ~text["padding"].bool()
        attended_BT = torch.cat([attended_BL.new_ones(b, image_BTD.shape[1]), attended_BL], dim=1)
    for block in denoiser.context_refiner:
        text_BLD = block(text_BLD, attended_BL, text_turns_BLR)

    row_BTD = common.traced(torch.cat([image_BTD, text_BLD], dim=1))
    all_turns_BTR = torch.cat([turns_BTR, text_turns_BLR], dim=1)
    for block in denoiser.layers:
        row_BTD = block(row_BTD, attended_BT, all_turns_BTR, time_BD)
    out_BTD = denoiser.all_final_layer["2-1"](row_BTD[:, :count], c=time_BD)
    return -out_BTD.view(b, h // 2, w // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def _text_turns(denoiser: ZImageTransformer2DModel, real_BL: torch.Tensor) -> torch.Tensor:
    """The rotations (B, L, R), complex, of a caption's tokens: they stand at (1, 0, 0), (2, 0, 0) and so on."""
    import torch

    b, length = real_BL.shape
    places_L3 = torch.zeros(length, 3, dtype=torch.int32, device=real_BL.device)
    places_L3[:, 0] = torch.arange(1, length + 1, device=real_BL.device)
    turns_LR: torch.Tensor = denoiser.rope_embedder(places_L3)
    return turns_LR.expand(b, -1, -1)


def _image_turns(
    denoiser: ZImageTransformer2DModel, real_BL: torch.Tensor, size: tuple[int, int], length: int
) -> torch.Tensor:
    """The rotations (B, T, R), complex, of an image's tokens: (n + 1, row, column) behind a caption of n tokens.

    n counts the caption's filled-up tokens. The tokens that fill up the image stand at (0, 0, 0).
    """
    import torch

    rows, columns = size
    device = real_BL.device
    first_B = (real_BL.sum(dim=1) + TEXT_MULTIPLE - 1) // TEXT_MULTIPLE * TEXT_MULTIPLE + 1
    places_BHW3 = torch.zeros(len(real_BL), rows, columns, 3, dtype=torch.int32, device=device)
    places_BHW3[..., 0] = first_B[:, None, None]
    places_BHW3[..., 1] = torch.arange(rows, device=device)[:, None]
    places_BHW3[..., 2] = torch.arange(columns, device=device)
    places_BT3 = torch.nn.functional.pad(places_BHW3.flatten(1, 2), (0, 0, 0, length - rows * columns))
    turns_R: torch.Tensor = denoiser.rope_embedder(places_BT3.flatten(0, 1))
    return turns_R.unflatten(0, places_BT3.shape[:2])


# ---- samples


def sample(
    denoiser: ZImageTransformer2DModel,
    vae: AutoencoderKL,
    folder: Path,
    *,
    prompt: Prompt,
    text: dict[str, torch.Tensor],
    negative: dict[str, torch.Tensor],
    scheduler: dict[str, Any] | None = None,
) -> Image.Image:
    """`prompt.cfg` counts as in every family, from 1 (none): the pipeline's guidance_scale is one less."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    pipe = ZImagePipeline(
        scheduler=common.load_scheduler(FlowMatchEulerDiscreteScheduler, folder, KINDS["scheduler"], scheduler),
        vae=vae,
        transformer=denoiser,
        **common.without_text_encoders(LORA_KEYS.encoders),
    )
    pipe.set_progress_bar_config(disable=True)
    latents_BCHW = pipe(
        prompt_embeds=_embeds(text),
        negative_prompt_embeds=_embeds(negative),
        guidance_scale=prompt.cfg - 1,
        **common.drawing_arguments(prompt),
    ).images
    return common.to_image(pipe, common.decode_latents(vae, latents_BCHW))


def _embeds(text: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The tokens (L, D) of each text alone, as the pipeline wants them."""
    return [tokens[real.bool()] for tokens, real in zip(text["tokens"], text["real"], strict=True)]


# ---- key names of LoRA files. The model's own implementation (Tongyi-MAI/Z-Image) has diffusers' names; in ComfyUI's
# files, q, k and v are one layer.
_PARTS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
_LAYERS = (
    *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"),
)
_SINGLE = (
    *("all_x_embedder.2-1", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"),
    *("all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1"),
)

LORA_KEYS = LoraKeys(
    layers=(
        *(OriginalLayer(f"{part}.{layer}", (f"{part}.{layer}",)) for part in _PARTS for layer in _LAYERS),
        *(OriginalLayer(layer, (layer,)) for layer in _SINGLE),
    ),
    encoders={"text_encoder": "qwen3"},  # no tool trains it
    other_names=(
        *(
            OriginalLayer(f"{part}.attention.qkv", tuple(f"{part}.attention.to_{x}" for x in "qkv"), (1, 1, 1))
            for part in _PARTS
        ),
        *(OriginalLayer(f"{part}.attention.out", (f"{part}.attention.to_out.0",)) for part in _PARTS),
        OriginalLayer("x_embedder", ("all_x_embedder.2-1",)),
        OriginalLayer("final_layer.linear", ("all_final_layer.2-1.linear",)),
        OriginalLayer("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)),
    ),
    one_width=True,
    file_formats=("native",),  # ComfyUI and diffusers read it; musubi-tuner alone wants kohya's keys
    dora_formats=("native", "peft"),
)
