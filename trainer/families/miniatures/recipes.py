"""The recipe of each family's miniature: its modules, its loss, and the pipeline that it is saved as.

B images, C channels, H and W of the latents, L tokens, D features. Latents are normalised by the autoencoder's shift
and scale. `ids` holds one (B, L) tensor of token ids for each tokenizer. `texts` holds what the text encoders make of
them, tensors (B, ...) by name: where the encoders do not train, `pools` computes them once for all captions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.families import flux2 as flux2_family
from trainer.families import krea2 as krea2_family
from trainer.families import qwen_image as qwen_image_family
from trainer.families import z_image as z_image_family
from trainer.families.miniatures import krea as krea_parts
from trainer.families.miniatures import models
from trainer.families.miniatures import qwen as qwen_parts
from trainer.families.miniatures.tokens import QWEN_LENGTH

Ids = Sequence[torch.Tensor]
Texts = dict[str, torch.Tensor]
Tokenizers = Sequence[PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Recipe:
    """One family's miniature before and after training: `denoiser` is the last of its modules.

    `untrained`: its text encoder is too deep to be trained here.
    """

    latent_channels: int
    modules: dict[str, nn.Module]
    texts: Callable[[Ids], Texts]
    loss: Callable[[torch.Tensor, Texts], torch.Tensor]
    pipeline: Callable[[Any], DiffusionPipeline]  # of the autoencoder
    of_videos: bool = False  # whether the autoencoder is one of videos
    untrained: bool = False

    @property
    def denoiser(self) -> nn.Module:
        return list(self.modules.values())[-1]


def flow_times(count: int, *, device: torch.device) -> torch.Tensor:
    """Times (count,) in 0..1: four of five logit-normal, shifted far towards noise, the rest uniform.

    In a flat image of so few colours a shape is settled between times 0.97 and 0.85; unshifted, one sample in
    twenty would lie there.
    """
    shifted = torch.sigmoid(torch.randn(count, device=device) + math.log(5))
    return torch.where(torch.rand(count, device=device) < 0.8, shifted, torch.rand(count, device=device))


def pack(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Two by two neighbours become one token: (B, H/2 * W/2, 4 C), in Flux's order."""
    batch, channels, height, width = latents_BCHW.shape
    blocks = latents_BCHW.view(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def earlier_words(real_BL: torch.Tensor) -> torch.Tensor:
    """Which tokens each token attends to, (B, 1, L, L): the real ones up to itself.

    transformers would make the same of `real_BL`, but may ask the host first whether it is true everywhere.
    """
    length = real_BL.shape[1]
    earlier_LL = torch.ones(length, length, dtype=torch.bool, device=real_BL.device).tril()
    return earlier_LL & real_BL[:, None, None, :]


def flux(tokenizers: Tokenizers) -> Recipe:
    """Flux.1-dev: pooled CLIP, T5 tokens, embedded guidance (any value from 1 to 4.5 means the same here)."""
    words, pieces = tokenizers
    clip = models.clip(words, width=models.CLIP_L_WIDTH, layers=2, projected=False)
    t5 = models.t5(pieces)
    net = models.flux_transformer()

    def texts(ids: Ids) -> Texts:
        return {"pooled": clip(ids[0]).pooler_output, "tokens": t5(ids[1])[0]}

    def loss(latents_BCHW: torch.Tensor, texts: Texts) -> torch.Tensor:
        device = latents_BCHW.device
        batch, _, height, width = latents_BCHW.shape
        clean = pack(latents_BCHW)
        t = flow_times(len(latents_BCHW), device=device)
        noise = torch.randn_like(clean)
        rows, columns = torch.meshgrid(
            torch.arange(height // 2, device=device), torch.arange(width // 2, device=device), indexing="ij"
        )
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
        predicted = net(
            hidden_states=torch.lerp(clean, noise, t[:, None, None]).to(net.dtype),
            timestep=t,
            guidance=1 + 3.5 * torch.rand(batch, device=device),
            pooled_projections=texts["pooled"],
            encoder_hidden_states=texts["tokens"],
            txt_ids=torch.zeros(texts["tokens"].shape[1], 3, device=device),
            img_ids=places,
        ).sample
        return F.mse_loss(predicted.float(), noise - clean)

    def pipeline(vae: AutoencoderKL) -> DiffusionPipeline:
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        )
        return FluxPipeline(scheduler, vae, clip, words, t5, pieces, net)

    return Recipe(16, {"text_encoder": clip, "text_encoder_2": t5, "transformer": net}, texts, loss, pipeline)


def sdxl(tokenizers: Tokenizers) -> Recipe:
    """SDXL: two CLIPs side by side, noise prediction, size and crop as conditions; an empty caption is zeros or ""."""
    words_l, words_g = tokenizers
    clip_l = models.clip(words_l, width=models.CLIP_L_WIDTH, layers=2, projected=False)
    clip_g = models.clip(words_g, width=models.CLIP_G_WIDTH, layers=2, projected=True)
    net = models.sdxl_unet()
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    signal = torch.Tensor(schedule.alphas_cumprod).to("cuda" if torch.cuda.is_available() else "cpu")

    def texts(ids: Ids) -> Texts:
        large = clip_g(ids[1], output_hidden_states=True)
        small = clip_l(ids[0], output_hidden_states=True)
        both = torch.cat([small.hidden_states[-2], large.hidden_states[-2]], dim=-1)
        return {"pooled": large.text_embeds, "tokens": both}

    def loss(latents_BCHW: torch.Tensor, texts: Texts) -> torch.Tensor:
        device = latents_BCHW.device
        batch, _, height, width = latents_BCHW.shape
        t = torch.randint(1000, (batch,), device=device)
        noise = torch.randn_like(latents_BCHW)
        alpha_bar = signal.gather(0, t)[:, None, None, None]
        conditioned = (torch.rand(batch, device=device) > 0.07).to(net.dtype)  # the others get zeros
        size = torch.full((1,), 8.0, device=device) * torch.cat(
            [torch.full((1,), float(side), device=device) for side in (height, width, 0, 0, height, width)]
        )
        predicted = net(
            (alpha_bar.sqrt() * latents_BCHW + (1 - alpha_bar).sqrt() * noise).to(net.dtype),
            t,
            encoder_hidden_states=texts["tokens"] * conditioned[:, None, None],
            added_cond_kwargs={
                "text_embeds": texts["pooled"] * conditioned[:, None],
                "time_ids": size.expand(batch, 6),
            },
        ).sample
        return F.mse_loss(predicted.float(), noise)

    def pipeline(vae: AutoencoderKL) -> DiffusionPipeline:
        scheduler = EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            timestep_spacing="leading",
        )
        return StableDiffusionXLPipeline(vae, clip_l, clip_g, words_l, words_g, net, scheduler, add_watermarker=False)

    return Recipe(4, {"text_encoder": clip_l, "text_encoder_2": clip_g, "unet": net}, texts, loss, pipeline)


def sd3(tokenizers: Tokenizers) -> Recipe:
    """Stable Diffusion 3: two projected CLIPs and T5 in one sequence, flow matching."""
    words_l, words_g, pieces = tokenizers
    clip_l = models.clip(words_l, width=models.CLIP_L_WIDTH, layers=2, projected=True)
    clip_g = models.clip(words_g, width=models.CLIP_G_WIDTH, layers=2, projected=True)
    t5 = models.t5(pieces)
    net = models.sd3_transformer()

    def texts(ids: Ids) -> Texts:
        small = clip_l(ids[0], output_hidden_states=True)
        large = clip_g(ids[1], output_hidden_states=True)
        both = torch.cat([small.hidden_states[-2], large.hidden_states[-2]], dim=-1)
        both = F.pad(both, (0, models.T5_WIDTH - both.shape[-1]))
        pooled = torch.cat([small.text_embeds, large.text_embeds], dim=-1)
        return {"pooled": pooled, "tokens": torch.cat([both, t5(ids[2])[0]], dim=1)}

    def loss(latents_BCHW: torch.Tensor, texts: Texts) -> torch.Tensor:
        t = flow_times(len(latents_BCHW), device=latents_BCHW.device)
        noise = torch.randn_like(latents_BCHW)
        predicted = net(
            hidden_states=torch.lerp(latents_BCHW, noise, t[:, None, None, None]).to(net.dtype),
            timestep=t * 1000,
            encoder_hidden_states=texts["tokens"],
            pooled_projections=texts["pooled"],
        ).sample
        return F.mse_loss(predicted.float(), noise - latents_BCHW)

    def pipeline(vae: AutoencoderKL) -> DiffusionPipeline:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return StableDiffusion3Pipeline(net, scheduler, vae, clip_l, words_l, clip_g, words_g, t5, pieces)

    modules = {"text_encoder": clip_l, "text_encoder_2": clip_g, "text_encoder_3": t5, "transformer": net}
    return Recipe(16, modules, texts, loss, pipeline)


def z_image(tokenizers: Tokenizers) -> Recipe:
    """Z-Image: Qwen3's hidden states of the caption as a message, flow matching with the time reversed.

    The family's own `predict`: diffusers' forward pass asks the host how long each caption is.
    """
    (words,) = tokenizers
    qwen = models.qwen3(words)
    net = models.z_image_transformer()

    def texts(ids: Ids) -> Texts:
        real_BL = ids[0] != words.pad_token_id
        read = qwen(input_ids=ids[0], attention_mask=earlier_words(real_BL), output_hidden_states=True)
        filled_B = (real_BL.sum(dim=1) + z_image_family.TEXT_MULTIPLE - 1) // z_image_family.TEXT_MULTIPLE
        places = torch.arange(QWEN_LENGTH, device=real_BL.device)
        padding_BL = places >= filled_B[:, None] * z_image_family.TEXT_MULTIPLE
        return {"tokens": read.hidden_states[-2], "real": real_BL, "padding": padding_BL}

    def loss(latents_BCHW: torch.Tensor, texts: Texts) -> torch.Tensor:
        t = flow_times(len(latents_BCHW), device=latents_BCHW.device)
        noise = torch.randn_like(latents_BCHW)
        noisy = torch.lerp(latents_BCHW, noise, t[:, None, None, None])
        predicted = z_image_family.predict(net, noisy, t, text=texts)
        return F.mse_loss(predicted.float(), noise - latents_BCHW)

    def pipeline(vae: AutoencoderKL) -> DiffusionPipeline:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
        return ZImagePipeline(scheduler, vae, qwen, words, net)

    return Recipe(16, {"text_encoder": qwen, "transformer": net}, texts, loss, pipeline)


def flux2(tokenizers: Tokenizers) -> Recipe:
    """FLUX.2 klein: three hidden states of Qwen3 side by side, flow matching without embedded guidance."""
    (words,) = tokenizers
    qwen = models.deep_qwen3(words, layers=flux2_family.QWEN3.states[-1] + 1)
    net = models.flux2_transformer()

    def texts(ids: Ids) -> Texts:
        attended = earlier_words(ids[0] != words.pad_token_id)
        states = qwen(input_ids=ids[0], attention_mask=attended, output_hidden_states=True)
        return {"tokens": torch.cat([states.hidden_states[number] for number in flux2_family.QWEN3.states], dim=-1)}

    def loss(latents_BCHW: torch.Tensor, texts: Texts) -> torch.Tensor:
        t = flow_times(len(latents_BCHW), device=latents_BCHW.device)
        noise = torch.randn_like(latents_BCHW)
        noisy = torch.lerp(latents_BCHW, noise, t[:, None, None, None])
        predicted = flux2_family.predict(net, noisy, t, text=texts, guidance=1.0)
        return F.mse_loss(predicted.float(), noise - latents_BCHW)

    def pipeline(vae: AutoencoderKL) -> DiffusionPipeline:
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        )
        return Flux2KleinPipeline(scheduler, models.flux2_vae(vae), qwen, words, net)

    return Recipe(16, {"text_encoder": qwen, "transformer": net}, texts, loss, pipeline, untrained=True)


def qwen_image(tokenizers: Tokenizers) -> Recipe:
    """Qwen-Image: the last hidden states of Qwen2.5-VL, flow matching."""
    (words,) = tokenizers
    qwen = qwen_parts.text_encoder(words)
    net = qwen_parts.transformer()
    attention = qwen_parts.MaskedAttention()
    net.set_attn_processor(attention)

    def texts(ids: Ids) -> Texts:
        real_BL = ids[0] != words.pad_token_id
        read = qwen(input_ids=ids[0], attention_mask=earlier_words(real_BL), output_hidden_states=True)
        dropped = qwen_image_family.DROPPED_TOKENS
        return {"tokens": read.hidden_states[-1][:, dropped:], "real": real_BL[:, dropped:]}

    def loss(latents_BCHW: torch.Tensor, texts: Texts) -> torch.Tensor:
        t = flow_times(len(latents_BCHW), device=latents_BCHW.device)
        noise = torch.randn_like(latents_BCHW)
        attention.real_BL = texts["real"]
        noisy = torch.lerp(latents_BCHW, noise, t[:, None, None, None])
        predicted = qwen_image_family.predict(net, noisy, t, text={"tokens": texts["tokens"]})
        return F.mse_loss(predicted.float(), noise - latents_BCHW)

    def pipeline(vae: Any) -> DiffusionPipeline:
        return qwen_parts.pipeline(vae, qwen, words, net)

    channels = qwen_parts.LATENT_CHANNELS
    return Recipe(channels, {"text_encoder": qwen, "transformer": net}, texts, loss, pipeline, of_videos=True)


def krea2(tokenizers: Tokenizers) -> Recipe:
    """Krea 2: twelve hidden states of Qwen3-VL for each token, flow matching."""
    (words,) = tokenizers
    qwen = krea_parts.text_encoder(words)
    net = krea_parts.transformer()

    def texts(ids: Ids) -> Texts:
        real_BL = ids[0] != words.pad_token_id
        attended = earlier_words(real_BL)
        read = qwen.language_model(input_ids=ids[0], attention_mask=attended, output_hidden_states=True)
        states = torch.stack([read.hidden_states[number] for number in krea2_family.TAPS], dim=2)
        dropped = qwen_image_family.DROPPED_TOKENS
        return {"tokens": states[:, dropped:], "padding": ~real_BL[:, dropped:]}

    def loss(latents_BCHW: torch.Tensor, texts: Texts) -> torch.Tensor:
        t = flow_times(len(latents_BCHW), device=latents_BCHW.device)
        noise = torch.randn_like(latents_BCHW)
        noisy = torch.lerp(latents_BCHW, noise, t[:, None, None, None])
        predicted = krea2_family.predict(net, noisy, t, text=texts)
        return F.mse_loss(predicted.float(), noise - latents_BCHW)

    def pipeline(vae: Any) -> DiffusionPipeline:
        return krea_parts.pipeline(vae, qwen, words, net)

    modules = {"text_encoder": qwen, "transformer": net}
    channels = qwen_parts.LATENT_CHANNELS
    return Recipe(channels, modules, texts, loss, pipeline, of_videos=True, untrained=True)


RECIPES: dict[str, Callable[[Tokenizers], Recipe]] = {
    "flux": flux,
    "sdxl": sdxl,
    "sd3": sd3,
    "z_image": z_image,
    "flux2": flux2,
    "qwen_image": qwen_image,
    "krea2": krea2,
}
