"""Load a denoiser, put it on the device block by block, and quantise its frozen weights.

A published denoiser in 16 bits may be larger than the memory of the host or the device. So its weights are mapped from
the file in the type in which they are stored, and one block after the other is brought to the device, where its
projections are fused and its weights quantised before the next one comes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.base_model import weight_check
from trainer.base_model.lazy_tensors import DTYPE_NAMES
from trainer.base_model.single_file import FP16_VARIANT
from trainer.engine import adapters
from trainer.engine.device import torch_dtype
from trainer.engine.fused_linear import install
from trainer.engine.kernels import self_test
from trainer.engine.memory.sharding import Peers, Shards
from trainer.engine.memory.weight_streaming import WeightStreamer
from trainer.engine.quantization.formats import WEIGHT_FORMATS, weight_format_for
from trainer.engine.quantization.frozen_linear import freeze
from trainer.engine.training_adapter import TrainingAdapter
from trainer.spec.family import Family
from trainer.spec.plan import EnginePlan
from trainer.spec.strategies import AWAY
from trainer.storage import safetensors_header


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of most weights in a model part's folder. Loaded in this type, they stay in the mapped files."""
    bytes_by_dtype: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        if FP16_VARIANT in file.name:
            continue
        for entry in safetensors_header.read_header(file).entries.values():
            bytes_by_dtype[entry.dtype] += entry.end - entry.begin
    most_common = bytes_by_dtype.most_common(1)[0][0]
    for dtype, name in DTYPE_NAMES.items():
        if name == most_common:
            return dtype
    return torch.bfloat16  # the file has FP8, of which bf16 holds every value


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
    shards: Shards | None = None,
    forwards: Mapping[type, type] | None = None,
    folder: Path | None = None,
    training_adapter: TrainingAdapter | None = None,
) -> WeightStreamer | None:
    """Bring the denoiser to `device` block by block, quantised for `precision`, with projections fused.

    Besides the mapped file and the result, neither the host nor the device holds more than one block.

    `dtype`: of activations, and of weights that are not quantised. `fused`, `targets`: see
    `adapters.fuse_projections`. `rank`: of the adapters for which FP8 weights get columns. `streamed`: regions whose
    weights wait on the host, or in `shards`; their streamer is returned. `forwards`: see `Family.fused_forwards`.
    `folder`: of the weights' files, for messages. `training_adapter`: merged into the weights before they are
    quantised. Raises SettingsError for weights that are no numbers, and for an adapter of another model.
    """
    weight_format = weight_format_for(precision, device)

    def column_rank(block_name: str) -> Callable[[str], int]:
        """The rank of the adapter that a layer of this block will get, by the layer's name in the block."""

        def of_layer(name: str) -> int:
            return rank if adapters.gets_adapter(f"{block_name}.{name}", targets=targets, fused=fused) else 0

        return of_layer

    streamer = WeightStreamer(device, shards=shards) if streamed else None
    outside = _modules_outside(denoiser, [*(block for _, block in blocks), *streamed])
    in_fp32 = _modules_in_fp32(denoiser)
    _bring(outside, device, dtype, in_fp32)
    weight_check.check_weights(_weights_of(denoiser, outside), folder)
    if training_adapter:
        training_adapter.merge((name, module) for name, module in denoiser.named_modules() if module in outside)
    del outside
    for name, block in blocks:
        _bring(block.modules(), device, dtype, in_fp32)
        # Before the weights are fused and quantised: they still have the names of the file.
        weight_check.check_weights(((f"{name}.{own}", weight) for own, weight in block.named_parameters()), folder)
        if training_adapter:
            training_adapter.merge((f"{name}.{own}", layer) for own, layer in block.named_modules())
        adapters.fuse_projections([(name, block)], fused=fused, targets=targets)
        if weight_format is not None:
            freeze(block, weight_format, column_rank(name))
            install(block, forwards or {})
        if streamer:
            for region in block.modules():
                if region in streamed:
                    streamer.add_region(region)
    if streamer:
        for region in streamed:
            if region not in streamer.regions:
                _channels_last(region.to(device, dtype), device)
                weight_check.check_weights(region.named_parameters(), folder)
                streamer.add_region(region)
        streamer.allocate_slots()
    if training_adapter:
        training_adapter.check_merged()
    denoiser.to(device)
    _channels_last(denoiser, device)
    return streamer


def _modules_in_fp32(denoiser: Any) -> set[torch.nn.Module]:
    """The modules whose weights stay fp32 beside bf16 activations, as diffusers' class of the denoiser wants it.

    None of them are replaced later. Krea 2's norms multiply by 1 + weight, which bf16 would round to three digits.
    """
    names = getattr(denoiser, "_keep_in_fp32_modules", None) or ()
    return {module for path, module in denoiser.named_modules() if path.rpartition(".")[2] in names}


def _bring(
    modules: Iterable[torch.nn.Module], device: str, dtype: torch.dtype, in_fp32: Collection[torch.nn.Module]
) -> None:
    """Bring the own weights of `modules`, without those of modules inside them, to `device`, in `dtype` or in fp32."""
    for module in modules:
        own = torch.float32 if module in in_fp32 else dtype
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.to(device, own if tensor.is_floating_point() else None)


def _modules_outside(denoiser: torch.nn.Module, parts: Sequence[torch.nn.Module]) -> set[torch.nn.Module]:
    """All modules of the denoiser that are not inside one of `parts`.

    Must not return or keep modules of the parts: their layers are replaced, and the old weights must be freed.
    """
    outside = set(denoiser.modules())
    for part in parts:
        outside -= set(part.modules())
    return outside


def _weights_of(denoiser: torch.nn.Module, modules: set[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of `modules` alone, by their names in the denoiser."""
    for name, module in denoiser.named_modules():
        if module in modules:
            for own, weight in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                yield f"{name}.{own}".removeprefix("."), weight


def _channels_last(module: torch.nn.Module, device: str) -> None:
    """Lay out convolution weights as tensor cores read them."""
    if device == "cuda":
        # torch's stubs have no overload with the memory format alone.
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def load_denoiser(
    family: Family,
    model: Path,
    plan: EnginePlan,
    *,
    fused: adapters.Fused,
    targets: Sequence[str],
    rank: int = 0,
    training_adapter: TrainingAdapter | None = None,
    peers: Peers | None = None,
) -> tuple[Any, WeightStreamer | None]:
    """The denoiser in folder `model`, placed as `plan` says (`place_denoiser`), and its weight streamer, if any.

    `peers`: the processes that have the parts of sharded weights, which all must call this.
    """
    denoiser = family.load_denoiser(model, device="cpu", dtype=stored_dtype(model / family.FACTS.parts["denoiser"]))
    forwards = _fused_forwards(family, plan)
    if plan.attention not in ("native", "flash_4"):
        denoiser.set_attention_backend(plan.attention)
    streamer = place_denoiser(
        denoiser,
        family.blocks(denoiser),
        precision=plan.precision,
        dtype=torch_dtype(plan),
        device=plan.device,
        fused=fused,
        targets=targets,
        rank=rank if forwards else 0,  # without correct kernels, no adapter columns
        streamed=family.regions(denoiser) if plan.offload in AWAY else (),
        shards=shards_for(plan, peers),
        forwards=forwards,
        folder=model / family.FACTS.parts["denoiser"],
        training_adapter=training_adapter,
    )
    return denoiser, streamer


def shards_for(plan: EnginePlan, peers: Peers | None) -> Shards | None:
    """Where the plan's frozen weights are sharded to, if they are."""
    if plan.offload != "shards":
        return None
    assert peers is not None, "sharded weights need other processes"
    return Shards(peers, plan.device)


def _fused_forwards(family: Family, plan: EnginePlan) -> Mapping[type, type]:
    """The family's fused forward passes, if weights multiply in FP8 and our kernels pass their self-test here."""
    weight_format = weight_format_for(plan.precision, plan.device)
    if weight_format is None or weight_format not in WEIGHT_FORMATS or not WEIGHT_FORMATS[weight_format].transposes:
        return {}
    return family.fused_forwards() if self_test.agree(plan.device, WEIGHT_FORMATS[weight_format].dtype) else {}
