"""The ways to train with less memory: one ordered table, read by the planner and by the engine.

A *memory mode* is a recompute policy together with an offload mode. `MEMORY_MODES` lists them in the order in which
they are tried, each cheaper in time than the next:

- the planner (`trainer.spec.memory_model.candidates`) predicts the peak of each mode and takes the first that fits;
- the engine (`fallbacks`) steps down the same list when the rehearsal step runs out of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class RecomputePolicy:
    """What the backward pass recomputes. `step_cost`: seconds of a step, relative to a step that keeps everything."""

    step_cost: float
    description: str  # for the log


@dataclass(frozen=True)
class OffloadMode:
    """What waits elsewhere than on the device. `slowdown`: factor on the time of a step."""

    slowdown: float
    description: str  # for the log; follows that of the policy


# From the least memory to the most (`trainer.engine.memory.checkpointing`). Costs: Flux.1 in FP8 on one accelerator,
# `python -m bench step --family flux fp8+none:1 fp8+products:1 fp8+attention:1 fp8+all:1` (docs/performance.md).
RECOMPUTE_POLICIES = {
    "all": RecomputePolicy(1.28, "all recomputed"),
    "attention": RecomputePolicy(1.2, "all but attention recomputed"),
    "products": RecomputePolicy(1.01, "all but products recomputed"),
    "none": RecomputePolicy(1.0, "everything kept"),
}
POLICIES = tuple(RECOMPUTE_POLICIES)

# From the most device memory to the least. Slow-downs: Flux.1 in FP8 at batch sizes 4 (activations) and 1 (weights),
# `python -m bench step --family flux fp8+all+host:4 fp8+all+weights:1`; larger batches hide more of the transfer. That
# of sharded weights is an estimate: `python -m bench gpus --what fp8+all+replay+eager --gpus 1 2 --sharded` tells.
OFFLOADS = {
    "none": OffloadMode(1.0, ""),
    "activations": OffloadMode(1.02, ", activations offloaded"),
    "shards": OffloadMode(1.05, ", weights sharded over the GPUs"),
    "weights": OffloadMode(1.4, ", activations offloaded, weights streamed"),
}

AWAY = ("shards", "weights")  # of OFFLOADS: those in which not all frozen weights are on the device
OFFLOADS_ACTIVATIONS = ("activations", "weights")  # and those in which saved activations wait on the host


@dataclass(frozen=True)
class MemoryMode:
    """A recompute policy with an offload mode, and the conditions under which the two work."""

    recompute: str  # a key of RECOMPUTE_POLICIES
    offload: str = "none"  # a key of OFFLOADS
    # Without the compiler, a checkpoint holds the outputs that its policy keeps, and these are not offloaded.
    needs_compiler: bool = False
    # peft measures the rows of a weight when it creates a DoRA adapter, so the weights must be on the device.
    works_with_dora: bool = True

    @property
    def weights_on_device(self) -> bool:
        """Whether all frozen weights stay on the device; otherwise they come from other GPUs, or from the host."""
        return self.offload not in AWAY

    def is_allowed(self, *, compiled: bool, dora: bool) -> bool:
        """Whether the conditions are met."""
        return (compiled or not self.needs_compiler) and (self.works_with_dora or not dora)


MEMORY_MODES = (
    MemoryMode("none"),
    MemoryMode("products"),
    MemoryMode("attention"),
    MemoryMode("attention", "activations", needs_compiler=True),
    # Takes more of the device than the mode above, but nothing of the host, which may not have that memory.
    MemoryMode("all"),
    MemoryMode("all", "activations"),
    # Only where several GPUs of a machine read each other's memory; then it takes nothing of the host.
    MemoryMode("none", "shards", works_with_dora=False),
    MemoryMode("products", "shards", works_with_dora=False),
    MemoryMode("attention", "shards", works_with_dora=False),
    MemoryMode("all", "shards", works_with_dora=False),
    MemoryMode("all", "weights", works_with_dora=False),
)


def memory_mode(recompute: str, offload: str) -> MemoryMode:
    """The row of the table with this policy and offload mode."""
    for mode in MEMORY_MODES:
        if (mode.recompute, mode.offload) == (recompute, offload):
            return mode
    raise KeyError((recompute, offload))


class RunningMode(NamedTuple):
    """How the regions of a denoiser run: a memory mode, with the first `kept_blocks` regions exempt from recompute."""

    recompute: str
    kept_blocks: int
    offload: str


def fallbacks(policy: str, kept_blocks: int, offload: str, *, compiled: bool) -> list[RunningMode]:
    """The given mode, and after it the modes to fall back to, each of which needs less device memory.

    A fallback recomputes at least as much and offloads at least as much as the given mode, and exempts no block.
    Weights are sharded when they are loaded, or not at all.
    """
    offloads = tuple(OFFLOADS)
    current = RunningMode(policy, kept_blocks, offload)
    modes = [current]
    for mode in MEMORY_MODES:
        recomputes_as_much = POLICIES.index(mode.recompute) <= POLICIES.index(policy) and mode.recompute != "none"
        offloads_as_much = offloads.index(mode.offload) >= offloads.index(offload)
        # DoRA is no condition here: its adapters have been created by now, so the weights may be streamed.
        allowed = mode.is_allowed(compiled=compiled, dora=False) and (mode.offload != "shards" or offload == "shards")
        fallback = RunningMode(mode.recompute, 0, mode.offload)
        if recomputes_as_much and offloads_as_much and allowed and fallback != current:
            modes.append(fallback)
    return modes


def described(recompute: str, kept_blocks: int, offload: str) -> str:
    """A running mode in words, for the log."""
    exempt = f", except in {kept_blocks} blocks" if kept_blocks else ""
    return f"{RECOMPUTE_POLICIES[recompute].description}{exempt}{OFFLOADS[offload].description}"
