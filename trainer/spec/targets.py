"""Which layers a value of PARAMS_TARGET_MODULES means: the end of a layer's dotted name, in whole parts.

`to_q` means every layer called that, `attn.to_q` those in an `attn`, `transformer_blocks.0.attn.to_q` one layer. In a
part, `*` stands for any characters: `single_transformer_blocks.*.attn.to_q`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache

from trainer.spec.family import Facts, get_family

NUMBER = "{}"  # in the names of `layer_names`: that of the block


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Whether the layer name `name` ends with one of `targets`; only whole parts of a dotted name count."""
    return any(_fits(name, target) for target in targets)


def _fits(name: str, target: str) -> bool:
    if "*" not in target:
        return f".{name}".endswith(f".{target}")
    patterns = target.split(".")
    parts = name.split(".")[-len(patterns) :]
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


@cache
def layer_names(family_name: str) -> tuple[str, ...]:
    """The layers of a family that can get adapters, by their names in diffusers' model: those in its blocks.

    `{}` stands for the number of the block.
    """
    facts = get_family(family_name).FACTS
    names: dict[str, None] = {}  # an ordered set
    for layer in get_family(family_name).LORA_KEYS.layers:
        for name in layer.diffusers_names:
            if _in_block(name, facts):
                names[name] = None
    return tuple(names)


def _in_block(name: str, facts: Facts) -> bool:
    """Layers of a numbered block have its number in their names; others of the family's targets have one of a level."""
    parts = name.split(".")
    if NUMBER in parts:
        return True
    return is_target(name, facts.targets) and any(part.isdigit() for part in parts)


def matching(family_name: str, target: str) -> Iterator[str]:
    """The layers of `layer_names` that `target` may mean; whether a model has a block of that number is not known."""
    patterns = target.split(".")
    for name in layer_names(family_name):
        parts = name.split(".")[-len(patterns) :]
        if len(parts) != len(patterns):
            continue
        if all(_may_be(part, pattern) for part, pattern in zip(parts, patterns, strict=True)):
            yield name


def _may_be(part: str, pattern: str) -> bool:
    if part == NUMBER:
        return "*" in pattern or pattern.isdecimal()
    return fnmatchcase(part, pattern)
