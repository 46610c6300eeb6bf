"""A run with everything loaded: its steps, and what is due between them.

`Session.train` is the run's main loop. A step itself is in trainer.training.loop; what is done once in a while is here,
as a list of plain ifs: validate, save, sample, stop. Save and sample are also done when the monitor page asks for them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from trainer.checkpoints.snapshots import BackgroundWriter, Snapshots
from trainer.data import batches
from trainer.data.batches import MicroBatch
from trainer.data.cache import Cache
from trainer.data.epochs import EpochSampler
from trainer.data.order.epoch import Epoch, Span
from trainer.engine.cuda_graphs import EagerStep
from trainer.engine.device import release
from trainer.engine.execution import Engine
from trainer.job import sampling
from trainer.job.rehearsal import Rehearsal
from trainer.job.reporting.closing import closing_lines
from trainer.job.reporting.contact_sheet import contact_sheet
from trainer.job.reporting.metrics import Metrics, plan_as_markdown
from trainer.job.reporting.status import Status
from trainer.job.rolling.rolling_cache import RollingCache
from trainer.job.saving import Saver
from trainer.job.watchdog import Watchdog
from trainer.spec.errors import FileMismatchError
from trainer.spec.family import Family
from trainer.spec.plan import Plan
from trainer.spec.rules import quote
from trainer.training import loop, optimizers
from trainer.training.distributed import Workers
from trainer.training.gradients import latents, seeded
from trainer.training.objective import Objective
from trainer.training.state import TrainingState
from trainer.training.stop_flag import StopFlag

log = logging.getLogger(__name__)
T = TypeVar("T")
Aside = Callable[[], contextlib.AbstractContextManager[object]]
LENGTH_STEP = 64  # tokens


def due(step: int, every: int, total: int) -> bool:
    """Whether periodic work is to be done after `step`: at multiples of `every`, and at the end; never if 0."""
    return every > 0 and (step % every == 0 or step == total)


@dataclass
class Session:
    """The parts of a run that is ready to train. `total`, `steps_per_epoch`: optimiser steps."""

    plan: Plan
    family: Family
    home: Path  # of the run: samples, metrics
    stop: StopFlag
    engine: Engine
    runner: EagerStep
    objective: Objective
    training_state: TrainingState
    snapshots: Snapshots
    saver: Saver
    sampler: EpochSampler
    cache: Cache
    total: int
    steps_per_epoch: int
    watchdog: Watchdog
    workers: Workers
    rolling: RollingCache | None = None  # where the cache holds one window at a time
    held: int = 0  # the step whose window the cache holds, and the step up to which it does
    until: int = 0
    shower: BackgroundWriter = field(default_factory=partial(BackgroundWriter, "contact sheet"), init=False)

    def __post_init__(self) -> None:
        self.workers.requests.is_saving = lambda: self.saver.writer.is_busy
        if self.rolling is not None:
            self.rolling.make_room = self._make_room

    def predict(self, noisy_BCHW: torch.Tensor, t_B: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """The denoiser's prediction (B, C, H, W) for noisy latents at times `t_B`."""
        text = self.training_state.texts.encode_trained(batch.text, batch.captions)
        with self.engine.saved_tensors():
            return self.family.predict(
                self.training_state.denoiser,
                noisy_BCHW,
                t_B,
                text=text,
                guidance=self.plan.train.guidance_scale,
                geometry_B6=batch.geometry_B6,
            )

    def rehearse(self, first: int = 0) -> None:
        """A step at the largest batches, forgotten: memory runs out here, or never. Raises SettingsError if it does.

        `first`: the step from which the run goes on. Where the cache holds a window, the sizes are those of this one.
        """
        self.held = min(first, self.total - 1)
        epoch, span = self._held_span()
        captions = partial(self.sampler.all_captions, self._window(span))
        self.rehearsal().run(epoch.outline(span.batches), self.cache, captions)

    def rehearsal(self) -> Rehearsal:
        return Rehearsal(
            self.engine,
            self.runner,
            self.training_state,
            self.workers,
            self.snapshots,
            self.predict,
            self.objective,
            self.saver.lora_modules,
            device=self.plan.engine.device,
            seed=self.plan.train.seed,
        )

    def train(self, status: Status, *, first: int) -> Path | None:
        """All steps after `first`, with what is due between them; then the final LoRA, whose path is returned.

        Of several processes only the first validates, saves and exports; the others wait for it. All draw samples.
        """
        every = self.plan.output
        if self.workers.is_first:
            self.saver.choose_kept(self.total)
            sampling.set_aside_outdated(self.home / "sample", self.plan.prompts)
        metrics = self.metrics(status, first)
        status.saved = self.saver.saved_step
        with contextlib.closing(metrics), contextlib.closing(self.saver.writer), contextlib.closing(self.shower):
            status.update({"first_step": first})
            metrics.describe(plan_as_markdown(self.plan))
            if every.sample_every and first % every.sample_every == 0:
                self.sample(first, status=status, metrics=metrics)
            status.phase("training")
            for step in self.steps(first, partial(self._aside, status, metrics)):
                is_last = step.number == self.total
                if self.training_state.ema and not step.skipped:
                    self.training_state.ema.update(self.training_state.optimizer_params)
                learning_rate = optimizers.step_size(self.training_state.optimizer)
                metrics.step(
                    step,
                    learning_rate=learning_rate,
                    estimate=optimizers.estimate(self.training_state.optimizer),
                    compiled=self.engine.compiled_graph_count,
                )
                if step.number == first + quote.MEASURED_AFTER < self.total:
                    self.log_measured(status, metrics)
                if due(step.number, every.validate_every, self.total):
                    self.on_first(partial(self.validate, step.number, metrics=metrics))
                asked = self.workers.asked()
                saved = due(step.number, every.save_every, self.total) or self.workers.stopping or asked.save
                # The next window is encoded then, and a stop in the midst of that loses no step.
                saved = saved or (self.rolling is not None and step.number == self.until < self.total)
                if saved:
                    self.save(step.number, step.epoch)
                # The last samples follow the export.
                if (due(step.number, every.sample_every, self.total) or asked.sample) and not is_last:
                    self.sample(step.number, status=status, metrics=metrics)
                    status.phase("training")
                if self.workers.stopping and not is_last:
                    if not saved:  # the stop was requested while a sample was drawn
                        self.save(step.number, step.epoch)
                    self.workers.disconnect()
                    self.saver.writer.join()
                    # Raises in the first process, which reports the stop.
                    self.stop.check(f" at step {step.number}; it is saved")
                    return None
                self.saver.writer.check()
                self.shower.check()
                self.watchdog.step()
            final = self.finish(status, metrics)
            if final is None:
                return None
        if self.plan.engine.device == "cuda":
            log.info("Peak of reserved GPU memory: %.2f GiB.", torch.cuda.max_memory_reserved() / 2**30)
        for line in closing_lines(
            final, self.plan, steps=self.total, samples=self.home / "sample", seconds=status.seconds()
        ):
            log.info("%s", line)
        if found := metrics.risen():
            log.warning("Compare the samples before you use it: %s.", found)
        return final

    def finish(self, status: Status, metrics: Metrics) -> Path | None:
        """After the last step: the first process exports the LoRA, whose path it returns; all draw the last samples."""
        self.watchdog.heartbeat()
        self.saver.writer.join()
        status.phase("exporting")
        exported: list[Path] = []
        self.on_first(lambda: exported.append(self.export()))
        if self.plan.output.sample_every:
            self.sample(self.total, status=status, metrics=metrics)
            self.shower.join()
        self.workers.disconnect()
        return exported[0] if exported else None

    def metrics(self, status: Status, first: int) -> Metrics:
        return Metrics(
            self.home,
            status,
            total_steps=self.total,
            first_step=first,
            rounds_left=lambda step: quote.rounds_left(self.plan, step, self.total),
            next_round=lambda step: quote.next_round(self.plan, step, self.total),
            round_s=self.plan.quote.round_s,
        )

    def log_measured(self, status: Status, metrics: Metrics) -> None:
        """Say the quote again, by the steps so far, and whether a limit ends the job before it is done."""
        steps_s = metrics.step_s() * (self.total - metrics.done)
        left = quote.Quote(metrics.step_s(), 0.0, steps_s, metrics.rounds_s())
        log.info("%s", quote.measured(self.plan, left, spent=status.seconds()))
        warning = quote.limit_warning(self.plan, left, first=metrics.done, total=self.total, spent=status.seconds())
        if warning:
            log.warning("%s", warning)

    def steps(self, first: int, aside: Aside = contextlib.nullcontext) -> Iterator[loop.Step]:
        """The optimiser steps after `first`, as an iterator that does them. `aside`: around other work between them."""
        while first < self.total:
            if self.rolling is not None:
                with aside():
                    self.rolling.bring(first)
            self.held = first
            self.until = self._until(first)
            yield from self._steps(first, self.until)
            first = self.until

    def _steps(self, first: int, until: int) -> Iterator[loop.Step]:
        """Those of one window."""
        return loop.train(
            batches.prefetched(self.groups(first, until)),
            predict=self.predict,
            objective=self.objective,
            params=self.training_state.optimizer_params,
            optimizer=self.training_state.optimizer,
            schedule=self.training_state.schedule,
            max_grad_norm=self.plan.train.max_grad_norm,
            guard=self.training_state.guard,
            device=self.plan.engine.device,
            seed=self.plan.train.seed,
            first_step=first + 1,
            runner=self.runner,
            workers=self.workers,
        )

    def groups(self, first: int, until: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """The epoch (from 1) and this process's micro-batches of each step after `first`, up to `until`."""
        pinned = self.plan.engine.device == "cuda"  # for copies to the device that nothing waits for
        _, span = self._held_span()
        lengths = batches.text_lengths(self.sampler.all_captions(self._window(span)), self.cache)
        if self.rolling is not None:  # so that the longest caption of each window does not make graphs of its own
            lengths = {name: -(-length // LENGTH_STEP) * LENGTH_STEP for name, length in lengths.items()}
        epoch_batches: Epoch | None = None
        for done in range(first, until):
            epoch, index = divmod(done, self.steps_per_epoch)
            if epoch_batches is None or index == 0:
                epoch_batches = self.sampler.epoch(epoch)
                span = epoch_batches.span(index, self._batches_per_step)
            group = []
            places = span.of_step(index)
            step_batches = epoch_batches[places.start : places.stop]
            for batch in step_batches[self.workers.process_rank :: self.workers.size]:
                # Captured steps are of one length of captions; launched ones need no padding.
                micro_batch = batches.micro_batch(self.cache, batch, lengths if self.runner.capturing else None)
                group.append(micro_batch.each(torch.Tensor.pin_memory) if pinned else micro_batch)
            yield epoch + 1, group

    @property
    def _batches_per_step(self) -> int:
        """Micro-batches of all processes; the last step of an epoch, and of a window, has the rest."""
        return self.plan.train.gradient_accumulation * self.workers.size

    def _held_span(self) -> tuple[Epoch, Span]:
        """The epoch of the step `held`, and the part of it that the cache holds."""
        epoch, index = divmod(self.held, self.steps_per_epoch)
        batches_of_epoch = self.sampler.epoch(epoch)
        return batches_of_epoch, batches_of_epoch.span(index, self._batches_per_step)

    def _window(self, span: Span) -> int | None:
        return span.window if self.rolling is not None else None

    def _until(self, first: int) -> int:
        """The step up to which the cache holds everything, where it holds that of the step after `first`."""
        if self.rolling is None:
            return self.total
        epoch, index = divmod(first, self.steps_per_epoch)
        span = self.sampler.epoch(epoch).span(index, self._batches_per_step)
        return min(self.total, epoch * self.steps_per_epoch + span.steps.stop)

    @contextlib.contextmanager
    def _aside(self, status: Status, metrics: Metrics) -> Iterator[None]:
        """Around the encoding of a window."""
        status.phase("encoding")
        with metrics.aside():
            yield
        self.watchdog.heartbeat()
        status.phase("training")

    def _make_room(self) -> None:
        """Give the device's memory to the encoders, all but that of the weights and of the optimiser."""
        self.runner.release()
        release()

    def on_first(self, task: Callable[[], None]) -> None:
        """The first process does `task`; the others wait for it."""
        self.workers.on_first(task, self.watchdog.heartbeat)

    def validate(self, step: int, *, metrics: Metrics) -> None:
        """Record the loss on the held-out images."""
        self.watchdog.heartbeat()

        def loss_now() -> float:
            held_out = (batches.micro_batch(self.cache, batch) for batch in self.sampler.validation())
            with self.training_state.inference_weights():
                return loop.validation_loss(
                    held_out,
                    predict=self.predict,
                    objective=self.objective,
                    device=self.plan.engine.device,
                    seed=self.plan.train.seed,
                )

        with metrics.aside():
            loss = self._with_room(partial(self._in_idle_memory, loss_now))
        metrics.record({"step": step, "validation_loss": loss})
        log.info("Validation loss at step %d: %.4f", step, loss)

    def save(self, step: int, epoch: int) -> None:
        """Begin to write the LoRA and the state of `step`, after a check that all processes have the same weights."""
        self.workers.check_same(self.training_state.optimizer_params)
        if self.workers.is_first:
            self.saver.save(step, epoch)

    def sample(self, step: int, *, status: Status, metrics: Metrics) -> None:
        """Draw the samples of `step` that are missing: all processes at once, each its share."""
        prompts = self.plan.prompts
        if not prompts:
            return
        folder, wanted = sampling.share_out(
            step,
            self.home / "sample",
            prompts=prompts,
            strengths=(1.0, *(self.plan.output.sample_strengths if step == self.total else ())),
            workers=self.workers,
        )
        if not wanted:
            return
        status.phase("sampling")

        def draw() -> None:
            sampling.sample(
                step,
                wanted,
                plan=self.plan,
                family=self.family,
                training_state=self.training_state,
                cache=self.cache,
                folder=folder,
                workers=self.workers,
                check_in=self.watchdog.heartbeat,
                around=self.runner.sampling,
            )

        with metrics.aside(is_round=True):
            started = time.monotonic()
            try:
                self._with_room(draw)
            except torch.OutOfMemoryError as problem:  # training is worth more than a sample
                log.warning("Not enough memory to draw all samples of step %d; training continues: %s", step, problem)
            self.watchdog.others_take(time.monotonic() - started)
            self.workers.wait_for_all(self.workers.notices_stop)
            self.watchdog.heartbeat()
            drawn = sampling.collect(step, folder, wanted, workers=self.workers)
        if drawn and self.workers.is_first:
            # Beside the next steps: with many rounds, all their images together take seconds.
            self.shower.begin(partial(self.show, step, folder, metrics))

    def show(self, step: int, folder: Path, metrics: Metrics) -> None:
        """Write the contact sheet, and show the samples of `step` on TensorBoard."""
        contact_sheet(folder, self.plan.prompts)
        metrics.samples(step, sorted(folder.glob(f"step-{step:08d}-*.png")))

    def export(self) -> Path:
        """Write the final LoRA; returns its path. Raises FileMismatchError where it is not what was trained."""
        self.runner.release()
        epoch = math.ceil(self.total / self.steps_per_epoch)
        try:
            return self.saver.export(self.plan.output.name, step=self.total, epoch=epoch, output=self._fixed_output)
        except FileMismatchError:
            if self.saver.saved_step() != self.total:  # no saves are asked for: what was trained is not to be lost
                self.saver.save(self.total, epoch)
                self.saver.writer.join()
            raise

    def _in_idle_memory(self, task: Callable[[], T]) -> T:
        with self.runner.idle_memory():
            return task()

    def _with_room(self, task: Callable[[], T]) -> T:
        """Do `task`; where memory runs out, once more without the captured steps, which are captured anew after that.

        Raises torch.OutOfMemoryError where it does not fit then either.
        """
        self.snapshots.wait_on_device()  # no other weights are swapped in while a save still copies these
        try:
            return task()
        except torch.OutOfMemoryError:
            if not self.runner.capturing:
                raise
        # Not inside `except`: there, the error's traceback would hold the tensors of the failed attempt.
        self.runner.release()
        return task()

    def _fixed_output(self) -> torch.Tensor:
        """The denoiser's output for one image of the dataset, the same each time."""
        device = self.plan.engine.device
        epoch, span = self._held_span()
        first_image = epoch[span.batches.start][:1]
        batch = batches.micro_batch(self.cache, first_image).to(device)
        generator = seeded(torch.Generator(device), self.plan.train.seed)
        noised = self.objective.add_noise(latents(batch.moments_B2CHW, generator), generator)
        return self.predict(noised.noisy_BCHW, noised.t_B, batch)
