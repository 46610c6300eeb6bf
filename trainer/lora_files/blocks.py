"""The numbered blocks of published models, and of the layers that a LoRA file has. Needs no torch.

A list of blocks is the path before its number: `transformer_blocks`, or `mid_block.attentions.0.transformer_blocks`.
Flux.1, FLUX.2 klein 4B and Qwen-Image give layers of the same width the same names. Only the numbers tell these apart.
"""

from __future__ import annotations

from collections.abc import Iterable

from trainer.lora_files.contents import declared_family
from trainer.lora_files.key_names import Layer, find_layer, split_key
from trainer.spec.family import BaseModel, Facts, base_models, get_family
from trainer.storage.safetensors_header import Header


def list_of(layer_name: str) -> str:
    """The list that a layer is in, by its name with {} for the number of its block."""
    return layer_name.partition(".{}")[0]


def last_blocks(base: BaseModel, family_name: str) -> dict[str, int]:
    """List of blocks → the number of its last one, as far as the marks of a published model name it."""
    if base.published is None:
        return {}
    names = [name.removesuffix(".weight") for name, shape in base.published.marks.items() if shape is not None]
    return _last_numbers(filter(None, (find_layer(name, family_name) for name in names)))


def last_blocks_of_layers(stems: Iterable[str], family_name: str) -> dict[str, int] | None:
    """The same of the layers that `stems` name, in any spelling; None if the family has no layer of such a name."""
    layers = []
    for stem in stems:
        layer = find_layer(stem, family_name)
        if layer is None:
            return None
        layers.append(layer)
    return _last_numbers(layers)


def _last_numbers(layers: Iterable[Layer]) -> dict[str, int]:
    last: dict[str, int] = {}
    for layer in layers:
        if layer.original is None or not layer.number.isdecimal():
            continue
        for name in layer.original.diffusers_names:
            last[list_of(name)] = max(last.get(list_of(name), 0), int(layer.number))
    return last


def models_with_these_blocks(header: Header, facts: Facts, *, width: int) -> list[str]:
    """The published models of other families than `facts` that have the layers of a LoRA file and end with its blocks.

    One value of BASE_MODEL for each family; none where the header names the family. `width`: of the layers.
    """
    if declared_family(header.metadata) == facts.name:
        return []
    stems = [split[0] for key in header.entries if (split := split_key(key))]
    found: dict[str, str] = {}
    for name, (family_name, base) in base_models().items():
        if family_name == facts.name or base.published is None or base.footprint is None:
            continue
        in_file = last_blocks_of_layers(stems, family_name)
        if not in_file or (get_family(family_name).LORA_KEYS.one_width and base.footprint.hidden_size != width):
            continue
        of_model = last_blocks(base, family_name)
        if all(of_model.get(blocks) == last for blocks, last in in_file.items()):
            found.setdefault(family_name, name)
    return list(found.values())
