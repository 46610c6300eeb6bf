"""The adapters that train in the model (PEFT's names) ↔ the modules of a LoRA file.

A layer that trains as one, where diffusers' model has several (`FusedTargets`), is split into these and joined again.
Shapes: r rank, in and out the sides of a layer; down (r, in), up (out, r), magnitude (out,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trainer.lora_files.convert import stack_layers
from trainer.lora_files.weights import LoraModules, LoraWeights

FusedTargets = Mapping[str, tuple[str, ...]]  # suffix of a fused layer → those of diffusers' layers, as in Facts
DOWN = ".lora_A.weight"
UP = ".lora_B.weight"
MAGNITUDE = ".lora_magnitude_vector"  # PEFT's name for DoRA's magnitudes


def unfused_names(module: str, fused: FusedTargets) -> tuple[str, ...]:
    """The names in diffusers' model of a layer that trains: its own, or those of the layers that it fuses."""
    for fused_suffix, suffixes in fused.items():
        if f".{module}".endswith(f".{fused_suffix}"):
            return tuple(module.removesuffix(fused_suffix) + suffix for suffix in suffixes)
    return (module,)


def from_peft_state(
    state: Mapping[str, torch.Tensor], *, prefix: str, fused: FusedTargets, scale: float
) -> LoraModules:
    """The modules of the adapters `state` (`adapters.state`), with `prefix` and a dot before their names.

    Views, on the state's device. Fused layers have equal numbers of rows.
    """
    modules: LoraModules = {}
    for key in state:
        if not key.endswith(DOWN):
            continue
        module = key.removesuffix(DOWN)
        down = state[key].float()
        up = state[module + UP].float()
        magnitude = state.get(module + MAGNITUDE)
        names = unfused_names(module, fused)
        ups = up.chunk(len(names))
        magnitudes: Sequence[torch.Tensor | None] = [None] * len(names)
        if magnitude is not None:
            magnitudes = magnitude.float().chunk(len(names))
        for name, part_up, part_magnitude in zip(names, ups, magnitudes, strict=True):
            modules[f"{prefix}.{name}"] = LoraWeights(down, part_up, scale, part_magnitude)
    return modules


def to_peft_state(
    modules: LoraModules, state: Mapping[str, torch.Tensor], *, prefix: str, fused: FusedTargets, scale: float
) -> dict[str, torch.Tensor]:
    """The state to load so that training starts from `modules`. `state`: the new adapters, whose up matrices are zero.

    A smaller rank is filled up with terms that are zero at first; adapters that the file lacks stay new. Modules whose
    up matrix is zero change nothing: a layer that files keep as one has them for parts that never trained. They are
    left out where they do not fit. Raises ValueError for other modules that do not train, and for other shapes.
    """
    remaining = dict(modules)
    loaded = dict(state)
    for key in state:
        if not key.endswith(DOWN):
            continue
        module = key.removesuffix(DOWN)
        down = state[key]
        up = state[module + UP]
        names = unfused_names(module, fused)
        parts = [remaining.pop(f"{prefix}.{name}", None) for name in names]
        if not any(parts):
            continue
        weights = _join(module, parts, down, up)
        if weights.rank > down.shape[0] and _is_idle(weights):
            continue
        if weights.rank > down.shape[0]:
            raise ValueError(f"{module} has rank {weights.rank} in the file, and rank {down.shape[0]} in this job")
        magnitude_key = module + MAGNITUDE
        if weights.magnitude is not None and magnitude_key not in state:
            raise ValueError(f"{module} is DoRA in the file, but not in this job")
        if weights.magnitude is None and magnitude_key in state:
            raise ValueError(f"{module} is DoRA in this job, but not in the file")
        if weights.magnitude is not None:
            loaded[magnitude_key] = weights.magnitude.to(state[magnitude_key])
        filled_down = down.clone()
        filled_up = torch.zeros_like(up)
        filled_down[: weights.rank] = weights.down.to(down)
        # The model multiplies by its own scale.
        filled_up[:, : weights.rank] = (weights.up * (weights.scale / scale)).to(up)
        loaded[key] = filled_down
        loaded[module + UP] = filled_up
    remaining = {name: weights for name, weights in remaining.items() if not _is_idle(weights)}
    if remaining:
        names_left = ", ".join(list(remaining)[:5])
        raise ValueError(f"{len(remaining)} of its {len(modules)} modules have no adapter in this job: {names_left}")
    return loaded


def new_adapters(
    modules: LoraModules, state: Mapping[str, torch.Tensor], *, prefix: str, fused: Mapping[str, tuple[str, ...]]
) -> list[str]:
    """The layers with adapters in `state` for which `modules` have nothing."""
    new = []
    for key in state:
        module = key.removesuffix(DOWN)
        if key == module:
            continue
        if not any(f"{prefix}.{name}" in modules for name in unfused_names(module, fused)):
            new.append(module)
    return new


def _is_idle(weights: LoraWeights) -> bool:
    return weights.magnitude is None and not weights.up.any()


def _join(module: str, parts: list[LoraWeights | None], down: torch.Tensor, up: torch.Tensor) -> LoraWeights:
    """The weights of the layer that trains, from those of its parts in the file.

    `down`, `up`: the matrices that train. Raises ValueError if the file's have other sides.
    """
    height = up.shape[0] // len(parts)
    if down.ndim == 2:
        parts = [part and part.without_kernel() for part in parts]
    present = [part for part in parts if part is not None]
    wrong = any(part.up.shape[0] != height for part in present)
    weights = present[0]
    if not wrong and len(parts) > 1:
        weights = stack_layers(parts, [height] * len(parts))
    if wrong or weights.down.shape[1:] != down.shape[1:]:
        in_file = (weights.up.shape[0], *weights.down.shape[1:])
        in_model = (height, *down.shape[1:])
        raise ValueError(f"{module} is {in_model} in this model and {in_file} in the file, which is for another model")
    return weights
