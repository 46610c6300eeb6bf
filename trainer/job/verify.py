"""Whether a LoRA file, read back from disk, gives the model that was trained. Nothing of peft's arithmetic is used.

No loader of any tool notices a wrong alpha, a wrong order of q, k and v, or a missing module; this does. It compares
each layer's ΔW = B·A with the file's, and then the output of the whole model with the file's adapters next to the
frozen weights.

A trained layer may be a fused projection (q, k and v as one), whose parts are modules of their own in the file: they
are stacked along the output features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import linear

from trainer.engine.quantization.frozen_linear import dequantized_matmul
from trainer.lora_files import convert, key_names, peft_bridge
from trainer.lora_files.peft_bridge import FusedTargets
from trainer.lora_files.weights import LoraModules, LoraWeights
from trainer.spec.errors import FileMismatchError

# Relative difference of a layer's ΔW: both sides are the same few products in fp32 (perhaps TF32).
LAYER_TOLERANCE = 1e-3
# Relative difference of the model's output. In 16 bits the two sums are rounded at the same places, but not from the
# same bits, and each of some fifty blocks may carry a difference of one rounding, 2^-8, further.
OUTPUT_TOLERANCE = 1e-3
OUTPUT_TOLERANCE_16_BITS = 2e-2

Parts = list[LoraWeights | None]  # the file's adapters of one layer, from top to bottom; None: the file lacks it


def verify(
    path: Path, models: Mapping[str, Any], *, family_name: str, fused: FusedTargets, output: Callable[[], torch.Tensor]
) -> float:
    """The relative difference between `output` with the live adapters and with those of the file at `path`.

    `models`: those with adapters, by their component's name, the denoiser first. `fused`: as in
    `peft_bridge.FusedTargets`. Takes memory for one layer's weight at a time. Raises FileMismatchError, naming the
    worst layer.
    """
    try:
        modules = convert.load(path, family_name)
    except ValueError as problem:
        raise FileMismatchError(f"{path} does not read back: {problem}.") from problem
    layers = {}
    for component, model in models.items():
        for name, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                layers[f"{component}.{name}"] = layer
    parts = _parts_by_layer(path, modules, layers, family_name=family_name, fused=fused)
    worst, worst_name = max((_difference(layer, parts[name]), name) for name, layer in layers.items())
    if not worst <= LAYER_TOLERANCE:  # also for NaN
        raise FileMismatchError(
            f"{path} is not what was trained: {worst_name} differs by {worst:.2g}, relative to its size "
            f"({LAYER_TOLERANCE:g} is allowed)."
        )
    denoiser = next(iter(models.values()))
    # Compiled blocks would not see the hooks. Inputs rounded to 8 bits would magnify a difference in the last bit.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), dequantized_matmul(denoiser):
        trained = output().float()
        with _file_applied(layers, parts):
            from_file = output().float()
    error = ((from_file - trained).norm() / trained.norm().clamp(min=1e-12)).item()
    allowed = OUTPUT_TOLERANCE if denoiser.dtype == torch.float32 else OUTPUT_TOLERANCE_16_BITS
    if not error <= allowed:
        raise FileMismatchError(
            f"{path} on the base model gives other images than the trained model: the outputs differ by "
            f"{error:.2g} ({allowed:g} is allowed)."
        )
    return error


def _parts_by_layer(
    path: Path, modules: LoraModules, layers: dict[str, BaseTunerLayer], *, family_name: str, fused: FusedTargets
) -> dict[str, Parts]:
    """The file's adapters of each trained layer. Raises FileMismatchError for modules that belong to no layer."""
    parts: dict[str, Parts] = {}
    unknown = set(modules)
    for layer_name in layers:
        names = [key_names.name_in_files(n, family_name) for n in peft_bridge.unfused_names(layer_name, fused)]
        parts[layer_name] = [modules.get(name) for name in names]
        unknown.difference_update(names)
    if unknown:
        raise FileMismatchError(f"{path} has {len(unknown)} modules that were not trained, {min(unknown)} first.")
    return parts


def _file_delta(parts: Parts, layer: Any) -> torch.Tensor:
    """ΔW (out, in) of the file in fp32, on the device of the layer's adapter; parts that the file lacks add nothing."""
    down = layer.lora_A["default"].weight
    up = layer.lora_B["default"].weight
    stacked = torch.zeros(up.shape[0], *down.shape[1:], device=up.device)
    for rows, part in zip(stacked.chunk(len(parts)), parts, strict=True):
        if part is not None:
            delta = LoraWeights(part.down.to(up.device), part.up.to(up.device), part.scale).delta()
            if delta.shape != rows.shape:
                return delta  # of another shape than the layer, which `_relative` reports
            rows.copy_(delta)
    return stacked


def _added_output(x: torch.Tensor, parts: Parts, layer: Any) -> torch.Tensor:
    """ΔW·x (…, out) for x (…, in), without making ΔW."""
    out_features = layer.lora_B["default"].weight.shape[0] // len(parts)
    outputs = []
    for part in parts:
        if part is None:
            outputs.append(x.new_zeros(*x.shape[:-1], out_features))
        else:
            outputs.append(part.scale * linear(linear(x, part.down.to(x)), part.up.to(x)))
    return torch.cat(outputs, dim=-1)


def _magnitudes(parts: Parts, layer: Any) -> torch.Tensor | None:
    """DoRA's magnitudes (out,) of the layer's rows, as far as the file has them; None: it has none."""
    magnitudes = [part.magnitude for part in parts if part is not None and part.magnitude is not None]
    if not magnitudes:
        return None
    return torch.cat(magnitudes).to(layer.lora_A["default"].weight.device)


@contextlib.contextmanager
def _adapter_on_host(layer: Any) -> Iterator[None]:
    """Inside, the layer's adapter is in the host's memory."""
    tensors = [(p, p.data) for p in layer.parameters() if p.requires_grad]
    try:
        for p, data in tensors:
            p.data = data.cpu()
        yield
    finally:
        for p, data in tensors:
            p.data = data


def _difference(layer: Any, parts: Parts) -> float:
    """Relative difference between the layer's adapter and the file's."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return _compared(layer, parts)
    with _adapter_on_host(layer):  # slower, but a job that has trained in little memory ends in as little
        return _compared(layer, parts)


def _compared(layer: Any, parts: Parts) -> float:
    with torch.no_grad():
        difference = _relative(_file_delta(parts, layer), layer.get_delta_weight("default").float())
        trained = layer.lora_magnitude_vector
        from_file = _magnitudes(parts, layer)
        if "default" not in trained and from_file is None:
            return difference  # no DoRA
        if "default" not in trained or from_file is None:
            return float("inf")
        return max(difference, _relative(from_file, trained["default"].weight.float()))


def _relative(from_file: torch.Tensor, trained: torch.Tensor) -> float:
    """Norm of the difference by that of `trained`. Overwrites `from_file`."""
    if from_file.shape != trained.shape:
        return float("inf")
    size = trained.norm().item()
    difference = from_file.sub_(trained).norm().item()
    if size:
        return difference / size
    return float("inf") if difference else 0.0


@contextlib.contextmanager
def _file_applied(layers: dict[str, BaseTunerLayer], parts: dict[str, Parts]) -> Iterator[None]:
    """Inside, each trained layer computes W·x + ΔW·x, with its frozen weight W and the file's ΔW.

    That is the merged weight's product, in any format of W, without a second W and without its rounding.
    """

    def hook(layer: Any, inputs: tuple[torch.Tensor, ...], name: str) -> torch.Tensor:
        base = layer.get_base_layer()
        out = base(*inputs)
        added = _added_output(inputs[0].float(), parts[name], layer)
        magnitudes = _magnitudes(parts[name], layer)
        if magnitudes is None:
            return (out + added).to(out.dtype)
        # DoRA scales each row of W + ΔW to its magnitude, for which both are needed.
        delta = _file_delta(parts[name], layer)
        bias = torch.zeros((), device=out.device) if base.bias is None else base.bias.float()
        identity = torch.eye(base.in_features, device=out.device, dtype=inputs[0].dtype)
        weight = (base(identity).float() - bias).T  # W, whatever format it is kept in
        row_norms = (weight + delta).norm(dim=1)
        return ((out - bias + added) * (magnitudes / row_norms) + bias).to(out.dtype)

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(lambda m, inputs, _, name=name: hook(m, inputs, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
