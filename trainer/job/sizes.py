"""The sizes of a run's steps, and what they change in a plan that was made before the images were seen.

A step's size is its number of images and their width and height. Photographs fall into many buckets, and the last batch
of a bucket may be smaller, so a run has up to some dozens of them. Each is captured as a CUDA graph of its own.

Captions of different lengths make no further sizes: in captured steps, all are filled up to the longest of the run
(`trainer.data.batches.text_lengths`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from trainer.data.order.variants import Batch
from trainer.engine import device
from trainer.spec.family import base_models
from trainer.spec.memory_model import Workload, with_room_for_graphs
from trainer.spec.plan import EnginePlan, Plan
from trainer.spec.strategies import described
from trainer.training.distributed import Workers

log = logging.getLogger(__name__)
StepSize = tuple[int, int, int, bool]  # images; width and height in pixels; whether the loss is weighed by a mask


def size_of(batch: Batch) -> StepSize:
    has_mask = any(example.image.mask_sha256 is not None for example in batch)
    return len(batch), *batch[0].view.size, has_mask


def one_of_each_size(epoch: Sequence[Batch]) -> list[Batch]:
    """One batch of each size (images, width and height), those with the most pixels first.

    Later epochs have the same sizes: an image always falls into the same bucket, and each is cut into batches alike.
    """
    by_size: dict[StepSize, Batch] = {}
    for batch in epoch:
        by_size.setdefault(size_of(batch), batch)
    return sorted(by_size.values(), key=lambda batch: -len(batch) * math.prod(batch[0].view.size))


def largest_batches(epoch: Sequence[Batch]) -> list[Batch]:
    """The batches not dominated by another in both image count and image size: one of them needs the most memory.

    Which one depends on the model: each image brings the tokens of its text as well, so many small images can need
    more than a few large ones with as many pixels.
    """
    by_size: dict[tuple[int, int], Batch] = {}
    for batch in epoch:
        by_size[len(batch), math.prod(batch[0].view.size)] = batch
    largest = []
    for size, batch in by_size.items():
        dominated = any(other != size and other[0] >= size[0] and other[1] >= size[1] for other in by_size)
        if not dominated:
            largest.append(batch)
    return largest


def engine_plan_for(plan: Plan, epoch: Sequence[Batch], workers: Workers) -> EnginePlan:
    """The plan of the engine, with room for CUDA graphs of all sizes; logs what they are and what they change.

    All processes must call it, and have the same one, for the card with the least memory: they fall back together.
    """
    sizes = one_of_each_size(epoch)
    engine = plan.engine
    footprint = base_models()[plan.model.base][1].footprint
    if len(sizes) == 1:
        return engine
    if not engine.replay or footprint is None or engine.device != "cuda":
        log.info("Steps come in %d sizes, by shape and number of images.", len(sizes))
        return engine
    workloads = [_workload(plan, batch) for batch in sizes]
    largest = max(workloads, key=lambda workload: workload.kilotokens(footprint))
    graphs = len(sizes) - 1  # a plan has room for one
    have_gib = workers.smallest(device.limit_bytes()) / 2**30
    changed = with_room_for_graphs(footprint, largest, engine, graphs=graphs, have_gib=have_gib)
    now = described(changed.recompute, changed.kept_blocks, changed.offload)
    before = described(engine.recompute, engine.kept_blocks, engine.offload)
    if now != before:
        now += f" (instead of {before})"
    log.info(
        "%d sizes of steps, each captured as a CUDA graph: %.1f GiB of the device's memory besides. Memory mode: %s.",
        len(sizes), graphs * footprint.graph_gib, now,
    )  # fmt: skip
    return changed


def _workload(plan: Plan, batch: Batch) -> Workload:
    return Workload(
        math.prod(batch[0].view.size),
        len(batch),
        plan.lora.rank,
        plan.optim.name,
        plan.optim.args,
        ema=bool(plan.train.ema_decay),
        shards=plan.engine.num_gpus,
    )
