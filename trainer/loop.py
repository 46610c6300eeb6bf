"""The training loop: a generator of steps that names no model family and no weight format."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from trainer import objective
from trainer.errors import NumbersError

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

    def to(self, device: str) -> MicroBatch:
        return dataclasses.replace(
            self,
            moments_B2CHW=self.moments_B2CHW.to(device),
            text={k: v.to(device) for k, v in self.text.items()},
            geometry_B6=self.geometry_B6.to(device),
            mask_B1HW=None if self.mask_B1HW is None else self.mask_B1HW.to(device),
            weight_B=self.weight_B.to(device),
        )


@dataclass(frozen=True)
class Step:
    """What one optimiser step was."""

    number: int  # from 1
    epoch: int  # from 1
    images: int
    loss: float
    grad_norm: float


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


def losses(
    predict: Predict, goal: objective.Objective, batch: MicroBatch, *, generator: torch.Generator
) -> torch.Tensor:
    """The loss of each picture, (B,), at random times with random noise."""
    drawn = goal.draw(latents(batch.moments_B2CHW, generator), generator)
    predicted = predict(drawn.noisy_BCHW, drawn.t_B, batch)
    return objective.loss(predicted, drawn, mask_B1HW=batch.mask_B1HW, weight_B=batch.weight_B)


def train(
    groups: Iterable[tuple[int, list[MicroBatch]]],
    *,
    predict: Predict,
    goal: objective.Objective,
    params: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    max_grad_norm: float,
    device: str,
    seed: int,
    first_step: int,
) -> Iterator[Step]:
    """One optimiser step for each group of micro-batches; yields after each.

    `groups`: (epoch, micro-batches); the group's gradient is the mean over its pictures, whatever the sizes of its
    micro-batches. Raises NumbersError, before the weights change, if the loss or the gradient is not finite.
    """
    generator = torch.Generator(device)
    for number, (epoch, group) in enumerate(groups, first_step):
        images = sum(len(batch.names) for batch in group)
        total = 0.0
        for i, batch in enumerate(group):
            each_B = losses(predict, goal, batch.to(device), generator=seeded(generator, seed, number, i))
            loss = each_B.sum() / images
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm or float("inf")).item()
        if not (total + norm < float("inf")):
            names = ", ".join(name for batch in group for name in batch.names)
            raise NumbersError(f"Step {number}: the loss is {total} and the gradient's norm {norm}. Pictures: {names}.")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        yield Step(number, epoch, images, total, norm)


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
