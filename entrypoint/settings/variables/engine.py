"""How the hardware is used: device, formats, memory, attention."""

from __future__ import annotations

from dataclasses import dataclass

from entrypoint.settings.row import row
from trainer.spec.strategies import OFFLOADS
from trainer.spec.weight_formats import PRECISIONS

BACKENDS = {"cuda": "nvidia", "rocm": "amd", "cpu": "cpu"}  # a value of BACKEND → the vendor whose hardware it means
FORMATS = tuple(PRECISIONS)
# flash_4 is trainer.engine.attention.flash_attention_4. The others are those of diffusers' attention backends that come
# with torch: the rest need packages that are not installed, or have no backward pass.
ATTENTION = ("native", "flash_4", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math", "flex")
UNMASKED = ("_native_flash",)  # those of them that refuse a mask


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How the hardware is used. None and "auto": the plan chooses."""

    backend: str = row(
        "BACKEND", "choice", default="auto", meaning="what to run on", choices=lambda: ("auto", *BACKENDS)
    )
    num_gpus: int = row(
        "NUM_GPUS",
        "auto_integer",
        default="auto",
        meaning="GPUs to train on, of each machine; auto: one",
        low=1,
        high=64,
    )
    nodes: int = row(
        "NODES",
        "auto_integer",
        default="1",
        meaning="machines that train together; auto: as many as the cluster's own variables say (docs/nodes.md)",
        low=1,
        high=1024,
    )
    nodes_timeout: float = row(
        "NODES_TIMEOUT",
        "number",
        default="900",
        meaning="seconds that the machines wait for each other at the start, before the job ends with 75",
        low=1,
        high=1e6,
    )
    precision: str = row(
        "PARAMS_PRECISION",
        "choice",
        default="auto",
        meaning="format of the weights",
        choices=lambda: ("auto", *FORMATS),
    )
    gradient_checkpointing: bool | None = row(
        "PARAMS_GRADIENT_CHECKPOINTING",
        "auto_switch",
        default="auto",
        meaning="recompute instead of keeping: slower, less memory",
    )
    offload: str = row(
        "PARAMS_OFFLOAD",
        "choice",
        default="auto",
        meaning="what waits elsewhere: in the host's memory what the backward pass needs, or that and the weights; or "
        "on the other GPUs of the job the weights (shards)",
        choices=lambda: ("auto", *OFFLOADS),
    )
    compile: bool | None = row("PARAMS_COMPILE", "auto_switch", default="auto", meaning="compile the model's blocks")
    attention: str = row(
        "PARAMS_ATTENTION",
        "choice",
        default="auto",
        meaning="implementation of attention, by diffusers' names; flash_4: FlashAttention 4 (docs/docker.md)",
        choices=lambda: ("auto", *ATTENTION),
    )
    deterministic: bool = row(
        "PARAMS_DETERMINISTIC",
        "switch",
        default="false",
        meaning="only kernels that give the same bits each time: a resumed run ends with the same bytes on a GPU too",
    )
    memory_limit_gib: float | None = row(
        "MEMORY_LIMIT_GIB", "number", meaning="GiB of a device that may be used", above=0, high=100_000, if_unset="all"
    )

    step_timeout: float | None = row(
        "PARAMS_STEP_TIMEOUT",
        "number",
        meaning="seconds without a step after which the job ends with 75; 0 is off",
        low=0,
        high=1e6,
        if_unset="20 times the usual step, at least 300",
    )
