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

from entrypoint.system.speeds import MEASURED_ON, Speed
from trainer.spec import memory_model
from trainer.spec.family import Footprint
from trainer.spec.memory_model import Strategy, Workload
from trainer.spec.weight_formats import PRECISIONS

# Shares of a step in FP8 on that card: Flux.1, batch 4.
ATTENTION, PRODUCTS = 0.37, 0.37
BANDWIDTH = 1 - ATTENTION - PRODUCTS


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
