"""Stable Diffusion XL: a UNet with transformers between its convolutions, trained to predict noise.

torch and diffusers are imported inside the functions: a plan needs only FACTS.

Shapes: B batch, C channels of latents, H and W their height and width, L tokens, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.base_model import configs
from trainer.families import common
from trainer.families.published import licences
from trainer.families.published import sdxl as published
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
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from PIL import Image

    from trainer.spec.plan import Prompt

KINDS = published.KINDS
MINIATURE = str(Path(__file__).with_name("miniatures") / "sdxl")
# GiB: fitted to peaks of `python -m bench step --family sdxl …` at 1024 x 1024 pixels
# (tests/trainer/spec/test_memory_model.py).
FOOTPRINT = Footprint(
    block_weights=2.21e9,
    other_weights=0.36e9,
    adapter_weights_per_rank=2.66e6,
    kohya_weights_per_rank=2.66e6,
    split_kohya_weights_per_rank=2.66e6,
    peft_weights_per_rank=2.66e6,
    region_count=87,
    text_tokens=0,
    caption_values=77 * 2048 + 1280,  # of both CLIPs, and the pooled output of the second
    latent_channels=4,
    saved_gib={"none": 1.0, "products": 0.8, "attention": 0.3, "all": 0.2, "host": 0.08},
    working_gib=0.146,
    largest_region_weights=0.05e9,
    fp8_weights=2.21e9,
    encoder_weights=0.82e9,
    hidden_size=1280,
    capture_gib=0.6,
    graph_gib=0.045,
    unfused_factor=1.5,
    measured_steps={1: MeasuredStep("none", 12.8), 4: MeasuredStep("none", 21.2)},
    measured_pixels=1024 * 1024,
)
BASE = BaseModel(
    "stabilityai/stable-diffusion-xl-base-1.0",
    files_gib=12.9,
    footprint=FOOTPRINT,
    published=published.BASE,
    licence=licences.OPENRAIL,
    aliases=(
        "sdxl 1.0",
        "sd_xl_base_1.0",
        "stable-diffusion-xl",
        "stable-diffusion-xl-base",
        "stable-diffusion-xl-1.0",
    ),
)

FACTS = Facts(
    name="sdxl",
    models={
        "sdxl": BASE,
        "sdxl-base": BASE,
        "mini-sdxl": BaseModel(MINIATURE, files_gib=0.0, resolution=128, defaults={"steps": 20, "cfg": 3.0}),
    },
    files=(
        "model_index.json",
        "scheduler/scheduler_config.json",
        *weights("unet", "vae", "text_encoder", "text_encoder_2"),
        *tokenizer_files("tokenizer", "tokenizer_2"),
    ),
    multiple=32,  # the VAE shrinks by 8, the UNet by another 4
    objective="denoising",
    timestep_samplings=("uniform",),
    compiles=False,
    attention_backends=False,
    targets=(
        "proj_in",
        "proj_out",
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "attn2.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    ),
    lora_prefix="unet",
    architecture="stable-diffusion-xl-v1-base",
    base_version="sdxl_base_v1-0",
    fused_targets={},  # every tool keeps q, k and v apart in this family's files
    parts={"denoiser": "unet", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    landmarks=("input_blocks.0.0.weight", "down_blocks.0.resnets.0.conv1.weight"),
    text_readers={"tokenizer": ("CLIP", CLIP_TOKENS)},
    max_token_lengths=(CLIP_TOKENS, 150, 225),
    lookalikes=published.LOOKALIKES,
    pipelines=published.PIPELINES,
    hub_tags=("stable-diffusion-xl",),
    kinds=published.KINDS,
    same_sizes=published.same_sizes,
    prompt_steps=30,
    prompt_guidance=1.0,
    prompt_cfg=7.0,
)


def load_encoders(folder: Path, *, device: str, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """A pipeline of the two tokenizers and text encoders alone (CLIP-L, and CLIP-G with its projection)."""
    from diffusers import StableDiffusionXLPipeline

    from trainer.base_model.loading import load_tokenizer

    tokenizers = {name: load_tokenizer(folder / name, KINDS[name]) for name in ("tokenizer", "tokenizer_2")}

    def encoder(name: str) -> Any:
        own = tokenizers[name.replace("text_encoder", "tokenizer")]
        return common.load_encoder(KINDS[name], folder / name, tokenizer=own, device=device, dtype=dtype)

    return StableDiffusionXLPipeline(
        scheduler=None,
        vae=None,
        unet=None,
        **tokenizers,
        text_encoder=encoder("text_encoder"),
        text_encoder_2=encoder("text_encoder_2"),
        add_watermarker=False,
    )


def encode_text(
    encoders: StableDiffusionXLPipeline, captions: list[str], *, max_tokens: int = CLIP_TOKENS
) -> list[dict[str, torch.Tensor]]:
    """`tokens` (77, 2048): the last but one hidden states of both encoders side by side; `pooled` (1280,) of CLIP-G.

    With `max_tokens` of 150 or 225, the tokens are 152 or 227 (`trainer.engine.encoders`).
    """
    import torch

    if max_tokens != CLIP_TOKENS:
        from trainer.engine.encoders import clip_output

        with torch.no_grad():
            clip_l = clip_output(encoders.text_encoder, encoders.tokenizer, captions, max_tokens=max_tokens)
            clip_g = clip_output(encoders.text_encoder_2, encoders.tokenizer_2, captions, max_tokens=max_tokens)
        return common.split_captions(torch.cat([clip_l.tokens_BLD, clip_g.tokens_BLD], dim=-1), clip_g.pooled_BD)
    with torch.no_grad(), common.without_warnings():
        tokens_BLD, _, pooled_BD, _ = encoders.encode_prompt(
            captions, captions, device=encoders.text_encoder.device, do_classifier_free_guidance=False
        )
    return common.split_captions(tokens_BLD, pooled_BD)


def with_clip_outputs(text: dict[str, torch.Tensor], outputs: dict[str, ClipOutput]) -> dict[str, torch.Tensor]:
    """Tokens (B, 77, 2048): CLIP-L's 768 features, then CLIP-G's 1280. The pooled output is CLIP-G's."""
    import torch

    tokens_BLD = text["tokens"]
    pooled_BD = text["pooled"]
    clip_l = outputs.get("text_encoder")
    if clip_l is not None:
        width = clip_l.tokens_BLD.shape[-1]
        tokens_BLD = torch.cat([clip_l.tokens_BLD, tokens_BLD[..., width:]], dim=-1)
    clip_g = outputs.get("text_encoder_2")
    if clip_g is not None:
        width = tokens_BLD.shape[-1] - clip_g.tokens_BLD.shape[-1]
        tokens_BLD = torch.cat([tokens_BLD[..., :width], clip_g.tokens_BLD], dim=-1)
        pooled_BD = clip_g.pooled_BD
    return {"tokens": tokens_BLD, "pooled": pooled_BD}


load_vae = common.load_vae
encode_images = common.encode_images


def load_denoiser(folder: Path, *, device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    denoiser: UNet2DConditionModel = common.load_denoiser(KINDS["unet"], folder / "unet", device=device, dtype=dtype)
    return denoiser


def from_original(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint as convert

    return dict(convert({f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}, config))


def blocks(denoiser: UNet2DConditionModel) -> list[tuple[str, torch.nn.Module]]:
    """The transformers between the convolutions: `proj_in`, transformer blocks, `proj_out`."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    return [(name, m) for name, m in denoiser.named_modules() if isinstance(m, Transformer2DModel)]


def regions(denoiser: UNet2DConditionModel) -> list[torch.nn.Module]:
    """The convolutional blocks, and the blocks inside the transformers."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    return [m for m in denoiser.modules() if isinstance(m, BasicTransformerBlock | ResnetBlock2D)]


def fused_forwards() -> dict[type, type]:
    from diffusers.models.attention import BasicTransformerBlock

    from trainer.families.fused_blocks.sdxl import FusedBasicBlock

    return {BasicTransformerBlock: FusedBasicBlock}


def predict(
    denoiser: UNet2DConditionModel,
    noisy_BCHW: torch.Tensor,
    t_B: torch.Tensor,
    *,
    text: dict[str, torch.Tensor],
    guidance: float = 1.0,  # noqa: ARG001 (this family has no embedded guidance)
    geometry_B6: torch.Tensor,
) -> torch.Tensor:
    """The noise, or the velocity of v-prediction, whichever the model was trained to predict."""
    predicted_BCHW: torch.Tensor = denoiser(
        noisy_BCHW.to(denoiser.dtype),
        (t_B * 1000).round(),  # the integer timestep, which the objective divided by 1,000
        encoder_hidden_states=text["tokens"],
        added_cond_kwargs={"text_embeds": text["pooled"], "time_ids": geometry_B6},
        return_dict=False,
    )[0]
    return predicted_BCHW


def sample(
    denoiser: UNet2DConditionModel,
    vae: AutoencoderKL,
    folder: Path,
    *,
    prompt: Prompt,
    text: dict[str, torch.Tensor],
    negative: dict[str, torch.Tensor],
    scheduler: dict[str, Any] | None = None,
) -> Image.Image:
    """Without a negative prompt its embeddings are zeros, if the model's own pipeline does so."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(
        scheduler=common.load_scheduler(EulerDiscreteScheduler, folder, KINDS["scheduler"], scheduler),
        vae=vae,
        unet=denoiser,
        add_watermarker=False,
        **common.without_text_encoders(LORA_KEYS.encoders),
    )
    pipe.set_progress_bar_config(disable=True)
    index = configs.read_object(folder / configs.INDEX)
    if not prompt.negative and index.get("force_zeros_for_empty_prompt", True):
        negative = {name: torch.zeros_like(tensor) for name, tensor in text.items()}
    latents_BCHW = pipe(
        guidance_scale=prompt.cfg,
        **common.pipeline_arguments(prompt, text, negative),
    ).images
    return common.to_image(pipe, common.decode_latents(vae, latents_BCHW))


# ---- key names of LoRA files. Original: the modules of Stability-AI/generative-models, which kohya's and ComfyUI's
# keys name by their place in a list: three to a level going down (two with layers, one that halves the size), three up.
# diffusers' name → original name
_ATTENTIONS = {
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.attentions.2": "output_blocks.2.1",
    "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.1.attentions.1": "output_blocks.4.1",
    "up_blocks.1.attentions.2": "output_blocks.5.1",
}
_IN_ATTENTION = (  # the same below both
    "transformer_blocks.{}.attn1.to_q",
    "transformer_blocks.{}.attn1.to_k",
    "transformer_blocks.{}.attn1.to_v",
    "transformer_blocks.{}.attn1.to_out.0",
    "transformer_blocks.{}.attn2.to_q",
    "transformer_blocks.{}.attn2.to_k",
    "transformer_blocks.{}.attn2.to_v",
    "transformer_blocks.{}.attn2.to_out.0",
    "transformer_blocks.{}.ff.net.0.proj",
    "transformer_blocks.{}.ff.net.2",
    "proj_in",
    "proj_out",
)
_RESNETS = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.resnets.1": "input_blocks.5.0",
    "down_blocks.2.resnets.0": "input_blocks.7.0",
    "down_blocks.2.resnets.1": "input_blocks.8.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.resnets.2": "output_blocks.2.0",
    "up_blocks.1.resnets.0": "output_blocks.3.0",
    "up_blocks.1.resnets.1": "output_blocks.4.0",
    "up_blocks.1.resnets.2": "output_blocks.5.0",
    "up_blocks.2.resnets.0": "output_blocks.6.0",
    "up_blocks.2.resnets.1": "output_blocks.7.0",
    "up_blocks.2.resnets.2": "output_blocks.8.0",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OTHERS = {
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}


def _layers() -> tuple[OriginalLayer, ...]:
    layers = []
    for diffusers_name, original_name in _ATTENTIONS.items():
        for path in _IN_ATTENTION:
            layers.append(OriginalLayer(f"{original_name}.{path}", (f"{diffusers_name}.{path}",)))
    for diffusers_name, original_name in _RESNETS.items():
        for diffusers_path, original_path in _IN_RESNET.items():
            layers.append(OriginalLayer(f"{original_name}.{original_path}", (f"{diffusers_name}.{diffusers_path}",)))
    for diffusers_name, original_name in _OTHERS.items():
        layers.append(OriginalLayer(original_name, (diffusers_name,)))
    return tuple(layers)


LORA_KEYS = LoraKeys(
    layers=_layers(),
    encoders={"text_encoder": "te1", "text_encoder_2": "te2"},  # CLIP-L and CLIP-G
)
