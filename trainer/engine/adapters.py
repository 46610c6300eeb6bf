"""Adapters around frozen layers (peft), kept in fp32."""

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

Blocks = Sequence[tuple[str, torch.nn.Module]]
Fused = dict[str, tuple[str, ...]]  # the fused projection's name → those of its parts, in the order of their rows


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Whether the module name `name` ends with one of `targets`, whole parts of a dotted name only."""
    return any(f".{name}".endswith(f".{t}") for t in targets)


def adapter_suffixes(targets: Sequence[str], fused: Fused) -> list[str]:
    """Suffixes of the layers that get adapters: `targets`, and fused projections of which all parts are targets."""
    return [*targets, *(whole for whole, parts in fused.items() if all(is_target(part, targets) for part in parts))]


def fuse_projections(blocks: Blocks, *, fused: Fused, targets: Sequence[str]) -> None:
    """Replace projections that read the same input by one, in place, wherever all parts are among `targets`."""
    for _, block in blocks:
        for whole, parts in fused.items():
            parent_name, _, leaf = whole.rpartition(".")
            parent = block.get_submodule(parent_name)
            names = [part.rpartition(".")[2] for part in parts]
            linears = [getattr(parent, n, None) for n in names]
            if all(linears) and all(is_target(part, targets) for part in parts):
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

    `kind`: lora; rslora (arXiv:2312.03732), which counts alpha / √rank; dora (arXiv:2402.09353).

    Fused projections get one adapter. Initialised as peft does: A random from `seed`, B zero.
    Raises SettingsError if no layer matches.
    """
    ends = adapter_suffixes(targets, fused)
    names = [
        f"{prefix}.{name}"
        for prefix, block in blocks
        for name, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear | FrozenLinear) and is_target(name, ends)
    ]
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
            warnings.filterwarnings("ignore", "Unsupported layer type")  # it has the sizes, which is all that is asked
            denoiser.add_adapter(config, adapter_name="default")
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
