"""Stable Diffusion XL base 1.0."""

from __future__ import annotations

from trainer.families.published import common
from trainer.spec.family import Lookalike, Published

BASE = Published(
    configs={
        "model_index.json": {
            **common.index(
                "StableDiffusionXLPipeline",
                {
                    "scheduler": "EulerDiscreteScheduler",
                    "unet": "UNet2DConditionModel",
                    "vae": "AutoencoderKL",
                    "text_encoder": "CLIPTextModel",
                    "text_encoder_2": "CLIPTextModelWithProjection",
                    "tokenizer": "CLIPTokenizer",
                    "tokenizer_2": "CLIPTokenizer",
                },
            ),
            "force_zeros_for_empty_prompt": True,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "EulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
            "interpolation_type": "linear",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "use_karras_sigmas": False,
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],  # numbers of heads, in spite of the name
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae/config.json": common.vae(latent_channels=4, scaling_factor=0.13025, shift_factor=None, quant_conv=True),
        "text_encoder/config.json": common.CLIP_L,
        "text_encoder_2/config.json": common.CLIP_G,
    },
    tokenizers={"tokenizer": common.CLIP_L_TOKENIZER, "tokenizer_2": common.CLIP_G_TOKENIZER},
    marks={
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "label_emb.0.0.weight": (1280, 2816),
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    },
)

_FIRST_ATTENTION = (
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
)
_FIRST_CONVOLUTION = ("input_blocks.0.0.weight", "conv_in.weight")
# The first of several that fit counts.
LOOKALIKES = (
    *(Lookalike("Stable Diffusion 1.x", name, (320, 768)) for name in _FIRST_ATTENTION),
    *(Lookalike("Stable Diffusion 2.x", name, (320, 1024)) for name in _FIRST_ATTENTION),
    *(Lookalike("the refiner of Stable Diffusion XL", name, (384, 4, 3, 3)) for name in _FIRST_CONVOLUTION),
    *(Lookalike("a model that paints into images", name, (None, 9, 3, 3)) for name in _FIRST_CONVOLUTION),
    *(Lookalike("a model that edits images", name, (None, 8, 3, 3)) for name in _FIRST_CONVOLUTION),
    Lookalike("Kolors", "encoder_hid_proj.weight"),
)
