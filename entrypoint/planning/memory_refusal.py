"""Refuses a batch that no memory mode can train on this card, and names the largest batch that fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from trainer.spec import memory_model
from trainer.spec.family import Footprint
from trainer.spec.memory_model import Strategy, Workload
from trainer.spec.strategies import memory_mode

# A prediction may be this much too high (tests/trainer/spec/test_memory_model.py holds 5 %, or 0.5 GiB): what is only
# a little too large is left to the rehearsal, which tries it.
TOLERANCE = 1.1
TOLERANCE_GIB = 0.6

Fits = Callable[[Workload], Strategy]


def refusal(workload: Workload, least: Fits, *, have_gib: float, size: tuple[int, int], variable: str) -> str | None:
    """Why no strategy can train `workload` in `have_gib`, and the fix; None where one can.

    `least` gives the strategy with the lowest peak, of those that the rehearsal may step down to. `size`: width and
    height of the image, `variable`: where the batch size was set, both for the message.
    """
    limit_gib = max(have_gib * TOLERANCE, have_gib + TOLERANCE_GIB)
    needed_gib = least(workload).gib
    if needed_gib <= limit_gib:
        return None
    width, height = size
    images = f"{workload.batch} images" if workload.batch > 1 else "one image"
    problem = f"a step of {images} of {width} × {height} at rank {workload.rank} takes about {needed_gib:.3g} GiB"
    problem += f" in the most frugal mode, and the card has {have_gib:.3g} GiB"
    largest = _largest_batch(workload, least, usable_gib=have_gib * memory_model.USABLE_SHARE)
    if largest:
        accumulation = math.ceil(workload.batch / largest)
        batch = math.ceil(workload.batch / accumulation)
        return (
            f"{variable}={workload.batch}: {problem}. The largest batch that fits is {largest}. Fix: "
            f"PARAMS_BATCH_SIZE={batch} with PARAMS_GRADIENT_ACCUMULATION={accumulation}, which trains on "
            f"{batch * accumulation} images a step; or PARAMS_BATCH_SIZE=auto."
        )
    fixes = ["take a larger card"]  # the last one; those before it are tried
    one = replace(workload, batch=1)
    for rank in (128, 64, 32, 16, 8, 4):
        if rank < workload.rank and least(replace(one, rank=rank)).gib <= have_gib:
            fixes.insert(0, f"PARAMS_NETWORK_DIM={rank}")
            break
    for side in (1024, 768, 512):
        if side * side < workload.pixels and least(replace(one, pixels=side * side)).gib <= have_gib:
            fixes.insert(0, f"PARAMS_RESOLUTION={side}")
            break
    return f"{problem[0].upper()}{problem[1:]}. Fix: {'; or '.join(fixes)}."


def least_peak(footprint: Footprint, precisions: tuple[str, ...], *, host_gib: float, compiles: bool) -> Fits:
    """The function that gives the strategy with the lowest peak of all that the rehearsal may step down to.

    The settings for recomputing and offloading do not count here: they say where the job begins.
    """

    def least(workload: Workload) -> Strategy:
        possible: list[Strategy] = []
        for strategy in memory_model.candidates(footprint, workload, precisions):
            mode = memory_mode(strategy.recompute, strategy.offload)
            in_host = memory_model.pinned_host_gib(footprint, workload, strategy) <= host_gib
            # DoRA is no condition here: once its adapters are there, the weights may be streamed (`fallbacks`).
            if in_host and mode.is_allowed(compiled=compiles, dora=False):
                possible.append(strategy)
        possible = possible or memory_model.candidates(footprint, workload, precisions)
        return min(possible, key=lambda strategy: strategy.gib)

    return least


def _largest_batch(workload: Workload, least: Fits, *, usable_gib: float) -> int:
    """The largest batch, below the workload's, that fits; 0: not even one image. Peaks grow with the batch."""
    low, high = 0, workload.batch - 1
    while low < high:
        middle = (low + high + 1) // 2
        if least(replace(workload, batch=middle)).gib <= usable_gib:
            low = middle
        else:
            high = middle - 1
    return low
