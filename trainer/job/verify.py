"""Whether a LoRA file, read back from disk, gives the model that was trained. Nothing of peft's arithmetic is used.

No loader of any tool notices a wrong alpha, a wrong order of q, k and v, or a missing module; this does.
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

# Of what a layer adds to its weight: both sides are the same few products in fp32 (perhaps TF32).
LAYER_TOLERANCE = 1e-3
# Of the model's output, relative. In 16 bits the two sums are rounded at the same places, but not from the same bits,
# and each of some fifty blocks may carry a difference of one rounding, 2^-8, further.
OUTPUT_TOLERANCE, IN_16_BITS = 1e-3, 2e-2


def verify(
    path: Path, models: Mapping[str, Any], *, family_name: str, fused: FusedTargets, output: Callable[[], torch.Tensor]
) -> float:
    """The relative difference between what `output` gives with the live adapters and with the file on the plain base.

    `models`: those with adapters, by their component's name, the denoiser first; `fused`: as `lora.Fused`. Takes memory
    for one layer's weight at a time. Raises FileMismatchError, naming the worst layer.
    """
    try:
        modules = convert.load(path, family_name)
    except ValueError as problem:
        raise FileMismatchError(f"{path} does not read back: {problem}.") from problem
    live = {
        f"{component}.{name}": layer
        for component, model in models.items()
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    stacks = _by_layer(path, modules, live, family_name=family_name, fused=fused)
    worst, name = max((_difference(layer, stacks[name]), name) for name, layer in live.items())
    if not worst <= LAYER_TOLERANCE:
        raise FileMismatchError(
            f"{path} is not what was trained: {name} differs by {worst:.2g} of its strength "
            f"({LAYER_TOLERANCE:g} is allowed)."
        )
    # Compiled blocks would not see the hooks. An input that is rounded to 8 bits makes much of a last bit.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), dequantized_matmul(next(iter(models.values()))):
        trained = output().float()
        with _applied(live, stacks):
            found = output().float()
    error = ((found - trained).norm() / trained.norm().clamp(min=1e-12)).item()
    allowed = OUTPUT_TOLERANCE if next(iter(models.values())).dtype == torch.float32 else IN_16_BITS
    if not error <= allowed:
        raise FileMismatchError(
            f"{path} on the base model gives another picture than the trained model: the outputs differ by "
            f"{error:.2g} ({allowed:g} is allowed)."
        )
    return error


def _by_layer(
    path: Path, modules: LoraModules, live: dict[str, BaseTunerLayer], *, family_name: str, fused: FusedTargets
) -> dict[str, list[LoraWeights | None]]:
    """For each trained layer the file's adapters of its members, from top to bottom."""
    members = {
        name: [key_names.name_in_files(m, family_name) for m in peft_bridge.unfused_names(name, fused)] for name in live
    }
    strange = modules.keys() - {m for names in members.values() for m in names}
    if strange:
        raise FileMismatchError(f"{path} has {len(strange)} modules that were not trained, {min(strange)} first.")
    return {name: [modules.get(m) for m in names] for name, names in members.items()}


def _delta(parts: list[LoraWeights | None], layer: Any) -> torch.Tensor:
    """(out, in) in fp32 where the layer's adapter is; parts that the file lacks add nothing."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    found = torch.zeros(up.shape[0], *down.shape[1:], device=up.device)
    for rows, part in zip(found.chunk(len(parts)), parts, strict=True):
        if part is not None:
            delta = LoraWeights(part.down.to(up.device), part.up.to(up.device), part.scale).delta()
            if delta.shape != rows.shape:
                return delta  # which is not the layer's
            rows.copy_(delta)
    return found


def _added(x: torch.Tensor, parts: list[LoraWeights | None], layer: Any) -> torch.Tensor:
    """The product of x and `_delta`, without that."""
    nothing = x.new_zeros(*x.shape[:-1], layer.lora_B["default"].weight.shape[0] // len(parts))
    return torch.cat(
        [nothing if p is None else p.scale * linear(linear(x, p.down.to(x)), p.up.to(x)) for p in parts],
        dim=-1,
    )


def _magnitudes(parts: list[LoraWeights | None], layer: Any) -> torch.Tensor | None:
    """The lengths that DoRA gives the layer's rows, as far as the file has them; None: it has none."""
    found = [p.magnitude for p in parts if p is not None and p.magnitude is not None]
    return torch.cat(found).to(layer.lora_A["default"].weight.device) if found else None


@contextlib.contextmanager
def _on_the_host(layer: Any) -> Iterator[None]:
    """Inside, the layer's adapter is in the host's memory."""
    kept = [(p, p.data) for p in layer.parameters() if p.requires_grad]
    try:
        for p, data in kept:
            p.data = data.cpu()
        yield
    finally:
        for p, data in kept:
            p.data = data


def _difference(layer: Any, parts: list[LoraWeights | None]) -> float:
    with contextlib.suppress(torch.OutOfMemoryError):
        return _compared(layer, parts)
    with _on_the_host(layer):  # slower, but a job that has trained in little memory ends in as little
        return _compared(layer, parts)


def _compared(layer: Any, parts: list[LoraWeights | None]) -> float:
    with torch.no_grad():
        difference = _relative(_delta(parts, layer), layer.get_delta_weight("default").float())
        vectors, lengths = layer.lora_magnitude_vector, _magnitudes(parts, layer)
        if "default" not in vectors and lengths is None:
            return difference
        if "default" not in vectors or lengths is None:
            return float("inf")
        return max(difference, _relative(lengths, vectors["default"].weight.float()))


def _relative(found: torch.Tensor, trained: torch.Tensor) -> float:
    if found.shape != trained.shape:
        return float("inf")
    size, difference = trained.norm().item(), found.sub_(trained).norm().item()
    return difference / size if size else float("inf") if difference else 0.0


@contextlib.contextmanager
def _applied(live: dict[str, BaseTunerLayer], stacks: dict[str, list[LoraWeights | None]]) -> Iterator[None]:
    """Inside, each trained layer computes with its frozen weight W and the file's delta: Wx + delta x.

    That is the merged weight's product, in any format of W, without a second W and without its rounding. With DoRA,
    the rows' products are scaled as the rows are, for which the delta is made.
    """

    def hook(layer: Any, inputs: tuple[torch.Tensor, ...], name: str) -> torch.Tensor:
        base, parts = layer.get_base_layer(), stacks[name]
        out, added = base(*inputs), _added(inputs[0].float(), parts, layer)
        lengths = _magnitudes(parts, layer)
        if lengths is None:
            return (out + added).to(out.dtype)
        delta = _delta(parts, layer)
        bias = torch.zeros((), device=out.device) if base.bias is None else base.bias.float()
        unit = torch.eye(base.in_features, device=out.device, dtype=inputs[0].dtype)
        weight = (base(unit).float() - bias).T  # whatever the format that it is kept in
        return ((out - bias + added) * (lengths / (weight + delta).norm(dim=1)) + bias).to(out.dtype)

    handles = [
        layer.register_forward_hook(lambda m, inputs, _, name=name: hook(m, inputs, name))
        for name, layer in live.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
