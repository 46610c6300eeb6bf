"""LoRA adapters around frozen layers, made by peft and kept in fp32: which layers get one, their state, loading."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from trainer.engine.quantization.frozen_linear import FrozenLinear
from trainer.engine.quantization.lora_linear import LoraLinear
from trainer.spec.errors import SettingsError
from trainer.spec.targets import is_target

Blocks = Sequence[tuple[str, torch.nn.Module]]
Fused = dict[str, tuple[str, ...]]  # name of a fused projection → the names of its parts, in the order of their rows


def fuse_projections(blocks: Blocks, *, fused: Fused, targets: Sequence[str]) -> None:
    """Replace projections that read the same input by one, in place, wherever all parts are among `targets`.

    One large product is faster than several small ones, and its input is quantised once. A block may have some of its
    projections joined and others not: its forward pass asks which there are.
    """
    for prefix, block in blocks:
        for fused_name, parts in fused.items():
            parent_name, _, leaf = fused_name.rpartition(".")
            parent = block.get_submodule(parent_name)
            names = [part.rpartition(".")[2] for part in parts]
            linears = [getattr(parent, name, None) for name in names]
            if all(linears) and all(is_target(f"{prefix}.{part}", targets) for part in parts):
                setattr(parent, leaf, _concatenated(linears))
                for name in names:
                    delattr(parent, name)
                # diffusers' attention reads this attribute; torch's stubs type all of a module's as Tensor or Module.
                parent.fused_projections = True  # type: ignore[assignment]


def gets_adapter(name: str, *, targets: Sequence[str], fused: Fused) -> bool:
    """Whether the layer of this full name gets an adapter: it is a target, or fuses layers that all are."""
    if is_target(name, targets):
        return True
    for fused_name, parts in fused.items():
        if f".{name}".endswith(f".{fused_name}"):
            stem = name.removesuffix(fused_name)
            return all(is_target(f"{stem}{part}", targets) for part in parts)
    return False


def _concatenated(linears: list[Any]) -> torch.nn.Linear:
    """One linear layer whose outputs are those of `linears`, one after another."""
    first = linears[0]
    has_bias = first.bias is not None
    with torch.device("meta"):
        fused = torch.nn.Linear(first.in_features, sum(linear.out_features for linear in linears), has_bias)
    fused.weight = torch.nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if has_bias:
        fused.bias = torch.nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return fused


def add_adapters(
    denoiser: Any,
    blocks: Blocks,
    *,
    targets: Sequence[str],
    fused: Fused,
    rank: int,
    alpha: float,
    seed: int,
    kind: str = "lora",
) -> list[torch.nn.Parameter]:
    """Put an adapter on every linear layer in `blocks` whose name ends like one of `targets`; return what trains.

    `kind`: lora; rslora (arXiv:2312.03732), which scales by alpha / √rank; dora (arXiv:2402.09353). Fused projections
    get one adapter. Initialised as peft does: A random from `seed`, B zero. Raises SettingsError if no layer matches.
    """
    names = _adapter_layers(blocks, targets=targets, fused=fused)
    if not names:
        raise SettingsError(f"PARAMS_TARGET_MODULES {','.join(targets)} matches no linear layer of the model.")
    devices = [torch.device("cuda")] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=names, use_rslora=kind == "rslora", use_dora=kind == "dora"
        )
        config._register_custom_module({torch.nn.Linear: LoraLinear, FrozenLinear: LoraLinear})
        with warnings.catch_warnings():
            # peft does not know FrozenLinear, and needs only its in_features and out_features.
            warnings.filterwarnings("ignore", "Unsupported layer type")
            denoiser.add_adapter(config, adapter_name="default")
    params = [p for p in denoiser.parameters() if p.requires_grad]
    for p in params:
        p.data = p.data.float()
    return params


def unmatched_targets(blocks: Blocks, targets: Sequence[str]) -> list[str]:
    """Those of `targets` that mean no linear layer in `blocks`."""
    unmatched = []
    for target in targets:
        if not _adapter_layers(blocks, targets=(target,), fused={}):
            unmatched.append(target)
    return unmatched


def _adapter_layers(blocks: Blocks, *, targets: Sequence[str], fused: Fused) -> list[str]:
    """The full names of all linear layers in `blocks` that get adapters."""
    names: list[str] = []
    for prefix, block in blocks:
        for name, layer in block.named_modules():
            full_name = f"{prefix}.{name}"
            if isinstance(layer, torch.nn.Linear | FrozenLinear) and gets_adapter(
                full_name, targets=targets, fused=fused
            ):
                names.append(full_name)
    return names


def state(denoiser: Any) -> dict[str, torch.Tensor]:
    """The adapters' tensors by peft's names (`….lora_A.weight`, `….lora_B.weight`), unscaled; not copies."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(denoiser, adapter_name="default")
    return tensors


def load(denoiser: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Overwrite the adapters. Raises ValueError for missing, unknown or differently shaped tensors."""
    have = state(denoiser)
    wrong: list[str] = []
    for name in have.keys() | tensors.keys():
        if name not in have or name not in tensors or have[name].shape != tensors[name].shape:
            wrong.append(name)
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(have)} tensors do not match, {sorted(wrong)[0]} first")
    set_peft_model_state_dict(denoiser, tensors, adapter_name="default")
