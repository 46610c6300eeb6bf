"""Between the adapters of a model (peft's names) and the modules of a LoRA file."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trainer.lora_files.convert import stack_layers
from trainer.lora_files.weights import LoraModules, LoraWeights

# ---- modules ↔ the adapters that are being trained (`lora.state`)

FusedTargets = Mapping[str, tuple[str, ...]]  # as `lora.FusedTargets`
MAGNITUDE = "lora_magnitude_vector"  # peft's name for what DoRA trains besides


def unfused_names(module: str, fused: FusedTargets) -> tuple[str, ...]:
    """The modules of diffusers' model that the trained module is: itself, or those that it joins."""
    for whole, parts in fused.items():
        if f".{module}".endswith(f".{whole}"):
            return tuple(module.removesuffix(whole) + part for part in parts)
    return (module,)


def from_peft_state(
    state: Mapping[str, torch.Tensor], *, prefix: str, fused: FusedTargets, scale: float
) -> LoraModules:
    """The modules of what is being trained, `prefix` before their names: views, where it is. Joined layers have equal
    numbers of rows."""
    found: LoraModules = {}
    for key in (k for k in state if k.endswith(".lora_A.weight")):
        module = key.removesuffix(".lora_A.weight")
        down, up = state[key].float(), state[f"{module}.lora_B.weight"].float()
        names, length = unfused_names(module, fused), state.get(f"{module}.{MAGNITUDE}")
        lengths = [None] * len(names) if length is None else length.float().chunk(len(names))
        for name, piece, own in zip(names, up.chunk(len(names)), lengths, strict=True):
            found[f"{prefix}.{name}"] = LoraWeights(down, piece, scale, own)
    return found


def to_peft_state(
    modules: LoraModules, state: Mapping[str, torch.Tensor], *, prefix: str, fused: FusedTargets, scale: float
) -> dict[str, torch.Tensor]:
    """What to load so that training goes on from `modules`. `state`: the adapters as they begin (up matrices zero).

    A smaller rank is filled up with terms that do nothing yet; what the file lacks begins anew. Raises ValueError for
    modules that are not trained, and for other shapes.
    """
    left, out = dict(modules), dict(state)
    for key in (k for k in state if k.endswith(".lora_A.weight")):
        module = key.removesuffix(".lora_A.weight")
        down, up = state[key], state[f"{module}.lora_B.weight"]
        names = unfused_names(module, fused)
        parts = [left.pop(f"{prefix}.{name}", None) for name in names]
        if not any(parts):
            continue
        heights = [up.shape[0] // len(names)] * len(names)
        wrong = [p for p, height in zip(parts, heights, strict=True) if p is not None and p.up.shape[0] != height]
        there = next(p for p in parts if p is not None) if wrong or len(parts) == 1 else stack_layers(parts, heights)
        if wrong or there.down.shape[1:] != down.shape[1:]:
            has, want = (there.up.shape[0], *there.down.shape[1:]), (up.shape[0] // len(names), *down.shape[1:])
            raise ValueError(f"{module} is {want} in this model and {has} in the file: it is of another model")
        if there.rank > down.shape[0]:
            raise ValueError(f"{module} has rank {there.rank} in the file, and {down.shape[0]} in this plan")
        magnitude = f"{module}.{MAGNITUDE}"
        if (there.magnitude is None) == (magnitude in state):
            said = "a DoRA in the file, and none" if there.magnitude is not None else "no DoRA in the file, and one"
            raise ValueError(f"{module} is {said} in this plan")
        if there.magnitude is not None:
            out[magnitude] = there.magnitude.to(state[magnitude])
        filled_down, filled_up = down.clone(), torch.zeros_like(up)
        filled_down[: there.rank] = there.down.to(down)
        filled_up[:, : there.rank] = (there.up * (there.scale / scale)).to(up)
        out[key], out[f"{module}.lora_B.weight"] = filled_down, filled_up
    if left:
        raise ValueError(f"{len(left)} of {len(modules)} modules get no adapter here: {', '.join(list(left)[:5])}")
    return out
