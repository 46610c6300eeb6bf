"""Load a denoiser, put it on the device and quantise its frozen weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.base_model.lazy_tensors import DTYPE_NAMES
from trainer.base_model.single_file import FP16_VARIANT
from trainer.engine import adapters
from trainer.engine.device import torch_dtype
from trainer.engine.fused_linear import install
from trainer.engine.kernels import self_test
from trainer.engine.memory.weight_streaming import WeightStreamer
from trainer.engine.quantization.formats import WEIGHT_FORMATS, weight_format_for
from trainer.engine.quantization.frozen_linear import freeze
from trainer.spec.family import Family
from trainer.spec.plan import EnginePlan
from trainer.storage import safetensors_header


def stored_dtype(folder: Path) -> torch.dtype:
    """The format that most of the weights in a part's folder are in: loaded so, they stay in the mapped files."""
    sizes: Counter[str] = Counter()
    for file in (f for f in folder.glob("*.safetensors") if FP16_VARIANT not in f.name):
        for entry in safetensors_header.read_header(file).entries.values():
            sizes[entry.dtype] += entry.end - entry.begin
    most = sizes.most_common(1)[0][0]
    return next(
        (dtype for dtype, name in DTYPE_NAMES.items() if name == most), torch.bfloat16
    )  # which holds all of fp8


def place_denoiser(
    denoiser: Any,
    blocks: adapters.Blocks,
    *,
    precision: str,
    dtype: torch.dtype,
    device: str,
    fused: adapters.Fused,
    targets: Sequence[str],
    rank: int = 0,
    streamed: Sequence[torch.nn.Module] = (),
    forwards: Mapping[type, type] | None = None,
) -> WeightStreamer | None:
    """Bring the denoiser to `device` block by block, in the format of `precision`, joining projections on the way.

    Neither the host nor the device ever holds more than one block besides the mapped file and the result. The weights
    of the regions `streamed` stay on the host; the stream that brings them is returned. `rank`: of the adapters that
    the layers will get; `forwards`: see `Family.fused_forwards`.
    """
    form = weight_format_for(precision, device)
    parts = [*(block for _, block in blocks), *streamed]
    outside = set(denoiser.modules()) - {m for part in parts for m in part.modules()}  # what is replaced must not stay
    stream = WeightStreamer(device) if streamed else None
    ends = adapters.adapter_suffixes(targets, fused)
    for module in outside:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.to(device, dtype if tensor.is_floating_point() else None)
    for name, block in blocks:
        block.to(device, dtype)
        adapters.fuse_projections([(name, block)], fused=fused, targets=targets)
        if form is not None:
            freeze(block, form, lambda name: rank if adapters.is_target(name, ends) else 0)
            install(block, forwards or {})
        if stream:
            for region in (m for m in block.modules() if m in streamed):
                stream.add_region(region)
    if stream:
        for region in (r for r in streamed if r not in stream.regions):
            _channels_last(region.to(device, dtype), device)
            stream.add_region(region)
        stream.allocate_slots()
    denoiser.to(device)
    _channels_last(denoiser, device)
    return stream


def _channels_last(module: Any, device: str) -> None:
    """As convolutions on tensor cores want their weights."""
    if device == "cuda":
        module.to(memory_format=torch.channels_last)


def load_denoiser(
    kind: Family, model: Path, plan: EnginePlan, *, fused: adapters.Fused, targets: Sequence[str], rank: int = 0
) -> tuple[Any, WeightStreamer | None]:
    """The denoiser in `model` as `plan` wants it (see `place`), and the stream of its weights if there is one."""
    denoiser = kind.load_denoiser(model, device="cpu", dtype=stored_dtype(model / kind.FACTS.parts["denoiser"]))
    forwards = _forwards(kind, plan)
    if plan.attention not in ("native", "flash_4"):
        denoiser.set_attention_backend(plan.attention)
    stream = place_denoiser(
        denoiser,
        kind.blocks(denoiser),
        precision=plan.precision,
        dtype=torch_dtype(plan),
        device=plan.device,
        fused=fused,
        targets=targets,
        rank=rank if forwards else 0,  # of that, too, the kernels are checked
        streamed=kind.regions(denoiser) if plan.offload == "weights" else (),
        forwards=forwards,
    )
    return denoiser, stream


def _forwards(kind: Family, plan: EnginePlan) -> Mapping[type, type]:
    """The family's own forward passes of blocks, if products are in FP8 and the kernels do what they should here."""
    form = weight_format_for(plan.precision, plan.device)
    if form is None or form not in WEIGHT_FORMATS or not WEIGHT_FORMATS[form].transposes:
        return {}
    return kind.fused_forwards() if self_test.agree(plan.device, WEIGHT_FORMATS[form].dtype) else {}
