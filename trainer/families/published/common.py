"""Text encoders, VAEs, tokenizers and warnings that several families share."""

from __future__ import annotations

from typing import Any

from trainer.spec.family import Config, Tokenizer

# ---- names of files that are no base models, for `Facts.name_cautions`

DISTILLED = "distilled to few steps, which training on its weights undoes"
EDITS = "a model that edits images, for which LoRAs train with pairs of images"
FEW_STEPS = r"(?<!\d)\d{1,2}[-_. ]?steps?(?![a-z])"  # 8steps, 4-step; not 3000steps, which somebody trained for
TURBO = r"^(?!.*de[-_. ]?(turbo|distill)).*turbo"  # not what is made of Turbo by undoing the distillation
EDIT = r"(?<![a-z])(qwen|image)*edit(?![a-z])"  # not credits, edition

# ---- text encoders

# Each of them counts 2 as the end of text, as their first configs did: transformers then takes the token with the
# highest number for it, which is 49407, the real end.
_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
CLIP_L: Config = {
    **_CLIP,
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_L_PROJECTED: Config = {**CLIP_L, "architectures": ["CLIPTextModelWithProjection"]}
CLIP_G: Config = {
    **_CLIP,
    "architectures": ["CLIPTextModelWithProjection"],
    "model_type": "clip_text_model",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL: Config = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
QWEN3_4B: Config = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 36,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
QWEN3_8B: Config = {**QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}

# The language model of it: what reads images is neither needed nor loaded.
QWEN2_5_VL_7B: Config = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

# Qwen3-VL-4B's language model, likewise alone: Qwen3-4B's sizes, and a place in time, height and width for each token.
QWEN3_VL_4B: Config = {
    **QWEN3_4B,
    "architectures": ["Qwen3VLTextModel"],
    "model_type": "qwen3_vl_text",
    "max_position_embeddings": 262144,
    "rope_theta": 5000000,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
}

# FLUX.2-dev's language model (Mistral Small's sizes) without its last ten layers, which FLUX.2 does not read and
# ComfyUI's file lacks.
MISTRAL_SMALL: Config = {
    "architectures": ["MistralModel"],
    "model_type": "mistral",
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000000.0,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def caption_gib(encoder: Config, *, tokens: int, states: int = 0) -> float:
    """GiB in 16 bits that a language model works with for a caption of so many tokens, as an upper bound.

    `states`: hidden states that are kept to the end, with those that are put side by side. A layer works with some six
    more of them (its input, normalised in fp32; queries, keys and values), and with three tensors of its MLP: the gate,
    the other product, and the product of both.
    """
    numbers = (states + 6) * encoder["hidden_size"] + 3 * encoder["intermediate_size"]
    return float(tokens * numbers * 2 / 2**30)


# ---- VAE


def vae(*, latent_channels: int, scaling_factor: float, shift_factor: float | None, quant_conv: bool) -> Config:
    """An AutoencoderKL of four levels, which shrinks an image's sides by 8."""
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "in_channels": 3,
        "out_channels": 3,
        "sample_size": 1024,
        "force_upcast": True,
        "latent_channels": latent_channels,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "use_quant_conv": quant_conv,
        "use_post_quant_conv": quant_conv,
    }


# The mean and the deviation of each of its latents' channels, with which denoisers' latents are normalised, are the
# defaults of diffusers' class.
QWEN_VAE: Config = {
    "_class_name": "AutoencoderKLQwenImage",
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ],
}

# ---- tokenizers


def clip_tokenizer(pad_token: str) -> Tokenizer:
    """CLIP's; all models have the same vocabulary, but not the same padding."""
    return Tokenizer(
        name="CLIP",
        repository="openai/clip-vit-large-patch14",
        files=("vocab.json", "merges.txt"),
        config={
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": pad_token,
        },
    )


CLIP_L_TOKENIZER = clip_tokenizer("<|endoftext|>")
CLIP_G_TOKENIZER = clip_tokenizer("!")  # which is number 0
# T5 v1.1 has the vocabulary of T5, but its own repositories lack tokenizer.json.
T5_TOKENIZER = Tokenizer(
    name="T5",
    repository="google-t5/t5-large",
    files=("tokenizer.json",),
    config={
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "extra_ids": 100,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    },
)
# The special tokens are in tokenizer.json.
QWEN3_TOKENIZER = Tokenizer(
    name="Qwen3",
    repository="Qwen/Qwen3-4B",
    files=("tokenizer.json",),
    config={
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 131072,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    },
)
QWEN2_5_VL_TOKENIZER = Tokenizer(
    name="Qwen2.5-VL",
    repository="Qwen/Qwen2.5-VL-7B-Instruct",
    files=("tokenizer.json",),
    config=QWEN3_TOKENIZER.config,
)

QWEN3_VL_TOKENIZER = Tokenizer(
    name="Qwen3-VL",
    repository="Qwen/Qwen3-VL-4B-Instruct",
    files=("tokenizer.json",),
    config={**QWEN3_TOKENIZER.config, "model_max_length": 262144},
)

# The special tokens are in tokenizer.json. Nothing limits its length.
TEKKEN_TOKENIZER = Tokenizer(
    name="Mistral Small 3.1",
    repository="unsloth/Mistral-Small-3.1-24B-Instruct-2503",
    files=("tokenizer.json",),
    config={
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 131072,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    },
)


def index(pipeline: str, components: dict[str, str]) -> Config:
    """model_index.json. `components`: name → class; the text encoders and tokenizers are transformers' classes."""
    listed: dict[str, Any] = {"_class_name": pipeline}
    for name, class_name in components.items():
        library = "transformers" if name.startswith(("text_encoder", "tokenizer")) else "diffusers"
        listed[name] = [library, class_name]
    return listed
