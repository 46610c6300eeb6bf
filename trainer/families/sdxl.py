"""SDXL: all that is known about it. torch and diffusers are imported inside the functions, see
`trainer.spec.family`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.spec.family import BaseModel, ClipOutput, Facts, Footprint, LoraKeys, OriginalLayer, weights

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from PIL import Image

    from trainer.spec.plan import Prompt

MINIATURE = str(Path(__file__).with_name("miniatures") / "sdxl")
FOOTPRINT = Footprint(
    block_weights=2.21e9,
    other_weights=0.36e9,
    adapter_weights_per_rank=2.66e6,
    region_count=87,
    text_tokens=0,
    saved_gib={"none": 1.0, "products": 0.8, "attention": 0.3, "all": 0.2, "host": 0.08},
    working_gib=0.146,
    largest_region_weights=0.05e9,
    fp8_weights=2.21e9,
    encoder_weights=0.82e9,
    hidden_size=1280,
    capture_gib=0.6,
    unfused_factor=1.5,
)
BASE = BaseModel("stabilityai/stable-diffusion-xl-base-1.0", 12.9, FOOTPRINT)

FACTS = Facts(
    name="sdxl",
    models={
        "sdxl": BASE,
        "sdxl-base": BASE,
        "mini-sdxl": BaseModel(MINIATURE, files_gib=0.0, resolution=128, defaults={"steps": 20, "cfg": 3.0}),
    },
    files=(
        "model_index.json",
        "scheduler/*",
        *weights("unet", "vae", "text_encoder", "text_encoder_2"),
        "tokenizer/*",
        "tokenizer_2/*",
    ),
    multiple=32,  # the VAE shrinks by 8, the UNet by another 4
    objective="denoising",
    timestep_samplings=("uniform",),
    compiles="never",
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
    fused_targets={},  # files of this family have q, k and v apart, in every tool
    parts={"denoiser": "unet", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    landmarks=("input_blocks.0.0.weight", "down_blocks.0.resnets.0.conv1.weight"),
    prompt_steps=30,
    prompt_guidance=1.0,
    prompt_cfg=7.0,
)


def load_encoders(folder: Path, *, device: str, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """A pipeline of the two tokenizers and text encoders alone (CLIP-L, and CLIP-G with its projection)."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    def encoder(kind: Any, name: str) -> Any:
        model = kind.from_pretrained(folder / name, dtype=dtype, use_safetensors=True, device_map=device)
        return model.requires_grad_(False).eval()

    return StableDiffusionXLPipeline(
        scheduler=None,
        vae=None,
        unet=None,
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder=encoder(CLIPTextModel, "text_encoder"),
        text_encoder_2=encoder(CLIPTextModelWithProjection, "text_encoder_2"),
        add_watermarker=False,
    )


def encode_text(encoders: StableDiffusionXLPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    """`tokens` (77, 2048): the last but one hidden states of both encoders side by side; `pooled` (1280,) of CLIP-G."""
    import torch

    with torch.no_grad():
        tokens_BLD, _, pooled_BD, _ = encoders.encode_prompt(
            captions, captions, device=encoders.text_encoder.device, do_classifier_free_guidance=False
        )
    return [{"tokens": t.cpu(), "pooled": p.cpu()} for t, p in zip(tokens_BLD, pooled_BD, strict=True)]


def with_clip_outputs(text: dict[str, torch.Tensor], fresh: dict[str, ClipOutput]) -> dict[str, torch.Tensor]:
    """The tokens are CLIP-L's and then CLIP-G's, side by side; the pooled output is CLIP-G's."""
    import torch

    tokens_BLD, pooled_BD = text["tokens"], text["pooled"]
    if small := fresh.get("text_encoder"):
        width = small.tokens_BLD.shape[-1]
        tokens_BLD = torch.cat([small.tokens_BLD, tokens_BLD[..., width:]], dim=-1)
    if large := fresh.get("text_encoder_2"):
        width = tokens_BLD.shape[-1] - large.tokens_BLD.shape[-1]
        tokens_BLD = torch.cat([tokens_BLD[..., :width], large.tokens_BLD], dim=-1)
        pooled_BD = large.pooled_BD
    return {"tokens": tokens_BLD, "pooled": pooled_BD}


def load_vae(folder: Path, *, device: str) -> AutoencoderKL:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32, use_safetensors=True)
    return vae.requires_grad_(False).eval().to(device)


def encode_images(vae: AutoencoderKL, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation, (B, 8, H/8, W/8): scaling_factor * latents."""
    import torch

    with torch.no_grad():
        spread = vae.encode(pixels_BCHW.to(vae.device, vae.dtype)).latent_dist
    return torch.cat([spread.mean, spread.std], dim=1).float() * vae.config.scaling_factor


def load_denoiser(folder: Path, *, device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(
        folder / "unet", torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=True, device_map=device
    )
    return model.requires_grad_(False)


def from_original(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint as convert

    return dict(convert({f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}, config))


def blocks(denoiser: UNet2DConditionModel) -> list[tuple[str, torch.nn.Module]]:
    """The transformers between the convolutions: `proj_in`, some transformer blocks, `proj_out`."""
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
    """The noise, or the velocity of v-prediction, whichever the model was trained on."""
    predicted_BCHW: torch.Tensor = denoiser(
        noisy_BCHW.to(denoiser.dtype),
        (t_B * 1000).round(),  # the step, which the objective has divided by their number
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
    """No negative prompt means zeros instead of its embeddings, where the model's own pipeline does so."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(
        scheduler=EulerDiscreteScheduler.from_pretrained(folder / "scheduler", **(scheduler or {})),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        unet=denoiser,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    index = StableDiffusionXLPipeline.load_config(folder)
    if not prompt.negative and index.get("force_zeros_for_empty_prompt", True):
        negative = {name: torch.zeros_like(tensor) for name, tensor in text.items()}
    latents_BCHW = pipe(
        prompt_embeds=text["tokens"],
        pooled_prompt_embeds=text["pooled"],
        negative_prompt_embeds=negative["tokens"],
        negative_pooled_prompt_embeds=negative["pooled"],
        guidance_scale=prompt.cfg,
        num_inference_steps=prompt.steps,
        width=prompt.width,
        height=prompt.height,
        generator=torch.Generator("cpu").manual_seed(prompt.seed),
        output_type="latent",
    ).images
    # Here and not in the pipeline, which would decode in the denoiser's precision.
    pixels_BCHW = vae.decode(latents_BCHW.float() / vae.config.scaling_factor).sample
    image: Image.Image = pipe.image_processor.postprocess(pixels_BCHW)[0]
    return image


# ---- key names of LoRA files. Original: the modules of Stability-AI/generative-models, which kohya's and ComfyUI's
# keys name by their place in a list: three to a level going down (two with layers, one that halves the size), three up.
_ATTENTIONS = {
    **{f"down_blocks.{i}.attentions.{j}": f"input_blocks.{3 * i + j + 1}.1" for i in (1, 2) for j in (0, 1)},
    "mid_block.attentions.0": "middle_block.1",
    **{f"up_blocks.{i}.attentions.{j}": f"output_blocks.{3 * i + j}.1" for i in (0, 1) for j in (0, 1, 2)},
}
_IN_ATTENTION = (
    *(f"transformer_blocks.{{}}.attn{n}.{end}" for n in (1, 2) for end in ("to_q", "to_k", "to_v", "to_out.0")),
    *("transformer_blocks.{}.ff.net.0.proj", "transformer_blocks.{}.ff.net.2", "proj_in", "proj_out"),
)
_RESNETS = {
    **{f"down_blocks.{i}.resnets.{j}": f"input_blocks.{3 * i + j + 1}.0" for i in (0, 1, 2) for j in (0, 1)},
    **{f"mid_block.resnets.{j}": f"middle_block.{2 * j}" for j in (0, 1)},
    **{f"up_blocks.{i}.resnets.{j}": f"output_blocks.{3 * i + j}.0" for i in (0, 1, 2) for j in (0, 1, 2)},
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OTHERS = {
    **{f"down_blocks.{i}.downsamplers.0.conv": f"input_blocks.{3 * i + 3}.0.op" for i in (0, 1)},
    **{f"up_blocks.{i}.upsamplers.0.conv": f"output_blocks.{3 * i + 2}.2.conv" for i in (0, 1)},
    **{f"time_embedding.linear_{n}": f"time_embed.{2 * n - 2}" for n in (1, 2)},
    **{f"add_embedding.linear_{n}": f"label_emb.0.{2 * n - 2}" for n in (1, 2)},
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}

LORA_KEYS = LoraKeys(
    layers=(
        *(OriginalLayer(f"{b}.{path}", (f"{a}.{path}",)) for a, b in _ATTENTIONS.items() for path in _IN_ATTENTION),
        *(OriginalLayer(f"{b}.{d}", (f"{a}.{c}",)) for a, b in _RESNETS.items() for c, d in _IN_RESNET.items()),
        *(OriginalLayer(b, (a,)) for a, b in _OTHERS.items()),
    ),
    encoders={"text_encoder": "te1", "text_encoder_2": "te2"},  # CLIP-L and CLIP-G
)
