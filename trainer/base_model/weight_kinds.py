"""What a file of weights is, told by the names and shapes in its header: a model, a part of one, a LoRA, another model.

Files of a kind that cannot be used are refused by what they are, before anything is fetched, with what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from trainer.spec.family import PREFIXES, Facts, Lookalike, Published, base_models, family_names, get_family
from trainer.storage.safetensors_header import Entry, Header

Entries = Mapping[str, Entry]
# Text encoders that one variable names: a base model has one at most.
LANGUAGE_MODELS = ("qwen3", "qwen2_5_vl", "qwen3_vl", "mistral3")
VARIABLES = {"denoiser": "MODEL_PATH", "vae": "VAE_PATH", "clip_l": "CLIP_L_PATH", "clip_g": "CLIP_G_PATH"}
VARIABLES |= {"t5": "T5_PATH"} | dict.fromkeys(LANGUAGE_MODELS, "TEXT_ENCODER_PATH")
PART_NAMES = {"denoiser": "the denoiser", "vae": "a VAE", "clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}
PART_NAMES |= {"qwen3": "Qwen3", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
CLIPS = ("clip_l", "clip_g")
LARGE_LAYER = 2**16  # weights; a smaller tensor of integers may be a mark or a table of positions
SCALES = (".scale_weight", ".weight_scale")  # of a layer in FP8
INTEGERS = ("I8", "U8", "I32", "I4", "U4", "F4")

# ---- quantisation

# An ending of tensors' names that only quantised files have → who quantised it. The first that fits counts.
QUANTISED = {
    ".wscales": "nunchaku (SVDQuant)",
    ".smooth_factor": "nunchaku (SVDQuant)",
    ".smooth_factor_orig": "nunchaku (SVDQuant)",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes (nf4)",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes (fp4)",
    ".SCB": "bitsandbytes (int8)",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".qzeros": "GPTQ or AWQ",
    ".qweight": "GPTQ, AWQ or SVDQuant",
    ".weight._data": "quanto",
    ".weight_qdata": "torchao",
    "._weight_qdata": "torchao",
    ":_data": "torchao",
    ".weight_scale_2": "nvfp4",
    ".weight_zero_point": "compressed-tensors",
}


def quantised(entries: Entries) -> str | None:
    """Who quantised the weights, in a way that is not read; None if they can be read (FP8 with one scale can)."""
    for ending, tool in QUANTISED.items():
        if any(name.endswith(ending) for name in entries):
            return tool
    for name, entry in entries.items():
        if entry.dtype in INTEGERS and name.endswith(".weight") and entry.end - entry.begin > LARGE_LAYER:
            return f"a tool that stores {entry.dtype}"
        if name.endswith(SCALES) and entry.shape not in ((), (1,)):
            return "a tool with a scale for each row"
    return None


QUANTISED_FIX = "Weights are quantised as they are loaded (PARAMS_PRECISION). Fix: the bf16, fp16 or fp8 file"


# ---- files that are no base model


def _any(*parts: str) -> Callable[[Entries], bool]:
    """Whether a name contains one of `parts`."""
    return lambda entries: any(part in name for name in entries for part in parts)


def _has(*names: str) -> Callable[[Entries], bool]:
    """Whether one of `names` is there."""
    return lambda entries: any(name in entries for name in names)


# In order: the first that fits counts.
ADDITIONS: tuple[tuple[Callable[[Entries], bool], str, str], ...] = (
    (
        _any("lora_down.weight", "lora_A.", "lora.down.weight", ".lora_up.", ".hada_w1_a", ".lokr_w1", ".oft_blocks"),
        "a LoRA",
        "PARAMS_RESUME_FROM=the file starts from a LoRA; leave MODEL_PATH to the base model",
    ),
    (
        _any("control_model.", "controlnet_cond_embedding.", "controlnet_blocks.", "controlnet_x_embedder."),
        "a ControlNet",
        "name the base model itself",
    ),
    (_any("input_hint_block.", "zero_convs.0"), "a ControlNet", "name the base model itself"),
    (_any("ip_adapter."), "an IP-Adapter", "name the base model itself"),
    (_has("redux_up.weight"), "an image adapter (Redux)", "name the base model itself"),
    (_has("emb_params"), "a textual inversion", "name the base model itself"),
)
# A name that only one other model has → that model.
OTHER_MODELS = {
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": "Stable Diffusion 1.x",
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": "Stable Diffusion 2.x",
    "txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight": "HunyuanVideo",
    "blocks.0.self_attn.q.weight": "Wan",
    "patchify_proj.weight": "LTX-Video",
    "clip_txt_mapper.weight": "Stable Cascade",
    "y_embedder.y_embedding": "PixArt",
    "adaln_single.emb.timestep_embedder.linear_1.weight": "PixArt or Sana",
    "double_stream_blocks.0.block.attn1.to_q.weight": "HiDream",
    "caption_projection.0.linear.weight": "HiDream",
}


def part_name(part: str) -> str:
    """What a message calls a part.

    A text encoder without a name of its own is that of the first model that reads by it. So is mistral3: Mistral Small
    3.1 and 3.2 have the same shapes, and sources disagree on whose weights FLUX.2-dev has. The code of its makers loads
    3.2's, and of 3.1 only the processor.
    """
    if part in PART_NAMES:
        return PART_NAMES[part]
    readers = []
    for _, model in base_models().values():
        if not model.is_miniature and part in model.own_facts.get("parts", ()):
            readers.append(model.source.rpartition("/")[2])
    return f"the text encoder of {readers[0]}"


def bare_names(entries: Entries, part: str) -> dict[str, Entry]:
    """A part's tensors without the prefix that they have in a file with several parts; all, if none has it."""
    for prefix in PREFIXES[part]:
        found = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
        if found:
            return found
    return dict(entries)


def addition(entries: Entries) -> tuple[str, str] | None:
    """What a file is that adds something to a base model, and what to do with it; None if it is no such file."""
    for fits, what, fix in ADDITIONS:
        if fits(entries):
            return what, fix
    return None


def lookalike(entries: Entries) -> str | None:
    """The model that a denoiser is of, if it is none that is trained here."""
    bare = bare_names(entries, "denoiser")
    for name in family_names():
        for other in get_family(name).FACTS.lookalikes:
            if other.tensor not in bare or bare.keys() & set(other.lacks):
                continue
            if _fits(bare[other.tensor].shape, other):
                return other.what
    for tensor, what in OTHER_MODELS.items():
        if tensor in entries or tensor in bare:
            return what
    return None


def _fits(shape: tuple[int, ...], other: Lookalike) -> bool:
    if other.shape is None:
        return True
    if len(shape) != len(other.shape):
        return False
    return all(want is None or side == want for side, want in zip(shape, other.shape, strict=True))


# ---- the denoiser


def model_problem(header: Header, base_model: str, facts: Facts) -> str | None:
    """Why a file cannot be the base model, with what to do; None if it seems to be."""
    entries = header.entries
    if tool := quantised(entries):
        return f"is quantised by {tool}, which is not read. {QUANTISED_FIX}."
    if found := addition(entries):
        what, fix = found
        return f"is {what}, not a base model. Fix: {fix}."
    if other := lookalike(entries):
        return f"is {other}, which is not trained here. Fix: a file of {base_model}."
    bare = bare_names(entries, "denoiser")
    if not bare.keys() & set(facts.landmarks):
        return _without_denoiser(entries, bare, base_model)
    published = base_models()[base_model][1].published
    if published is None:
        return None
    if mark := _differing_mark(bare, published, facts.name):
        fitting = fitting_bases(bare)
        if fitting:
            return f"is of another base model. Fix: BASE_MODEL={fitting[0]}."
        return f"is not of {base_model}: {mark}. Fix: a file of {base_model}."
    return None


def _without_denoiser(entries: Entries, bare: Entries, base_model: str) -> str:
    for name in family_names():
        if bare.keys() & set(get_family(name).FACTS.landmarks):
            fitting = fitting_bases(bare) or list(get_family(name).FACTS.models)
            return f"is of another family: holds no denoiser for BASE_MODEL={base_model}. Fix: BASE_MODEL={fitting[0]}."
    part = part_of(entries)
    if part is not None:
        return (
            f"is {part_name(part)} alone and holds no denoiser for BASE_MODEL={base_model}. Fix: "
            f"{VARIABLES[part]}=this file, and MODEL_PATH=the denoiser's file."
        )
    return f"holds no denoiser for BASE_MODEL={base_model}. Fix: a file of {base_model}."


def marks_in(bare: Entries, published: Published, family: str) -> dict[str, tuple[int, ...] | None]:
    """`Published.marks` by the names that a denoiser's tensors have: the original ones or those of diffusers.

    A layer whose rows are in several of diffusers' layers is left out.
    """
    if get_family(family).FACTS.landmarks[0] in bare:
        return published.marks
    diffusers_names = {}
    for layer in get_family(family).LORA_KEYS.layers:
        if len(layer.diffusers_names) == 1:
            diffusers_names[layer.name] = layer.diffusers_names[0]
    found = {}
    for name, shape in published.marks.items():
        layer_name = name.removesuffix(".weight")
        number = re.search(r"\.(\d+)\.", layer_name)
        if layer_name not in diffusers_names and number is not None:
            layer_name = layer_name.replace(number[0], ".{}.", 1)
        if layer_name in diffusers_names:
            own = diffusers_names[layer_name].format(number[1] if number else "")
            found[f"{own}.weight"] = shape
    return found


def _differing_mark(bare: Entries, published: Published, family: str) -> str | None:
    for name, shape in marks_in(bare, published, family).items():
        if shape is None and name in bare:
            return f"it has {name}"
        if shape is not None and name not in bare:
            return f"it has no {name}"
        if shape is not None and bare[name].shape != shape:
            return f"{name} has the shape {[*bare[name].shape]} and not {[*shape]}"
    return None


def fitting_bases(bare: Entries) -> list[str]:
    """The values of BASE_MODEL whose marks a denoiser has."""
    fitting = []
    for base, (family, model) in base_models().items():
        if not bare.keys() & set(get_family(family).FACTS.landmarks):
            continue
        if model.published is not None and _differing_mark(bare, model.published, family) is None:
            fitting.append(base)
    return fitting


# ---- the other parts

TOKENS = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight", "token_embedding.weight")
CLIP_LAYERS = (
    "text_model.encoder.layers.0.self_attn.q_proj.weight",
    "encoder.layers.0.self_attn.q_proj.weight",
    "transformer.resblocks.0.attn.in_proj_weight",
)
# Before a language model's names: alone, with its output layer, and in a model that also reads images, with that and
# without.
LEVELS = ("", "model.", "model.language_model.", "language_model.", "language_model.model.")
QWEN3_LAYERS = tuple(f"{level}layers.0.self_attn.q_norm.weight" for level in LEVELS)
QWEN2_5_VL_LAYERS = tuple(f"{level}layers.0.self_attn.q_proj.bias" for level in LEVELS)
# Of what reads images in Qwen3-VL, whose language model has the same layers as Qwen3.
QWEN3_VL_LAYERS = tuple(f"{level}visual.deepstack_merger_list.0.norm.weight" for level in ("", "model."))
# Of Mistral, Llama and Gemma 2, which lack Qwen's norms and biases, and have other numbers of tokens than FLUX.2-dev's.
PLAIN_LAYERS = tuple(f"{level}layers.0.self_attn.q_proj.weight" for level in LEVELS)
MISTRAL_TOKENS = 131072
LEAST_TOKENS = 32000  # of a published language model: with fewer, it is a miniature's
LANGUAGE_TOKENS = tuple(f"{level}embed_tokens.weight" for level in LEVELS)
LANGUAGE_GATES = tuple(f"{level}layers.0.mlp.gate_proj.weight" for level in LEVELS)
VAE_LAYERS = ("decoder.conv_in.weight", "decoder.conv1.weight")  # the latter: of Wan, and so of Qwen-Image
# Text encoder of several sizes → width → the size's name.
SIZE_NAMES = {
    "qwen3": {1024: "Qwen3-0.6B", 2048: "Qwen3-1.7B", 2560: "Qwen3-4B", 4096: "Qwen3-8B", 5120: "Qwen3-14B"},
    "qwen3_vl": {2048: "Qwen3-VL-2B", 2560: "Qwen3-VL-4B", 4096: "Qwen3-VL-8B", 5120: "Qwen3-VL-32B"},
    "mistral3": {3072: "Ministral 3B", 4096: "Ministral 8B"},
}
T5_LAYER = "encoder.block.0.layer.0.SelfAttention.q.weight"
T5_TOKENS = ("shared.weight", "encoder.embed_tokens.weight")
CLIP_L_WIDTH = 768
POSITIONS = ("text_model.embeddings.position_embedding.weight", "positional_embedding")


def part_of(entries: Entries) -> str | None:
    """Which part of a model a file holds that holds one alone; None if it is neither a VAE nor a text encoder."""
    if T5_LAYER in entries:
        return "t5"
    if any(name in entries for name in QWEN3_LAYERS):
        return "qwen3_vl" if any(name in entries for name in QWEN3_VL_LAYERS) else "qwen3"
    if any(name in entries for name in QWEN2_5_VL_LAYERS):
        return "qwen2_5_vl"
    if any(name in entries for name in PLAIN_LAYERS):
        tokens = _first_shape(entries, LANGUAGE_TOKENS)
        is_mistral = tokens is not None and (tokens[0] == MISTRAL_TOKENS or tokens[0] < LEAST_TOKENS)
        return "mistral3" if is_mistral else None
    if any(name in entries for name in CLIP_LAYERS):
        shape = _first_shape(entries, TOKENS)
        return "clip_l" if shape is None or shape[-1] <= CLIP_L_WIDTH else "clip_g"
    if any(name in entries for name in VAE_LAYERS):
        return "vae"
    return None


def _first_shape(entries: Entries, names: tuple[str, ...]) -> tuple[int, ...] | None:
    for name in names:
        if name in entries:
            return entries[name].shape
    return None


def part_problem(
    part: str, header: Header, published: Published | None, folder: str, *, names: Mapping[str, str] | None = None
) -> str | None:
    """Why a file cannot be `part`, with what to do; None if it seems to be.

    `folder`: of the part. `names`: what names the file of a part, if it is not its variable.
    """
    entries = header.entries
    if tool := quantised(entries):
        return f"is quantised by {tool}, which is not read. {QUANTISED_FIX}"
    if found := addition(entries):
        return f"is {found[0]}, not {part_name(part)}"
    bare = bare_names(entries, part)
    actual = part_of(bare)
    if actual is None and any(name.startswith(("vision_model.", "visual.")) for name in entries):
        return "is CLIP's image encoder. Fix: the text encoder's file"
    if actual is None and any(name.startswith("decoder.") for name in entries) and part == "vae":
        return "is a decoder that only draws previews. Fix: a VAE with its encoder"
    if actual is None and any(name in bare for name in PLAIN_LAYERS):
        return f"is not {part_name(part)}, but a language model that no base model reads captions by"
    if actual is None:
        return f"is not {part_name(part)}: it has none of its layers"
    same = actual == part or (actual in CLIPS and part in CLIPS and published is None)
    if not same:
        if VARIABLES[actual] == VARIABLES[part]:
            return f"is {part_name(actual)}, not {part_name(part)}. Fix: the file of {part_name(part)}"
        return f"is {part_name(actual)}, not {part_name(part)}. Fix: {_naming(actual, names)}this file"
    if published is None:
        return None
    return _size_problem(part, bare, published.configs[f"{folder}/config.json"])


def _naming(part: str, names: Mapping[str, str] | None) -> str:
    """What stands before the file of `part` where it is named."""
    return f"{VARIABLES[part]}=" if names is None else f"{names[part]} "


def _size_problem(part: str, bare: Entries, config: Mapping[str, int]) -> str | None:
    """Whether a part has the sizes that the base model needs."""
    if part == "vae":
        return _vae_problem(bare, config)
    if part == "t5":
        shape = _first_shape(bare, T5_TOKENS)
        if shape is not None and shape != (config["vocab_size"], config["d_model"]):
            return f"is another T5, of {shape[0]} tokens and width {shape[-1]}. Fix: T5 v1.1 XXL (t5xxl)"
        return None
    if part in LANGUAGE_MODELS:
        shape = _first_shape(bare, LANGUAGE_TOKENS)
        if shape is not None and shape[-1] != config["hidden_size"]:
            return _other_width(part, shape[-1], config["hidden_size"])
        gate = _first_shape(bare, LANGUAGE_GATES)
        if gate is not None and gate[0] != config["intermediate_size"]:
            wanted = config["intermediate_size"]
            has = f"has {gate[0]} numbers in an MLP, and {part_name(part)} as this base model reads by it {wanted}"
            return f"{has}. Fix: that one's file"
        return None
    tokens = _first_shape(bare, TOKENS)
    if tokens is not None and tokens[-1] != config["hidden_size"]:
        return f"is a CLIP of width {tokens[-1]}; {part_name(part)} has {config['hidden_size']}"
    positions = _first_shape(bare, POSITIONS)
    if positions is not None and positions[0] != config["max_position_embeddings"]:
        return f"is a CLIP for {positions[0]} tokens (Long-CLIP); this base model reads 77"
    return None


def _other_width(part: str, width: int, wanted: int) -> str:
    """What a text encoder of another width is."""
    if part not in SIZE_NAMES:
        return f"is another {part_name(part)}, of width {width}; this base model's has {wanted}"
    found = SIZE_NAMES[part].get(width, f"another {part_name(part)}")
    needed = SIZE_NAMES[part].get(wanted, part_name(part))
    return f"is {found}, of width {width}; this base model reads by {needed}, of width {wanted}. Fix: that one's file"


def _vae_problem(bare: Entries, config: Mapping[str, int]) -> str | None:
    """Whether a VAE is of images or of videos, as the base model's is, and has as many channels."""
    decoder = next(name for name in VAE_LAYERS if name in bare)
    if decoder.replace("decoder", "encoder") not in bare:
        return "is a decoder alone. Fix: a VAE with its encoder"
    shape = bare[decoder].shape
    wanted = "videos" if "z_dim" in config else "images"
    found = "videos" if len(shape) == 5 else "images"
    if found != wanted:
        return f"is a VAE of {found}; this base model's is one of {wanted}"
    channels = config["z_dim"] if "z_dim" in config else config["latent_channels"]
    if shape[1] != channels:
        return f"is a VAE of {shape[1]} channels; this base model's has {channels}"
    return None
