"""Adapters around frozen layers (peft), kept in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from trainer.errors import SettingsError

Blocks = Sequence[tuple[str, torch.nn.Module]]
Fused = dict[str, tuple[str, ...]]  # the fused projection's name → those of its parts, in the order of their rows


def targeted(name: str, targets: Sequence[str]) -> bool:
    """Whether the module name `name` ends with one of `targets`, whole parts of a dotted name only."""
    return any(f".{name}".endswith(f".{t}") for t in targets)


def fuse(blocks: Blocks, *, fused: Fused, targets: Sequence[str]) -> None:
    """Replace projections that read the same input by one, in place, wherever all parts are among `targets`."""
    for _, block in blocks:
        for whole, parts in fused.items():
            parent_name, _, leaf = whole.rpartition(".")
            parent = block.get_submodule(parent_name)
            names = [part.rpartition(".")[2] for part in parts]
            linears = [getattr(parent, n, None) for n in names]
            if all(linears) and all(targeted(part, targets) for part in parts):
                setattr(parent, leaf, _stacked(linears))
                for n in names:
                    delattr(parent, n)
                parent.fused_projections = True  # type: ignore[assignment]


def _stacked(linears: list[Any]) -> torch.nn.Linear:
    """One linear layer whose outputs are those of `linears`, side by side."""
    with torch.device("meta"):
        one = torch.nn.Linear(linears[0].in_features, sum(x.out_features for x in linears), linears[0].bias is not None)
    one.weight = torch.nn.Parameter(torch.cat([x.weight for x in linears]), requires_grad=False)
    if linears[0].bias is not None:
        one.bias = torch.nn.Parameter(torch.cat([x.bias for x in linears]), requires_grad=False)
    return one


def add_adapters(
    denoiser: Any, blocks: Blocks, *, targets: Sequence[str], fused: Fused, rank: int, alpha: float, seed: int
) -> list[torch.nn.Parameter]:
    """Put an adapter on every linear layer in `blocks` whose name ends like one of `targets`; return what trains.

    Layers that `fuse` has joined get one adapter for all. The start is peft's: A random from `seed`, B zero.
    Raises SettingsError if no layer matches.
    """
    joined = [whole for whole, parts in fused.items() if all(targeted(part, targets) for part in parts)]
    names = [
        f"{prefix}.{name}"
        for prefix, block in blocks
        for name, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear) and targeted(name, [*targets, *joined])
    ]
    if not names:
        raise SettingsError(f"PARAMS_TARGET_MODULES {','.join(targets)} matches no linear layer of the model.")
    devices = [torch.device("cuda")] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), adapter_name="default")
    params = [p for p in denoiser.parameters() if p.requires_grad]
    for p in params:
        p.data = p.data.float()
    return params


def state(denoiser: Any) -> dict[str, torch.Tensor]:
    """The adapters' tensors by peft's names (`….lora_A.weight`, `….lora_B.weight`), unscaled; not copies."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(denoiser, adapter_name="default")
    return tensors


def load(denoiser: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Overwrite the adapters. Raises ValueError for missing, unknown or differently shaped tensors."""
    have = state(denoiser)
    wrong = [
        k
        for k in have.keys() | tensors.keys()
        if k not in have or k not in tensors or have[k].shape != tensors[k].shape
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(have)} tensors do not match, {sorted(wrong)[0]} first")
    set_peft_model_state_dict(denoiser, tensors, adapter_name="default")


def split_fused(tensors: dict[str, torch.Tensor], *, fused: Fused) -> dict[str, torch.Tensor]:
    """Adapters of fused projections → adapters of their parts, exactly: the same A, and B by rows (equal parts)."""
    out: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        whole = next((w for w in fused if f".{w}.lora_" in key), None)
        if whole is None:
            out[key] = tensor
            continue
        pieces = [tensor] * len(fused[whole]) if ".lora_A." in key else tensor.chunk(len(fused[whole]))
        for part, piece in zip(fused[whole], pieces, strict=True):
            out[key.replace(f".{whole}.", f".{part}.")] = piece.contiguous().clone()
    return out


def join_fused(tensors: dict[str, torch.Tensor], *, fused: Fused) -> dict[str, torch.Tensor]:
    """The inverse of `split_fused`. Raises ValueError where the parts were trained with an A each."""
    out = dict(tensors)
    for whole, parts in fused.items():
        for key in [k for k in tensors if f".{parts[0]}.lora_A." in k]:
            downs = [tensors[key.replace(f".{parts[0]}.", f".{p}.")] for p in parts]
            if not all(torch.equal(downs[0], d) for d in downs):
                raise ValueError(f"{key}: q, k and v have an adapter each, which PARAMS_SPLIT_QKV=true continues")
            ups = [tensors[key.replace(f".{parts[0]}.", f".{p}.").replace("lora_A", "lora_B")] for p in parts]
            for p in parts:
                del out[key.replace(f".{parts[0]}.", f".{p}.")]
                del out[key.replace(f".{parts[0]}.", f".{p}.").replace("lora_A", "lora_B")]
            joined = key.replace(f".{parts[0]}.", f".{whole}.")
            out[joined], out[joined.replace("lora_A", "lora_B")] = downs[0], torch.cat(ups)
    return out


def read_file(path: Path, *, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file without the model's `prefix`. Raises SettingsError if it is of another family."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as problem:
        raise SettingsError(f"PARAMS_RESUME_FROM {path} is not a safetensors file: {problem}.") from problem
    strange = [k for k in tensors if not k.startswith(f"{prefix}.") or (".lora_A." not in k and ".lora_B." not in k)]
    if strange or not tensors:
        found = f"it has {strange[0]}" if strange else "it is empty"
        raise SettingsError(
            f"PARAMS_RESUME_FROM {path} is not a LoRA for this family: keys like "
            f"{prefix}.….lora_A.weight are needed, {found}."
        )
    return {k.removeprefix(f"{prefix}."): t.float() for k, t in tensors.items()}
