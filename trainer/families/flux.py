"""Flux.1: all that is known about it. torch and diffusers are imported inside the functions, see
`trainer.spec.family`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.families.common import traced
from trainer.spec.family import BaseModel, ClipOutput, Facts, Footprint, LoraKeys, OriginalLayer

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
    from PIL import Image

    from trainer.spec.plan import Prompt

MINIATURE = str(Path(__file__).with_name("miniatures") / "flux")

FOOTPRINT = Footprint(
    block_weights=11.82e9,
    other_weights=0.08e9,
    adapter_weights_per_rank=3.63e6,
    region_count=57,
    text_tokens=512,
    saved_gib={"none": 4.6, "products": 3.25, "attention": 0.673, "all": 0.334, "host": 0.02},
    working_gib=0.136,
    largest_region_weights=0.34e9,
    fp8_weights=8.6e9,
    encoder_weights=4.89e9,
    hidden_size=3072,
)
FACTS = Facts(
    name="flux",
    models={
        "flux": BaseModel("black-forest-labs/FLUX.1-dev", 31.5, FOOTPRINT, gated=True),
        "flux-dev": BaseModel("black-forest-labs/FLUX.1-dev", 31.5, FOOTPRINT, gated=True),
        "flux-krea": BaseModel("black-forest-labs/FLUX.1-Krea-dev", 31.5, FOOTPRINT, gated=True),
        "flux-schnell": BaseModel(
            "black-forest-labs/FLUX.1-schnell",
            files_gib=31.4,
            footprint=FOOTPRINT,
            gated=True,
            defaults={"steps": 4, "guidance": 0.0},
        ),
        "mini-flux": BaseModel(MINIATURE, files_gib=0.0, resolution=128),
    },
    files=(
        "model_index.json",
        "scheduler/*",
        "transformer/*.json",
        "transformer/*.safetensors",
        "vae/*",
        "text_encoder/*",
        "text_encoder_2/*",
        "tokenizer/*",
        "tokenizer_2/*",
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
    landmarks=("double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0.proj_mlp.weight"),
    prompt_steps=20,
    prompt_guidance=3.5,
    prompt_cfg=1.0,
    compiles="recomputed",
)


def load_encoders(folder: Path, *, device: str, dtype: torch.dtype) -> FluxPipeline:
    """A FluxPipeline of the two tokenizers and text encoders alone (CLIP-L's pooled output and T5's tokens)."""
    from diffusers import FluxPipeline
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    def encoder(kind: Any, name: str) -> Any:
        model = kind.from_pretrained(folder / name, dtype=dtype, use_safetensors=True, device_map=device)
        return model.requires_grad_(False).eval()

    return FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder=encoder(CLIPTextModel, "text_encoder"),
        text_encoder_2=encoder(T5EncoderModel, "text_encoder_2"),
    )


def encode_text(encoders: FluxPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    """`tokens` (L, 4096) of T5 and `pooled` (768,) of CLIP-L for each caption, padded as the pipeline pads."""
    import torch

    length = min(512, encoders.tokenizer_2.model_max_length)
    with torch.no_grad():
        tokens_BLD, pooled_BD, _ = encoders.encode_prompt(
            captions, captions, device=encoders.text_encoder.device, max_sequence_length=length
        )
    return [{"tokens": t.cpu(), "pooled": p.cpu()} for t, p in zip(tokens_BLD, pooled_BD, strict=True)]


def with_clip_outputs(text: dict[str, torch.Tensor], fresh: dict[str, ClipOutput]) -> dict[str, torch.Tensor]:
    """Of CLIP-L, this family reads the pooled output alone."""
    return {**text, "pooled": fresh["text_encoder"].pooled_BD} if "text_encoder" in fresh else text


def load_vae(folder: Path, *, device: str) -> AutoencoderKL:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32, use_safetensors=True)
    return vae.requires_grad_(False).eval().to(device)


def encode_images(vae: AutoencoderKL, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation, (B, 32, H/8, W/8): scaling_factor * (latents - shift_factor)."""
    import torch

    with torch.no_grad():
        spread = vae.encode(pixels_BCHW.to(vae.device, vae.dtype)).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    return torch.cat([(spread.mean - shift) * scale, spread.std * scale], dim=1).float()


def load_denoiser(folder: Path, *, device: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=True, device_map=device
    )
    return model.requires_grad_(False)


def from_original(
    state: dict[str, torch.Tensor],
    config: dict[str, Any],  # noqa: ARG001 (the names say all)
) -> dict[str, torch.Tensor]:
    """By the table of this family's LoRA keys, at any width: diffusers' own function knows the full-size one alone."""
    layers = {layer.name: layer for layer in LORA_KEYS.layers}
    found = {}
    for name, tensor in state.items():
        path, end = name.rsplit(".", 1)
        number = next((p for p in path.split(".") if p.isdecimal()), "") if "_blocks." in path else ""
        general = path.replace(f".{number}.", ".{}.", 1) if number else path
        if general in NORMS:
            found[f"{NORMS[general].format(number)}.weight"] = tensor
            continue
        layer = layers.get(general)
        if layer is None:
            found[name] = tensor  # and is refused
            continue
        unit = tensor.shape[0] // sum(layer.row_ratio)
        pieces = tensor.split([unit * n for n in layer.row_ratio]) if len(layer.diffusers_names) > 1 else (tensor,)
        if layer.halves_swapped:
            pieces = (tensor.roll(tensor.shape[0] // 2, 0),)
        found |= {f"{part.format(number)}.{end}": p for part, p in zip(layer.diffusers_names, pieces, strict=True)}
    return found


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
    geometry_B6: torch.Tensor | None = None,  # noqa: ARG001 (positions are all that this family is told)
) -> torch.Tensor:
    """The velocity (noise - latents). `guidance`: the embedded scale, which schnell has none of."""
    import torch

    b, c, h, w = noisy_BCHW.shape
    patches_BLD = noisy_BCHW.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * 4)
    img_ids = torch.zeros(h // 2, w // 2, 3, device=noisy_BCHW.device, dtype=denoiser.dtype)
    img_ids[..., 1] = torch.arange(h // 2, device=noisy_BCHW.device)[:, None]
    img_ids[..., 2] = torch.arange(w // 2, device=noisy_BCHW.device)
    out_BLD = denoiser(
        hidden_states=traced(patches_BLD.to(denoiser.dtype)),
        timestep=t_B,
        guidance=t_B.new_full((b,), guidance) if denoiser.config.guidance_embeds else None,
        pooled_projections=text["pooled"],
        encoder_hidden_states=traced(text["tokens"]),
        txt_ids=img_ids.new_zeros(text["tokens"].shape[1], 3),
        img_ids=img_ids.view(-1, 3),
        return_dict=False,
    )[0]
    return out_BLD.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


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
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", **(scheduler or {})),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=denoiser,
    )
    pipe.set_progress_bar_config(disable=True)
    packed_BLD = pipe(
        prompt_embeds=text["tokens"],
        pooled_prompt_embeds=text["pooled"],
        negative_prompt_embeds=negative["tokens"],
        negative_pooled_prompt_embeds=negative["pooled"],
        true_cfg_scale=prompt.cfg,
        guidance_scale=prompt.guidance,
        num_inference_steps=prompt.steps,
        width=prompt.width,
        height=prompt.height,
        generator=torch.Generator("cpu").manual_seed(prompt.seed),
        output_type="latent",
    ).images
    # Here and not in the pipeline, which would decode in the denoiser's precision.
    latents_BCHW = pipe._unpack_latents(packed_BLD, prompt.height, prompt.width, pipe.vae_scale_factor)
    pixels_BCHW = vae.decode(latents_BCHW.float() / vae.config.scaling_factor + vae.config.shift_factor).sample
    image: Image.Image = pipe.image_processor.postprocess(pixels_BCHW)[0]
    return image


# ---- key names of LoRA files. Original: the modules of black-forest-labs/flux, which kohya's and ComfyUI's keys name.
_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_EMBEDDERS = {"timestep": "time_in", "text": "vector_in", "guidance": "guidance_in"}

LORA_KEYS = LoraKeys(
    layers=(
        OriginalLayer("double_blocks.{}.img_attn.qkv", tuple(f"{_DOUBLE}.attn.to_{x}" for x in "qkv"), (1, 1, 1)),
        OriginalLayer("double_blocks.{}.txt_attn.qkv", tuple(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv"), (1, 1, 1)),
        OriginalLayer("double_blocks.{}.img_attn.proj", (f"{_DOUBLE}.attn.to_out.0",)),
        OriginalLayer("double_blocks.{}.txt_attn.proj", (f"{_DOUBLE}.attn.to_add_out",)),
        OriginalLayer("double_blocks.{}.img_mlp.0", (f"{_DOUBLE}.ff.net.0.proj",)),
        OriginalLayer("double_blocks.{}.img_mlp.2", (f"{_DOUBLE}.ff.net.2",)),
        OriginalLayer("double_blocks.{}.txt_mlp.0", (f"{_DOUBLE}.ff_context.net.0.proj",)),
        OriginalLayer("double_blocks.{}.txt_mlp.2", (f"{_DOUBLE}.ff_context.net.2",)),
        OriginalLayer("double_blocks.{}.img_mod.lin", (f"{_DOUBLE}.norm1.linear",)),
        OriginalLayer("double_blocks.{}.txt_mod.lin", (f"{_DOUBLE}.norm1_context.linear",)),
        OriginalLayer(
            "single_blocks.{}.linear1",
            (*(f"{_SINGLE}.attn.to_{x}" for x in "qkv"), f"{_SINGLE}.proj_mlp"),
            (1, 1, 1, 4),  # the MLP is four times as wide as the model
        ),
        OriginalLayer("single_blocks.{}.linear2", (f"{_SINGLE}.proj_out",)),
        OriginalLayer("single_blocks.{}.modulation.lin", (f"{_SINGLE}.norm.linear",)),
        OriginalLayer("img_in", ("x_embedder",)),
        OriginalLayer("txt_in", ("context_embedder",)),
        *(
            OriginalLayer(f"{native}.{end}_layer", (f"time_text_embed.{ours}_embedder.linear_{number}",))
            for ours, native in _EMBEDDERS.items()
            for number, end in ((1, "in"), (2, "out"))
        ),
        OriginalLayer("final_layer.linear", ("proj_out",)),
        OriginalLayer("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True),
    ),
    encoders={"text_encoder": "te1", "text_encoder_2": "te3"},  # CLIP-L and T5
)
_STREAMS = {"img_attn": "norm_", "txt_attn": "norm_added_"}
NORMS = {  # of queries and keys: no adapters there, but weights
    **{
        f"double_blocks.{{}}.{stream}.norm.{long}_norm": f"{_DOUBLE}.attn.{norm}{long[0]}"
        for stream, norm in _STREAMS.items()
        for long in ("query", "key")
    },
    **{f"single_blocks.{{}}.norm.{long}_norm": f"{_SINGLE}.attn.norm_{long[0]}" for long in ("query", "key")},
}
