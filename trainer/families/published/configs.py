"""What the configs of the parts that families share may say (`trainer.spec.rules.config_rules`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.spec.rules.config_rules import (
    ACTIVATION,
    EPSILON,
    FALSE,
    FLAG,
    GROUPS,
    HEADS,
    LAYERS,
    NOTHING,
    SHARE,
    WIDTH,
    ConfigKind,
    Rule,
    Rules,
    each,
    number,
    only,
    optional,
    text,
    whole,
)

# ---- text encoders

_TOKEN = optional(whole(0, 10**6))
_CLIP_TEXT: Rules = {
    "vocab_size": whole(1, 10**6),
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "projection_dim": optional(WIDTH),
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": whole(3, 8192),
    "hidden_act": only("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"),
    "layer_norm_eps": EPSILON,
    "attention_dropout": SHARE,
    "initializer_range": number(0, 10),
    "initializer_factor": number(0, 10),
    "pad_token_id": _TOKEN,
    "bos_token_id": _TOKEN,
    "eos_token_id": _TOKEN,
}
_T5: Rules = {
    "vocab_size": whole(1, 10**6),
    "d_model": WIDTH,
    "d_kv": whole(1, 1024),
    "d_ff": WIDTH,
    "num_layers": LAYERS,
    "num_decoder_layers": optional(whole(0, 200)),
    "num_heads": HEADS,
    "relative_attention_num_buckets": whole(4, 1024),
    "relative_attention_max_distance": whole(4, 10**5),
    "dropout_rate": SHARE,
    "layer_norm_epsilon": EPSILON,
    "initializer_factor": number(0, 10),
    "feed_forward_proj": only("gated-gelu", "relu", "gelu", "gated-silu"),
    "is_encoder_decoder": FLAG,
    "use_cache": FLAG,
    "tie_word_embeddings": FLAG,
    "pad_token_id": _TOKEN,
    "eos_token_id": _TOKEN,
    "classifier_dropout": SHARE,
    "is_decoder": FALSE,
}
_ROPE_BASE = number(1, 1e12)


def _is_plain_rope(value: Any) -> bool:
    """Rotary position embeddings that are not stretched, as transformers 5 writes them."""
    if not isinstance(value, dict) or not value.keys() <= {"rope_theta", "rope_type"}:
        return False
    return value.get("rope_type", "default") == "default" and _ROPE_BASE.fits(value.get("rope_theta"))


def _is_image_rope(value: Any) -> bool:
    """Those of a language model that also reads images: a text token has the same place in time, height and width."""
    keys = {"rope_theta", "rope_type", "type", "mrope_section", "mrope_interleaved"}
    if not isinstance(value, dict) or not value.keys() <= keys:
        return False
    if any(value.get(key, "default") not in ("default", "mrope") for key in ("rope_type", "type")):
        return False
    if not _ROPE_BASE.fits(value.get("rope_theta", 1)) or not FLAG.fits(value.get("mrope_interleaved", False)):
        return False
    return each(whole(1, 1024), 3, 3).fits(value.get("mrope_section"))


_LANGUAGE_MODEL: Rules = {
    "vocab_size": whole(1, 10**6),
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": whole(2, 200),
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "hidden_act": only("silu"),
    "max_position_embeddings": whole(512, 10**7),
    "rms_norm_eps": EPSILON,
    "rope_theta": _ROPE_BASE,
    "attention_dropout": only(0, 0.0),
    "use_sliding_window": FALSE,
    "sliding_window": optional(whole(1, 10**7)),
    "max_window_layers": whole(0, 200),
    "layer_types": optional(each(only("full_attention"), 2, 200)),
    "initializer_range": number(0, 10),
    "use_cache": FLAG,
    "pad_token_id": _TOKEN,
    "bos_token_id": _TOKEN,
    "eos_token_id": _TOKEN,
}
_QWEN3: Rules = {
    **_LANGUAGE_MODEL,
    "head_dim": whole(2, 1024),
    "rope_scaling": NOTHING,
    "rope_parameters": Rule('{"rope_type": "default", "rope_theta": a number from 1 to 1e12}', _is_plain_rope),
    "attention_bias": FLAG,
    "tie_word_embeddings": FLAG,
}
_MISTRAL: Rules = {**_QWEN3, "sliding_window": NOTHING}
_IMAGE_ROPE = Rule('{"rope_type": "default", "mrope_section": three whole numbers, …}', _is_image_rope)
_QWEN2_5_VL: Rules = {**_LANGUAGE_MODEL, "rope_scaling": _IMAGE_ROPE, "rope_parameters": _IMAGE_ROPE}
_QWEN3_VL: Rules = {**_QWEN3, "rope_scaling": _IMAGE_ROPE, "rope_parameters": _IMAGE_ROPE}


def _clip_differing(config: Mapping[str, Any]) -> str | None:
    if config["hidden_size"] % config["num_attention_heads"]:
        return "hidden_size is not a multiple of num_attention_heads"
    return None


def _t5_differing(config: Mapping[str, Any]) -> str | None:
    buckets = config.get("relative_attention_num_buckets", 32)
    if config.get("relative_attention_max_distance", 128) <= buckets // 4:
        return "relative_attention_max_distance is not larger than a quarter of relative_attention_num_buckets"
    return None


def _qwen3_differing(config: Mapping[str, Any]) -> str | None:
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        return "num_attention_heads is not a multiple of num_key_value_heads"
    if "rope_parameters" not in config and "rope_theta" not in config:
        return "it has neither rope_theta nor rope_parameters"
    layers = config.get("layer_types")
    if layers is not None and len(layers) != config["num_hidden_layers"]:
        return "layer_types has not num_hidden_layers entries"
    return None


def _qwen2_5_vl_differing(config: Mapping[str, Any]) -> str | None:
    heads = config["num_attention_heads"]
    if config["hidden_size"] % heads:
        return "hidden_size is not a multiple of num_attention_heads"
    return _qwen_vl_differing(config, config["hidden_size"] // heads, "hidden_size / num_attention_heads")


def _qwen3_vl_differing(config: Mapping[str, Any]) -> str | None:
    return _qwen_vl_differing(config, config["head_dim"], "head_dim")


def _qwen_vl_differing(config: Mapping[str, Any], head_width: int, width_name: str) -> str | None:
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        return "num_attention_heads is not a multiple of num_key_value_heads"
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if rope is None:
        return "it has neither rope_scaling nor rope_parameters"
    if 2 * sum(rope["mrope_section"]) != head_width:
        return f"the sum of mrope_section is not half of {width_name}"
    layers = config.get("layer_types")
    if layers is not None and len(layers) != config["num_hidden_layers"]:
        return "layer_types has not num_hidden_layers entries"
    return None


def clip(*names: str) -> ConfigKind:
    """A CLIP text encoder, with its projection or without."""
    return ConfigKind(
        *("transformers", names, _CLIP_TEXT),
        required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        model_type="clip_text_model",
        saved_as=("CLIPModel",),
        differing=_clip_differing,
    )


T5_ENCODER = ConfigKind(
    *("transformers", ("T5EncoderModel",), _T5),
    required=("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj"),
    model_type="t5",
    saved_as=("T5Model", "T5ForConditionalGeneration"),
    differing=_t5_differing,
)
# The language model without its output layer, which would only repeat the embeddings.
QWEN3 = ConfigKind(
    *("transformers", ("Qwen3Model",), _QWEN3),
    required=(
        *("vocab_size", "hidden_size", "intermediate_size", "head_dim"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    ),
    model_type="qwen3",
    saved_as=("Qwen3ForCausalLM",),
    differing=_qwen3_differing,
)

# The language model of one that also reads images: captions are all that it gets here.
QWEN2_5_VL = ConfigKind(
    *("transformers", ("Qwen2_5_VLTextModel", "Qwen2_5_VLForConditionalGeneration"), _QWEN2_5_VL),
    required=(
        *("vocab_size", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    ),
    model_type="qwen2_5_vl_text",
    whole_type="qwen2_5_vl",
    saved_as=("Qwen2_5_VLModel",),
    differing=_qwen2_5_vl_differing,
)

# Its successor, likewise.
QWEN3_VL = ConfigKind(
    *("transformers", ("Qwen3VLTextModel", "Qwen3VLModel", "Qwen3VLForConditionalGeneration"), _QWEN3_VL),
    required=QWEN3.required,
    model_type="qwen3_vl_text",
    whole_type="qwen3_vl",
    differing=_qwen3_vl_differing,
)

# FLUX.2-dev's language model: of a Mistral Small, which reads images too.
MISTRAL3 = ConfigKind(
    *("transformers", ("MistralModel", "Mistral3ForConditionalGeneration"), _MISTRAL),
    required=QWEN3.required,
    model_type="mistral",
    whole_type="mistral3",
    saved_as=("Mistral3Model",),
    differing=_qwen3_differing,
)

# ---- tokenizers, whose files `trainer.base_model.tokenizer_files` checks

CLIP_TOKENIZER = ConfigKind("transformers", ("CLIPTokenizer", "CLIPTokenizerFast"), {})
T5_TOKENIZER = ConfigKind("transformers", ("T5Tokenizer", "T5TokenizerFast"), {})
QWEN_TOKENIZER = ConfigKind("transformers", ("Qwen2Tokenizer", "Qwen2TokenizerFast"), {})
# Tekken, Mistral's byte pair encoding, has no class of its own: transformers takes all of it from tokenizer.json.
# Models name the processor, which reads images as well.
TEKKEN_TOKENIZER = ConfigKind("transformers", ("PreTrainedTokenizerFast", "PixtralProcessor"), {})

# ---- VAE

_LEVELS = 4  # which shrink an image's sides by 8, as the families expect
VAE = ConfigKind(
    *("diffusers", ("AutoencoderKL",)),
    rules={
        "in_channels": only(3),
        "out_channels": only(3),
        "down_block_types": each(only("DownEncoderBlock2D"), _LEVELS, _LEVELS),
        "up_block_types": each(only("UpDecoderBlock2D"), _LEVELS, _LEVELS),
        "block_out_channels": each(WIDTH, _LEVELS, _LEVELS),
        "layers_per_block": whole(1, 16),
        "act_fn": ACTIVATION,
        "latent_channels": whole(1, 256),
        "norm_num_groups": GROUPS,
        "sample_size": whole(1, 16384),
        "scaling_factor": number(1e-6, 1e6),
        "shift_factor": optional(number(-1e6, 1e6)),
        "latents_mean": optional(each(number(-1e6, 1e6), 0, 256)),
        "latents_std": optional(each(number(-1e6, 1e6), 0, 256)),
        "force_upcast": optional(FLAG),
        "use_quant_conv": FLAG,
        "use_post_quant_conv": FLAG,
        "mid_block_add_attention": FLAG,
    },
    required=("block_out_channels", "down_block_types", "up_block_types", "latent_channels"),
)


def _qwen_vae_differing(config: Mapping[str, Any]) -> str | None:
    for key in ("latents_mean", "latents_std"):
        if len(config[key]) != config["z_dim"]:
            return f"{key} has not z_dim entries"
    return None


# Of Qwen-Image and others: a VAE of videos, which sees an image as one frame.
QWEN_VAE = ConfigKind(
    *("diffusers", ("AutoencoderKLQwenImage",)),
    rules={
        "base_dim": whole(1, 4096),
        "z_dim": whole(1, 256),
        "dim_mult": each(whole(1, 64), _LEVELS, _LEVELS),
        "num_res_blocks": whole(1, 16),
        "attn_scales": each(number(0, 1024), 0, 0),
        "temperal_downsample": each(FLAG, _LEVELS - 1, _LEVELS - 1),
        "dropout": only(0, 0.0),
        "input_channels": only(3),
        "latents_mean": each(number(-1e6, 1e6), 1, 256),
        "latents_std": each(number(1e-6, 1e6), 1, 256),
    },
    required=("base_dim", "z_dim", "latents_mean", "latents_std"),
    differing=_qwen_vae_differing,
)

# ---- schedulers, of whichever class: those that train and sample here take what they know

_SIGMA = optional(number(0, 10**6))
_SCHEDULER: Rules = {
    "num_train_timesteps": only(1000),  # timesteps are times in [0, 1], times this
    "beta_start": number(1e-8, 0.99),
    "beta_end": number(1e-8, 0.99),
    "beta_schedule": only("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": optional(each(number(1e-8, 0.999), 1000, 1000)),
    "prediction_type": only("epsilon", "v_prediction", "sample"),
    "interpolation_type": only("linear", "log_linear"),
    "use_karras_sigmas": optional(FLAG),
    "use_exponential_sigmas": optional(FLAG),
    "use_beta_sigmas": only(None, False),  # scipy, which Kiln lacks, would compute them
    "sigma_min": _SIGMA,
    "sigma_max": _SIGMA,
    "timestep_spacing": only("linspace", "leading", "trailing"),
    "timestep_type": only("discrete", "continuous"),
    "steps_offset": whole(0, 1000),
    "rescale_betas_zero_snr": FLAG,
    "final_sigmas_type": only("zero", "sigma_min"),
    "variance_type": optional(text(40)),
    "clip_sample": FLAG,
    "thresholding": FLAG,
    "dynamic_thresholding_ratio": SHARE,
    "clip_sample_range": number(0, 1e6),
    "sample_max_value": number(0, 1e6),
    "shift": number(1e-3, 1e3),
    "use_dynamic_shifting": FLAG,
    "base_shift": number(-100, 100),
    "max_shift": number(-100, 100),
    "base_image_seq_len": whole(1, 10**6),
    "max_image_seq_len": whole(1, 10**6),
    "invert_sigmas": FALSE,
    "shift_terminal": optional(number(1e-6, 1)),
    "time_shift_type": only("exponential", "linear"),
    "stochastic_sampling": FLAG,
}


def _schedule_differing(config: Mapping[str, Any]) -> str | None:
    if config.get("use_karras_sigmas") and config.get("use_exponential_sigmas"):
        return "use_karras_sigmas and use_exponential_sigmas are both true"
    if config.get("base_image_seq_len", 256) >= config.get("max_image_seq_len", 4096):
        return "base_image_seq_len is not smaller than max_image_seq_len"
    if config.get("beta_start", 0) > config.get("beta_end", 1):
        return "beta_start is larger than beta_end"
    return None


FLOW_SCHEDULER = ConfigKind(
    *("diffusers", ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"), _SCHEDULER),
    differing=_schedule_differing,
)
DENOISING_SCHEDULER = ConfigKind(
    "diffusers",
    (
        *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler", "DDIMScheduler"),
        *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "PNDMScheduler"),
        *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
        *("UniPCMultistepScheduler", "DEISMultistepScheduler", "LCMScheduler", "TCDScheduler", "SASolverScheduler"),
    ),
    _SCHEDULER,
    differing=_schedule_differing,
)
