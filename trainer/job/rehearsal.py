"""The rehearsal: steps of the dataset's sizes before the first one, so that memory runs out here or never.

It compiles and captures what the steps will use, allocates the buffers of a save, and creates an optimiser's state; its
gradients are forgotten. Where steps are captured, a step of every size is, the largest first: their graphs share the
memory of the largest, and the first and the last of them are compared with launched steps. Where kernels are launched
one by one, the largest sizes tell enough.

Where memory runs out, it tries again with less, until all fit:
- before a change that makes steps much slower (more offloading, no CUDA graphs any more), the adapter columns next to
  the frozen weights are dropped;
- captured steps take the engine's next memory mode (recompute more, offload activations) and are captured again, if
  that can be: to launch the kernels of some sizes one by one would be far slower;
- if it cannot, they are launched kernel by kernel from then on;
- a step that is not captured takes the engine's next memory mode. Past the last one the job ends with SettingsError.
All processes fall back together, so that all do the same.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from trainer.checkpoints.snapshots import Snapshots
from trainer.data import batches
from trainer.data.batches import MicroBatch
from trainer.data.cache import Cache
from trainer.data.order.variants import Batch
from trainer.engine.cuda_graphs import EagerStep
from trainer.engine.device import rehearsal_reserve, release
from trainer.engine.execution import Engine
from trainer.job.sizes import largest_batches, one_of_each_size
from trainer.lora_files.weights import LoraModules
from trainer.training.distributed import Workers
from trainer.training.gradients import Predict, add_gradient
from trainer.training.objective import Objective
from trainer.training.state import TrainingState

log = logging.getLogger(__name__)


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

    def run(self, epoch: Sequence[Batch], cache: Cache, captions: Callable[[], Iterable[str]] = tuple) -> None:
        """Fall back until steps of all sizes in `epoch` fit, with the longest of `captions()`.

        Raises SettingsError where nothing is left to try.
        """
        largest = largest_batches(epoch)
        sizes = " or ".join(f"{len(batch)} images of {batch[0].view.size}" for batch in largest)
        smallest = min(epoch, key=lambda batch: len(batch) * math.prod(batch[0].view.size))

        longest = batches.longest_caption(captions(), cache)

        def read(some: Sequence[Batch], lengths: Mapping[str, int] | None = None) -> list[MicroBatch]:
            """Each with the longest caption as its first one: all captions of a batch are padded to it."""
            made = []
            for first, *others in some:
                if longest is not None:
                    first = dataclasses.replace(first, caption=longest)
                made.append(batches.micro_batch(cache, (first, *others), lengths))
            return made

        self.run_steps(
            read(one_of_each_size(epoch), batches.text_lengths(captions(), cache)) if self.runner.capturing else [],
            read(largest),
            read([smallest]),
            problem=f"The largest batch ({sizes}) does not fit in memory.",
        )

    def run_steps(
        self, each: Sequence[MicroBatch], large: Sequence[MicroBatch], small: Sequence[MicroBatch], *, problem: str
    ) -> None:
        """`run` with these micro-batches. `each`: one of every size, for captured steps. `problem`: see `step_down`."""
        started = time.monotonic()
        self.runner.must_capture = True
        try:
            while True:
                was_capturing = self.runner.capturing
                fits = self.fits(each) if was_capturing else self.fits(large, small)
                # Capturing may have ended in the attempt, where something in a step cannot be captured.
                capturing = self.workers.all_agree(self.runner.capturing)
                fits = self.workers.all_agree(fits)
                if fits and capturing == was_capturing:
                    break
                self._fall_back(problem, fits=fits, capturing=capturing, was_capturing=was_capturing)
        finally:
            self.runner.must_capture = False
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated() - self.reserved_bytes
            how = f"{len(each)} sizes of steps are captured" if self.runner.capturing else "steps are launched"
            log.info(
                "One step takes %.1f GiB at most, and a save %.1f GiB of the host's memory; %s; tried in %.1f s.",
                peak / 2**30, self.snapshots.bytes / 2**30, how, time.monotonic() - started,
            )  # fmt: skip

    def _fall_back(self, problem: str, *, fits: bool, capturing: bool, was_capturing: bool) -> None:
        """Give up one thing, or take one memory mode that needs less memory (the order is in the module's
        docstring).
        """
        capture_next = capturing and self.engine.can_capture(1)
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
            # that are captured again where samples needed more memory: so an attempt does without a reserve, and
            # launched steps are tried again after a small one. With offloading more stays on the device from the second
            # pass on, when it is known how much goes to the host.
            eager = self.device == "cuda" and not self.runner.capturing
            self.reserved_bytes = rehearsal_reserve(self.device, eager=eager)
            reserve = torch.empty(self.reserved_bytes, dtype=torch.uint8, device=self.device)
            tried = list(large)
            if eager:
                tried += small
            if eager or (self.engine.offload and not self.runner.capturing):
                tried += large
            for batch in tried:
                self._add_gradient(batch)
            if self.runner.capturing and self.runner.has_dropped:
                for batch in tried:
                    self._add_gradient(batch)
            if self.runner.capturing:
                self.runner.comparing = True
                for batch in {id(batch): batch for batch in (tried[0], tried[-1])}.values():
                    self._add_gradient(batch)
            self.snapshots.wait()
            del state, reserve
            self.training_state.first_state()  # captured steps keep their memory while the optimiser steps
        except torch.OutOfMemoryError:
            return False
        finally:
            self.runner.comparing = False
            self.runner.clear()
            self.snapshots.wait()
            self.snapshots.release()
        return True

    def _add_gradient(self, batch: MicroBatch) -> None:
        add_gradient(
            batch,
            predict=self.predict,
            objective=self.objective,
            device=self.device,
            seed=self.seed,
            runner=self.runner,
        )
