"""The keys in LoRA files: which tool's spelling a key has, and which layer it names. Standard library only.

A key is a stem, which names a layer, and an ending, which says what the tensor is (`ENDINGS`). Every spelling of a stem
leads to a module of diffusers' pipeline, `<component>.<path>`: transformer.norm_out.linear, or
text_encoder.text_model.encoder.layers.0.mlp.fc1. The families' tables (`LoraKeys`) relate original names to these.
The tools' own code is the source: kohya-ss/sd-scripts, ComfyUI's comfy/lora.py, diffusers' loaders/lora_pipeline.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from trainer.spec.family import OriginalLayer, get_family

# How keys end, and what the tensor is. `(?<=…)`: what is before belongs to the stem. The first that fits counts.
# PEFT puts an adapter's name before `.weight` (lora_A.default.weight); XLabs numbers the streams (qkv_lora1).
ENDINGS = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"\.lora_(?:down|A)(?:\.\w+)?\.weight$", "down"),
        (r"\.lora_(?:up|B)(?:\.\w+)?\.weight$", "up"),
        (r"\.lora_mid\.weight$", "mid"),
        (r"(?<=_lora[12])\.down\.weight$", "down"),
        (r"(?<=_lora[12])\.up\.weight$", "up"),
        (r"(?:[._]lora|\.lora_linear_layer)\.down\.weight$", "down"),
        (r"(?:[._]lora|\.lora_linear_layer)\.up\.weight$", "up"),
        (r"\.alpha$", "alpha"),
        (r"\.dora_scale$", "magnitude"),
        (r"\.lora_magnitude_vector(?:\.\w+)?$", "magnitude"),
    )
)
# What may stand before a denoiser's layer, also one after the other → the tool that writes it.
STYLES = {
    "lora_unet_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
    "model.diffusion_model.": "ComfyUI",
    "diffusion_model.": "ComfyUI",
    "base_model.model.": "PEFT",
    "transformer.": "diffusers",
    "unet.": "diffusers",
    "model.": "bare names",
    "": "bare names",
}
KOHYA_ENCODERS = {"te_": "te1", "te1_": "te1", "te2_": "te2", "te3_": "te3"}  # after `lora_`
# ComfyUI's names, after `text_encoders.`, and those of OneTrainer's OMI files.
PLAIN_ENCODERS = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3", "t5": "te3"}
CLIP_LAYER = re.compile(
    r"(?:text_model_)?encoder_layers_(\d+)_(self_attn|mlp)_([qkv]_proj|out_proj|fc1|fc2|to_[qkv]|to_out)"
)
CLIP_BEFORE_PEFT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
CLIP_PROJECTION = "text_projection"
UNTRAINED = "kiln_untrained"  # key of a header: the modules of rank 0 that a DoRA file holds, as JSON
T5_LAYER = re.compile(r"encoder_block_(\d+)_layer_(\d)_(SelfAttention|DenseReluDense)_(q|k|v|o|wi_0|wi_1|wi|wo)")


@dataclass(frozen=True)
class Layer:
    """What a stem names: a layer of the original model, one of its layers in diffusers' model, or a text encoder's."""

    component: str  # transformer, unet, text_encoder, text_encoder_2 …
    original: OriginalLayer | None  # None: a text encoder's layer, which has one name everywhere
    number: str  # of the block
    part: int | None  # an index of original.diffusers_names; None: all of its rows, in the original's order
    path: str = ""  # of a text encoder's layer

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of diffusers' pipeline that hold the layer, in the order of their rows."""
        if self.original is None:
            return (f"{self.component}.{self.path}",)
        names = self.original.diffusers_names
        if self.part is not None:
            names = names[self.part : self.part + 1]
        return tuple(f"{self.component}.{name.replace('{}', self.number)}" for name in names)


def split_key(key: str) -> tuple[str, str] | None:
    """A key → its stem, and down, up, mid, alpha or magnitude; None for a key of no LoRA."""
    for ending, role in ENDINGS:
        if match := ending.search(key):
            return key[: match.start()], role
    return None


def untrained_modules(metadata: Mapping[str, str]) -> list[str]:
    """The modules without a LoRA that a DoRA's file holds since it keeps them and one with a LoRA as one layer."""
    try:
        names = json.loads(metadata.get(UNTRAINED, "[]"))
    except (ValueError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def find_layer(stem: str, family_name: str) -> Layer | None:
    """The layer that a stem names in a family; None if there is none."""
    return _encoder_layer(stem, family_name) or _denoiser_layer(stem, family_name)


def name_in_files(module: str, family_name: str) -> str:
    """A module's name in files: with the level `text_model`, which transformers 5 leaves out."""
    layer = find_layer(module, family_name)
    if layer is None or layer.original is not None:
        return module
    return layer.modules[0]


def key_style(stem: str) -> str:
    """The tool that spells stems like this."""
    if ".processor." in stem:
        return "diffusers before PEFT"
    return next(style for prefix, style in STYLES.items() if stem.startswith(prefix))


def _denoiser_layer(stem: str, family_name: str) -> Layer | None:
    path = stem.replace(".processor.", ".")
    if ".processor." in stem and path.endswith(".to_out"):
        path += ".0"  # diffusers before PEFT left the index of the linear layer out
    while True:
        match = _look_up(path.replace(".", "_"), _index(family_name))
        if match is not None:
            original, part, number = match
            return Layer(get_family(family_name).FACTS.lora_prefix, original, number, part)
        prefix = next(p for p in STYLES if path.startswith(p))
        if not prefix:
            return None
        path = path.removeprefix(prefix)


@cache
def _index(family_name: str) -> dict[str, tuple[OriginalLayer, int | None]]:
    """Every name of the family's layers, the original and diffusers', with _ for dots → the layer and the part."""
    index: dict[str, tuple[OriginalLayer, int | None]] = {}
    keys = get_family(family_name).LORA_KEYS
    for original in keys.layers:
        index[original.name.replace(".", "_")] = original, None
        for part, name in enumerate(original.diffusers_names):
            index[name.replace(".", "_")] = original, part
            if len(original.diffusers_names) > 1:  # OMI numbers the parts: img_attn.qkv.0
                index[f"{original.name.replace('.', '_')}_{part}"] = original, part
    for original in keys.other_names:
        index.setdefault(original.name.replace(".", "_"), (original, None))
    return index


def _look_up(
    name: str, index: Mapping[str, tuple[OriginalLayer, int | None]]
) -> tuple[OriginalLayer, int | None, str] | None:
    """Look `name` up as it is, and with each of its numbers as that of the block."""
    if name in index:
        return *index[name], ""
    for number in re.finditer(r"\d+", name):
        template = f"{name[: number.start()]}{{}}{name[number.end() :]}"
        if template in index:
            return *index[template], number[0]
    return None


def _encoder_layer(stem: str, family_name: str) -> Layer | None:
    encoders = get_family(family_name).LORA_KEYS.encoders
    short, path = _encoder_and_path(stem, encoders)
    flat = path.replace(".processor.", ".").replace(".", "_")
    clip = CLIP_LAYER.fullmatch(flat)
    t5 = T5_LAYER.fullmatch(flat)
    if t5 and short:
        short = "te3"  # OneTrainer counts a model's encoders, so that T5 is the second of two
    component = next((component for component, name in encoders.items() if name == short), None)
    if component is None:
        return None
    if t5:
        return Layer(component, None, t5[1], None, f"encoder.block.{t5[1]}.layer.{t5[2]}.{t5[3]}.{t5[4]}")
    if short == "te3":
        return None
    if clip:
        # transformers 5 leaves text_model out of the path; ComfyUI then skips the key, so files always have it.
        leaf = CLIP_BEFORE_PEFT.get(clip[3], clip[3])
        return Layer(component, None, clip[1], None, f"text_model.encoder.layers.{clip[1]}.{clip[2]}.{leaf}")
    if flat.removeprefix("text_model_") == CLIP_PROJECTION:
        return Layer(component, None, "", None, CLIP_PROJECTION)
    return None


def _encoder_and_path(stem: str, encoders: Mapping[str, str]) -> tuple[str, str]:
    """The text encoder's name in kohya's keys, or "" where the stem names none, and the path inside.

    `encoders`: as in LoraKeys.
    """
    for prefix, short in KOHYA_ENCODERS.items():
        if stem.startswith(f"lora_{prefix}"):
            return short, stem.removeprefix(f"lora_{prefix}")
    name, _, path = stem.removeprefix("text_encoders.").partition(".")
    return PLAIN_ENCODERS.get(name, encoders.get(name, "")), path.removeprefix("base_model.model.").removeprefix(
        "transformer."
    )
