"""The gradient of one group of micro-batches, with fewer images at once when memory runs out.

Letters: B images, C latent channels, H and W rows and columns of the latents. 2C: means, then standard deviations.

Randomness. Before each micro-batch the generator is seeded by (run's seed, step, number of the micro-batch in the
step), so no draw depends on those before it. A resumed run therefore draws what an undisturbed one does, the processes
of several GPUs exchange no random state, and the result does not depend on how many of them share the micro-batches.
Latents and noise are drawn for the whole micro-batch before it is cut, so halving it changes no draw either.

The mean. A step's gradient is that of the mean loss over all images of the step, whatever the sizes of its
micro-batches. Here every backward pass starts from (sum of its images' losses) × (loss scale / images of this process's
group), so that the accumulated gradient is the group's mean. `Workers.mean_gradient` then averages over the processes,
each weighted by its images.

Memory. When a pass runs out of memory, the group starts again: first without CUDA graphs, whose memory is then free,
and after that with half as many images at once, for the rest of the run.
"""

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
from trainer.training import objective as objectives
from trainer.training.objective import NoisedBatch, Objective
from trainer.training.step_guard import StepGuard

log = logging.getLogger(__name__)

# (noisy latents (B, C, H, W), times (B,), everything else of the micro-batch) → prediction (B, C, H, W)
Predict = Callable[[torch.Tensor, torch.Tensor, MicroBatch], torch.Tensor]


def seeded(generator: torch.Generator, *parts: int) -> torch.Generator:
    """Seed `generator` by all `parts`, in order: the run's seed, the step and the micro-batch."""
    mixed = 0
    for part in parts:
        # Knuth's MMIX linear congruential generator mixes the parts into one seed of 63 bits.
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return generator.manual_seed(mixed)


def latents(moments_B2CHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Latents (B, C, H, W) drawn from the normal distribution that the VAE's encoder gives for each image."""
    mean_BCHW, std_BCHW = moments_B2CHW.chunk(2, dim=1)
    return mean_BCHW + std_BCHW * torch.randn(mean_BCHW.shape, generator=generator, device=generator.device)


def add_gradient(
    batch: MicroBatch, *, predict: Predict, objective: Objective, device: str, seed: int, runner: EagerStep
) -> None:
    """Add the gradient of the mean loss of one micro-batch, as a step of it alone would. For the rehearsal.

    Raises torch.OutOfMemoryError instead of halving the micro-batch.
    """
    Backward(predict, objective, torch.Generator(device), seed, StepGuard(), runner).group_gradient([batch], 0)


@dataclass
class Backward:
    """Adds the gradients of groups of micro-batches to those of the parameters that `runner` knows.

    Micro-batch `i` of a group has the number `first_index + i * stride` in its step: with N processes each takes every
    N-th one.
    """

    predict: Predict
    objective: Objective
    generator: torch.Generator
    seed: int
    guard: StepGuard  # has the loss scale
    runner: EagerStep
    first_index: int = 0
    stride: int = 1
    images_at_once: int | None = None  # None: whole micro-batches
    # The first micro-batch of the step of that number, already on the device and noised.
    prefetched: tuple[int, MicroBatch, NoisedBatch] | None = None

    def __call__(self, group: list[MicroBatch], number: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Add the gradient of the mean over the group's images, times the loss scale, in step `number`.

        Returns the losses (B,) and the noise levels (B,) of each micro-batch. Raises OutOfMemoryError where not even
        one image fits.
        """
        while True:
            try:
                return self.group_gradient(group, number)
            except torch.OutOfMemoryError as problem:
                reason = str(problem).splitlines()[0]
            # Not inside `except`: there, the error's traceback would hold the tensors of the failed attempt.
            graphs_released = self.runner.disable()
            self.runner.clear()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if graphs_released:  # with their memory, as many images fit as in the rehearsal
                log.warning("Step %d: out of memory; CUDA graphs are disabled. %s", number, reason)
                continue
            largest = max(len(batch.names) for batch in group)
            most = min(self.images_at_once or largest, largest)
            if most == 1:
                raise OutOfMemoryError(f"Step {number}: even a single image does not fit in memory: {reason}")
            self.images_at_once = most // 2
            log.warning(
                "Step %d: out of memory with %d images at once; from now on %d at once, in steps of the same size. %s",
                number, most, self.images_at_once, reason,
            )  # fmt: skip

    def prefetch(self, group: list[MicroBatch], number: int) -> None:
        """Copy and noise the first micro-batch of step `number` while the device computes the step before.

        Only with CUDA graphs: there the host has launched the whole step at once, and is free while it runs.
        """
        if self.runner.capturing and group:
            with contextlib.suppress(torch.OutOfMemoryError):  # the step itself tries again, and makes room
                self.prefetched = (number, *self._noised(group[0], number, 0))

    def _noised(self, batch: MicroBatch, number: int, index: int) -> tuple[MicroBatch, NoisedBatch]:
        """The micro-batch on the device, with noise that depends on nothing but seed, step and micro-batch."""
        on_device = batch.to(str(self.generator.device))
        seeded(self.generator, self.seed, number, self.first_index + index * self.stride)
        latents_BCHW = latents(on_device.moments_B2CHW, self.generator)
        return on_device, self.objective.add_noise(latents_BCHW, self.generator)

    def _take_prefetched(self, number: int) -> tuple[MicroBatch, NoisedBatch] | None:
        prefetched = self.prefetched
        self.prefetched = None
        if prefetched is None or prefetched[0] != number:
            return None
        return prefetched[1:]

    def group_gradient(self, group: list[MicroBatch], number: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`__call__` without a second attempt. Raises torch.OutOfMemoryError."""
        images = sum(len(batch.names) for batch in group)
        losses, times = [], []
        for index, batch in enumerate(group):
            on_device, noised = self._take_prefetched(number) or self._noised(batch, number, index)
            count = len(batch.names)
            at_once = self.images_at_once or count
            pieces = []
            for start in range(0, count, at_once):
                rows = slice(start, start + at_once)
                pieces.append(self._piece(on_device.part(rows), noised.part(rows), images))
            losses.append(torch.cat(pieces))
            times.append(noised.t_B)
        return losses, times

    def _piece(self, batch: MicroBatch, noised: NoisedBatch, images: int) -> torch.Tensor:
        """Forward and backward pass of images that are computed at once; returns their losses (B,)."""
        # A CUDA graph reads its inputs from fixed addresses, so everything that varies goes in as named tensors.
        inputs = {
            **_tensors("noised", noised),
            **_tensors("batch", batch),
            **{f"text.{key}": value for key, value in batch.text.items()},
            "share": torch.full((), self.guard.scale / images, device=self.generator.device),
        }
        return self.runner(partial(self._forward, names=batch.names, captions=batch.captions), inputs)

    def _forward(
        self, tensors: dict[str, torch.Tensor], *, names: tuple[str, ...], captions: tuple[str, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses (B,), and the number that the backward pass starts from."""
        noised = NoisedBatch(**_with_prefix("noised", tensors))
        fields = _with_prefix("batch", tensors)
        mask_B1HW = fields.pop("mask_B1HW", None)
        text = _with_prefix("text", tensors)
        batch = MicroBatch(**fields, mask_B1HW=mask_B1HW, text=text, names=names, captions=captions)
        predicted_BCHW = self.predict(noised.noisy_BCHW, noised.t_B, batch)
        losses_B = objectives.loss(predicted_BCHW, noised, mask_B1HW=mask_B1HW, weight_B=batch.weight_B)
        return losses_B, losses_B.sum() * tensors["share"]


def _tensors(prefix: str, batch: NoisedBatch | MicroBatch) -> dict[str, torch.Tensor]:
    """The fields that are tensors, by `prefix.field`."""
    named = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            named[f"{prefix}.{field.name}"] = value
    return named


def _with_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `_tensors` named with `prefix`, by the fields' own names."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
