"""The miniature of Qwen-Image: its modules and its recipe. Shapes: B images, C channels, H and W, L tokens, D features.

Its autoencoder is one of videos. `OneFrame` gives it the interface of one of images. It learns the latents of an
autoencoder of images that is there already (`Taught`).
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from trainer.families.miniatures.fit import difference

LATENT_CHANNELS = 16
WIDTH = 64


class OneFrame(nn.Module):
    """An autoencoder of videos as one of images. Its latents are already normalised."""

    usual: torch.Tensor  # mean and deviation of the latents' channels, (2, C, 1, 1)

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        super().__init__()
        self.vae = vae
        for module in vae.modules():
            if isinstance(module, QwenImageCausalConv3d) and module.kernel_size[1] == module.kernel_size[2]:
                module.forward = _of_one_frame(module)
        self.config = SimpleNamespace(shift_factor=None, scaling_factor=1.0)
        numbers = torch.tensor([vae.config.latents_mean, vae.config.latents_std])[..., None, None]
        self.register_buffer("usual", numbers, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    def encode(self, pixels_BCHW: torch.Tensor) -> SimpleNamespace:
        moments_BCHW = self.vae.encode(pixels_BCHW.unsqueeze(2)).latent_dist.parameters.squeeze(2)
        mean_C11, std_C11 = self.usual.to(moments_BCHW.dtype)
        mean_BCHW, log_variance_BCHW = moments_BCHW.chunk(2, dim=1)
        scaled = [(mean_BCHW - mean_C11) / std_C11, log_variance_BCHW - 2 * std_C11.log()]
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(torch.cat(scaled, dim=1)))

    def decode(self, latents_BCHW: torch.Tensor) -> SimpleNamespace:
        mean_C11, std_C11 = self.usual.to(latents_BCHW.dtype)
        frames = self.vae.decode((latents_BCHW * std_C11 + mean_C11).unsqueeze(2)).sample
        return SimpleNamespace(sample=frames.squeeze(2))


class Taught(nn.Module):
    """What the autoencoder of videos is to encode images to: another one's latents, with each channel normalised.

    So its families can be trained while it learns to encode to these latents and to decode them.
    """

    usual: torch.Tensor  # mean and deviation of the latents' channels, (2, C, 1, 1)

    def __init__(self, teacher: AutoencoderKL, vae: AutoencoderKLQwenImage) -> None:
        super().__init__()
        self.teacher = teacher
        self.config = SimpleNamespace(shift_factor=None, scaling_factor=1.0)
        numbers = torch.tensor([vae.config.latents_mean, vae.config.latents_std])[..., None, None]
        self.register_buffer("usual", numbers, persistent=False)

    def encode(self, pixels_BCHW: torch.Tensor) -> SimpleNamespace:
        known = self.teacher.encode(pixels_BCHW).latent_dist
        mean_C11, std_C11 = self.usual
        scaled = [(known.mean - mean_C11) / std_C11, known.logvar - 2 * std_C11.log()]
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(torch.cat(scaled, dim=1)))


def taught_loss(student: OneFrame, teacher: Taught) -> Callable[[torch.Tensor], torch.Tensor]:
    """How badly the student encodes images to the teacher's latents, and decodes these."""

    def loss(x_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            known = teacher.encode(x_BCHW).latent_dist
            latents_BCHW = known.sample()
        own = student.encode(x_BCHW.to(student.dtype)).latent_dist
        y_BCHW = student.decode(latents_BCHW.to(student.dtype)).sample.float()
        apart = F.mse_loss(own.mean.float(), known.mean) + F.mse_loss(own.logvar.float(), known.logvar) / 100
        return difference(y_BCHW, x_BCHW) + apart

    return loss


def new_vae(teacher: AutoencoderKL, pixels_BCHW: torch.Tensor) -> AutoencoderKLQwenImage:
    """Four levels as the published one, with one residual block each, that will have the teacher's latents.

    Its config has the mean and the deviation of each channel of the latents of these images.
    """
    with torch.no_grad():
        latents_BCHW = teacher.encode(pixels_BCHW).latent_dist.mean
    mean_C, std_C = latents_BCHW.mean(dim=(0, 2, 3)), latents_BCHW.std(dim=(0, 2, 3))
    vae = AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        latents_mean=[round(value, 4) for value in mean_C.tolist()],
        latents_std=[round(value, 4) for value in std_C.tolist()],
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, QwenImageCausalConv3d):
                module.weight *= module.kernel_size[0] ** 0.5  # of its taps in time, one frame meets only the last
    return vae


def _of_one_frame(convolution: QwenImageCausalConv3d) -> Callable[..., torch.Tensor]:
    """The forward pass of `convolution` over (B, C, 1, H, W): a third of the work, as the frames before are zeros."""
    _, height, width = convolution.kernel_size
    _, *stride = convolution.stride
    assert (height, width) in ((1, 1), (3, 3))

    def forward(frames_BC1HW: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        assert cache_x is None
        assert frames_BC1HW.shape[2] == 1
        image = frames_BC1HW.squeeze(2)
        weight = convolution.weight[:, :, -1]
        return F.conv2d(image, weight, convolution.bias, stride, padding=height // 2).unsqueeze(2)

    return forward


def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Three layers with grouped queries, and as good as nothing that reads images."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    images: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 1,
        "out_hidden_size": WIDTH,
    }
    images |= {"patch_size": 2, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=images, tie_word_embeddings=True)
    return Qwen2_5_VLForConditionalGeneration(config)


def transformer() -> QwenImageTransformer2DModel:
    """Four blocks, 128 wide."""
    model = QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith("_mod.1") or name in ("norm_out.linear", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


class MaskedAttention(QwenDoubleStreamAttnProcessor2_0):
    """The model's own attention, to the tokens of text in `real_BL` alone.

    The model's argument for them also has it count them, by a number that it copies from the host.
    """

    real_BL: torch.Tensor | None = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        encoder_hidden_states_mask: None = None,  # noqa: ARG002 (`real_BL` instead)
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs: tuple[torch.Tensor, torch.Tensor] = super().__call__(
            attn,
            hidden_states,
            encoder_hidden_states,
            encoder_hidden_states_mask=self.real_BL,
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        return outputs


def pipeline(
    vae: OneFrame, qwen: nn.Module, words: PreTrainedTokenizerBase, net: QwenImageTransformer2DModel
) -> DiffusionPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return QwenImagePipeline(scheduler, vae.vae, qwen, words, net)
