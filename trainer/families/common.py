"""Parts that several families share: loading frozen models, the VAE, and the set-up of a pipeline for sampling.

torch and diffusers are imported inside the functions, so that importing a family imports neither.

Shapes: B batch, C channels, H and W height and width (of pixels, or of latents: 1/8 of them), L tokens, D features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.families.published import configs

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    from trainer.spec.family import ClipOutput
    from trainer.spec.plan import Prompt
    from trainer.spec.rules.config_rules import ConfigKind

# ---- loading


def load_encoder(
    kind: ConfigKind, folder: Path, *, tokenizer: Any, device: str, dtype: torch.dtype, depth: int | None = None
) -> Any:
    """A frozen text encoder of transformers. `folder`: its own, inside the model's. `tokenizer`: the one it reads by.
    `depth`: the number of its layers that are loaded, if not all.

    Raises SettingsError for one that cannot be loaded, or has no embedding for a token.
    """
    from trainer.base_model import loading, weight_check

    model = loading.load_model(kind, folder, device=device, dtype=dtype, depth=depth)
    weight_check.check_weights(model.named_parameters(), folder)
    loading.check_tokens(tokenizer, model, folder.with_name(folder.name.replace("text_encoder", "tokenizer")))
    return model.eval()


def load_denoiser(kind: ConfigKind, folder: Path, *, device: str, dtype: torch.dtype) -> Any:
    """A frozen denoiser of diffusers. `folder`: its own, inside the model's. Raises SettingsError."""
    from trainer.base_model import loading

    return loading.load_model(kind, folder, device=device, dtype=dtype)


def load_vae(folder: Path, *, device: str, kind: ConfigKind = configs.VAE) -> Any:
    """The frozen VAE, in fp32: SDXL's overflows fp16, and bf16 has fewer bits than a pixel. Raises SettingsError."""
    import torch

    from trainer.base_model import loading, weight_check

    vae = loading.load_model(kind, folder / "vae", device=None, dtype=torch.float32).to(device)
    weight_check.check_weights(vae.state_dict().items(), folder / "vae")
    return vae.eval()


# ---- text and images


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Inside, libraries do not warn of captions that are cut: `trainer.data.caption_length` says it with names."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)


def split_captions(tokens_BLD: torch.Tensor, pooled_BD: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """`tokens` (L, D) and `pooled` (D,) of each caption, on the CPU."""
    return [{"tokens": t.cpu(), "pooled": p.cpu()} for t, p in zip(tokens_BLD, pooled_BD, strict=True)]


def without_clip_outputs(
    text: dict[str, torch.Tensor],
    outputs: dict[str, ClipOutput],  # noqa: ARG001
) -> dict[str, torch.Tensor]:
    """`Family.with_clip_outputs` of a family that has no CLIP: the text as it is."""
    return text


def encode_images(vae: AutoencoderKL, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of the latents, (B, 2C, H/8, W/8): scaling_factor * (latents - shift_factor).

    SDXL's VAE has no shift.
    """
    import torch

    with torch.no_grad():
        distribution = vae.encode(pixels_BCHW.to(vae.device, vae.dtype)).latent_dist
    mean_BCHW = distribution.mean
    if vae.config.shift_factor is not None:
        mean_BCHW = mean_BCHW - vae.config.shift_factor
    scale = vae.config.scaling_factor
    return torch.cat([mean_BCHW * scale, distribution.std * scale], dim=1).float()


def decode_latents(vae: AutoencoderKL, latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, 8H, 8W) in about [-1, 1]; reverses `encode_images`.

    Pipelines would decode in the denoiser's precision, so families let them return latents and decode here.
    """
    latents_BCHW = latents_BCHW.float() / vae.config.scaling_factor
    if vae.config.shift_factor is not None:
        latents_BCHW = latents_BCHW + vae.config.shift_factor
    return decoded(vae, latents_BCHW)


def decoded(
    vae: Any, latents: torch.Tensor, decode: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Pixels in fp32 of latents on the VAE's own scale, by `decode`, or by `vae.decode`; computed in the VAE's dtype.

    A VAE in fp16 that overflows, as SDXL's first one does, decodes again in fp32, and stays in it.
    """
    import torch

    def plainly(latents: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = vae.decode(latents).sample
        return pixels

    decode = decode or plainly
    pixels = decode(latents.to(vae.dtype))
    if vae.dtype == torch.float16 and not pixels.isfinite().all():
        vae.float()
        pixels = decode(latents.float())
    return pixels.float()


# ---- sampling


def without_text_encoders(encoders: Iterable[str]) -> dict[str, None]:
    """Arguments of a pipeline that gets embeddings: no text encoders and no tokenizers, by the names of the former."""
    components: dict[str, None] = {}
    for encoder in encoders:
        components[encoder] = None
        components[encoder.replace("text_encoder", "tokenizer")] = None
    return components


def load_scheduler(scheduler_class: Any, folder: Path, kind: ConfigKind, changes: dict[str, Any] | None) -> Any:
    """The model's scheduler. `changes`: values that differ from its config."""
    from trainer.base_model import loading

    return loading.load_scheduler(scheduler_class, folder / "scheduler", kind, changes)


def pipeline_arguments(
    prompt: Prompt, text: dict[str, torch.Tensor], negative: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """What a pipeline is called with that takes tokens and pooled outputs; it returns latents."""
    return {
        "prompt_embeds": text["tokens"],
        "pooled_prompt_embeds": text["pooled"],
        "negative_prompt_embeds": negative["tokens"],
        "negative_pooled_prompt_embeds": negative["pooled"],
        **drawing_arguments(prompt),
    }


def drawing_arguments(prompt: Prompt) -> dict[str, Any]:
    """What the pipelines of all families are called with besides texts and guidance; they return latents.

    The generator is on the CPU, so that a seed draws the same noise on every device.
    """
    import torch

    return {
        "num_inference_steps": prompt.steps,
        "width": prompt.width,
        "height": prompt.height,
        "generator": torch.Generator("cpu").manual_seed(prompt.seed),
        "output_type": "latent",
    }


def to_image(pipeline: Any, pixels_BCHW: torch.Tensor) -> Image.Image:
    """The first image of a batch."""
    image: Image.Image = pipeline.image_processor.postprocess(pixels_BCHW)[0]
    return image


# ---- latents as tokens


def patch_tokens(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Patches of 2 x 2 latents, row by row: (B, H/2 * W/2, 4C). Each has the four numbers of its channels in turn."""
    b, c, h, w = latents_BCHW.shape
    return latents_BCHW.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * 4)


def latents_of_patches(tokens_BTD: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Latents (B, C, h, w) of such patches."""
    b, _, d = tokens_BTD.shape
    return tokens_BTD.view(b, h // 2, w // 2, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, d // 4, h, w)


# ---- training


def traced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, as an input that gradients reach.

    All blocks then have inputs that require gradients, and torch.compile compiles one graph for all of them; the first
    block would get a graph of its own otherwise.
    """
    import torch

    return tensor if tensor.requires_grad else tensor.detach().requires_grad_(torch.is_grad_enabled())
