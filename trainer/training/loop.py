"""The training loop: a generator of optimiser steps that names no model family and no weight format.

One step, in order:
1. `Backward` adds the gradients of this process's micro-batches (`gradients`: seeds, the mean over images, halving
   when memory runs out). Nothing waits for the device.
2. The next group is read from the cache, and its first micro-batch is sent to the device, while that still computes.
3. `Workers.mean_gradient` replaces the gradient by the mean over the images of all processes (`distributed`).
4. The gradient is clipped.
5. `Workers.read_totals` reads loss, also by noise level, number of images and gradient norm: the only place where a
   step waits for the device.
6. `StepGuard` decides by these numbers whether the optimiser steps. Every process has the same numbers, so all decide
   the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from trainer.data.batches import MicroBatch
from trainer.engine.cuda_graphs import EagerStep
from trainer.spec.errors import KilnError, NumbersError
from trainer.training import objective as objectives
from trainer.training.distributed import Workers
from trainer.training.gradients import Backward, Predict, seeded
from trainer.training.objective import Objective
from trainer.training.step_guard import StepGuard, likely_cause

log = logging.getLogger(__name__)

VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # 0: clean, 1: pure noise


@dataclass(frozen=True)
class Step:
    """The result of one optimiser step."""

    number: int  # from 1
    epoch: int  # from 1
    images: int  # of all processes
    loss: float  # mean over these images
    grad_norm: float  # before clipping
    skipped: bool = False  # the numbers were bad, and the weights are unchanged
    band_losses: tuple[float | None, ...] = ()  # by noise level (`noise_bands.KEYS`); None: a band without images


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

    `groups`: (epoch, this process's micro-batches of one step). Each of N processes takes every N-th micro-batch of the
    step. The gradient is the mean over all images of the step, whatever the sizes of the micro-batches. `runner`:
    computes the gradients of `params`, step by step or from CUDA graphs. `max_grad_norm`: 0 does not clip.

    Raises NumbersError when `guard` has skipped more steps than it allows, and OutOfMemoryError where not even one
    image fits. An error while reading `groups` is raised after the step before it is done.
    """
    runner = runner or EagerStep(params)
    workers = workers or Workers()
    backward = Backward(
        predict, objective, torch.Generator(device), seed, guard, runner, workers.process_rank, workers.size
    )
    remaining = iter(groups)
    unread: Exception | None = None
    number = first_step
    upcoming = next(remaining, None)
    while upcoming is not None:
        epoch, group = upcoming
        losses, times = backward(group, number)
        try:
            upcoming = next(remaining, None)
        except (OSError, ValueError, KilnError) as problem:
            # Raised below, after this step: it may be due to be saved.
            upcoming = None
            unread = problem
        if upcoming is not None:
            backward.prefetch(upcoming[1], number + 1)
        if guard.scale != 1:
            runner.flat_grad.div_(guard.scale)
        step_totals_T = workers.mean_gradient(runner.flat_grad, losses, times)
        clipped = torch.nn.utils.clip_grad_norm_(params, max_grad_norm or float("inf"))
        totals = workers.read_totals(step_totals_T, clipped)  # the step's one wait for the device
        loss, norm = totals.loss, totals.norm
        overflow = guard.overflows(loss, norm)
        objection = None
        if not overflow:
            objection = guard.objection(loss, norm)
        if overflow:
            log.info("Step %d is skipped: its gradient overflows; the loss scale is now %g.", number, guard.scale)
        elif objection is None:
            optimizer.step()
        else:
            _skip(number, group, losses, loss=loss, guard=guard, params=params, workers=workers, objection=objection)
        schedule.step()
        runner.clear()
        is_skipped = overflow or objection is not None
        yield Step(number, epoch, totals.images, loss, norm, skipped=is_skipped, band_losses=totals.band_losses)
        number += 1
    if unread:
        raise unread


def _skip(
    number: int,
    group: list[MicroBatch],
    losses: list[torch.Tensor],
    *,
    loss: float,
    guard: StepGuard,
    params: Sequence[torch.nn.Parameter],
    workers: Workers,
    objection: str,
) -> None:
    """Log why step `number` is skipped, and count it. Raises NumbersError when more are skipped than allowed.

    `losses`: those of this process's micro-batches; `loss`: the mean over all processes.
    """
    names = []
    inputs = []
    for batch in group:
        for i, name in enumerate(batch.names):
            names.append(name)
            inputs.append((name, [batch.moments_B2CHW[i], *(tensor[i] for tensor in batch.text.values())]))
    own_losses = [value for losses_B in losses for value in losses_B.tolist()]
    if workers.size > 1 and not math.isfinite(loss) and all(map(math.isfinite, own_losses)):
        cause = "an image of another process, whose log names it"
    else:
        cause = likely_cause(inputs, list(zip(names, own_losses, strict=True)), params)
    message = f"Step {number} is skipped: {objection}. Images: {', '.join(names)}. Most likely {cause}."
    if not guard.skip():
        raise NumbersError(
            f"{message} This run has now skipped {guard.skipped} steps, more than PARAMS_MAX_SKIPPED_STEPS="
            f"{guard.limit} allows."
        )
    log.warning("%s (%d of the %d skipped steps that are allowed)", message, guard.skipped, guard.limit)


def validation_loss(
    batches: Iterable[MicroBatch], *, predict: Predict, objective: Objective, device: str, seed: int
) -> float:
    """Mean loss of the held-out images at fixed times and with fixed noise, comparable between steps and runs.

    It takes the mean of each image's latents instead of a draw. 0 without images.
    """
    generator = torch.Generator(device)
    total = 0.0
    count = 0
    with torch.no_grad():
        for i, batch in enumerate(batches):
            on_device = batch.to(device)
            mean_BCHW = on_device.moments_B2CHW.chunk(2, dim=1)[0]
            seeded(generator, seed, i)
            for time in VALIDATION_TIMES:
                noise_BCHW = torch.randn(mean_BCHW.shape, generator=generator, device=device)
                t_B = torch.full((len(mean_BCHW),), time, device=device)
                noised = objective.at(mean_BCHW, t_B, noise_BCHW)
                predicted_BCHW = predict(noised.noisy_BCHW, noised.t_B, on_device)
                losses_B = objectives.loss(predicted_BCHW, noised, mask_B1HW=None, weight_B=on_device.weight_B)
                total += losses_B.sum().item()
                count += len(mean_BCHW)
    return total / max(count, 1)
