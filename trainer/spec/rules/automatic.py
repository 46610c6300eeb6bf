"""How long to train and how often to save where the user has not said so: by the number of images.

The rule, and what published guides say, is in docs/settings.md.
"""

from __future__ import annotations

import dataclasses
import math

from trainer.spec.plan import AUTO, Plan

VISITS_PER_IMAGE = 100
LEAST_VISITS = 1000  # of all images together
MOST_VISITS = 4000  # unless that were fewer than VISITS_OF_MANY for each image
VISITS_OF_MANY = 10
LEAST_STEPS = 300  # with large batches: an optimiser needs some steps, however many images each has
ROUND_STEPS_TO = 50
ROUNDS = 10  # of saves and samples in a run
LEAST_INTERVAL = 10


def automatic_steps(images_per_epoch: int, images_per_step: int) -> int:
    """Optimiser steps of a run. `images_per_epoch`: with repeats, without regularisation images. `images_per_step`:
    batch size times accumulation times GPUs.
    """
    visits = min(max(VISITS_PER_IMAGE * images_per_epoch, LEAST_VISITS), MOST_VISITS)
    visits = max(visits, VISITS_OF_MANY * images_per_epoch)
    steps = math.ceil(visits / images_per_step / ROUND_STEPS_TO) * ROUND_STEPS_TO
    return max(steps, LEAST_STEPS)


def reason(images_per_epoch: int, images_per_step: int) -> str:
    """Why `automatic_steps` came to its number, for the log."""
    steps = automatic_steps(images_per_epoch, images_per_step)
    visits = steps * images_per_step / max(images_per_epoch, 1)
    return f"each of {images_per_epoch} images, with repeats, is seen {visits:.0f} times, {images_per_step} a step"


def round_interval(total: int) -> int:
    """Steps between two rounds of saves and samples: about ten a run, a round number (1,000 steps: every 100)."""
    exact = total / ROUNDS
    if exact <= LEAST_INTERVAL:
        return LEAST_INTERVAL
    unit = 10 ** math.floor(math.log10(exact)) / 2
    return round(round(exact / unit) * unit)


def intervals(total: int, *, save_every: int | None, sample_every: int | None) -> tuple[int, int]:
    """Steps between saves and between samples; None: chosen here, so that each sample meets a save. 0 is off."""
    usual = round_interval(total)
    save = _meeting(usual, sample_every) if save_every is None else save_every
    sample = _meeting(usual, save_every) if sample_every is None else sample_every
    return save, sample


def _meeting(usual: int, other: int | None) -> int:
    """The multiple of `other` nearest to `usual`, at least `other`; `usual` where `other` is off or chosen too."""
    if not other:
        return usual
    return other * max(1, round(usual / other))


def with_lengths(
    plan: Plan, *, images_per_epoch: int, steps_per_epoch: int, chosen: int | None = None
) -> tuple[Plan, list[str]]:
    """`plan` with numbers for how long to train, and how often to save and sample, where it leaves that to `auto`; and
    a line for the log for each.

    `images_per_epoch`: as for `automatic_steps`. `chosen`: what the run has chosen for its length already, and keeps.
    """
    lines = []
    train = plan.train
    if train.max_steps is None and train.max_epochs == AUTO:
        per_step = images_per_step(plan)
        why = "as this run chose when it began"
        if chosen is None:
            chosen = automatic_steps(images_per_epoch, per_step)
            why = reason(images_per_epoch, per_step)
        lines.append(f"PARAMS_MAX_EPOCHS: auto, {chosen:,} steps ({why}). PARAMS_MAX_STEPS sets another number.")
        train = dataclasses.replace(train, max_steps=chosen)
    output = plan.output
    save_every, sample_every = intervals(
        train.max_steps or train.max_epochs * steps_per_epoch,
        save_every=None if output.save_every == AUTO else output.save_every,
        sample_every=None if output.sample_every == AUTO else output.sample_every,
    )
    output = dataclasses.replace(output, save_every=save_every, sample_every=sample_every)
    return dataclasses.replace(plan, train=train, output=output), lines


def images_per_step(plan: Plan) -> int:
    """Of all GPUs; with several datasets, the largest batch size counts."""
    batch_size = max(dataset.batch_size for dataset in plan.data.datasets)
    return batch_size * plan.train.gradient_accumulation * plan.engine.processes
