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

# The ending of a key → what the tensor is. The longest ending that fits counts.
ENDINGS = {
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
# The prefix of a denoiser's stem → the tool that writes it. The first that fits counts.
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
KOHYA_ENCODERS = {"te_": "te1", "te1_": "te1", "te2_": "te2", "te3_": "te3"}  # after `lora_`
COMFYUI_ENCODERS = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3"}  # after `text_encoders.`
UNTRAINED = "kiln_untrained"  # key of a header: the modules of rank 0 that a DoRA file holds, as JSON
CLIP_LAYER = re.compile(r"(?:text_model_)?encoder_layers_(\d+)_(self_attn|mlp)_([qkv]_proj|out_proj|fc1|fc2)")
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
    """A key → its stem, and down, up, alpha or magnitude; None for a key of no LoRA."""
    endings = [ending for ending in ENDINGS if key.endswith(ending)]
    if not endings:
        return None
    longest = max(endings, key=len)
    return key.removesuffix(longest), ENDINGS[longest]


def untrained_modules(metadata: Mapping[str, str]) -> list[str]:
    """The modules without a LoRA that a DoRA's file holds since it keeps them and one with a LoRA as one layer."""
    try:
        names = json.loads(metadata.get(UNTRAINED, "[]"))
    except ValueError:
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
    prefix = next(p for p in STYLES if stem.startswith(p))
    path = stem.removeprefix(prefix).replace(".processor.", ".")
    if ".processor." in stem and path.endswith(".to_out"):
        path += ".0"  # diffusers before PEFT left the index of the linear layer out
    match = _look_up(path.replace(".", "_"), _index(family_name))
    if match is None:
        return None
    original, part, number = match
    return Layer(get_family(family_name).FACTS.lora_prefix, original, number, part)


@cache
def _index(family_name: str) -> dict[str, tuple[OriginalLayer, int | None]]:
    """Every name of the family's layers, the original and diffusers', with _ for dots → the layer and the part."""
    index: dict[str, tuple[OriginalLayer, int | None]] = {}
    for original in get_family(family_name).LORA_KEYS.layers:
        index[original.name.replace(".", "_")] = original, None
        for part, name in enumerate(original.diffusers_names):
            index[name.replace(".", "_")] = original, part
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
    component, path = _encoder_and_path(stem, family_name)
    if component not in get_family(family_name).LORA_KEYS.encoders:
        return None
    flat = path.replace(".", "_")
    if clip := CLIP_LAYER.fullmatch(flat):
        # transformers 5 leaves text_model out of the path; ComfyUI then skips the key, so files always have it.
        return Layer(component, None, clip[1], None, f"text_model.encoder.layers.{clip[1]}.{clip[2]}.{clip[3]}")
    if t5 := T5_LAYER.fullmatch(flat):
        return Layer(component, None, t5[1], None, f"encoder.block.{t5[1]}.layer.{t5[2]}.{t5[3]}.{t5[4]}")
    return None


def _encoder_and_path(stem: str, family_name: str) -> tuple[str, str]:
    """The text encoder's name in diffusers' pipeline, or "" or something else if it has none, and the path inside."""
    components = {short: component for component, short in get_family(family_name).LORA_KEYS.encoders.items()}
    kohya = next((prefix for prefix in KOHYA_ENCODERS if stem.startswith(f"lora_{prefix}")), None)
    if kohya is not None:
        return components.get(KOHYA_ENCODERS[kohya], ""), stem.removeprefix(f"lora_{kohya}")
    if stem.startswith("text_encoders."):
        encoder, _, path = stem.removeprefix("text_encoders.").partition(".")
        return components.get(COMFYUI_ENCODERS.get(encoder, ""), ""), path.removeprefix("transformer.")
    component, _, path = stem.partition(".")
    return component, path
