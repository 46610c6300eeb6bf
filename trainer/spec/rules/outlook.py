"""What a job will do, in lines for the log: its subject, shapes, steps, saves and samples.

`--check`, a job before it downloads a model, and the trainer say it in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from trainer.spec.plan import AUTO, Plan

SHOWN_PLACES = 3  # folders, archives and repositories
SHOWN_SHAPES = 8  # the most frequent ones; the rest are counted


def headline(plan: Plan) -> str:
    """What will be trained, on what, and where the result goes."""
    places: dict[str, None] = {}
    words: dict[str, None] = {}
    for dataset in plan.data.datasets:
        for subset in dataset.subsets:
            if subset.source.kind != "generated":
                places[subset.source.public] = None
            if subset.trigger_word:
                words[repr(subset.trigger_word)] = None
    shown = ", ".join(list(places)[:SHOWN_PLACES])
    if len(places) > SHOWN_PLACES:
        shown += f" and {len(places) - SHOWN_PLACES} more"
    word = f" with the trigger word {' or '.join(words)}" if words else ""
    final = f"{plan.output.path}/{plan.output.name}.safetensors"
    return f"A LoRA of {plan.model.base} at rank {plan.lora.rank}{word}, from {shown}, to {final}."


def describe_shapes(examples: Mapping[tuple[int, int], int]) -> str:
    """`examples`: of an epoch, by width and height in pixels. The most frequent come first."""
    ordered = sorted(examples.items(), key=lambda shape: (-shape[1], shape[0]))
    shown = [f"{width} × {height} ({count:,})" for (width, height), count in ordered[:SHOWN_SHAPES]]
    if len(ordered) > SHOWN_SHAPES:
        shown.append(f"{len(ordered) - SHOWN_SHAPES} more")
    return f"Shapes: {len(ordered)}, in pixels (with examples an epoch): {', '.join(shown)}."


def describe_length(plan: Plan, *, steps_per_epoch: int) -> list[str]:
    """Steps, saves and samples of a plan whose lengths are all numbers."""
    total = plan.train.max_steps or plan.train.max_epochs * steps_per_epoch
    batches_per_step = plan.train.gradient_accumulation * plan.engine.processes
    batch_sizes = sorted({dataset.batch_size * batches_per_step for dataset in plan.data.datasets})
    per_step = " or ".join(str(size) for size in batch_sizes)
    epochs = f"{total / steps_per_epoch:.3g}"
    if total >= 100 * steps_per_epoch:
        epochs = f"{total / steps_per_epoch:,.0f}"
    return [
        f"Steps: {total:,}, which is {epochs} time{'s' if epochs != '1' else ''} all images; an epoch has "
        f"{steps_per_epoch:,} step{'s' if steps_per_epoch != 1 else ''} of up to {per_step} "
        f"image{'s' if per_step != '1' else ''}.",
        f"{_saves(plan, total)} {_samples(plan, total)}",
    ]


def count_saves(plan: Plan, total: int) -> int:
    """How often a job of `total` steps is saved, besides the finished LoRA. The last step is saved too."""
    return math.ceil(total / plan.output.save_every) if plan.output.save_every else 0


def count_sample_rounds(plan: Plan, total: int) -> int:
    """How often samples are drawn: at step 0, between, and at the end."""
    if not plan.output.sample_every or not plan.prompts:
        return 0
    return (total - 1) // plan.output.sample_every + 2


def _saves(plan: Plan, total: int) -> str:
    every = plan.output.save_every
    rounds = count_saves(plan, total)
    if not every:
        return "Saves: only the finished LoRA."
    if rounds == 1:
        return f"Saves: at step {total:,}, with the finished LoRA."
    kept = "all LoRA files and the newest two states"
    if plan.output.keep_checkpoints != AUTO:
        kept = f"the newest {min(rounds, plan.output.keep_checkpoints)}"
    return f"Saves: {rounds:,}, every {every:,} steps, of which {kept} are kept; and the finished LoRA."


def _samples(plan: Plan, total: int) -> str:
    every = plan.output.sample_every
    rounds = count_sample_rounds(plan, total)
    if not rounds:
        return "Samples: none."
    when = "at step 0 and at the end"
    if rounds > 2:
        when = f"at step 0, every {every:,} steps, and at the end"
    images = "image" if len(plan.prompts) == 1 else "images"
    text = f"Samples: {rounds:,} rounds of {len(plan.prompts)} {images}, {when}"
    if plan.output.sample_strengths:
        listed = ", ".join(f"{strength:g}" for strength in plan.output.sample_strengths)
        text += f"; there also with strength {listed}"
    return f"{text}."
