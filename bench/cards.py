"""What `auto` chooses on each card, and how long a step would take there: predicted, since only H100s and H200s ran.

    python -m bench plans --cards

The memory mode, its peak and the seconds come from the planner's own functions (`entrypoint.planning.step_time`).
"""

from __future__ import annotations

from dataclasses import replace

from bench.step import RANK, SIZES
from entrypoint.planning.engine_choice import PINNED_HOST_SHARE
from entrypoint.planning.step_time import step_seconds
from entrypoint.system.cards import hardware_of
from entrypoint.system.hardware import Hardware
from entrypoint.system.speeds import SPEEDS
from trainer.spec import memory_model
from trainer.spec.family import Facts, Footprint, get_family
from trainer.spec.memory_model import Strategy, Workload
from trainer.spec.plan import EnginePlan
from trainer.spec.strategies import described, memory_mode

# The rows of the tables; `entrypoint.system.speeds` has the figures of more cards.
SHOWN = (
    *("RTX 3060", "RTX 3090", "RTX 4090", "RTX 5090", "A100 40GB", "L40S", "RTX A6000"),
    *("H100", "H200", "B200", "MI300X", "MI325X"),
)
SHAPES = 10
TITLES = {"flux": "Flux.1, 1280 x 768", "sdxl": "SDXL, 1024 x 1024", "sd3": "SD3 medium, 1024 x 1024"}


def chosen(facts: Facts, footprint: Footprint, hardware: Hardware, workload: Workload) -> Strategy:
    """What the planner chooses for a job that leaves everything to `auto`."""
    compiles = facts.compiles or not hardware.can_capture
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
        captured=hardware.can_capture,
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


def _ten_shapes(footprint: Footprint, hardware: Hardware, workload: Workload, one: Strategy) -> Strategy:
    """`one`, changed as a job changes it whose images have ten shapes, of at most the size of `workload`.

    Each is captured as a CUDA graph of its own. Where steps are not captured, shapes change nothing in the plan.
    """
    if not hardware.can_capture or one.offload == "weights":
        return one
    plan = EnginePlan(
        precision=one.precision,
        recompute=one.recompute,
        kept_blocks=one.kept_blocks,
        offload=one.offload,
        turned_weights=one.transposed,
        host_gib=hardware.host_memory_gib * PINNED_HOST_SHARE,
        compile=memory_mode(one.recompute, one.offload).needs_compiler,
    )
    changed = memory_model.with_room_for_graphs(
        footprint, workload, plan, graphs=SHAPES - 1, have_gib=hardware.memory_gib
    )
    gib = memory_model.predict_peak_gib(
        footprint,
        workload,
        precision=changed.precision,
        recompute=changed.recompute,
        kept_blocks=changed.kept_blocks,
        offload=changed.offload,
        transposed=changed.turned_weights,
    )
    gib += (SHAPES - 1) * footprint.graph_gib
    return Strategy(
        changed.precision,
        changed.recompute,
        changed.kept_blocks,
        changed.offload,
        gib,
        transposed=changed.turned_weights,
    )


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
    for card in SHOWN:
        hardware, speed = hardware_of(card), SPEEDS[card]
        strategy = chosen(facts, footprint, hardware, one)
        if not _fits(hardware, strategy):
            rows.append([card, "does not fit", "", f"{strategy.gib:.1f}", *[""] * 7])
            continue
        taken = step_seconds(footprint, one, strategy, speed)
        many = _ten_shapes(footprint, hardware, one, strategy)
        taken_many = step_seconds(footprint, one, many, speed)
        workload, faster = _fastest(facts, footprint, hardware, one)
        taken_faster = step_seconds(footprint, workload, faster, speed)
        assert taken is not None and taken_many is not None and taken_faster is not None, family
        row = [card, strategy.precision, _way(strategy), f"{strategy.gib:.1f}", f"{taken:.2f}"]
        row += ["the same" if _way(many) == _way(strategy) else _way(many), f"{taken_many:.2f}"]
        images_s = workload.batch / taken_faster
        rows.append([*row, str(workload.batch), _way(faster), f"{faster.gib:.1f}", f"{images_s:.2f}"])
    return rows


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> str:
    """The tables of docs/performance.md, in Markdown."""
    columns = ["card", "weights", "batch 1: memory mode", "GiB", "s a step, predicted"]
    columns += ["with ten shapes: memory mode", "s a step, predicted"]
    columns += ["batch of `auto`", "its memory mode", "GiB", "images/s, predicted"]
    parts: list[str] = []
    for family, title in TITLES.items():
        parts.append(f"{title}:\n\n{_table(columns, family_rows(family))}")
    rows: list[list[str]] = []
    for card in SHOWN:
        hardware, speed = hardware_of(card), SPEEDS[card]
        memory = f"{hardware.memory_gib:.1f}"
        rows.append([card, hardware.architecture, memory, *(f"{value:g}" for value in speed[:3]), speed.source])
    head = ["card", "architecture", "GiB", "TFLOP/s, 16 bits", "8 bits", "GB/s", "source"]
    parts.append(f"The cards, by their makers' data sheets:\n\n{_table(head, rows)}")
    return "\n\n".join(parts)
