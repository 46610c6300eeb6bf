"""Settings that a job can carry out, but that make no sense with as many steps as it has: a warning each.

One row for each; a row is a function of the plan and its steps that gives a sentence, or None. They are looked at
wherever the number of steps is known: in the plan if PARAMS_MAX_STEPS is set, else once the images are counted (by
`--check`, and by the trainer before the first step). What makes no sense whatever the steps are is in
`entrypoint.planning.sanity`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainer.spec.plan import Plan

USUAL_STEPS = "500 to 5,000 for a LoRA"
MAX_USUAL_STEPS = 50_000
MAX_USUAL_WARMUP = 0.5  # of all steps
MIN_STEPS_OF_A_CYCLE = 10


@dataclass(frozen=True)
class Length:
    """How long a job is."""

    steps: int  # of the optimiser
    steps_per_epoch: int | None = None  # None: the images are not counted yet, and so on
    images: int | None = None


def _warmup_longer_than_the_job(plan: Plan, length: Length) -> str | None:
    warmup = plan.optim.warmup_steps
    if warmup <= MAX_USUAL_WARMUP * length.steps:
        return None
    return (
        f"PARAMS_WARMUP_STEPS={warmup}: the job has {length.steps:,} steps, so the learning rate is at its full "
        f"height for {max(0, length.steps - warmup):,} of them. Usual: a tenth of the steps, {length.steps // 10:,}."
    )


def _saves_beyond_the_end(plan: Plan, length: Length) -> str | None:
    every = plan.output.save_every
    if "PARAMS_SAVE_EVERY_N_STEPS" not in plan.given or every <= length.steps:
        return None
    return (
        f"PARAMS_SAVE_EVERY_N_STEPS={every}: the job has {length.steps:,} steps, so only the finished LoRA is "
        f"saved. Usual: a tenth of the steps, {max(1, length.steps // 10):,}."
    )


def _samples_beyond_the_end(plan: Plan, length: Length) -> str | None:
    every = plan.output.sample_every
    if "PARAMS_SAMPLE_EVERY_N_STEPS" not in plan.given or every <= length.steps:
        return None
    return (
        f"PARAMS_SAMPLE_EVERY_N_STEPS={every}: the job has {length.steps:,} steps, so samples are drawn only before "
        f"the first and after the last. Usual: a tenth of the steps, {max(1, length.steps // 10):,}."
    )


def _validations_beyond_the_end(plan: Plan, length: Length) -> str | None:
    every = plan.output.validate_every
    if every <= length.steps:
        return None
    return (
        f"PARAMS_VALIDATE_EVERY_N_STEPS={every}: the job has {length.steps:,} steps, so it never validates. "
        f"Usual: a tenth of the steps, {max(1, length.steps // 10):,}."
    )


def _cycles_of_a_few_steps(plan: Plan, length: Length) -> str | None:
    cycles = plan.optim.num_cycles
    if cycles <= 1 or length.steps / cycles >= MIN_STEPS_OF_A_CYCLE:
        return None
    return (
        f"PARAMS_NUM_CYCLES={cycles}: the job has {length.steps:,} steps, so the learning rate restarts every "
        f"{length.steps / cycles:.3g}. Usual: 1 to 5."
    )


def _very_many_steps(plan: Plan, length: Length) -> str | None:
    if length.steps <= MAX_USUAL_STEPS:
        return None
    if plan.train.max_steps:
        asked = f"PARAMS_MAX_STEPS={plan.train.max_steps}"
    else:
        asked = f"PARAMS_MAX_EPOCHS={plan.train.max_epochs}"
    return f"{asked}: the job has {length.steps:,} steps. Usual: {USUAL_STEPS}; PARAMS_MAX_STEPS sets them."


def _epoch_without_end(plan: Plan, length: Length) -> str | None:
    repeats = max(subset.num_repeats for subset in plan.data.subsets)
    if repeats <= 1 or length.steps_per_epoch is None or length.steps_per_epoch <= length.steps:
        return None
    return (
        f"num_repeats={repeats} (PARAMS_NUM_REPEATS, dataset.json, or the name of a folder): an epoch has "
        f"{length.steps_per_epoch:,} steps, and the job ends after {length.steps:,}. Usual: 1; repeats only weigh "
        "subsets against each other."
    )


def _step_larger_than_the_dataset(plan: Plan, length: Length) -> str | None:
    if length.images is None:
        return None
    batch = max(dataset.batch_size for dataset in plan.data.datasets)
    pieces = plan.train.gradient_accumulation
    step = batch * pieces * plan.engine.processes
    if step <= length.images or pieces * batch == 1:
        return None
    parts = f"{batch} images a batch, PARAMS_GRADIENT_ACCUMULATION={pieces}"
    return (
        f"A step may have {step} images ({parts}), but there are only {length.images}: it has some of them twice, or "
        "is shorter. Usual: 1 to 4 images a step for a small dataset."
    )


def _average_over_more_steps_than_there_are(plan: Plan, length: Length) -> str | None:
    decay = plan.train.ema_decay
    window = 1 / (1 - decay)
    if window <= length.steps:
        return None
    reached = (1 + length.steps) / (10 + length.steps)  # trainer.training.ema lets the decay rise
    return (
        f"PARAMS_EMA_DECAY={decay:g} averages over {window:,.0f} steps, and the job has {length.steps:,}, in which "
        f"the decay rises to {min(decay, reached):.3g}. Usual: 0.99 for {length.steps:,} steps, or 0."
    )


def _no_regularisation_images(plan: Plan, length: Length) -> str | None:
    if "PARAMS_PRIOR_LOSS_WEIGHT" not in plan.given or length.images is None:
        return None
    if any(subset.is_reg for subset in plan.data.subsets):
        return None
    return (
        f"PARAMS_PRIOR_LOSS_WEIGHT={plan.train.prior_loss_weight:g} has no effect: no subset has regularisation images "
        "(is_reg in dataset.json)."
    )


ROWS: tuple[Callable[[Plan, Length], str | None], ...] = (
    _warmup_longer_than_the_job,
    _saves_beyond_the_end,
    _samples_beyond_the_end,
    _validations_beyond_the_end,
    _cycles_of_a_few_steps,
    _very_many_steps,
    _epoch_without_end,
    _step_larger_than_the_dataset,
    _average_over_more_steps_than_there_are,
    _no_regularisation_images,
)


def warnings(plan: Plan, length: Length) -> list[str]:
    """A sentence for each row that applies; without those that `plan` has warned of already."""
    found = []
    for row in ROWS:
        sentence = row(plan, length)
        if sentence and sentence not in plan.warnings:
            found.append(sentence)
    return found
