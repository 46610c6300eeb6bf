"""Adapters at another strength than 1, as programs that draw with a LoRA use it: W + strength · (change of W).

Letters: N output features, R the adapter's rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners import lora as peft_lora


@contextlib.contextmanager
def at_strength(models: Sequence[Any], strength: float) -> Iterator[None]:
    """Inside, the adapters of `models` (made by peft) act with this strength; 0: not at all. Then the former bits.

    The live tensors change, at their places: whatever reads them, a captured graph too, sees it. The former ones wait
    in the host's memory, since the device may have no room.
    """
    if strength == 1:
        yield
        return
    layers = [module for model in models for module in model.modules() if isinstance(module, peft_lora.LoraLayer)]
    kept = []
    try:
        with torch.no_grad():
            for layer in layers:
                for tensor in _scaled_tensors(layer):
                    kept.append((tensor, tensor.detach().to("cpu", copy=True)))
                _scale(layer, strength)
        yield
    finally:
        with torch.no_grad():
            for tensor, former in kept:
                tensor.copy_(former)


def _scaled_tensors(layer: Any) -> list[torch.Tensor]:
    tensors = [layer.lora_B["default"].weight]
    if "default" in layer.lora_magnitude_vector:
        tensors.append(layer.lora_magnitude_vector["default"].weight)
    return tensors


def _scale(layer: Any, strength: float) -> None:
    """Change B, and DoRA's magnitudes, so that the layer's weight is W + strength · (its weight now - W).

    Without DoRA that is strength · B. With it the weight is m/n · (W + BA), row by row, where n are the norms of the
    rows of W + BA. With g = m/n, W + s (g (W + BA) - W) = c (W + (s g / c) BA), where c = 1 - s + s g. So B' is
    s g / c · B, and m' is c times the new norms.
    """
    up_NR = layer.lora_B["default"].weight
    if "default" not in layer.lora_magnitude_vector:
        up_NR.mul_(strength)
        return
    magnitude_N = layer.lora_magnitude_vector["default"].weight
    gain_N = magnitude_N / _row_norms(layer)
    base_share_N = 1 - strength + strength * gain_N
    up_NR.mul_((strength * gain_N / base_share_N)[:, None])
    magnitude_N.copy_(base_share_N * _row_norms(layer))


def _row_norms(layer: Any) -> torch.Tensor:
    """The norms (N,) of the rows of W + scale · BA, as peft computes them in each pass."""
    from peft.utils.integrations import dequantize_module_weight

    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    weight = dequantize_module_weight(layer.get_base_layer())
    found: torch.Tensor = layer.lora_magnitude_vector["default"].get_weight_norm(
        weight.to(delta.dtype), delta, layer.scaling["default"]
    )
    return found
