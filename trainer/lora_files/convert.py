"""LoRA files of every tool ↔ `LoraModules`: diffusers' modules, each with matrices of its own.

Exact both ways in fp32; `precision` says what 16 bits change.

A layer that other tools keep as one (q, k and v; Flux's linear1) is split into its parts here, and stacked again to
write. If the parts share the down matrix, the layer has that matrix and the up matrices one above the other. Otherwise
it has the rank-one terms of all parts side by side, and each part's rows of the up matrix are zero in the columns of
the others (the "fusing recipe"): the rank is then the sum of the parts' ranks, and alpha grows with it, so that
scale = alpha / rank stays the same. sd-scripts' `split_qkv` forgets alpha, which leaves a third of the strength.

Shapes: r rank, in and out the sides of a layer, kh and kw the sides of a convolution's kernel;
down (r, in) or (r, in, kh, kw); up (out, r) or (out, r, 1, 1); magnitude (out,).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainer.lora_files import contents, key_names, other_kinds, precision
from trainer.lora_files.key_names import Layer
from trainer.lora_files.precision import Pair, Stored
from trainer.lora_files.weights import LoraModules, LoraWeights
from trainer.spec.family import OriginalLayer, get_family
from trainer.storage import safetensors_header

# → what a job appends to the file's name. No family's job leaves both kohya's keys and native ones.
KEY_FORMATS = {"kohya": "", "comfyui": "-comfyui", "native": "", "peft": "-diffusers"}
DORA_READERS = {"kohya": "ComfyUI, Forge", "comfyui": "ComfyUI, Forge", "native": "ComfyUI", "peft": "diffusers"}
Number = TypeVar("Number", int, float)


# ---- files → modules


def load(
    path: Path, family_name: str, *, without_embeddings: bool = False, with_untrained: bool = False
) -> LoraModules:
    """All modules of the file `path`. Raises ValueError with what is wrong with it.

    `without_embeddings`: leave out those that OneTrainer puts into a file. `with_untrained`: also the modules of rank 0
    that a DoRA file has beside those that trained, in a layer that files keep as one.
    """
    header = safetensors_header.read_header(path)
    safetensors_header.check_is_here(header)
    ignored = other_kinds.bundled_embeddings(header.entries) if without_embeddings else []
    contents.read_layers(header, family_name, ignored=ignored)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as problem:
        raise ValueError(f"it cannot be read: {problem}") from problem
    for key in ignored:
        del tensors[key]
    return from_tensors(tensors, contents.metadata_of(header), family_name, with_untrained=with_untrained)


def from_tensors(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    family_name: str,
    *,
    with_untrained: bool = False,
) -> LoraModules:
    """All modules of a file, in fp32, and as they were before they were balanced for 16 bits.

    Raises ValueError, with names, for what this family's files cannot have.

    `with_untrained`: see `load`.
    """
    layers = contents.assemble({key: tuple(tensor.shape) for key, tensor in tensors.items()}, family_name, metadata)
    not_finite = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if not_finite:
        raise ValueError(contents.not_finite(not_finite, len(tensors)))
    settings = contents.adapter_settings(metadata)
    exponents = precision.balance(metadata, [layer.stem for layer in layers])
    modules: LoraModules = {}
    for layer in layers:
        roles = {role: tensors[key].float() for role, key in layer.keys.items()}
        if "alpha" in roles:
            contents.check_alpha(layer.keys["alpha"], roles["alpha"].item())
        weights = _read_weights(roles, layer.layer.modules[0], settings)
        modules |= _split_layer(layer.layer, precision.unbalanced(weights, exponents[layer.stem]))
    for name in key_names.untrained_modules(metadata):
        untrained = modules.pop(name, None)
        if untrained is not None and with_untrained:
            modules[name] = replace(untrained, down=untrained.down[:0], up=untrained.up[:, :0])
    return modules


def _read_weights(roles: Mapping[str, torch.Tensor], module: str, settings: Mapping[str, Any]) -> LoraWeights:
    """`roles`: down, up, mid, alpha and magnitude, as far as the file has them; the shapes fit."""
    down = roles["down"]
    up = roles["up"]
    rank = down.shape[0]
    scale = roles["alpha"].item() / rank if "alpha" in roles else contents.scale_in_header(module, rank, settings)
    if "mid" in roles:
        # LyCORIS' LoCon with Tucker's decomposition: a convolution (r, r, kh, kw) between two of 1 x 1.
        down = torch.einsum("abhw,bi->aihw", roles["mid"], down.flatten(1))
        up = up.view(up.shape[0], -1, 1, 1)
    magnitude = roles.get("magnitude")
    if magnitude is not None:
        magnitude = magnitude.flatten()
    return LoraWeights(down, up, scale, magnitude)


def _split_layer(layer: Layer, weights: LoraWeights) -> LoraModules:
    """The parts of a layer that files keep as one. A part keeps the rank-one terms in which it is not zero."""
    original = layer.original
    if original is None or layer.part is not None:
        return {layer.modules[0]: weights}
    if len(original.diffusers_names) == 1:
        return {layer.modules[0]: _reorder_rows(original, weights)}
    row_count = weights.up.shape[0]
    untrained = not weights.up.any()
    parts: LoraModules = {}
    top = 0
    for name, share in zip(layer.modules, original.row_ratio, strict=True):
        bottom = top + row_count // sum(original.row_ratio) * share
        up = weights.up[top:bottom]
        magnitude = None
        if weights.magnitude is not None:
            magnitude = weights.magnitude[top:bottom]
        columns = up.any(dim=0).nonzero().flatten()
        if untrained:  # every term belongs to every part
            columns = torch.arange(weights.rank)
        elif magnitude is not None and not len(columns):  # only magnitudes were learnt: keep one term, which is zero
            columns = torch.arange(1)
        if len(columns):
            parts[name] = LoraWeights(weights.down[columns], up[:, columns], weights.scale, magnitude)
        top = bottom
    return parts


def _reorder_rows(original: OriginalLayer, weights: LoraWeights) -> LoraWeights:
    """Between the original order of the rows and diffusers': some adaptive norms have scale and shift swapped."""
    if not original.halves_swapped or weights.up.shape[0] != 2 * weights.down.shape[1]:
        return weights
    up = torch.cat(weights.up.chunk(2)[::-1])
    if weights.magnitude is None:
        return replace(weights, up=up)
    return replace(weights, up=up, magnitude=torch.cat(weights.magnitude.chunk(2)[::-1]))


def stack_layers(parts: Sequence[LoraWeights | None], heights: Sequence[int]) -> LoraWeights:
    """The weights of one layer whose rows are those of `parts`, one above the other. None: a part without a LoRA.

    `heights`: the number of rows of each part. Rows that several down matrices have are kept once, so that parts with
    one common down matrix do not raise the rank. Raises ValueError if some parts have magnitudes and some not.
    """
    present = [part for part in parts if part is not None]
    scale = present[0].scale
    if any(part.scale != scale for part in present):
        return stack_layers([part and part.folded() for part in parts], heights)
    down, columns_of_parts = _merge_rows([part.down for part in present])
    up = torch.zeros(sum(heights), len(down))
    top = 0
    columns = iter(columns_of_parts)
    for part, height in zip(parts, heights, strict=True):
        if part is not None:
            up[top : top + height, next(columns)] = part.up
        top += height
    magnitudes = [part.magnitude for part in present if part.magnitude is not None]
    if not magnitudes:
        return LoraWeights(down, up, scale)
    if len(magnitudes) < len(parts):
        raise ValueError(
            "a layer that these files keep as one has DoRA magnitudes for some of its rows only; the job's kohya file "
            "has them for all"
        )
    return LoraWeights(down, up, scale, torch.cat(magnitudes))


def _merge_rows(downs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[list[int]]]:
    """A matrix with the rows of all `downs`, equal ones once, and for each of `downs` the places of its rows in it.

    Rows that are equal within one matrix stay apart: the n-th of them matches the n-th in the other matrices.
    """
    places: dict[tuple[bytes, int], int] = {}
    rows: list[torch.Tensor] = []
    places_of_downs: list[list[int]] = []
    for down in downs:
        seen: Counter[bytes] = Counter()
        own_places = []
        for row in down:
            content = row.contiguous().numpy().tobytes()
            place = places.setdefault((content, seen[content]), len(places))
            if place == len(rows):
                rows.append(row)
            own_places.append(place)
            seen[content] += 1
        places_of_downs.append(own_places)
    return torch.stack(rows), places_of_downs


# ---- modules → files


@dataclass(frozen=True)
class LoraFile:
    """The tensors of a file, and what its header says of them."""

    tensors: dict[str, torch.Tensor]
    rank: int  # the commonest
    alpha: float  # the same for all modules
    header: dict[str, str]  # of the number format
    pair_count: int
    wide_count: int  # pairs of matrices that are fp32, since 16 bits would lose something of them


@dataclass(frozen=True)
class _Stacked:
    """A layer as files keep it. `heights`: the rows of each of its parts, from top to bottom."""

    weights: LoraWeights
    heights: Sequence[int]


def to_file(modules: LoraModules, key_format: str, family_name: str, save_precision: str = "fp32") -> LoraFile:
    """The content of a file with the keys of `key_format`, and matrices in `save_precision`; the rest is fp32.

    Raises ValueError for a module that has no name in this format.
    """
    modules = {name: weights.to_cpu() for name, weights in modules.items()}
    if key_format == "peft":
        return _to_peft_file(modules, save_precision)
    layers = _stack_modules(modules, key_format, family_name)
    if key_format == "native":
        return _to_native_file(layers, save_precision)
    return _to_kohya_file(layers, save_precision)


def count_numbers(modules: LoraModules, key_format: str, family_name: str) -> tuple[int, int]:
    """How many numbers the matrices of a file of these modules have, and how many it has besides.

    Parts of one layer share a down matrix where it is the same tensor.
    """
    if key_format == "peft":
        pairs = [weights for weights in modules.values() if weights.rank]
        in_matrices = sum(weights.down.numel() + weights.up.numel() for weights in pairs)
        return in_matrices, sum(weights.magnitude.numel() for weights in pairs if weights.magnitude is not None)
    in_matrices = 0
    besides = 0
    for parts in _by_layer(modules, family_name):
        original = parts.layer.original
        present = list(parts.modules.values())
        rows = len(present[0].up)
        if original is not None and len(original.diffusers_names) > 1:
            rows = sum(_heights(original.name, parts.modules, original.row_ratio))
        downs = {id(weights.down): weights.down for weights in present}
        for down in downs.values():
            in_matrices += down.numel() + len(down) * rows
        if key_format != "native":
            besides += 1  # alpha
        if present[0].magnitude is not None:
            besides += rows
    return in_matrices, besides


def _to_peft_file(modules: LoraModules, save_precision: str) -> LoraFile:
    """The scale is folded into lora_B, so that alpha = rank: ComfyUI and Forge ignore PEFT's alpha."""
    modules = {name: weights for name, weights in modules.items() if weights.rank}
    pairs = {}
    tensors = {}
    for name, weights in modules.items():
        pairs[name] = Pair(weights.down, weights.folded().up, [len(weights.up)])
        if weights.magnitude is not None:
            # transformers renames keys up to the adapter's name, and does not add `.weight` as peft does.
            ending = ".weight" if name.startswith("text_encoder") else ""
            tensors[f"{name}.lora_magnitude_vector{ending}"] = weights.magnitude.float()
    stored = precision.store(pairs, save_precision)
    for name, pair in stored.pairs.items():
        tensors[f"{name}.lora_A.weight"] = pair.down
        tensors[f"{name}.lora_B.weight"] = pair.up
    rank = _commonest([weights.rank for weights in modules.values()])
    return _lora_file(tensors, stored, save_precision, rank=rank, alpha=float(rank))


def _to_kohya_file(layers: Mapping[str, _Stacked], save_precision: str) -> LoraFile:
    """`layers`: by their stems. Also ComfyUI's format, whose stems are dotted.

    All modules get the same alpha, and the rest of their scale is folded into lora_up: diffusers applies the commonest
    alpha of an SDXL file to attention layers that have another.
    """
    # 9 digits: scales that were divided by different ranks give the same alpha again.
    alphas = [float(f"{layer.weights.scale * layer.weights.rank:.9g}") for layer in layers.values()]
    alpha = _commonest(alphas)
    pairs = {}
    tensors = {}
    for stem, layer in layers.items():
        weights = layer.weights
        up = weights.up * (weights.scale * weights.rank / alpha)
        pairs[stem] = Pair(weights.down, up, layer.heights)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        if weights.magnitude is not None:
            tensors[f"{stem}.dora_scale"] = weights.magnitude.float().view(-1, *[1] * (weights.down.ndim - 1))
    stored = precision.store(pairs, save_precision)
    for stem, pair in stored.pairs.items():
        tensors[f"{stem}.lora_down.weight"] = pair.down
        tensors[f"{stem}.lora_up.weight"] = pair.up
    rank = _commonest([layer.weights.rank for layer in layers.values()])
    return _lora_file(tensors, stored, save_precision, rank=rank, alpha=alpha)


def _to_native_file(layers: Mapping[str, _Stacked], save_precision: str) -> LoraFile:
    """PEFT's endings at the original model's dotted names. The scale is folded into lora_B, as in PEFT's files."""
    pairs = {}
    tensors = {}
    for stem, layer in layers.items():
        weights = layer.weights
        pairs[stem] = Pair(weights.down, weights.folded().up, layer.heights)
        if weights.magnitude is not None:
            tensors[f"{stem}.dora_scale"] = weights.magnitude.float().view(-1, *[1] * (weights.down.ndim - 1))
    stored = precision.store(pairs, save_precision)
    for stem, pair in stored.pairs.items():
        tensors[f"{stem}.lora_A.weight"] = pair.down
        tensors[f"{stem}.lora_B.weight"] = pair.up
    rank = _commonest([layer.weights.rank for layer in layers.values()])
    return _lora_file(tensors, stored, save_precision, rank=rank, alpha=float(rank))


def _lora_file(
    tensors: Mapping[str, torch.Tensor], stored: Stored, save_precision: str, *, rank: int, alpha: float
) -> LoraFile:
    header = {precision.PRECISION: save_precision, **stored.header}
    own = {key: tensor.cpu().contiguous().clone() for key, tensor in sorted(tensors.items())}
    return LoraFile(own, rank, alpha, header, len(stored.pairs), len(stored.wide))


def _commonest(numbers: Sequence[Number]) -> Number:
    """Of several that are as common, the first."""
    counts = Counter(numbers)
    return max(counts, key=lambda number: counts[number])


@dataclass(frozen=True)
class _Parts:
    """A layer that files keep as one, and the modules in it by their place; a text encoder's has no `original`."""

    layer: Layer
    modules: dict[int, LoraWeights]


def _by_layer(modules: LoraModules, family_name: str) -> list[_Parts]:
    """The modules, those of one layer of the original model together. Raises ValueError for one that is no layer."""
    found: dict[tuple[str, str, str], _Parts] = {}
    for name, weights in modules.items():
        layer = key_names.find_layer(name, family_name)
        if layer is None:
            raise ValueError(f"{name} has no name in this format")
        key = (layer.component, layer.original.name if layer.original else layer.path, layer.number)
        found.setdefault(key, _Parts(layer, {})).modules[layer.part or 0] = weights
    return list(found.values())


def _stack_modules(modules: LoraModules, key_format: str, family_name: str) -> dict[str, _Stacked]:
    """The stems of the original model's layers in this format → the layers."""
    encoder_names = get_family(family_name).LORA_KEYS.encoders
    of_encoders: dict[str, _Stacked] = {}
    of_denoiser: dict[str, _Stacked] = {}
    for parts in _by_layer(modules, family_name):
        layer = parts.layer
        if layer.original is None:
            weights = parts.modules[0]
            stem = f"lora_{encoder_names[layer.component]}_{layer.path.replace('.', '_')}"
            of_encoders[stem] = _Stacked(weights, [len(weights.up)])
            continue
        path = layer.original.name.replace("{}", layer.number)
        stem = f"lora_unet_{path.replace('.', '_')}"
        if key_format in ("comfyui", "native"):
            stem = f"diffusion_model.{path}"
        if len(layer.original.diffusers_names) == 1:
            weights = _reorder_rows(layer.original, parts.modules[0])
            of_denoiser[stem] = _Stacked(weights, [len(weights.up)])
        else:
            heights = _heights(path, parts.modules, layer.original.row_ratio)
            stacked = stack_layers([parts.modules.get(i) for i in range(len(heights))], heights)
            of_denoiser[stem] = _Stacked(stacked, heights)
    return of_encoders | of_denoiser


def _heights(path: str, parts: Mapping[int, LoraWeights], row_ratio: Sequence[int]) -> list[int]:
    """The rows of each part of a layer, from those of the parts that are present."""
    units = {weights.up.shape[0] / row_ratio[i] for i, weights in parts.items()}
    if len(units) > 1:
        raise ValueError(f"the numbers of rows of the parts of {path} do not match: {sorted(units)}")
    unit = units.pop()
    return [int(share * unit) for share in row_ratio]


def merge(loras: Sequence[tuple[LoraModules, float]]) -> LoraModules:
    """The sum of several LoRAs, each times its weight: ranks add up, nothing is approximated.

    Raises ValueError for DoRA, whose magnitudes do not add up; one such LoRA with weight 1 stays as it is.
    """
    if len(loras) == 1:
        [(modules, strength)] = loras
        if strength == 1:
            return dict(modules)
    if any(weights.magnitude is not None for modules, _ in loras for weights in modules.values()):
        raise ValueError("DoRA files cannot be merged or weighted")
    merged: LoraModules = {}
    for name in dict.fromkeys(name for modules, _ in loras for name in modules):
        parts = []
        for modules, strength in loras:
            if name in modules and strength:
                parts.append(replace(modules[name], scale=modules[name].scale * strength).folded())
        if parts:
            down = torch.cat([part.down for part in parts])
            up = torch.cat([part.up for part in parts], dim=1)
            merged[name] = LoraWeights(down, up, 1.0)
    return merged
