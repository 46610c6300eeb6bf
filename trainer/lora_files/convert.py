"""LoRA files of every tool ↔ one form: diffusers' modules, each with its own matrices. Exact both ways.

A layer that other tools keep as one (q, k, v; Flux's linear1) is here its parts. Where they share the down matrix, the
whole is that matrix and the stack_layers up matrices; otherwise their terms of rank one side by side, block by block.
Shapes: down (r, in) or (r, in, kh, kw); up (out, r) or (out, r, 1, 1).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trainer.lora_files import key_names
from trainer.lora_files.weights import LoraModules, LoraWeights
from trainer.spec.family import OriginalLayer, get_family

KEY_FORMATS = {"kohya": "", "comfyui": "-comfyui", "peft": "-diffusers"}  # → what a job adds to the name of such a file
DORA_READERS = {"kohya": "ComfyUI, Forge", "comfyui": "ComfyUI, Forge", "peft": "diffusers"}


# ---- files → modules


def load(path: Path, family_name: str) -> LoraModules:
    """All modules of the file `path`. Raises ValueError with what is wrong with it."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as problem:
        raise ValueError(f"it is not a safetensors file: {problem}") from problem
    return from_tensors(tensors, metadata, family_name)


def from_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], family_name: str) -> LoraModules:
    """All modules of a file, in fp32. Raises ValueError, with names, for what this family's files cannot have."""
    stems: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        found = key_names.split_key(key)
        if found is None or key_names.find_layer(found[0], family_name) is None:
            unknown.append(key)
        else:
            stems.setdefault(found[0], {})[found[1]] = tensor.float()
    if unknown or not stems:
        raise ValueError(
            f"{len(unknown)} of {len(tensors)} keys mean nothing here: {', '.join(unknown[:5]) or 'empty'}"
        )
    modules: LoraModules = {}
    for stem, roles in stems.items():
        there = key_names.find_layer(stem, family_name)
        assert there is not None
        for name, adapter in _split(there, _adapter(stem, roles, there.modules[0], metadata)).items():
            if name in modules:
                raise ValueError(f"{name} is there twice, as {stem} too")
            modules[name] = adapter
    return modules


def _adapter(stem: str, roles: Mapping[str, torch.Tensor], module: str, metadata: Mapping[str, str]) -> LoraWeights:
    lacking = {"down", "up"} - roles.keys()
    if lacking:
        raise ValueError(f"{stem} has no {' and no '.join(sorted(lacking))} matrix")
    down, up = roles["down"], roles["up"]
    if down.ndim < 2 or up.ndim != down.ndim or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise ValueError(f"{stem} has matrices of shapes {list(down.shape)} and {list(up.shape)}")
    bad = [role for role, tensor in roles.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{stem}: {bad[0]} is not finite")
    rank = down.shape[0]
    scale = roles["alpha"].item() / rank if "alpha" in roles else _scale_in_header(module, rank, metadata)
    if scale == 0:
        raise ValueError(f"{stem}: alpha is 0, which is no strength to some tools and the full strength to others")
    magnitude = roles.get("magnitude")
    if magnitude is not None and magnitude.shape not in ((up.shape[0],), (up.shape[0], *[1] * (up.ndim - 1))):
        raise ValueError(f"{stem} has DoRA magnitudes of shape {list(magnitude.shape)}: only those of rows are read")
    return LoraWeights(down, up, scale, None if magnitude is None else magnitude.flatten())


def _scale_in_header(module: str, rank: int, metadata: Mapping[str, str]) -> float:
    """Diffusers' `lora_adapter_metadata`: peft's settings, with the component before each name. Without it, 1."""
    said: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    component, _, path = module.partition(".")
    alpha = said.get(f"{component}.lora_alpha", rank)
    for pattern, value in (said.get(f"{component}.alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
    return float(alpha / (rank**0.5 if said.get(f"{component}.use_rslora") else rank))


def _split(there: key_names.Layer, whole: LoraWeights) -> LoraModules:
    """The parts of a layer as its file has it. A part keeps the terms in which it has something."""
    native = there.original
    if native is None or there.part is not None:
        return {there.modules[0]: whole}
    if len(native.diffusers_names) == 1:
        return {there.modules[0]: _swapped(whole) if native.halves_swapped else whole}
    rows = whole.up.shape[0]
    if rows % sum(native.row_ratio):
        raise ValueError(f"{native.name} has {rows} rows, which {len(native.diffusers_names)} layers cannot share")
    heights = [rows // sum(native.row_ratio) * share for share in native.row_ratio]
    ups = whole.up.split(heights)
    lengths = [None] * len(ups) if whole.magnitude is None else whole.magnitude.split(heights)
    used = [up.any(dim=0).nonzero().flatten() for up in ups]
    if not any(len(columns) for columns in used):  # nothing was learned: all of it belongs to all of them
        used = [torch.arange(whole.rank)] * len(ups)
    if whole.magnitude is not None:  # a part may have learnt that alone: one term that does nothing stands for none
        used = [columns if len(columns) else torch.arange(1) for columns in used]
    return {
        name: LoraWeights(whole.down[columns], up[:, columns], whole.scale, length)
        for name, up, columns, length in zip(there.modules, ups, used, lengths, strict=True)
        if len(columns)
    }


def _swapped(adapter: LoraWeights) -> LoraWeights:
    """Exchange the halves of the rows, where there are two."""
    if adapter.up.shape[0] != 2 * adapter.down.shape[1]:
        return adapter
    length = adapter.magnitude
    swapped = None if length is None else torch.cat(length.chunk(2)[::-1])
    return replace(adapter, up=torch.cat(adapter.up.chunk(2)[::-1]), magnitude=swapped)


def stack_layers(parts: Sequence[LoraWeights | None], heights: Sequence[int]) -> LoraWeights:
    """One adapter for layers with these numbers of rows, one above the other; None: one without an adapter.

    Rows of the down matrices that are equal are kept once. Raises ValueError where some have magnitudes and some not.
    """
    there = [p for p in parts if p is not None]
    if len({p.scale for p in there}) > 1:
        return stack_layers([None if p is None else p.folded() for p in parts], heights)
    places: dict[tuple[bytes, int], int] = {}
    chosen: list[list[int]] = []
    downs: list[torch.Tensor] = []
    for part in there:
        seen: Counter[bytes] = Counter()
        chosen.append([])
        for row in part.down:
            raw = row.contiguous().numpy().tobytes()
            place = places.setdefault((raw, seen[raw]), len(places))
            if place == len(downs):
                downs.append(row)
            chosen[-1].append(place)
            seen[raw] += 1
    up, top, columns = torch.zeros(sum(heights), len(downs)), 0, iter(chosen)
    for piece, height in zip(parts, heights, strict=True):
        if piece is not None:
            up[top : top + height, next(columns)] = piece.up
        top += height
    lengths = [p.magnitude for p in there if p.magnitude is not None]
    if lengths and len(lengths) < len(parts):
        raise ValueError("layers that files have as one are partly DoRA and partly not")
    return LoraWeights(torch.stack(downs), up, there[0].scale, torch.cat(lengths) if lengths else None)


# ---- modules → files


@dataclass(frozen=True)
class LoraFile:
    """The tensors of a file, and what its header has to say about them: the commonest rank and the one alpha."""

    tensors: dict[str, torch.Tensor]
    rank: int
    alpha: float


def to_file(modules: LoraModules, to: str, family_name: str) -> LoraFile:
    """The file in format `to`, in fp32. Raises ValueError for a module that has no name there."""
    modules = {name: adapter.to_cpu() for name, adapter in modules.items()}
    if to == "peft":
        tensors = {}
        for name, adapter in modules.items():
            tensors[f"{name}.lora_A.weight"] = adapter.down
            tensors[f"{name}.lora_B.weight"] = adapter.folded().up  # then alpha = rank, for readers that know no alpha
            if adapter.magnitude is not None:
                tensors[f"{name}.lora_magnitude_vector"] = adapter.magnitude
        rank = Counter(a.rank for a in modules.values()).most_common(1)[0][0]
        return LoraFile(_plain(tensors), rank, float(rank))
    whole = _joined(modules, to, family_name)
    ranks = Counter(a.rank for a in whole.values())
    # One alpha for all, which some readers take from the first module they see.
    alpha = Counter(float(f"{a.scale * a.rank:.9g}") for a in whole.values()).most_common(1)[0][0]
    tensors = {}
    for stem, adapter in whole.items():
        factor = adapter.scale * adapter.rank / alpha
        tensors[f"{stem}.lora_down.weight"] = adapter.down
        tensors[f"{stem}.lora_up.weight"] = adapter.up if abs(factor - 1) < 1e-8 else adapter.up * factor
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        if adapter.magnitude is not None:
            tensors[f"{stem}.dora_scale"] = adapter.magnitude.view(-1, *[1] * (adapter.down.ndim - 1))
    return LoraFile(_plain(tensors), ranks.most_common(1)[0][0], alpha)


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.float().cpu().contiguous().clone() for key, tensor in sorted(tensors.items())}


def _joined(modules: LoraModules, to: str, family_name: str) -> LoraModules:
    """Layers of the original model by the names that files give them → their adapters."""
    whole: LoraModules = {}
    shared: dict[tuple[OriginalLayer, str], dict[int, LoraWeights]] = {}
    for name, adapter in modules.items():
        there = key_names.find_layer(name, family_name)
        if there is None:
            raise ValueError(f"{name} has no name in files of this format")
        if there.original is None:
            short = get_family(family_name).LORA_KEYS.encoders[there.component]
            whole[f"lora_{short}_{there.path.replace('.', '_')}"] = adapter
        else:
            shared.setdefault((there.original, there.number), {})[there.part or 0] = adapter
    for (native, number), parts in shared.items():
        path = native.name.replace("{}", number)
        stem = f"diffusion_model.{path}" if to == "comfyui" else f"lora_unet_{path.replace('.', '_')}"
        if len(native.diffusers_names) == 1:
            whole[stem] = _swapped(parts[0]) if native.halves_swapped else parts[0]
        else:
            units = {a.up.shape[0] / native.row_ratio[i] for i, a in parts.items()}
            if len(units) > 1:
                raise ValueError(f"the parts of {path} have {sorted(units)} rows where they should have as many")
            heights = [int(share * next(iter(units))) for share in native.row_ratio]
            whole[stem] = stack_layers([parts.get(i) for i in range(len(heights))], heights)
    return whole


def merge(several: Sequence[tuple[LoraModules, float]]) -> LoraModules:
    """The sum of several files, each times its weight: ranks add up, nothing is approximated.

    Raises ValueError for DoRA, whose rows' lengths do not add up; one such file at weight 1 stays as it is.
    """
    if len(several) == 1 and several[0][1] == 1:
        return dict(several[0][0])
    if any(adapter.magnitude is not None for modules, _ in several for adapter in modules.values()):
        raise ValueError("DoRA files can be neither added up nor weighted")
    found: LoraModules = {}
    for name in dict.fromkeys(name for modules, _ in several for name in modules):
        parts = [
            replace(m[name], scale=m[name].scale * weight).folded() for m, weight in several if name in m and weight
        ]
        if parts:
            found[name] = LoraWeights(torch.cat([p.down for p in parts]), torch.cat([p.up for p in parts], dim=1), 1.0)
    return found
