"""Which layers get adapters: the names in PARAMS_TARGET_MODULES, each of which must mean a layer of the model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from entrypoint.settings.checks import Notes
from entrypoint.settings.variables.adapter import AdapterSettings
from trainer.base_model import model_folder
from trainer.lora_files import key_names
from trainer.spec.family import Facts
from trainer.spec.plan import ModelPlan
from trainer.spec.targets import NUMBER, is_target, layer_names, matching
from trainer.spec.values import Problems, nearest, show

REGULAR_EXPRESSION = re.compile(r"[\\^$()\[\]{}|+?]|\.\*")
SHOWN = 4  # layers in a message, and messages


def check_targets(settings: AdapterSettings, *, model: ModelPlan, facts: Facts, notes: Notes) -> AdapterSettings:
    """The settings with the targets as the trainer takes them; notes those that mean no layer, with names near them."""
    targets = settings.target_modules
    if targets is None:
        return settings
    layers = _local_layers(model, facts)
    if set(targets) == set(facts.targets):
        layers = []  # some of these are in some models of the family only
    checked: dict[str, None] = {}
    problems = Problems()
    for target in targets:
        name = target.removeprefix(f"{facts.lora_prefix}.").removesuffix(".weight")
        checked[name] = None
        if name != target:
            notes.chose("PARAMS_TARGET_MODULES", name, f"read from {target}")
        matches = tuple(matching(facts.name, name))
        if not matches:
            problems.add(f"PARAMS_TARGET_MODULES: {show(target)} {_why_none(name, facts)}")
        elif layers and not any(is_target(layer, (name,)) for layer in layers):
            problems.add(
                f"PARAMS_TARGET_MODULES: {show(target)} is no layer of {model.source}, which has "
                f"{_listed(_same_kind(matches, layers))}. Fix: name one of them, or leave it out."
            )
    for line in problems.lines[:SHOWN]:
        notes.add(line)
    if len(problems.lines) > SHOWN:
        notes.add(f"PARAMS_TARGET_MODULES: {len(problems.lines) - SHOWN} more of its names are not layers.")
    return dataclasses.replace(settings, target_modules=tuple(checked))


def _why_none(name: str, facts: Facts) -> str:
    """Why `name` means no layer that gets an adapter, and what to write instead."""
    layers = layer_names(facts.name)
    if REGULAR_EXPRESSION.search(name):
        example = next(layer for layer in layers if NUMBER in layer).replace(NUMBER, "*")
        return (
            "is read as a name, not as a regular expression. Fix: the end of a layer's name, in which * stands for any "
            f"characters between two dots, such as {example}."
        )
    original = key_names.find_layer(name, facts.name)
    if original is not None and original.original is not None:
        here = [module.removeprefix(f"{facts.lora_prefix}.") for module in original.modules]
        if all(any(matching(facts.name, path)) for path in here):
            return f"is called {' and '.join(here)} here. Fix: PARAMS_TARGET_MODULES={','.join(here)}."
        return f"is outside the blocks, where no layer gets an adapter. Fix: leave it out; known are {_ends(facts)}."
    for joined, parts in facts.fused_targets.items():
        if f".{joined}".endswith(f".{name}"):
            return f"is {', '.join(parts)} here, which share one adapter unless PARAMS_SPLIT_QKV=true. Fix: name these."
    inside = _layers_inside(name, layers)
    if inside:
        return f"is not a layer, but has layers inside. Fix: name these, such as {_listed(inside)}."
    guess = nearest(name, [*_suffixes(layers), *layers])
    if guess:
        return f"is not a layer of this model; did you mean {guess.replace(NUMBER, '0')}?"
    return f"is not a layer of this model; known are {_ends(facts)}."


def _ends(facts: Facts) -> str:
    return ", ".join(facts.targets)


def _suffixes(layers: Sequence[str]) -> list[str]:
    """All ends of the layers' names, in whole parts, without those that begin inside a list."""
    suffixes: dict[str, None] = {}
    for layer in layers:
        parts = layer.split(".")
        for start in range(len(parts)):
            if not parts[start].isdecimal() and parts[start] != NUMBER:
                suffixes[".".join(parts[start:])] = None
    return list(suffixes)


def _layers_inside(name: str, layers: Sequence[str]) -> list[str]:
    """The layers of the module that `name` means, by its first block."""
    inside: dict[str, None] = {}
    count = len(name.split("."))
    for layer in layers:
        parts = layer.split(".")
        for end in range(count, len(parts)):
            if _is_named(".".join(parts[end - count : end]), name):
                inside[".".join([name, *parts[end:]]).replace(NUMBER, "*")] = None
    return list(inside)


def _is_named(template: str, name: str) -> bool:
    """Whether `name` is `template` with a number, or *, in the place of {}."""
    pattern = re.escape(template).replace(re.escape(NUMBER), r"(\d+|\*)")
    return re.fullmatch(pattern, name) is not None


def _same_kind(matches: Sequence[str], layers: Sequence[str]) -> list[str]:
    """The model's layers that have one of these names with any number."""
    wanted = [match.replace(NUMBER, "*") for match in matches]
    return [layer for layer in layers if is_target(layer, wanted)]


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none of that name"
    if len(names) <= SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[: SHOWN - 1])} … {names[-1]}"


def _local_layers(model: ModelPlan, facts: Facts) -> list[str]:
    """The layers of a model in diffusers' layout on this machine, in the file's order; none if it is not here."""
    folder = Path(model.source) / facts.parts["denoiser"]
    if "denoiser" in model.parts or not folder.is_dir():
        return []
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        names |= model_folder.tensors(file)
    layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    return sorted(layers, key=_by_number)


def _by_number(name: str) -> list[tuple[int, str]]:
    key = []
    for part in name.split("."):
        key.append((int(part), "") if part.isdecimal() else (-1, part))
    return key
