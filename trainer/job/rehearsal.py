"""The rehearsal: a step at the largest batches before the first one, so that memory runs out here or never.

It compiles and captures what the steps will use, allocates the buffers of a save, and creates an optimiser's state; its
gradients are forgotten. Where memory runs out, it tries again with less, until a step fits:
- before a change that makes steps much slower (more offloading, no CUDA graphs any more), the adapter columns next to
  the frozen weights are dropped;
- a captured step of which nothing is compiled takes the engine's next memory mode (recompute more, offload activations)
  and is captured again, if that can be: to launch its kernels one by one would be far slower;
- any other captured step is launched kernel by kernel from then on;
- a step that is not captured takes the engine's next memory mode. Past the last one the job ends with SettingsError.
All processes fall back together, so that all do the same.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trainer.checkpoints.snapshots import Snapshots
from trainer.data import batches
from trainer.data.batches import MicroBatch
from trainer.data.cache import Cache
from trainer.data.epochs import Batch
from trainer.engine.cuda_graphs import EagerStep
from trainer.engine.device import rehearsal_reserve, release
from trainer.engine.execution import Engine
from trainer.lora_files.weights import LoraModules
from trainer.training.distributed import Workers
from trainer.training.gradients import Predict, add_gradient
from trainer.training.objective import Objective
from trainer.training.state import TrainingState

log = logging.getLogger(__name__)


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


def with_longest_caption(batch: Batch, captions: Sequence[str], cache: Cache) -> Batch:
    """`batch` with the caption of `captions` that has the most tokens as its first one: all are padded to the longest.

    Of most families all captions have the same number of tokens.
    """
    sizes = {caption: cache.text_path(caption).stat().st_size for caption in captions}
    if len(set(sizes.values())) < 2:
        return batch
    longest = max(sizes, key=lambda caption: sizes[caption])
    return (dataclasses.replace(batch[0], caption=longest), *batch[1:])


@dataclass
class Rehearsal:
    """What a step and a save need, to try them. `lora_modules`: the live adapters, as a save copies them."""

    engine: Engine
    runner: EagerStep
    training_state: TrainingState
    workers: Workers
    snapshots: Snapshots
    predict: Predict
    objective: Objective
    lora_modules: Callable[[], LoraModules]
    device: str
    seed: int
    reserved_bytes: int = 0  # that the last attempt did without

    def run(self, epoch: Sequence[Batch], cache: Cache, captions: Sequence[str] = ()) -> None:
        """Fall back until the largest batches of `epoch` fit, with the longest of `captions`.

        Raises SettingsError where nothing is left to try.
        """
        started = time.monotonic()
        largest = largest_batches(epoch)
        sizes = " or ".join(f"{len(batch)} images of {batch[0].view.size}" for batch in largest)
        problem = f"The largest batch ({sizes}) does not fit in memory."
        large = [batches.micro_batch(cache, with_longest_caption(batch, captions, cache)) for batch in largest]
        small = []
        if self.device == "cuda":
            smallest = min(epoch, key=lambda batch: len(batch) * math.prod(batch[0].view.size))
            small = [batches.micro_batch(cache, smallest)]
        while True:
            was_capturing = self.runner.capturing
            fits = self.fits(large, small)
            # Capturing may have ended in the attempt, where something in a step cannot be captured.
            capturing = self.workers.all_agree(self.runner.capturing)
            fits = self.workers.all_agree(fits and not (capturing and self.runner.short_of_memory))
            if fits and capturing == was_capturing:
                break
            self._fall_back(problem, fits=fits, capturing=capturing, was_capturing=was_capturing)
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated() - self.reserved_bytes
            log.info(
                "One step takes %.1f GiB at most, and a save %.1f GiB of the host's memory; tried in %.1f s.",
                peak / 2**30, self.snapshots.bytes / 2**30, time.monotonic() - started,
            )  # fmt: skip

    def _fall_back(self, problem: str, *, fits: bool, capturing: bool, was_capturing: bool) -> None:
        """Give up one thing, or take one memory mode that needs less memory (the order is in the module's
        docstring).
        """
        capture_next = capturing and not self.engine.compiled and self.engine.can_capture(1)
        much_slower_next = self.engine.next_offloads_more or (was_capturing and not capture_next)
        dropped_columns = not fits and much_slower_next and self.engine.drop_adapter_columns()
        if capturing and (capture_next or dropped_columns):
            self.runner.reset()
        else:
            self.runner.disable()
        release()
        if dropped_columns:
            return
        if capture_next or not was_capturing:
            self.engine.step_down(problem)
            release()  # host memory of the memory mode before

    def fits(self, large: Sequence[MicroBatch], small: Sequence[MicroBatch] = ()) -> bool:
        """Whether a step of each of `large` fits, next to a save and the optimiser's state.

        `small`: tried as well where kernels are launched one by one.
        """
        try:
            # In every step but the first, the optimiser's own tensors exist.
            state = self.training_state.first_state()
            if self.workers.is_first:  # the one that saves
                self.snapshots.copy((self.lora_modules(), state))
            self.runner.clear()
            # Launched steps find their memory in pieces that steps of other sizes leave behind, and so do captured ones
            # that are captured again after samples were drawn: so an attempt does without a reserve, and launched steps
            # are tried again after a small one. With offloading more stays on the device from the second pass on, when
            # it is known how much goes to the host.
            eager = bool(small) and not self.runner.capturing
            self.reserved_bytes = rehearsal_reserve(self.device, eager=eager)
            reserve = torch.empty(self.reserved_bytes, dtype=torch.uint8, device=self.device)
            tried = list(large)
            if eager:
                tried += small
            if eager or self.engine.offload:
                tried += large
            for batch in tried:
                add_gradient(
                    batch,
                    predict=self.predict,
                    objective=self.objective,
                    device=self.device,
                    seed=self.seed,
                    runner=self.runner,
                )
            self.snapshots.wait()
            del state, reserve
            self.training_state.first_state()  # captured steps keep their memory while the optimiser steps
        except torch.OutOfMemoryError:
            return False
        finally:
            self.runner.clear()
            self.snapshots.wait()
            self.snapshots.release()
        return True
