"""The names in LoRA files: which tool's spelling a key has, and which layer it means. Standard library only.

Every spelling leads to a module of diffusers' pipeline, `<component>.<path>`: transformer.norm_out.linear, or
text_encoder.text_model.encoder.layers.0.mlp.fc1. The families' tables
(`LoraKeys`) say how original names relate to these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from trainer.spec.family import OriginalLayer, get_family

# How a file spells the two matrices and the strength of a module. The longest ending that fits counts.
ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# What comes before the name of a denoiser's layer, and who writes such files.
STYLES = {
    "lora_unet_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
    "diffusion_model.": "ComfyUI",
    "base_model.model.": "PEFT",
    "transformer.": "diffusers",
    "unet.": "diffusers",
    "": "bare names",
}
CLIPS = {"te_": "te1", "te1_": "te1", "te2_": "te2", "te3_": "te3"}
COMFY_ENCODERS = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3"}
CLIP_LAYER = re.compile(r"(?:text_model_)?encoder_layers_(\d+)_(self_attn|mlp)_([qkv]_proj|out_proj|fc1|fc2)")
T5_LAYER = re.compile(r"encoder_block_(\d+)_layer_(\d)_(SelfAttention|DenseReluDense)_(q|k|v|o|wi_0|wi_1|wi|wo)")
# struct's letter for the types that an alpha comes in; bfloat16 is the upper half of a float32.
SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}


@dataclass(frozen=True)
class Layer:
    """What a key names: a layer of the original model, one of its parts by diffusers' name, or a text encoder's."""

    component: str  # transformer, unet, text_encoder, text_encoder_2 …
    original: OriginalLayer | None  # None: a text encoder's layer, which has one name everywhere
    number: str  # of the block
    part: int | None  # an index of original.diffusers_names; None: the whole, with its rows as the original has them
    path: str = ""  # of a text encoder's layer

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of diffusers' pipeline that this is, in the order of the rows."""
        if self.original is None:
            return (f"{self.component}.{self.path}",)
        parts = (
            self.original.diffusers_names
            if self.part is None
            else self.original.diffusers_names[self.part : self.part + 1]
        )
        return tuple(f"{self.component}.{p.replace('{}', self.number)}" for p in parts)


def split_key(key: str) -> tuple[str, str] | None:
    """A key → the name of its module as the file spells it, and down, up, alpha or magnitude; None for others."""
    ending = max((e for e in ROLES if key.endswith(e)), key=len, default=None)
    return None if ending is None else (key[: -len(ending)], ROLES[ending])


def find_layer(stem: str, family_name: str) -> Layer | None:
    """What the module name `stem` of a file means in a family; None if nothing."""
    return _encoder_layer(stem, family_name) or _denoiser_layer(stem, family_name)


def name_in_files(module: str, family_name: str) -> str:
    """The module's name as files have it: with the level `text_model` that transformers leaves out."""
    there = find_layer(module, family_name)
    return there.modules[0] if there is not None and there.original is None else module


def key_style(stem: str) -> str:
    """Who spells module names like this."""
    if ".processor." in stem:
        return "diffusers before PEFT"
    return next(s for prefix, s in STYLES.items() if stem.startswith(prefix))


def _denoiser_layer(stem: str, family_name: str) -> Layer | None:
    prefix = next(p for p in STYLES if stem.startswith(p))
    path = stem.removeprefix(prefix).replace(".processor.", ".")
    if ".processor." in stem and path.endswith(".to_out"):
        path += ".0"
    found = _numbered(path.replace(".", "_"), _index(family_name))
    component = get_family(family_name).FACTS.lora_prefix
    return Layer(component, found[0], found[2], found[1]) if found else None


@cache
def _index(family_name: str) -> dict[str, tuple[OriginalLayer, int | None]]:
    """Every name of the family's layers with _ for dots, original and diffusers', → the layer and the part."""
    found: dict[str, tuple[OriginalLayer, int | None]] = {}
    for native in get_family(family_name).LORA_KEYS.layers:
        found[native.name.replace(".", "_")] = native, None
        for i, part in enumerate(native.diffusers_names):
            found[part.replace(".", "_")] = native, i
    return found


def _numbered(
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
    components = {kohya: component for component, kohya in get_family(family_name).LORA_KEYS.encoders.items()}
    if short := next((c for c in CLIPS if stem.startswith(f"lora_{c}")), None):
        component, path = components.get(CLIPS[short], ""), stem.removeprefix(f"lora_{short}")
    elif stem.startswith("text_encoders."):
        which, _, path = stem.removeprefix("text_encoders.").partition(".")
        component, path = components.get(COMFY_ENCODERS.get(which, ""), ""), path.removeprefix("transformer.")
    else:
        component, _, path = stem.partition(".")
    if component not in components.values():
        return None
    flat = path.replace(".", "_")
    if clip := CLIP_LAYER.fullmatch(flat):
        # transformers 5 leaves text_model out of the path; every other tool's file has it.
        return Layer(component, None, clip[1], None, f"text_model.encoder.layers.{clip[1]}.{clip[2]}.{clip[3]}")
    if t5 := T5_LAYER.fullmatch(flat):
        return Layer(component, None, t5[1], None, f"encoder.block.{t5[1]}.layer.{t5[2]}.{t5[3]}.{t5[4]}")
    return None
