"""A LoRA that is part of the frozen weights while they train, and of nothing else: PARAMS_TRAINING_ADAPTER.

A model that was distilled to few steps loses that when it is trained: a LoRA learns to undo the distillation before it
learns its subject, and images become blurred. A training adapter undoes the distillation first. It is merged into the
weights before these are quantised, so that the LoRA has nothing to undo; the LoRA's file does not have it, and neither
have those who use the LoRA. So samples are drawn without it as well: `without` subtracts it again from the outputs of
its layers, as W x + (B A) x - (B A) x. The weights stay as they are; quantised ones could not be put back.

The fused forward passes and compiled regions do not see what is subtracted, so both are off while samples are drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from trainer.lora_files import convert, peft_bridge
from trainer.lora_files.peft_bridge import FusedTargets
from trainer.lora_files.weights import LoraModules, LoraWeights
from trainer.spec.errors import SettingsError
from trainer.spec.family import Facts
from trainer.spec.values import some

Layers = Iterable[tuple[str, torch.nn.Module]]  # by their names in diffusers' denoiser


@dataclass(eq=False)
class TrainingAdapter:
    """`weights`: of each layer of the denoiser that it changes, by the layer's name in diffusers' model."""

    path: Path
    weights: LoraModules
    merged: set[str] = field(default_factory=set)  # names of the layers whose weights have it
    # What is subtracted: a live layer, and its two matrices on the device, in the type of activations.
    placed: list[tuple[torch.nn.Module, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def merge(self, layers: Layers) -> None:
        """Add it to the weights of those of `layers` that it changes. They are on their device and not quantised.

        Raises SettingsError where a weight has another shape.
        """
        for name, layer in layers:
            change = self.weights.get(name)
            if change is None or name in self.merged:
                continue
            weight: Any = layer.weight
            shape = (change.up.shape[0], *change.down.shape[1:])
            if tuple(weight.shape) != shape:
                raise SettingsError(
                    f"{self._where}: {name} is {shape} in it and {tuple(weight.shape)} in this model. It is for "
                    "another one. Fix: name the adapter of this model."
                )
            on_device = LoraWeights(change.down.to(weight.device), change.up.to(weight.device), change.scale)
            weight.data = on_device.applied_to(weight).to(weight.dtype)
            self.merged.add(name)

    def check_merged(self) -> None:
        """Raises SettingsError if the model lacks some of its layers."""
        missing = sorted(self.weights.keys() - self.merged)
        if missing:
            raise SettingsError(
                f"{self._where}: this model lacks {len(missing)} of its {len(self.weights)} layers: {some(missing)}. "
                "Fix: name the adapter of this model."
            )

    def place(self, denoiser: torch.nn.Module, *, fused: FusedTargets, device: str, dtype: torch.dtype) -> None:
        """Prepare `without` for the denoiser as it trains: with adapters, and with projections that are joined."""
        for name, layer in denoiser.named_modules():
            parts = [self.weights.get(part) for part in peft_bridge.unfused_names(name, fused)]
            if any(parts):
                down, up = _joined(parts, getattr(layer, "base_layer", layer).out_features)
                self.placed.append((layer, down.to(device, dtype), up.to(device, dtype)))

    @contextlib.contextmanager
    def without(self) -> Iterator[None]:
        """Inside, the layers' outputs are those of the weights without it. For passes that need no gradient."""
        hooks = []
        for layer, down, up in self.placed:
            hooks.append(layer.register_forward_hook(partial(_subtract, down=down, up=up)))
        try:
            # What is compiled does not look whether there are hooks.
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def _where(self) -> str:
        return f"PARAMS_TRAINING_ADAPTER={self.path}"


def load(path: Path, facts: Facts) -> TrainingAdapter:
    """Raises SettingsError for a file that is no LoRA of linear layers of this family's denoiser."""
    where = f"PARAMS_TRAINING_ADAPTER={path}"
    try:
        modules = convert.load(path, facts.name)
    except (ValueError, OSError) as problem:
        raise SettingsError(f"{where} cannot be read: {problem}.") from problem
    weights: LoraModules = {}
    for name, change in modules.items():
        component, _, layer = name.partition(".")
        change = change.without_kernel()
        if component != facts.lora_prefix or change.magnitude is not None or change.down.ndim != 2:
            raise SettingsError(
                f"{where}: {name} is no plain LoRA of a linear layer of the denoiser. No other can be left out again "
                "when samples are drawn. Fix: name another file."
            )
        weights[layer] = change.folded()
    return TrainingAdapter(path, weights)


def _joined(parts: Sequence[LoraWeights | None], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a layer whose rows are those of `parts`, one after another. None: a part without a change."""
    height = rows // len(parts)
    downs: list[torch.Tensor] = []
    ups: list[torch.Tensor] = []
    for part in parts:
        ups.append(torch.zeros(height, 0) if part is None else part.up.float())
        if part is not None:
            downs.append(part.down.float())
    return torch.cat(downs), torch.block_diag(*ups)


def _subtract(
    _layer: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
    *,
    down: torch.Tensor,
    up: torch.Tensor,
) -> torch.Tensor:
    return output - F.linear(F.linear(inputs[0].to(down.dtype), down), up).to(output.dtype)
