"""The training loop: a generator of steps that names no model family and no weight format."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import torch

from trainer import objective
from trainer.errors import KilnError, NumbersError, OutOfMemoryError
from trainer.guard import Guard, cause
from trainer.parallel import Team
from trainer.replay import Direct

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """Pictures of one size, as the cache has them. `moments`: mean and standard deviation of the latents.

    `geometry`, in pixels: height and width of the original picture; top and left of the cut in the scaled picture;
    height and width of the cut.
    """

    moments_B2CHW: torch.Tensor
    text: dict[str, torch.Tensor]
    geometry_B6: torch.Tensor
    mask_B1HW: torch.Tensor | None
    weight_B: torch.Tensor
    names: tuple[str, ...]
    captions: tuple[str, ...] = ()  # as the text encoders get them, where some of these train

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """With every tensor changed."""
        return dataclasses.replace(
            self,
            moments_B2CHW=change(self.moments_B2CHW),
            text={k: change(v) for k, v in self.text.items()},
            geometry_B6=change(self.geometry_B6),
            mask_B1HW=None if self.mask_B1HW is None else change(self.mask_B1HW),
            weight_B=change(self.weight_B),
        )

    def to(self, device: str) -> MicroBatch:
        """Begins copies from memory that is pinned, and waits for others."""
        return self.each(lambda t: t.to(device, non_blocking=True))

    def part(self, rows: slice) -> MicroBatch:
        """Some of the pictures."""
        some = self.each(lambda t: t[rows])
        return dataclasses.replace(some, names=self.names[rows], captions=self.captions[rows])


@dataclass(frozen=True)
class Step:
    """What one optimiser step was."""

    number: int  # from 1
    epoch: int  # from 1
    images: int
    loss: float
    grad_norm: float
    skipped: bool = False  # the numbers were bad: the weights are as they were


Predict = Callable[[torch.Tensor, torch.Tensor, MicroBatch], torch.Tensor]  # noisy latents, times, the rest


def seeded(generator: torch.Generator, *parts: int) -> torch.Generator:
    """Set `generator` by the run's seed, the step and the micro-batch: no step depends on how many came before it."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return generator.manual_seed(mixed)


def latents(moments_B2CHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw latents from their distribution."""
    mean_BCHW, std_BCHW = moments_B2CHW.chunk(2, dim=1)
    return mean_BCHW + std_BCHW * torch.randn(mean_BCHW.shape, generator=generator, device=generator.device)


def train(
    groups: Iterable[tuple[int, list[MicroBatch]]],
    *,
    predict: Predict,
    goal: objective.Objective,
    params: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    max_grad_norm: float,
    guard: Guard,
    device: str,
    seed: int,
    first_step: int,
    runner: Direct | None = None,
    team: Team | None = None,
) -> Iterator[Step]:
    """One optimiser step for each group of micro-batches; yields after each.

    `groups`: (epoch, micro-batches); the gradient is the mean over the pictures of a group, whatever the sizes of its
    micro-batches, and of all groups of that step in `team`: of the step's micro-batches each process has every so
    manieth. `runner` runs them. A step to whose numbers `guard` objects leaves the weights as they are. Raises
    NumbersError when that was once too often, and OutOfMemoryError where not even one picture fits.
    """
    runner, team = runner or Direct(params), team or Team()
    backward = _Backward(predict, goal, torch.Generator(device), seed, guard, runner, team.rank, team.size)
    given, unread = iter(groups), None
    number, upcoming = first_step, next(given, None)
    while upcoming is not None:
        epoch, group = upcoming
        each_B = backward(group, number)
        try:
            upcoming = next(given, None)
        except (OSError, ValueError, KilnError) as problem:  # this step is done first, and saved if it is due
            upcoming, unread = None, problem
        if upcoming is not None:
            backward.begin(upcoming[1], number + 1)
        if guard.scale != 1:
            runner.flat.div_(guard.scale)
        said_3 = team.mean(runner.flat, each_B)
        clipped = torch.nn.utils.clip_grad_norm_(params, max_grad_norm or float("inf"))
        loss, images, norm = team.heard(said_3, clipped)  # the step's one wait for the device
        overflow = guard.overflows(loss, norm)
        objection = None if overflow else guard.objection(loss, norm)
        if overflow:
            log.info("Step %d is skipped: its gradient overflows; from now on it is scaled by %g.", number, guard.scale)
        elif objection is None:
            optimizer.step()
        else:
            lost = [x for each in each_B for x in each.tolist()]
            elsewhere = team.size > 1 and not math.isfinite(loss) and all(map(math.isfinite, lost))
            _skip(number, group, None if elsewhere else lost, guard=guard, params=params, objection=objection)
        schedule.step()
        runner.clear()
        yield Step(number, epoch, images, loss, norm, skipped=overflow or objection is not None)
        number += 1
    if unread:
        raise unread


def add_gradient(
    batch: MicroBatch, *, predict: Predict, goal: objective.Objective, device: str, seed: int, runner: Direct
) -> None:
    """The gradient of the mean loss of a batch, as a step of it alone has it. Raises torch.OutOfMemoryError."""
    _Backward(predict, goal, torch.Generator(device), seed, Guard(), runner)._all([batch], 0)


@dataclass
class _Backward:
    """Gradients of a group, with fewer pictures at once as soon as memory runs out. The draws stay the same."""

    predict: Predict
    goal: objective.Objective
    generator: torch.Generator
    seed: int
    guard: Guard  # knows how many times as large as the gradient they are
    runner: Direct
    rank: int = 0  # in the step, the first of these micro-batches has this number
    apart: int = 1  # and those that follow are so far from each other
    at_once: int | None = None  # pictures; None: whole micro-batches
    begun: tuple[int, MicroBatch, objective.Drawn] | None = None  # of the first micro-batch of the step of that number

    def __call__(self, group: list[MicroBatch], number: int) -> list[torch.Tensor]:
        """Add the gradient of the mean over the group's pictures; return the loss of each, by micro-batch."""
        while True:
            try:
                return self._all(group, number)
            except torch.OutOfMemoryError as problem:
                said = str(problem).splitlines()[0]
            # Out here the error no longer holds the failed attempt's tensors.
            held = self.runner.give_up()
            self.runner.clear()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if held:  # with that memory, as many fit as in the rehearsal
                log.warning("Step %d: out of memory; steps are not recorded any more. %s", number, said)
                continue
            largest = max(len(batch.names) for batch in group)
            most = min(self.at_once or largest, largest)
            if most == 1:
                raise OutOfMemoryError(f"Step {number}: one picture at once does not fit in memory: {said}")
            self.at_once = most // 2
            log.warning(
                "Step %d: out of memory with %d pictures at once; from now on %d at once, and as many in each step. %s",
                number, most, self.at_once, said,
            )  # fmt: skip

    def begin(self, group: list[MicroBatch], number: int) -> None:
        """Bring to the device what the step `number` begins with, while it is at work on a recorded step."""
        if self.runner.recording and group:
            with contextlib.suppress(torch.OutOfMemoryError):  # the step itself tries again, and makes room
                self.begun = (number, *self._drawn(group[0], number, 0))

    def _drawn(self, batch: MicroBatch, number: int, i: int) -> tuple[MicroBatch, objective.Drawn]:
        here = batch.to(str(self.generator.device))
        seeded(self.generator, self.seed, number, self.rank + i * self.apart)
        return here, self.goal.draw(latents(here.moments_B2CHW, self.generator), self.generator)

    def _all(self, group: list[MicroBatch], number: int) -> list[torch.Tensor]:
        images = sum(len(batch.names) for batch in group)
        found = []
        for i, batch in enumerate(group):
            begun, self.begun = self.begun, None
            here, drawn = begun[1:] if begun and begun[0] == number else self._drawn(batch, number, i)
            count = len(batch.names)
            size, parts = self.at_once or count, []
            for start in range(0, count, size):
                rows = slice(start, start + size)
                part = here.part(rows)
                inputs = {
                    **_named("drawn", drawn.part(rows)),
                    **_named("batch", part),
                    **{f"text.{k}": v for k, v in part.text.items()},
                    "share": torch.full((), self.guard.scale / images, device=self.generator.device),
                }
                parts.append(self.runner(partial(self._one, names=part.names, captions=part.captions), inputs))
            found.append(torch.cat(parts))
        return found

    def _one(
        self, tensors: dict[str, torch.Tensor], *, names: tuple[str, ...], captions: tuple[str, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each picture, and what of it is the group's."""

        def those(kind: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(f"{kind}."): v for k, v in tensors.items() if k.startswith(f"{kind}.")}

        drawn = objective.Drawn(**those("drawn"))
        there = those("batch")
        mask_B1HW = there.pop("mask_B1HW", None)
        batch = MicroBatch(**there, mask_B1HW=mask_B1HW, text=those("text"), names=names, captions=captions)
        predicted = self.predict(drawn.noisy_BCHW, drawn.t_B, batch)
        each_B = objective.loss(predicted, drawn, mask_B1HW=batch.mask_B1HW, weight_B=batch.weight_B)
        return each_B, each_B.sum() * tensors["share"]


def _named(prefix: str, of: objective.Drawn | MicroBatch) -> dict[str, torch.Tensor]:
    """Its tensors."""
    values = {f.name: getattr(of, f.name) for f in dataclasses.fields(of)}
    return {f"{prefix}.{name}": value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _skip(
    number: int,
    group: list[MicroBatch],
    lost: list[float] | None,
    *,
    guard: Guard,
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
    batches: Iterable[MicroBatch], *, predict: Predict, goal: objective.Objective, device: str, seed: int
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
                drawn = goal.at(mean_BCHW, torch.full((len(mean_BCHW),), time, device=device), noise)
                predicted = predict(drawn.noisy_BCHW, drawn.t_B, here)
                total += objective.loss(predicted, drawn, mask_B1HW=None, weight_B=here.weight_B).sum().item()
                count += len(mean_BCHW)
    return total / max(count, 1)


class Ema:
    """An exponential moving average of the parameters, with a warm-up so that the start is forgotten (as diffusers)."""

    def __init__(self, params: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.shadow = [p.detach().clone() for p in params]

    def update(self, params: Sequence[torch.nn.Parameter]) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for average, p in zip(self.shadow, params, strict=True):
                average.lerp_(p, 1 - decay)


def prefetched(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items, made by one thread up to `depth` ahead."""
    end = object()
    with ThreadPoolExecutor(1, "prefetch") as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield cast(T, item)
