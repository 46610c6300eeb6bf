"""The gradient of one group of micro-batches. It halves the number of images at once when memory runs out."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from trainer.data.batches import MicroBatch
from trainer.engine.cuda_graphs import EagerStep
from trainer.spec.errors import OutOfMemoryError
from trainer.training.objective import NoisedBatch, Objective, loss
from trainer.training.step_guard import StepGuard

log = logging.getLogger(__name__)


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


def add_gradient(
    batch: MicroBatch, *, predict: Predict, objective: Objective, device: str, seed: int, runner: EagerStep
) -> None:
    """The gradient of the mean loss of a batch, as a step of it alone has it. Raises torch.OutOfMemoryError."""
    Backward(predict, objective, torch.Generator(device), seed, StepGuard(), runner)._all([batch], 0)


@dataclass
class Backward:
    """Gradients of a group, with fewer pictures at once as soon as memory runs out. The draws stay the same."""

    predict: Predict
    objective: Objective
    generator: torch.Generator
    seed: int
    guard: StepGuard  # knows how many times as large as the gradient they are
    runner: EagerStep
    process_rank: int = 0  # in the step, the first of these micro-batches has this number
    apart: int = 1  # and those that follow are so far from each other
    at_once: int | None = None  # pictures; None: whole micro-batches
    begun: tuple[int, MicroBatch, NoisedBatch] | None = None  # of the first micro-batch of the step of that number

    def __call__(self, group: list[MicroBatch], number: int) -> list[torch.Tensor]:
        """Add the gradient of the mean over the group's pictures; return the loss of each, by micro-batch."""
        while True:
            try:
                return self._all(group, number)
            except torch.OutOfMemoryError as problem:
                said = str(problem).splitlines()[0]
            # Out here the error no longer holds the failed attempt's tensors.
            held = self.runner.disable()
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
        if self.runner.capturing and group:
            with contextlib.suppress(torch.OutOfMemoryError):  # the step itself tries again, and makes room
                self.begun = (number, *self._drawn(group[0], number, 0))

    def _drawn(self, batch: MicroBatch, number: int, i: int) -> tuple[MicroBatch, NoisedBatch]:
        here = batch.to(str(self.generator.device))
        seeded(self.generator, self.seed, number, self.process_rank + i * self.apart)
        return here, self.objective.add_noise(latents(here.moments_B2CHW, self.generator), self.generator)

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

        drawn = NoisedBatch(**those("drawn"))
        there = those("batch")
        mask_B1HW = there.pop("mask_B1HW", None)
        batch = MicroBatch(**there, mask_B1HW=mask_B1HW, text=those("text"), names=names, captions=captions)
        predicted = self.predict(drawn.noisy_BCHW, drawn.t_B, batch)
        losses_B = loss(predicted, drawn, mask_B1HW=batch.mask_B1HW, weight_B=batch.weight_B)
        return losses_B, losses_B.sum() * tensors["share"]


def _named(prefix: str, of: NoisedBatch | MicroBatch) -> dict[str, torch.Tensor]:
    """Its tensors."""
    values = {f.name: getattr(of, f.name) for f in dataclasses.fields(of)}
    return {f"{prefix}.{name}": value for name, value in values.items() if isinstance(value, torch.Tensor)}
