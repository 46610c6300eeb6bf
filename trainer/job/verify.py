"""Whether a LoRA file, read back from disk, has what was trained. Nothing of peft's arithmetic is used.

No loader of any tool notices a wrong alpha, a wrong order of q, k and v, or a missing module; this does. It compares
the change ΔW = s B A of each layer with the file's, part by part: a trained layer may be a fused projection (q, k and v
as one), whose parts are modules of their own in the file. A small part beside a large one is compared with itself.

What is allowed follows from the arithmetic of the file (`trainer.lora_files.precision` has the derivation):

- Matrices in 16 bits: 2u of ‖ΔW‖, u = 2^-11 or 2^-8, which is what the writer promises. It keeps a pair of matrices in
  fp32 that 16 bits cannot hold so.
- fp32: the file has A as it is, and B multiplied by a part of s, rounded once: |B'A - BA| <= u |B||A|, u = 2^-24. alpha
  is rounded too, to 9 digits and to fp32, and a factor that is 1 to 1e-8 is left out. Together less than 2^-22 of
  ‖|B||A|‖, which is larger than ‖BA‖ where terms cancel.

So a layer either is what was trained, as exactly as its file can have it, or it is wrong: there is no tolerance to
choose. How far the whole model's output then differs is a matter of the base, which may carry the last bits of one
block through fifty others. That is reported, beside how much the LoRA changes, and never an error.

All of it is done on the CPU in float64 with Gram matrices of the rank's size, as in `precision`: ‖L R‖² is the sum of
(LᵀL) ∘ (RRᵀ), for L = (B', -B) side by side and R = A' over A. That is exact to 1e-8 of ‖B‖‖A‖, and makes no ΔW.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from trainer.spec.values import many
from trainer.spec.weight_formats import SAVE_PRECISIONS

FP32_BOUND = 2.0**-22  # of ‖|B||A|‖: see above
MAGNITUDE_BOUND = 2.0**-22  # files have DoRA's magnitudes in fp32, as they are
SHOWN_LAYERS = 5  # in a message
SAME_DIRECTION = 1e-2  # a change that differs from a multiple of the trained one by less is that, with a wrong strength

Parts = list[LoraWeights | None]  # the file's adapters of one layer, from top to bottom; None: the file lacks it
Layers = dict[str, BaseTunerLayer]  # `<component>.<name in the model>` → the layer with its adapter


@dataclass(frozen=True)
class Verified:
    """How near a file is to what was trained. All are relative; None: there is nothing to compare with."""

    worst: float  # of all parts of layers: the difference, by the size of the part's change
    output: float | None  # the model's output with the file, by what the LoRA changes in it
    effect: float | None  # what the LoRA changes in the model's output, by that output

    def __str__(self) -> str:
        text = f"read back, each layer is what was trained to {self.worst:.1e} of its change"
        if self.output is not None and self.effect is not None:
            text += (
                f". The LoRA changes the model's output by {percent(self.effect)}, and the file's change differs "
                f"from the trained one by {percent(self.output)} of that"
            )
        return text


def percent(share: float) -> str:
    """A share in percent, with two digits that count, and never as a power of ten."""
    found = 100 * share
    return f"{found:,.0f} %" if found >= 10 else f"{found:.2g} %"


def verify(
    path: Path,
    models: Mapping[str, Any],
    *,
    family_name: str,
    fused: FusedTargets,
    save_precision: str,
    output: Callable[[], torch.Tensor],
) -> Verified:
    """Compare the file at `path` with the live adapters of `models`.

    `models`: those with adapters, by their component's name, the denoiser first. `fused`: as in
    `peft_bridge.FusedTargets`. `save_precision`: of the file. `output`: computes the denoiser's output. Raises
    FileMismatchError, which names the layers that are wrong, and how.
    """
    try:
        modules = convert.load(path, family_name)
    except ValueError as problem:
        raise FileMismatchError(f"{path} does not read back: {problem}.") from problem
    layers: Layers = {}
    for component, model in models.items():
        for name, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                layers[f"{component}.{name}"] = layer
    parts, unknown = _parts_by_layer(modules, layers, family_name=family_name, fused=fused)
    worst = 0.0
    wrong = [f"{name}: it was not trained, and the file has it" for name in unknown]
    for name, layer in layers.items():
        difference, fault = _compare(layer, parts[name], name, fused, SAVE_PRECISIONS[save_precision].bound)
        worst = max(worst, difference)
        if fault:
            wrong.append(fault)
    if wrong:
        shown = "; ".join(wrong[:SHOWN_LAYERS])
        more = f"; and {len(wrong) - SHOWN_LAYERS} more" if len(wrong) > SHOWN_LAYERS else ""
        raise FileMismatchError(f"{path} is not what was trained. {many(len(wrong), 'layer')} wrong: {shown}{more}.")
    output_difference, effect = _compare_outputs(output, next(iter(models.values())), layers, parts)
    return Verified(worst, output_difference, effect)


def _parts_by_layer(
    modules: LoraModules, layers: Layers, *, family_name: str, fused: FusedTargets
) -> tuple[dict[str, Parts], list[str]]:
    """The file's adapters of each trained layer; and its modules that belong to none."""
    parts: dict[str, Parts] = {}
    unknown = set(modules)
    for layer_name in layers:
        names = [key_names.name_in_files(n, family_name) for n in peft_bridge.unfused_names(layer_name, fused)]
        parts[layer_name] = [modules.get(name) for name in names]
        unknown.difference_update(names)
    return parts, sorted(unknown)


# ---- the layers


def _compare(layer: Any, parts: Parts, name: str, fused: FusedTargets, bound: float) -> tuple[float, str]:
    """The largest relative difference of a layer's parts; and what is wrong with it in words, or ""."""
    down = layer.lora_A["default"].weight.detach().cpu().double().flatten(1)
    up = layer.lora_B["default"].weight.detach().cpu().double().flatten(1) * layer.scaling["default"]
    worst = 0.0
    names = peft_bridge.unfused_names(name, fused)
    for part_name, part_up, part in zip(names, up.chunk(len(parts)), parts, strict=True):
        difference, problem = _compare_part(part_up, down, part, bound)
        worst = max(worst, difference)
        if problem:
            return worst, f"{part_name}: {problem}"
    difference, problem = _compare_magnitudes(layer, parts)
    return max(worst, difference), f"{name}: {problem}" if problem else ""


def _compare_part(up: torch.Tensor, down: torch.Tensor, part: LoraWeights | None, bound: float) -> tuple[float, str]:
    """The relative difference of ΔW = up @ down (out, in) and the file's; and what is wrong with it, or ""."""
    size = _product_norm(up, down)
    if part is None:
        return (1.0, "the file has nothing for it") if size else (0.0, "")
    file_down = part.down.double().flatten(1)
    file_up = part.up.double().flatten(1) * part.scale
    if (len(file_up), file_down.shape[1]) != (len(up), down.shape[1]):
        have, want = [len(file_up), file_down.shape[1]], [len(up), down.shape[1]]
        return math.inf, f"the file changes a weight of {have}, and the layer's is {want}"
    difference = _product_norm(torch.cat([file_up, -up], dim=1), torch.cat([file_down, down]))
    file_size = _product_norm(file_up, file_down)
    if not size:
        return (math.inf, "it was trained to change nothing, and the file changes it") if file_size else (0.0, "")
    relative = difference / size
    # Terms that cancel are rounded by parts of what they were before.
    allowed = max(bound, FP32_BOUND * _product_norm(up.abs(), down.abs()) / size)
    if relative <= allowed:
        return relative, ""
    strength = _inner_product(file_up, file_down, up, down) / size**2
    off_direction = _product_norm(torch.cat([file_up, -strength * up], dim=1), torch.cat([file_down, down])) / size
    if not file_size:
        what = "the file's change is zero"
    elif off_direction < SAME_DIRECTION * abs(strength):
        what = f"the file has it {strength:.4g} times as strong as it was trained"
    else:
        what = "the file has another change: rows or columns in another order, or those of another layer"
    return relative, f"{what} (off by {relative:.2g} of its size; rounding explains {allowed:.1g})"


def _product_norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """‖up @ down‖ (Frobenius)."""
    return math.sqrt(max(0.0, _inner_product(up, down, up, down)))


def _inner_product(up: torch.Tensor, down: torch.Tensor, other_up: torch.Tensor, other_down: torch.Tensor) -> float:
    """The sum of the entries of (up @ down) ∘ (other_up @ other_down)."""
    return float(((up.T @ other_up) * (down @ other_down.T)).sum())


def _compare_magnitudes(layer: Any, parts: Parts) -> tuple[float, str]:
    """The same for DoRA's magnitudes (out,) of the layer's rows, as far as the layer and the file have them."""
    from_file = _magnitudes(parts)
    if "default" not in layer.lora_magnitude_vector:
        if from_file is None:
            return 0.0, ""
        return math.inf, "the file has DoRA magnitudes, and it was trained without"
    trained = layer.lora_magnitude_vector["default"].weight.detach().cpu().double()
    if from_file is None or from_file.shape != trained.shape:
        return math.inf, "the file lacks DoRA magnitudes of its rows"
    relative = float((from_file.double() - trained).norm() / trained.norm())
    if relative <= MAGNITUDE_BOUND:
        return relative, ""
    return relative, f"the file has other DoRA magnitudes (off by {relative:.2g} of their size)"


def _magnitudes(parts: Parts) -> torch.Tensor | None:
    """DoRA's magnitudes (out,) of the file, as far as it has them; None: it has none."""
    magnitudes = [part.magnitude for part in parts if part is not None and part.magnitude is not None]
    return torch.cat(magnitudes) if magnitudes else None


# ---- the model's output


def _compare_outputs(
    output: Callable[[], torch.Tensor], denoiser: Any, layers: Layers, parts: Mapping[str, Parts]
) -> tuple[float | None, float | None]:
    """What the file's output differs by, relative to what the LoRA changes; and what that is, relative to the output.

    None where the LoRA changes nothing, where the output is not finite, and where there is no memory for it: the layers
    are right all the same.
    """

    def from_file(layer: Any, inputs: tuple[torch.Tensor, ...], name: str) -> torch.Tensor:
        return _file_output(layer, inputs[0], parts[name])

    def without(layer: Any, inputs: tuple[torch.Tensor, ...], _: str) -> torch.Tensor:
        return layer.get_base_layer()(*inputs)

    # Compiled blocks would not see the hooks. Inputs rounded to 8 bits would magnify a difference in the last bit.
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), dequantized_matmul(denoiser):
            trained = output().double()
            with _replaced(layers, from_file):
                difference = float((output().double() - trained).norm())
            with _replaced(layers, without):
                effect = float((output().double() - trained).norm())
            size = float(trained.norm())
    except torch.OutOfMemoryError:
        return None, None
    if not effect or not size or not math.isfinite(difference + effect + size):
        return None, None
    return difference / effect, effect / size


@contextlib.contextmanager
def _replaced(layers: Layers, compute: Callable[[Any, tuple[torch.Tensor, ...], str], torch.Tensor]) -> Iterator[None]:
    """Inside, each trained layer gives what `compute(layer, inputs, name)` does."""
    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(lambda m, inputs, _, name=name: compute(m, inputs, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _file_output(layer: Any, x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """W·x + ΔW·x, with the frozen weight W of the layer, in any format, and the file's ΔW.

    That is the merged weight's product, without a second W and without its rounding.
    """
    base = layer.get_base_layer()
    out = base(x)
    added = _added_output(x.float(), parts, layer)
    magnitudes = _magnitudes(parts)
    if magnitudes is None:
        return (out + added).to(out.dtype)
    # DoRA scales each row of W + ΔW to its magnitude, for which both are needed.
    bias = torch.zeros((), device=out.device) if base.bias is None else base.bias.float()
    identity = torch.eye(base.in_features, device=out.device, dtype=x.dtype)
    weight = (base(identity).float() - bias).T  # W, whatever format it is kept in
    delta = _added_output(torch.eye(base.in_features, device=out.device), parts, layer).T
    row_norms = (weight + delta).norm(dim=1)
    return ((out - bias + added) * (magnitudes.to(out.device) / row_norms) + bias).to(out.dtype)


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
