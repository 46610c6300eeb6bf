"""The miniatures as diffusers' own pipelines."""

from pathlib import Path

import torch
from diffusers import (
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    Krea2Pipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)

from trainer.spec.family import base_models, get_family

PIPELINES = {
    "flux": FluxPipeline,
    "flux2": Flux2KleinPipeline,
    "flux2_dev": Flux2Pipeline,
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "z_image": ZImagePipeline,
    "qwen_image": QwenImagePipeline,
    "krea2": Krea2Pipeline,
}
FAMILIES = ("flux", "sdxl", "sd3")  # those with CLIP


def base(name):
    """The value of BASE_MODEL of a miniature. `name`: of its family, or with what the base model has of its own."""
    return f"mini-{name.replace('_', '-')}"


def family_of(name):
    return get_family(base_models()[base(name)][0])


def folder(name):
    return Path(base_models()[base(name)][1].source)


def pipeline(name):
    return PIPELINES[name].from_pretrained(folder(name), dtype=torch.float32)


def encoded(name, pipe, captions):
    """What diffusers' pipeline makes of captions, as Kiln's families name it."""
    captions = list(captions)
    if name == "flux":
        tokens, pooled, _ = pipe.encode_prompt(
            captions, captions, device="cpu", max_sequence_length=pipe.tokenizer_2.model_max_length
        )
    elif name in ("flux2", "flux2_dev"):
        texts, _ = pipe.encode_prompt(captions, device="cpu", max_sequence_length=pipe.tokenizer.model_max_length)
        return {"tokens": texts}
    elif name == "qwen_image":
        tokens_BLD, mask_BL = pipe.encode_prompt(captions, device="cpu")
        if mask_BL is None:
            mask_BL = torch.ones(tokens_BLD.shape[:2])
        return {"tokens": [tokens[mask.bool()] for tokens, mask in zip(tokens_BLD, mask_BL, strict=True)]}
    elif name == "krea2":
        tokens_BLSD, mask_BL = pipe.encode_prompt(captions, device="cpu")
        return {"tokens": [tokens[mask] for tokens, mask in zip(tokens_BLSD, mask_BL, strict=True)]}
    elif name == "z_image":
        texts, _ = pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
        return {"tokens": texts}
    elif name == "sdxl":
        tokens, _, pooled, _ = pipe.encode_prompt(captions, captions, device="cpu", do_classifier_free_guidance=False)
    else:
        tokens, _, pooled, _ = pipe.encode_prompt(
            captions, captions, captions, device="cpu", do_classifier_free_guidance=False,
            max_sequence_length=pipe.tokenizer_3.model_max_length,
        )  # fmt: skip
    return {"tokens": tokens, "pooled": pooled}


def random_text(name, denoiser, length, *, generator=None):
    """The embeddings of one made-up caption of `length` tokens, as the family's `predict` takes them."""
    config = denoiser.config
    if name == "qwen_image":
        return {"tokens": torch.randn(1, length, config.joint_attention_dim, generator=generator)}
    if name == "krea2":
        return {"tokens": torch.randn(1, length, config.num_text_layers, config.text_hidden_dim, generator=generator)}
    if name == "z_image":
        filled = -(-length // 32) * 32
        tokens = torch.randn(1, filled, config.cap_feat_dim, generator=generator)
        return {"tokens": tokens, "real": torch.arange(filled)[None] < length}
    if name in ("flux2", "flux2_dev"):
        return {"tokens": torch.randn(1, length, config.joint_attention_dim, generator=generator)}
    if name == "sdxl":
        wide = config.cross_attention_dim
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    else:
        wide, pooled = config.joint_attention_dim, config.pooled_projection_dim
    tokens = torch.randn(1, length, wide, generator=generator)
    return {"tokens": tokens, "pooled": torch.randn(1, pooled, generator=generator)}
