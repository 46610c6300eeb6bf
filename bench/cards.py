"""What `auto` chooses on each card, and how long a step would take there: predicted, since only H100s and H200s ran.

    python -m bench plans --cards

The memory mode and its peak come from the planner's own functions. The seconds come from rows measured on an H200
(`python -m bench step`), in three parts that a profile of that step has (docs/engine.md, "Where the time of a step
goes"): attention scales with the card's 16-bit TFLOP/s, the products of the weights with its TFLOP/s in their format,
and all else with its memory's bandwidth. A recompute policy and offloading cost what `trainer.spec.strategies` says.

How far that is from what was measured: an H100 is predicted 3 to 5 % slower than it is (tests/bench/test_cards.py),
and bf16 on an H200 11 % (SDXL, batch 4). What is not in it: libraries that reach less of a card's data sheet than
cuBLAS does on an H200, a slower PCIe, and power limits; and that small batches do not fill an H200, but do fill a small
card, which then is faster than predicted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from bench.step import RANK, SIZES
from entrypoint.planning.engine_choice import PINNED_HOST_SHARE
from entrypoint.system.cards import hardware_of
from entrypoint.system.hardware import Hardware
from trainer.spec import memory_model
from trainer.spec.family import Facts, Footprint, get_family
from trainer.spec.memory_model import Strategy, Workload
from trainer.spec.strategies import described, memory_mode
from trainer.spec.weight_formats import PRECISIONS


class Speed(NamedTuple):
    """A card's peak, as its maker's data sheet has it, without sparsity and with sums in fp32.

    `tflops_8`: of FP8, or of int8 (TOP/s) where there are no tensor cores for FP8.
    """

    tflops_16: float
    tflops_8: float
    gb_s: float  # bandwidth of its memory
    source: str


GA102 = "NVIDIA Ampere GA102 GPU Architecture, whitepaper, appendix A"
ADA = "NVIDIA Ada GPU Architecture, whitepaper, appendix A"
SPEEDS = {
    "RTX 3060": Speed(25.5, 102, 360, "by the GA102 whitepaper's rate for 112 tensor cores at 1.78 GHz"),
    "RTX 3090": Speed(71, 284, 936, GA102),
    "RTX 4090": Speed(165.2, 330.3, 1008, ADA),
    "RTX 5090": Speed(209.5, 419, 1792, "NVIDIA RTX Blackwell GPU Architecture, whitepaper, appendix A"),
    "A100 40GB": Speed(312, 624, 1555, "NVIDIA A100 Tensor Core GPU, data sheet"),
    "L40S": Speed(362, 733, 864, "NVIDIA L40S, data sheet"),
    "RTX A6000": Speed(154.8, 309.7, 768, "NVIDIA RTX A6000, data sheet; " + GA102),
    "H100": Speed(989, 1979, 3350, "NVIDIA H100, data sheet (SXM)"),
    "H200": Speed(989, 1979, 4800, "NVIDIA H200, data sheet (SXM)"),
    "B200": Speed(2250, 4500, 8000, "NVIDIA DGX B200, data sheet, an eighth of it"),
    "MI300X": Speed(1307.4, 2614.9, 5300, "AMD Instinct MI300X, data sheet"),
    "MI325X": Speed(1307.4, 2614.9, 6000, "AMD Instinct MI325X, data sheet"),
}
MEASURED_ON = "H200"
# Shares of a step in FP8 there: Flux.1, batch 4.
ATTENTION, PRODUCTS = 0.37, 0.37
BANDWIDTH = 1 - ATTENTION - PRODUCTS
# Family → batch → recompute policy and images/s in FP8, captured, with torch's own attention where it was measured.
MEASURED = {
    "flux": {1: ("none", 4.02), 4: ("products", 4.39)},
    "sdxl": {1: ("none", 12.8), 4: ("none", 21.2)},
    "sd3": {4: ("none", 20.2)},
}
TITLES = {"flux": "Flux.1, 1280 x 768", "sdxl": "SDXL, 1024 x 1024", "sd3": "SD3 medium, 1024 x 1024"}


def seconds(family: str, footprint: Footprint, workload: Workload, strategy: Strategy, speed: Speed) -> float:
    """Of a step on a card, predicted."""
    measured = MEASURED[family]
    batch = max([size for size in measured if size <= workload.batch], default=min(measured))
    policy, images_s = measured[batch]
    reference = Strategy("fp8", policy, 0, "none", 0.0)
    of_reference = replace(workload, batch=batch)

    def relative_time(work: Workload, way: Strategy) -> float:
        return work.batch / memory_model.relative_speed(footprint, work, way)

    on_h200 = batch / images_s * relative_time(workload, strategy) / relative_time(of_reference, reference)
    h200 = SPEEDS[MEASURED_ON]
    multiplies_8_bits = PRECISIONS[strategy.precision].weight_format in ("fp8", "int8")
    products_tflops = speed.tflops_8 if multiplies_8_bits else speed.tflops_16
    return on_h200 * (
        ATTENTION * h200.tflops_16 / speed.tflops_16
        + PRODUCTS * h200.tflops_8 / products_tflops
        + BANDWIDTH * h200.gb_s / speed.gb_s
    )


def chosen(facts: Facts, footprint: Footprint, hardware: Hardware, workload: Workload) -> Strategy:
    """What the planner chooses for a job that leaves everything to `auto`."""
    captured = hardware.can_capture
    compiles = not (captured and facts.compiles == "never")
    candidates = memory_model.candidates(footprint, workload, hardware.auto_precisions)
    allowed: list[Strategy] = []
    for strategy in candidates:
        if memory_mode(strategy.recompute, strategy.offload).is_allowed(compiled=compiles, dora=False):
            allowed.append(strategy)
    return memory_model.choose(
        footprint,
        workload,
        allowed,
        have_gib=hardware.memory_gib,
        host_gib=hardware.host_memory_gib * PINNED_HOST_SHARE,
        captured=captured,
    )


def _fits(hardware: Hardware, strategy: Strategy) -> bool:
    share = memory_model.MAX_USABLE_SHARE if strategy.offload == "activations" else memory_model.USABLE_SHARE
    return strategy.gib <= hardware.memory_gib * share


def _fastest(facts: Facts, footprint: Footprint, hardware: Hardware, smallest: Workload) -> tuple[Workload, Strategy]:
    """The batch that PARAMS_BATCH_SIZE=auto chooses, and its strategy."""
    tried: list[tuple[Workload, Strategy]] = []
    for batch in memory_model.BATCHES:
        workload = replace(smallest, batch=batch)
        strategy = chosen(facts, footprint, hardware, workload)
        if not tried or (strategy.precision == tried[0][1].precision and _fits(hardware, strategy)):
            tried.append((workload, strategy))
    return memory_model.fastest_batch(footprint, tried)


def _way(strategy: Strategy) -> str:
    copies = ", transposed weight copies" if strategy.transposed else ""
    return f"{described(strategy.recompute, strategy.kept_blocks, strategy.offload)}{copies}"


def family_rows(family: str) -> list[list[str]]:
    """A row for each card: with a batch of one image, and with the batch that `auto` chooses."""
    facts = get_family(family).FACTS
    footprint = next(model.footprint for model in facts.models.values() if model.footprint)
    width, height = SIZES[family]
    one = Workload(width * height, 1, RANK, "adamw")
    rows: list[list[str]] = []
    for card, speed in SPEEDS.items():
        hardware = hardware_of(card)
        strategy = chosen(facts, footprint, hardware, one)
        if not _fits(hardware, strategy):
            rows.append([card, "does not fit", "", f"{strategy.gib:.1f}", "", "", "", "", ""])
            continue
        taken = seconds(family, footprint, one, strategy, speed)
        workload, faster = _fastest(facts, footprint, hardware, one)
        images_s = workload.batch / seconds(family, footprint, workload, faster, speed)
        row = [card, strategy.precision, _way(strategy), f"{strategy.gib:.1f}", f"{taken:.2f}", str(workload.batch)]
        rows.append([*row, _way(faster), f"{faster.gib:.1f}", f"{images_s:.2f}"])
    return rows


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> str:
    """The tables of docs/performance.md, in Markdown."""
    columns = ["card", "weights", "batch 1: memory mode", "GiB", "s a step, predicted", "batch of `auto`"]
    columns += ["its memory mode", "GiB", "images/s, predicted"]
    parts: list[str] = []
    for family, title in TITLES.items():
        parts.append(f"{title}:\n\n{_table(columns, family_rows(family))}")
    rows: list[list[str]] = []
    for card, speed in SPEEDS.items():
        hardware = hardware_of(card)
        memory = f"{hardware.memory_gib:.1f}"
        rows.append([card, hardware.architecture, memory, *(f"{value:g}" for value in speed[:3]), speed.source])
    head = ["card", "architecture", "GiB", "TFLOP/s, 16 bits", "8 bits", "GB/s", "source"]
    parts.append(f"The cards, by their makers' data sheets:\n\n{_table(head, rows)}")
    return "\n\n".join(parts)
