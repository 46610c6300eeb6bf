"""One training step of each published model on the device "meta", in each weight format that a target has.

The models have their real widths, and one or two blocks of each kind: more blocks launch the same kernels again.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from bench import step
from bench.targets.launches import Launch, recorded
from bench.targets.limits import Target
from trainer.engine import adapters, fused_linear
from trainer.engine.kernels import quantize_triton, self_test
from trainer.engine.quantization import frozen_linear
from trainer.engine.quantization.cast_adapters import AdapterCast
from trainer.engine.quantization.formats import WEIGHT_FORMATS, weight_format_for
from trainer.engine.quantization.frozen_linear import FrozenLinear, freeze
from trainer.spec.family import BaseModel, Family, get_family
from trainer.spec.weight_formats import supported_formats

FAMILIES = ("flux", "flux2", "krea2", "qwen_image", "sd3", "sdxl", "z_image")
SHALLOW: dict[str, dict[str, Any]] = {
    "flux": {"num_layers": 1, "num_single_layers": 1},
    "flux2": {"num_layers": 1, "num_single_layers": 1},
    "krea2": {"num_layers": 1, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
    "qwen_image": {"num_layers": 1},
    "sd3": {"num_layers": 3},  # the last block has no text output; of SD3.5 medium, the first has a second attention
    "sdxl": {"transformer_layers_per_block": [1, 1, 1]},
    "z_image": {"n_layers": 1, "n_refiner_layers": 1},
}
BATCH = 2
FORMATS = ("fp8", "int8", "int8-storage", "fp8-storage")  # those whose arithmetic has kernels of ours


class Case(NamedTuple):
    """A step that a job may take. `joined`: q, k and v are one layer. `rank`: 0 for layers without adapters."""

    family: str
    model: str
    precision: str
    rank: int = step.RANK
    joined: bool = True


def all_cases(families: Sequence[str] = FAMILIES) -> list[Case]:
    """Every published model in every format; joined and split; with and without adapters; other ranks of Flux.1."""
    cases: list[Case] = []
    for family in families:
        for name in _distinct_models(get_family(family)):
            cases += [Case(family, name, precision) for precision in FORMATS]
            cases += [Case(family, name, "fp8", joined=False), Case(family, name, "fp8", rank=0)]
    if "flux" in families:
        cases += [Case("flux", "flux", "fp8", rank=rank) for rank in (4, 64, 128)]
    return cases


# Every kernel, and the widest rows: those of Flux.1; GEGLU in SDXL; RMSNorm and SwiGLU in Z-Image;
# SwiGLU behind attention's output in FLUX.2; in Krea 2 the widest norms, RMSNorm with a shift, and a gate on attention.
SAMPLE = (
    Case("flux", "flux", "fp8"),
    Case("flux", "flux", "fp8", rank=128),
    Case("flux", "flux", "int8"),
    Case("flux", "flux", "int8-storage"),
    Case("sdxl", "sdxl", "fp8"),
    Case("z_image", "z-image", "fp8"),
    Case("flux2", "flux2-klein-4b", "fp8"),
    Case("krea2", "krea2", "fp8"),
    Case("qwen_image", "qwen-image", "fp8"),
)


def _distinct_models(family: Family) -> dict[str, BaseModel]:
    """The published models whose denoisers have different configs, by one of their names."""
    distinct: dict[str, BaseModel] = {}
    seen: list[Any] = []
    for name, model in family.FACTS.models.items():
        config = _config(family, model)
        if config and config not in seen:
            seen.append(config)
            distinct[name] = model
    return distinct


def _config(family: Family, model: BaseModel) -> dict[str, Any]:
    """The denoiser's config; {} of a miniature."""
    if model.published is None:
        return {}
    return model.published.configs[f"{family.FACTS.parts['denoiser']}/config.json"]


@contextlib.contextmanager
def pretended(target: Target) -> Iterator[None]:
    """Inside, torch answers as on this target where the engine asks for the device."""
    originals = torch.version.hip, torch.cuda.get_device_properties, torch.cuda.get_device_capability
    torch.version.hip = "7.2" if target.backend == "hip" else None
    properties = types.SimpleNamespace(gcnArchName=f"{target.architecture}:sramecc+:xnack-")
    torch.cuda.get_device_properties = lambda _device: properties
    torch.cuda.get_device_capability = lambda _device: target.capability
    quantize_triton._has_fp8.cache_clear()
    try:
        yield
    finally:
        torch.version.hip, torch.cuda.get_device_properties, torch.cuda.get_device_capability = originals
        quantize_triton._has_fp8.cache_clear()


def launches_on(target: Target, cases: tuple[Case, ...] | list[Case], known: dict[Any, set[Launch]]) -> set[Launch]:
    """The launches of the cases that this target supports, and of all others as far as no FP8 is in them.

    `known`: those of targets before, which are the same where the target chooses the same types.
    """
    if target.backend == "cuda":
        supported = supported_formats(nvidia=target.capability)
    else:
        supported = supported_formats(amd=target.name)
    launches: set[Launch] = set()
    with pretended(target):
        loads_fp8 = quantize_triton._has_fp8(torch.device("meta"))
        for case in cases:
            weight_format = weight_format_for(case.precision, "cuda")
            assert weight_format is not None
            key = case, weight_format, loads_fp8
            if key not in known:
                known[key] = _launches_of(case, weight_format)
            runs = case.precision in supported
            launches |= {launch for launch in known[key] if runs or not launch.has_fp8}
    return launches


class _NoBound:
    """In the place of `MIN_LARGEST_WEIGHT`: whatever a weight's numbers are, which "meta" does not have."""

    def __le__(self, _other: object) -> bool:
        return True


def _launches_of(case: Case, weight_format: str) -> set[Launch]:
    """What a step of this case launches, the making of transposed copies, dequantised weights, and the self-test."""
    family = get_family(case.family)
    model = _denoiser(family, case)
    fused = family.FACTS.fused_targets if case.joined else {}
    targets = family.FACTS.targets
    with recorded() as launches:
        for name, block in family.blocks(model):
            adapters.fuse_projections([(name, block)], fused=fused, targets=targets)
            _freeze(block, weight_format, case.rank)
            fused_linear.install(block, family.fused_forwards())
        if case.rank:
            adapters.add_adapters(
                model, family.blocks(model), targets=targets, fused=fused, rank=case.rank, alpha=case.rank, seed=0
            )
        _step(family, model, case)
        for module in model.modules():
            if isinstance(module, FrozenLinear):
                module.keep_transposed(True)
                _ = module.weight  # dequantised, as for verification
        if WEIGHT_FORMATS[weight_format].transposes:
            _self_test(WEIGHT_FORMATS[weight_format].dtype)
    return launches


def _denoiser(family: Family, case: Case) -> Any:
    config = _config(family, family.FACTS.models[case.model]) | SHALLOW[case.family]
    if config.get("dual_attention_layers"):
        config["dual_attention_layers"] = (0,)
    import diffusers  # takes seconds

    model_class = getattr(diffusers, config["_class_name"])
    with step.random_weights("meta"):
        model = model_class(**{key: value for key, value in config.items() if not key.startswith("_")})
    return model.requires_grad_(False).train()


def _freeze(block: torch.nn.Module, weight_format: str, rank: int) -> None:
    bound = frozen_linear.MIN_LARGEST_WEIGHT
    frozen_linear.MIN_LARGEST_WEIGHT = _NoBound()  # type: ignore[assignment]
    try:
        freeze(block, weight_format, lambda _: rank)
    finally:
        frozen_linear.MIN_LARGEST_WEIGHT = bound


def _step(family: Family, model: Any, case: Case) -> None:
    """Forward and backward pass. The input needs a gradient, so that layers without adapters have a backward pass."""
    length, features, pooled_features = step.text_sizes(case.family, case.model)
    width, height = step.SIZES[case.family]

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    noisy = empty(BATCH, step.CHANNELS[case.family], height // 8, width // 8, dtype=torch.float32).requires_grad_()
    text = {
        "tokens": empty(BATCH, length, *features),
        "pooled": empty(BATCH, pooled_features),
        "real": empty(BATCH, length, dtype=torch.bool),
    }
    t = empty(BATCH, dtype=torch.float32)
    geometry = empty(BATCH, 6, dtype=torch.float32)
    with AdapterCast(model, torch.bfloat16)():
        out = family.predict(model, noisy, t, text=text, guidance=1.0, geometry_B6=geometry)
        out.float().sum().backward()


def _self_test(dtype: torch.dtype) -> None:
    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    comparisons = (
        self_test._norm_comparisons(normal, dtype),
        self_test._rms_comparisons(normal, dtype),
        self_test._gelu_comparisons(normal, dtype),
        self_test._swiglu_comparisons(normal, dtype),
        self_test._rope_comparisons(normal),
    )
    for comparison in comparisons:
        list(comparison)
