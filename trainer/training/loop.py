"""The training loop: a generator of steps that names no model family and no weight format."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from trainer.data.batches import MicroBatch
from trainer.engine.cuda_graphs import EagerStep
from trainer.spec.errors import KilnError, NumbersError
from trainer.training.distributed import Workers
from trainer.training.gradients import Backward, Predict, seeded
from trainer.training.objective import Objective, loss
from trainer.training.step_guard import StepGuard, cause

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """What one optimiser step was."""

    number: int  # from 1
    epoch: int  # from 1
    images: int
    loss: float
    grad_norm: float
    skipped: bool = False  # the numbers were bad: the weights are as they were


def train(
    groups: Iterable[tuple[int, list[MicroBatch]]],
    *,
    predict: Predict,
    objective: Objective,
    params: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    max_grad_norm: float,
    guard: StepGuard,
    device: str,
    seed: int,
    first_step: int,
    runner: EagerStep | None = None,
    workers: Workers | None = None,
) -> Iterator[Step]:
    """One optimiser step for each group of micro-batches; yields after each.

    `groups`: (epoch, micro-batches); the gradient is the mean over the pictures of a group, whatever the sizes of its
    micro-batches, and of all groups of that step in `workers`: of the step's micro-batches each process has every so
    manieth. `runner` runs them. A step to whose numbers `guard` objects leaves the weights as they are. Raises
    NumbersError when that was once too often, and OutOfMemoryError where not even one picture fits.
    """
    runner, workers = runner or EagerStep(params), workers or Workers()
    backward = Backward(
        predict, objective, torch.Generator(device), seed, guard, runner, workers.process_rank, workers.size
    )
    given, unread = iter(groups), None
    number, upcoming = first_step, next(given, None)
    while upcoming is not None:
        epoch, group = upcoming
        losses_B = backward(group, number)
        try:
            upcoming = next(given, None)
        except (OSError, ValueError, KilnError) as problem:  # this step is done first, and saved if it is due
            upcoming, unread = None, problem
        if upcoming is not None:
            backward.begin(upcoming[1], number + 1)
        if guard.scale != 1:
            runner.flat_grad.div_(guard.scale)
        step_totals_3 = workers.mean_gradient(runner.flat_grad, losses_B)
        clipped = torch.nn.utils.clip_grad_norm_(params, max_grad_norm or float("inf"))
        loss, images, norm = workers.read_totals(step_totals_3, clipped)  # the step's one wait for the device
        overflow = guard.overflows(loss, norm)
        objection = None if overflow else guard.objection(loss, norm)
        if overflow:
            log.info("Step %d is skipped: its gradient overflows; from now on it is scaled by %g.", number, guard.scale)
        elif objection is None:
            optimizer.step()
        else:
            lost = [x for each in losses_B for x in each.tolist()]
            elsewhere = workers.size > 1 and not math.isfinite(loss) and all(map(math.isfinite, lost))
            _skip(number, group, None if elsewhere else lost, guard=guard, params=params, objection=objection)
        schedule.step()
        runner.clear()
        yield Step(number, epoch, images, loss, norm, skipped=overflow or objection is not None)
        number += 1
    if unread:
        raise unread


def _skip(
    number: int,
    group: list[MicroBatch],
    lost: list[float] | None,
    *,
    guard: StepGuard,
    params: Sequence[torch.nn.Parameter],
    objection: str,
) -> None:
    """Say what is wrong with a step and count it; raises NumbersError when that was once too often.

    `lost`: the loss of each picture; None: those of another process are the reason.
    """
    names = [name for batch in group for name in batch.names]
    inputs = [
        (name, [batch.moments_B2CHW[i], *(v[i] for v in batch.text.values())])
        for batch in group
        for i, name in enumerate(batch.names)
    ]
    why = "a picture of another process, which tells of it"
    if lost is not None:
        why = cause(inputs, list(zip(names, lost, strict=True)), params)
    told = f"Step {number} is skipped: {objection}. Pictures: {', '.join(names)}. Most likely {why}."
    if not guard.skip():
        raise NumbersError(
            f"{told} That is the {guard.skipped}. such step of this run, and PARAMS_MAX_SKIPPED_STEPS is {guard.limit}."
        )
    log.warning("%s (%d of %d that are allowed)", told, guard.skipped, guard.limit)


def validation_loss(
    batches: Iterable[MicroBatch], *, predict: Predict, objective: Objective, device: str, seed: int
) -> float:
    """Mean loss of held-out pictures at fixed times and fixed noise, comparable between steps and runs."""
    generator, total, count = torch.Generator(device), 0.0, 0
    with torch.no_grad():
        for i, batch in enumerate(batches):
            here = batch.to(device)
            mean_BCHW = here.moments_B2CHW.chunk(2, dim=1)[0]
            seeded(generator, seed, i)
            for time in (0.1, 0.3, 0.5, 0.7, 0.9):
                noise = torch.randn(mean_BCHW.shape, generator=generator, device=device)
                drawn = objective.at(mean_BCHW, torch.full((len(mean_BCHW),), time, device=device), noise)
                predicted = predict(drawn.noisy_BCHW, drawn.t_B, here)
                total += loss(predicted, drawn, mask_B1HW=None, weight_B=here.weight_B).sum().item()
                count += len(mean_BCHW)
    return total / max(count, 1)
