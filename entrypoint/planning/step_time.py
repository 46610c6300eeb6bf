"""How long a training step takes on a card: predicted from steps that were measured on an H200.

`python -m bench step` measured them (`Footprint.measured_steps`). A profile of such a step (docs/engine.md, "Where the
time of a step goes") has three parts: attention scales with the card's 16-bit TFLOP/s, the products of the weights with
its TFLOP/s in their format, and all else with its memory's bandwidth. A recompute policy and offloading cost what
`trainer.spec.strategies` says.

How far that is from what was measured (tests/bench/test_cards.py): an H100 is predicted 3 to 5 % slower than it is,
bf16 on an H200 11 % (SDXL, batch 4), and Flux.1 at 512 x 512 15 %. What is not in it: libraries that reach less of a
card's data sheet than cuBLAS does on an H200, a slower PCIe, and power limits; and that small batches do not fill an
H200, but do fill a small card, which then is faster than predicted.
"""

from __future__ import annotations

import math
from dataclasses import replace

from entrypoint.planning.captions.caption_time import caption_times
from entrypoint.settings.checks import Notes
from entrypoint.settings.variables.finish import FinishSettings
from entrypoint.system.cards import card_of
from entrypoint.system.hardware import Hardware
from entrypoint.system.speeds import MEASURED_ON, Speed, speed_of
from trainer.spec import memory_model
from trainer.spec.family import Footprint
from trainer.spec.memory_model import Strategy, Workload
from trainer.spec.plan import Dataset, Plan, QuotePlan
from trainer.spec.rules.quote import HOUR_S, duration
from trainer.spec.strategies import RECOMPUTE_POLICIES
from trainer.spec.weight_formats import PRECISIONS

# Shares of a step in FP8 on that card: Flux.1, batch 4.
ATTENTION, PRODUCTS = 0.37, 0.37
BANDWIDTH = 1 - ATTENTION - PRODUCTS
# A forward pass in a step that recomputes nothing: recomputing everything is one more.
FORWARD = RECOMPUTE_POLICIES["all"].step_cost - RECOMPUTE_POLICIES["none"].step_cost
# `python -m bench job` on an H200 (docs/performance.md, "Whole jobs"): to the first step, without encoding.
START_S = 33.0
SURELY = 0.25  # no start takes less than this share of that: the fastest that was measured took 0.48
# `python -m bench prepare`, Flux.1 on an H100: a caption, and an image for each 2^20 pixels.
CAPTION_S, LATENT_S_PER_MEGAPIXEL = 0.039, 0.086


def step_seconds(footprint: Footprint, workload: Workload, strategy: Strategy, speed: Speed) -> float | None:
    """Of one forward and backward pass with the optimiser; None where no step of the model was measured."""
    measured = footprint.measured_steps
    if not measured:
        return None
    batch = max([size for size in measured if size <= workload.batch], default=min(measured))
    reference = Strategy("fp8", measured[batch].recompute, 0, "none", 0.0)
    of_reference = Workload(footprint.measured_pixels, batch, workload.rank, workload.optimizer)

    def relative_time(work: Workload, way: Strategy) -> float:
        return work.batch / memory_model.relative_speed(footprint, work, way)

    longer = relative_time(workload, strategy) / relative_time(of_reference, reference)
    there = batch / measured[batch].images_per_second * longer
    # Each token attends to all of its image: at the same number of tokens, larger images take longer.
    tokens = workload.kilotokens(footprint) / workload.batch
    attended = tokens / (of_reference.kilotokens(footprint) / batch)
    multiplies_8_bits = PRECISIONS[strategy.precision].weight_format in ("fp8", "int8")
    products_tflops = speed.tflops_8 if multiplies_8_bits else speed.tflops_16
    return there * (
        ATTENTION * attended * MEASURED_ON.tflops_16 / speed.tflops_16
        + PRODUCTS * MEASURED_ON.tflops_8 / products_tflops
        + BANDWIDTH * MEASURED_ON.gb_s / speed.gb_s
    )


def quote_plan(plan: Plan, footprint: Footprint | None, hardware: Hardware, finish: FinishSettings) -> QuotePlan:
    """What the job is predicted to take on this hardware, as far as that is known, with its price and its limit."""
    limit_hours, limit = _limit(finish)
    price = finish.price_per_hour
    if price is not None:
        price *= plan.engine.nodes
    captions = caption_times(plan.data.captioner, hardware)
    known = QuotePlan(
        caption_s=captions.image,
        captioner_s=captions.load,
        price_per_hour=price,
        limit_hours=limit_hours,
        limit=limit,
    )
    speed = speed_of(hardware)
    # How much slower DoRA is, and text encoders that train, was not measured.
    if footprint is None or speed is None or plan.lora.kind == "dora" or plan.optim.text_encoders:
        return known
    batch_s: list[float] = []
    for dataset in plan.data.datasets:
        taken = step_seconds(footprint, _workload(plan, dataset), _strategy(plan), speed)
        if taken is None:
            return known
        batch_s.append(taken)
    slower = MEASURED_ON.tflops_16 / speed.tflops_16
    megapixels = max(math.prod(dataset.resolution) for dataset in plan.data.datasets) / 2**20
    return replace(
        known,
        card=card_of(hardware) or "",
        batch_s=tuple(batch_s),
        round_s=_round_seconds(plan, footprint, speed),
        start_s=START_S,
        image_s=(CAPTION_S + LATENT_S_PER_MEGAPIXEL * megapixels) * slower,
    )


def refuse_too_short(quote: QuotePlan, notes: Notes) -> None:
    """Note a limit that ends the job before its first step, whatever the machine."""
    if quote.limit_hours is None or quote.limit_hours * HOUR_S >= quote.start_s * SURELY:
        return
    notes.add(
        f"{quote.limit} ends the job after {duration(quote.limit_hours * HOUR_S)}, before its first step: loading "
        f"takes about {duration(quote.start_s)}. Fix: raise it."
    )


def _limit(finish: FinishSettings) -> tuple[float | None, str]:
    """The hours after which the job ends, and the setting that says so; None, "" where none does."""
    limits: list[tuple[float, str]] = []
    if finish.max_runtime is not None:
        limits.append((finish.max_runtime, f"MAX_RUNTIME={finish.max_runtime:g}"))
    if finish.max_cost is not None and finish.price_per_hour:
        name = f"MAX_COST={finish.max_cost:g} at PRICE_PER_HOUR={finish.price_per_hour:g}"
        limits.append((finish.max_cost / finish.price_per_hour, name))
    return min(limits, default=(None, ""))


def _strategy(plan: Plan) -> Strategy:
    engine = plan.engine
    return Strategy(engine.precision, engine.recompute, engine.kept_blocks, engine.offload, 0.0, engine.turned_weights)


def _workload(plan: Plan, dataset: Dataset) -> Workload:
    return Workload(math.prod(dataset.resolution), dataset.batch_size, plan.lora.rank, plan.optim.name)


def _round_seconds(plan: Plan, footprint: Footprint, speed: Speed) -> float:
    """Of one sample of each prompt, each process drawing its share. A rough figure: their passes are taken for those of
    a step.
    """
    engine = plan.engine
    streams = "weights" if engine.offload == "weights" else "none"
    forward_only = Strategy(engine.precision, "none", 0, streams, 0.0)
    seconds = [0.0] * engine.processes
    for number, prompt in enumerate(plan.prompts):
        one = Workload(prompt.width * prompt.height, 1, plan.lora.rank, plan.optim.name)
        passes = prompt.steps * (2 if prompt.cfg != 1.0 else 1)
        taken = passes * FORWARD * (step_seconds(footprint, one, forward_only, speed) or 0.0)
        seconds[number % engine.processes] += taken
    return max(seconds)
