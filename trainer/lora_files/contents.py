"""What a LoRA file holds: its tensors by layer, all checked. No torch: the planner and the tools check by this alone.

Every ValueError completes a sentence about the file ("x.safetensors: it is empty"), and names the tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.lora_files import numbers, other_kinds
from trainer.lora_files.key_names import Layer, find_layer, split_key
from trainer.spec.family import family_names, get_family
from trainer.spec.values import printable, some
from trainer.storage import safetensors_header
from trainer.storage.read import read_regular
from trainer.storage.safetensors_header import Header

ADAPTER_SETTINGS = "lora_adapter_metadata"  # diffusers' name for PEFT's settings in a file's header
SHOWN_TENSORS = 5  # names in a message
MOST_VALUES = 2**28  # of one tensor: rank 4096 in a layer of 65,536 columns
LARGEST_SETTINGS = 2**22  # bytes
PLAIN_NAME = re.compile(r"\w+")
REPEATED_GROUP = re.compile(r"\)[*+?{]|\(\?")
REPEAT = re.compile(r"[*+{]")
LONGEST_PATTERN = 300  # characters
SAME_FORM = 1e-3  # relative difference of two forms that are one
MOST_REPEATS = 3  # each multiplies the time by the length of a module's name
Shapes = Mapping[str, tuple[int, ...]]  # of the tensors, by their keys


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer: down, up, mid, alpha and magnitude → their keys, as far as the file has them."""

    stem: str
    layer: Layer
    keys: dict[str, str]


def read_layers(header: Header, family_name: str, *, ignored: Collection[str] = ()) -> list[LayerTensors]:
    """The layers of a LoRA file. Raises ValueError for a file that is damaged, of another kind, or not finite.

    `ignored`: keys that do not count.
    """
    safetensors_header.check_layout(header)
    for key, entry in header.entries.items():
        if math.prod(entry.shape) > MOST_VALUES:  # they would be read as a whole
            raise ValueError(
                f"its tensor {printable(key)} has the shape {list(entry.shape)}, larger than any of a LoRA"
            )
    shapes = {key: entry.shape for key, entry in header.entries.items() if key not in ignored}
    layers = assemble(shapes, family_name, header.metadata)
    for tensors in layers:
        _check_types(header, tensors)
    _check_finite(header)
    for tensors in layers:
        if "alpha" in tensors.keys:
            check_alpha(tensors.keys["alpha"], numbers.scalar(header, header.entries[tensors.keys["alpha"]]))
    settings = adapter_settings(metadata_of(header))
    for tensors in layers:
        if "alpha" not in tensors.keys:
            rank = header.entries[tensors.keys["down"]].shape[0]
            scale_in_header(tensors.layer.modules[0], rank, settings)
    return layers


def assemble(shapes: Shapes, family_name: str, metadata: Mapping[str, str]) -> list[LayerTensors]:
    """The layers that the keys name, by their shapes alone. Raises ValueError for a file that cannot be read."""
    if not shapes:
        raise ValueError("it is empty")
    if description := other_kinds.describe(shapes):
        raise ValueError(description)
    layers: dict[str, LayerTensors] = {}
    unknown = []
    misfits = False
    for key in shapes:
        split = split_key(key)
        layer = find_layer(split[0], family_name) if split else None
        if split is None or layer is None:
            unknown.append(key)
            continue
        stem, role = split
        tensors = layers.setdefault(stem, LayerTensors(stem, layer, {}))
        if role in tensors.keys:
            raise ValueError(f"it has {stem} twice, as {tensors.keys[role]} and as {key}")
        tensors.keys[role] = key
    for tensors in layers.values():
        misfits = misfits or not _has_form(tensors.layer, _form(tensors.stem, shapes))
    _check_family(shapes, unknown, family_name, metadata, misfits=misfits)
    modules: dict[str, str] = {}
    for tensors in layers.values():
        _check_shapes(tensors, shapes, family_name)
        for module in tensors.layer.modules:
            if module in modules:
                raise ValueError(f"it has {module} twice, as {modules[module]} and as {tensors.stem}")
            modules[module] = tensors.stem
    return list(layers.values())


def _check_family(
    shapes: Shapes, unknown: list[str], family_name: str, metadata: Mapping[str, str], *, misfits: bool
) -> None:
    """Raises ValueError for a file of another model, and for keys that name no layer.

    `misfits`: whether a layer has other sides than this family's.
    """
    declared = declared_family(metadata)
    likely = likely_family(shapes, metadata)
    fix = f"Fix: name a LoRA for {family_name}"
    if unknown and (model := other_kinds.other_model(shapes)):
        raise ValueError(f"it is a LoRA for {model}, and {family_name} is needed. {fix}")
    if likely not in (None, family_name) and (unknown or misfits or declared == likely):
        raise ValueError(f"it looks like a LoRA for {likely}, and {family_name} is needed. {fix}")
    if unknown:
        raise ValueError(
            f"{len(unknown)} of its {len(shapes)} tensors belong to no layer of {family_name}"
            f"{other_kinds.declared(metadata)}: {some(unknown, most=SHOWN_TENSORS)}"
        )


def _check_shapes(tensors: LayerTensors, shapes: Shapes, family_name: str) -> None:
    """Raises ValueError where the matrices of a layer are missing, empty, or do not go together."""
    stem = tensors.stem
    missing = [role for role in ("down", "up") if role not in tensors.keys]
    if missing:
        raise ValueError(f"{stem} has no {' and no '.join(missing)} matrix")
    for role, key in tensors.keys.items():
        if 0 in shapes[key]:
            raise ValueError(f"its tensor {key} is empty: {list(shapes[key])}")
        if role == "alpha" and math.prod(shapes[key]) != 1:
            raise ValueError(f"its tensor {key} has the shape {list(shapes[key])}, and an alpha is one number")
    down = shapes[tensors.keys["down"]]
    up = shapes[tensors.keys["up"]]
    ranks_match = len(down) >= 2 and len(up) == len(down) and len(down) in (2, 4) and math.prod(up[2:]) == 1
    if ranks_match and "mid" in tensors.keys:
        mid = shapes[tensors.keys["mid"]]
        ranks_match = len(mid) == 4 and mid[:2] == (up[1], down[0]) and math.prod(down[2:]) == 1
    elif ranks_match:
        ranks_match = down[0] == up[1]
    if not ranks_match:
        raise ValueError(f"{stem}: the shapes of down {list(down)} and up {list(up)} do not match")
    if "magnitude" in tensors.keys:
        _check_magnitude(tensors.keys["magnitude"], shapes, up=up, down=down)
    _check_rows(tensors, family_name, rows=up[0], columns=down[1])


def _check_magnitude(key: str, shapes: Shapes, *, up: tuple[int, ...], down: tuple[int, ...]) -> None:
    """Raises ValueError for DoRA magnitudes that are not one a row."""
    shape = shapes[key]
    if shape in ((up[0],), (up[0], *[1] * (len(up) - 1))):
        return
    if shape[:2] == (1, down[1]):
        raise ValueError(
            f"its tensor {key} has DoRA magnitudes of columns, {list(shape)}. Kiln reads those of rows. Fix: train it "
            "with LyCORIS' wd_on_output, or name a LoRA without DoRA"
        )
    raise ValueError(f"its tensor {key} has DoRA magnitudes of shape {list(shape)}; they need one a row, {up[0]}")


def _check_rows(tensors: LayerTensors, family_name: str, *, rows: int, columns: int) -> None:
    """Raises ValueError for a layer that several of diffusers' layers make up, with another number of rows."""
    layer = tensors.layer
    if layer.original is None or len(layer.modules) == 1:
        return
    unit = sum(layer.original.row_ratio)
    if rows % unit:
        raise ValueError(f"{tensors.stem} has {rows} rows, which do not split into {len(layer.modules)} layers")
    if get_family(family_name).LORA_KEYS.one_width and rows != unit * columns:
        raise ValueError(
            f"{tensors.stem} changes a weight of {[rows, columns]}, and in {family_name} this is "
            f"{[unit * columns, columns]}: it is for another model"
        )


def _check_types(header: Header, tensors: LayerTensors) -> None:
    """Raises ValueError for matrices of whole numbers, and for types that no number has."""
    for role, key in tensors.keys.items():
        dtype = header.entries[key].dtype
        if dtype not in numbers.FLOATS and not (role == "alpha" and dtype in numbers.INTEGERS):
            raise ValueError(
                f"its tensor {key} is of type {dtype}, and matrices of a LoRA are floats: the file is quantised or "
                "damaged"
            )


def _check_finite(header: Header) -> None:
    bad = []
    for key, entry in header.entries.items():
        if entry.dtype in numbers.FLOATS and not numbers.is_finite(numbers.read_bits(header, entry), entry.dtype):
            bad.append(key)
    if bad:
        raise ValueError(not_finite(bad, len(header.entries)))


def not_finite(keys: list[str], count: int) -> str:
    """The sentence about the tensors `keys`, of `count` that a file has."""
    return (
        f"{len(keys)} of its {count} tensors are not finite (NaN or infinite), {keys[0]} first: the training that "
        "made it had failed. Fix: name an earlier save"
    )


def check_alpha(key: str, alpha: float) -> None:
    """Raises ValueError for an alpha of 0: it is no strength for some tools (ComfyUI), and alpha = rank for others."""
    if alpha == 0:
        raise ValueError(f"{key}: alpha is 0, which some tools read as no strength and others as full strength")


# ---- the alpha of files without alpha keys


def metadata_of(header: Header) -> dict[str, str]:
    """The metadata of a file, with PEFT's settings from beside adapter_model.safetensors."""
    config = header.path.with_name("adapter_config.json")
    if header.path.name != "adapter_model.safetensors" or not config.is_file():
        return header.metadata
    try:
        return {ADAPTER_SETTINGS: read_regular(config, limit=LARGEST_SETTINGS).decode("utf-8"), **header.metadata}
    except OSError as problem:
        raise ValueError(f"{config} beside it cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise ValueError(f"{config} beside it is damaged: it is not text in UTF-8") from problem


def adapter_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings in the header, as diffusers writes them. Raises ValueError where they are damaged."""
    try:
        settings = json.loads(metadata.get(ADAPTER_SETTINGS, "{}"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"its {ADAPTER_SETTINGS} is damaged: {problem}") from problem
    if not isinstance(settings, dict):
        raise ValueError(f"its {ADAPTER_SETTINGS} is damaged")
    return settings


def scale_in_header(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """The scale by PEFT's settings, whose names may begin with the component's name. Without any, 1."""
    component, _, path = module.partition(".")

    def setting(name: str) -> Any:
        return settings.get(f"{component}.{name}", settings.get(name))

    alpha = setting("lora_alpha")
    if alpha is None:
        alpha = rank
    patterns = setting("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"its {ADAPTER_SETTINGS} is damaged: alpha_pattern")
    for pattern, value in patterns.items():
        if _matches(pattern, path):
            alpha = value
    if type(alpha) not in (int, float) or not abs(alpha) <= numbers.LARGEST_FP32:
        raise ValueError(f"its {ADAPTER_SETTINGS} has no number for the alpha of {module}")
    check_alpha(ADAPTER_SETTINGS, alpha)
    if setting("use_rslora"):  # rank-stabilised, arXiv:2312.03732
        return float(alpha / rank**0.5)
    return float(alpha / rank)


def _matches(pattern: str, path: str) -> bool:
    """Whether a key of PEFT's alpha_pattern means the module `path`, as PEFT matches it.

    Raises ValueError for what is no regular expression, and for one that may take for ever: repeated groups, or more
    repeats than a name of a module needs.
    """
    if PLAIN_NAME.fullmatch(pattern):
        return path == pattern or path.endswith(f".{pattern}")
    if len(pattern) > LONGEST_PATTERN or REPEATED_GROUP.search(pattern) or len(REPEAT.findall(pattern)) > MOST_REPEATS:
        raise ValueError(f"its {ADAPTER_SETTINGS} has an alpha_pattern that names no module: {printable(pattern)}")
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except (re.error, RecursionError, OverflowError) as problem:
        raise ValueError(f"its {ADAPTER_SETTINGS} is damaged: alpha_pattern: {problem}") from problem


# ---- the family of a file


def declared_family(metadata: Mapping[str, str]) -> str | None:
    """The family that the header names in modelspec.architecture; None if it names none that is known."""
    declared = metadata.get("modelspec.architecture", "")
    for name in family_names():
        if declared.startswith(get_family(name).FACTS.architecture):
            return name
    return None


def likely_family(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    """The family whose layers the keys name; None if they name none of any family.

    Families share names. Among those with the most matches the header decides; without one, the family of whose layers
    the file has the larger share. A layer whose weight has other sides than a family's is none of that family's.
    """
    stems = [split[0] for key in shapes if (split := split_key(key))]
    forms = {stem: _form(stem, shapes) for stem in dict.fromkeys(stems)}
    declared = declared_family(metadata)
    scores: dict[str, tuple[int, bool, float]] = {}
    for name in family_names():
        found = [(find_layer(stem, name), forms[stem]) for stem in stems]
        layers = [layer for layer, form in found if layer is not None and _has_form(layer, form)]
        originals = {layer.original.name for layer in layers if layer.original}
        scores[name] = (len(layers), declared == name, len(originals) / len(get_family(name).LORA_KEYS.layers))
    best = max(scores, key=lambda name: scores[name])
    namesake = get_family(best).LORA_KEYS.namesake
    if namesake and scores[namesake][:2] == scores[best][:2]:
        best = namesake
    return best if scores[best][0] else None


def _form(stem: str, shapes: Shapes) -> float:
    """How many rows the weight of this stem has for each column; 0 where that cannot be told."""
    down = shapes.get(f"{stem}.lora_down.weight", shapes.get(f"{stem}.lora_A.weight", ()))
    up = shapes.get(f"{stem}.lora_up.weight", shapes.get(f"{stem}.lora_B.weight", ()))
    if len(down) != 2 or len(up) != 2 or not down[1]:
        return 0.0
    return up[0] / down[1]


def _has_form(layer: Layer, form: float) -> bool:
    """Whether a weight of this form can be the layer's."""
    if layer.original is None or layer.part is not None or not layer.original.rows_per_column or not form:
        return True
    return abs(form / layer.original.rows_per_column - 1) < SAME_FORM
