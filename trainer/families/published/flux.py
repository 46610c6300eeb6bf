"""Flux.1 dev, Krea and schnell: schnell has no embedded guidance, and its schedule no shift."""

from __future__ import annotations

from trainer.families.published import common
from trainer.spec.family import Lookalike, Published


def _flux(*, guidance: bool) -> Published:
    schedule = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    return Published(
        configs={
            "model_index.json": common.index(
                "FluxPipeline",
                {
                    "scheduler": "FlowMatchEulerDiscreteScheduler",
                    "transformer": "FluxTransformer2DModel",
                    "vae": "AutoencoderKL",
                    "text_encoder": "CLIPTextModel",
                    "text_encoder_2": "T5EncoderModel",
                    "tokenizer": "CLIPTokenizer",
                    "tokenizer_2": "T5Tokenizer",
                },
            ),
            "scheduler/scheduler_config.json": {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "num_train_timesteps": 1000,
                "base_shift": 0.5,
                "max_shift": 1.15,
                "base_image_seq_len": 256,
                "max_image_seq_len": 4096,
                **schedule,
            },
            "transformer/config.json": {
                "_class_name": "FluxTransformer2DModel",
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "axes_dims_rope": [16, 56, 56],
                "guidance_embeds": guidance,
            },
            "vae/config.json": common.vae(
                latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant_conv=False
            ),
            "text_encoder/config.json": common.CLIP_L,
            "text_encoder_2/config.json": common.T5_XXL,
        },
        tokenizers={"tokenizer": common.CLIP_L_TOKENIZER, "tokenizer_2": common.T5_TOKENIZER},
        marks={
            "img_in.weight": (3072, 64),
            "guidance_in.in_layer.weight": (3072, 256) if guidance else None,
            "double_blocks.18.img_attn.qkv.weight": (9216, 3072),
            "single_blocks.37.linear2.weight": (3072, 15360),
        },
    )


DEV = _flux(guidance=True)  # and Krea
SCHNELL = _flux(guidance=False)

LOOKALIKES = (
    Lookalike("Flux.1 Fill, which paints into images", "img_in.weight", (3072, 384)),
    Lookalike("Flux.1 Fill, which paints into images", "x_embedder.weight", (3072, 384)),
    Lookalike("Flux.1 Canny or Depth, which an image controls", "img_in.weight", (3072, 128)),
    Lookalike("Flux.1 Canny or Depth, which an image controls", "x_embedder.weight", (3072, 128)),
    Lookalike("Chroma", "distilled_guidance_layer.in_proj.weight"),
    Lookalike("Flux.2", "double_stream_modulation_img.lin.weight"),
    Lookalike("Flux.2", "double_stream_modulation_img.linear.weight"),
)
