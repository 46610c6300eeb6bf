"""A run with everything loaded: the steps, and what is done between them."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trainer.checkpoints import resume, state_files
from trainer.checkpoints.retention import CheckpointRetention
from trainer.checkpoints.snapshots import BackgroundWriter, Snapshots
from trainer.data import cache as caching
from trainer.data.batches import MicroBatch, micro_batch, prefetched
from trainer.data.cache import Cache
from trainer.data.epochs import Batch, EpochSampler
from trainer.data.identity import fingerprint
from trainer.data.records import Scan
from trainer.engine import encoders
from trainer.engine.cuda_graphs import EagerStep, GraphStep
from trainer.engine.device import rehearsal_reserve, release, torch_dtype
from trainer.engine.execution import Engine, without_new_compilation
from trainer.engine.quantization.cast_adapters import AdapterCast
from trainer.job import sampling, saving
from trainer.job.metrics import Metrics
from trainer.job.status import Status
from trainer.job.verify import verify
from trainer.job.watchdog import Watchdog
from trainer.lora_files import convert, metadata, peft_bridge
from trainer.lora_files.weights import LoraModules
from trainer.lora_files.write import write_lora
from trainer.spec.family import Family, base_models
from trainer.spec.plan import Plan, Prompt
from trainer.storage import atomic
from trainer.training import optimizers, text_encoders
from trainer.training.distributed import Workers
from trainer.training.gradients import add_gradient, latents, seeded
from trainer.training.loop import train, validation_loss
from trainer.training.objective import Objective, scheduler_changes
from trainer.training.state import TrainingState
from trainer.training.stop_flag import StopFlag

log = logging.getLogger(__name__)
SLOW_SAVE_WARNING_S = 0.2  # of waiting for the save before


def due(step: int, every: int, total: int) -> bool:
    """Whether periodic work is to be done after `step`: at multiples of `every`, and at the end; never if 0."""
    return every > 0 and (step % every == 0 or step == total)


@dataclass
class Session:
    """The parts of a run that is ready to train. `total`, `steps_per_epoch`: optimiser steps."""

    plan: Plan
    kind: Family
    out: Path
    stop: StopFlag
    engine: Engine
    objective: Objective
    training_state: TrainingState
    order: EpochSampler
    cache: Cache
    found: Scan
    total: int
    steps_per_epoch: int
    watchdog: Watchdog
    workers: Workers

    def __post_init__(self) -> None:
        self.snapshots = Snapshots(self.training_state.optimizer, self.plan.engine.device)
        self.background = BackgroundWriter()
        self.retention = CheckpointRetention(self.out, self.plan.output.name, self.plan.output.keep_checkpoints)
        self.spared = 0  # bytes that the rehearsal did without
        dtype, compiled = torch_dtype(self.plan.engine), self.engine.compiled  # which makes adapters' halves in passing
        halves = contextlib.nullcontext if compiled else AdapterCast(self.training_state.denoiser, dtype)
        recorded = self.plan.engine.replay and self.engine.can_capture() and not self.training_state.texts.models
        around = partial(self.engine.forward_backward, halves)
        self.runner = (GraphStep if recorded else EagerStep)(
            self.training_state.adapter_params, self.training_state.optimizer_params, around
        )

    def predict(self, noisy_BCHW: torch.Tensor, t_B: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        text = self.training_state.texts.encode_trained(batch.text, batch.captions)
        with self.engine.saved_tensors():
            return self.kind.predict(
                self.training_state.denoiser,
                noisy_BCHW,
                t_B,
                text=text,
                guidance=self.plan.train.guidance_scale,
                geometry_B6=batch.geometry_B6,
            )

    @staticmethod
    def largest(epoch: Sequence[Batch]) -> list[Batch]:
        """Those of which no other has as many pictures of that size or more: one of them takes most.

        Which of them, the model says: to each picture come the tokens of its text, and so many small ones take more
        than a few large ones with as many pixels.
        """
        by_size = {(len(b), math.prod(b[0].view.size)): b for b in epoch}
        return [
            batch
            for (count, pixels), batch in by_size.items()
            if not any(c >= count and p >= pixels and (c, p) != (count, pixels) for c, p in by_size)
        ]

    def rehearse(self) -> None:
        """A step at the largest batches, forgotten: memory runs out here, or never. Also what a save is copied into.

        Where it does, steps are not recorded, or the engine goes one rung down. Raises SettingsError past the last.
        """
        epoch = self.order.epoch(0)
        largest = self.largest(epoch)
        told = " or ".join(f"{len(b)} pictures of {b[0].view.size}" for b in largest)
        what = f"The largest batch ({told}) does not fit in memory."
        started, batches = time.monotonic(), [micro_batch(self.cache, batch) for batch in largest]
        least = min(epoch, key=lambda b: len(b) * math.prod(b[0].view.size))
        between = [micro_batch(self.cache, least)] if self.plan.engine.device == "cuda" else []
        while True:
            as_recorded = self.runner.capturing
            fits = self._rehearsed(batches, between)
            recorded = self.workers.all_agree(self.runner.capturing)  # no more, where something in a step cannot be
            fits = self.workers.all_agree(fits and not (recorded and self.runner.short_of_memory))
            if fits and recorded == as_recorded:
                break
            # What is not compiled is far slower when it is launched: rather the next way, as long as that is recorded.
            again = recorded and not self.engine.compiled and self.engine.can_capture(1)
            steep = self.engine.next_offloads_more or (as_recorded and not again)
            narrower = not fits and steep and self.engine.drop_adapter_columns()
            self.runner.reset() if recorded and (again or narrower) else self.runner.disable()
            release()
            if narrower:
                continue
            if again or not as_recorded:
                self.engine.step_down(what)
                release()  # what waited on the host
        if self.plan.engine.device == "cuda":
            peak = (torch.cuda.max_memory_allocated() - self.spared) / 2**30
            log.info(
                "One step takes %.1f GiB at most, and a save %.1f GiB of the host's memory; tried in %.1f s.",
                peak, self.snapshots.bytes / 2**30, time.monotonic() - started,
            )  # fmt: skip

    def _rehearsed(self, batches: Sequence[MicroBatch], between: Sequence[MicroBatch] = ()) -> bool:
        device, seed = self.plan.engine.device, self.plan.train.seed
        try:
            state = self.training_state.first_state()  # the optimiser's tensors are there in every step but the first
            if self.workers.is_first:  # the one that saves
                self.snapshots.copy((self._modules(), state))
            self.runner.clear()
            # More stays on the device once it is known how much goes to the host. And what is launched finds memory in
            # the pieces that other sizes leave; as what is recorded anew does, where samples were drawn meanwhile.
            launched = [] if self.runner.capturing else between
            self.spared = rehearsal_reserve(device, eager=bool(launched))
            spare = torch.empty(self.spared, dtype=torch.uint8, device=device)
            for batch in [*batches, *launched, *(batches if launched or self.engine.offload else [])]:
                add_gradient(
                    batch, predict=self.predict, objective=self.objective, device=device, seed=seed, runner=self.runner
                )
            self.snapshots.wait()
            del state, spare
            self.training_state.first_state()  # what is recorded stays where it is while the optimiser steps
        except torch.OutOfMemoryError:
            return False
        finally:
            self.runner.clear()
            self.snapshots.wait()
            self.snapshots.release()
        return True

    def train(self, status: Status, *, first: int) -> None:
        """All steps after `first`, with what is to be done between them; then the final LoRA.

        Of several processes the first alone validates, saves, draws and exports.
        """
        plan, metrics = self.plan, Metrics(self.out, status, total_steps=self.total, first_step=first)
        with contextlib.closing(metrics), contextlib.closing(self.background):
            if plan.output.sample_every and first % plan.output.sample_every == 0:
                self._alone(partial(self.sample, first, status=status, metrics=metrics))
            status.phase("training")
            for step in train(
                prefetched(self.groups(first)),
                predict=self.predict,
                objective=self.objective,
                params=self.training_state.optimizer_params,
                optimizer=self.training_state.optimizer,
                schedule=self.training_state.schedule,
                max_grad_norm=plan.train.max_grad_norm,
                guard=self.training_state.guard,
                device=plan.engine.device,
                seed=plan.train.seed,
                first_step=first + 1,
                runner=self.runner,
                workers=self.workers,
            ):
                if self.training_state.ema and not step.skipped:
                    self.training_state.ema.update(self.training_state.optimizer_params)
                metrics.step(
                    step,
                    learning_rate=optimizers.step_size(self.training_state.optimizer),
                    compiled=self.engine.compiled_graph_count,
                )
                if due(step.number, plan.output.validate_every, self.total):
                    self._alone(partial(self.validate, step.number, metrics=metrics))
                saved = due(step.number, plan.output.save_every, self.total) or self.workers.stopping
                if saved:
                    self.save(step.number, step.epoch)
                if due(step.number, plan.output.sample_every, self.total) and step.number < self.total:
                    self._alone(partial(self.sample, step.number, status=status, metrics=metrics))
                    status.phase("training")
                if self.workers.stopping and step.number < self.total:
                    if not saved:  # the wish came while a sample was drawn
                        self.save(step.number, step.epoch)
                    self.workers.disconnect()
                    self.background.join()
                    self.stop.check()
                    return  # the first process has told why
                self.background.check()
                self.watchdog.step()
            self.watchdog.heartbeat()
            self.workers.disconnect()
            self.background.join()
            if not self.workers.is_first:
                return
            status.phase("exporting")
            final = self.export(plan.output.name, step=self.total, epoch=math.ceil(self.total / self.steps_per_epoch))
            if plan.output.sample_every:
                self.sample(self.total, status=status, metrics=metrics)
        if self.plan.engine.device == "cuda":
            log.info(
                "At most, of the device's memory were reserved %.2f GiB.", torch.cuda.max_memory_reserved() / 2**30
            )
        log.info("Done: %s", final)

    def _alone(self, work: Callable[[], None]) -> None:
        self.workers.on_first(work, self.watchdog.heartbeat)

    def groups(self, first: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """The epoch (from 1) and this process's micro-batches of each step after `first`."""
        size, left = self.plan.train.gradient_accumulation * self.workers.size, self.total - first
        cuda = self.plan.engine.device == "cuda"
        epoch, begin = divmod(first, self.steps_per_epoch)
        while left > 0:
            batches = self.order.epoch(epoch)
            for index in range(begin, min(begin + left, self.steps_per_epoch)):
                some = batches[index * size : (index + 1) * size][self.workers.process_rank :: self.workers.size]
                group = [micro_batch(self.cache, batch) for batch in some]
                yield epoch + 1, [b.each(torch.Tensor.pin_memory) for b in group] if cuda else group
                left -= 1
            epoch, begin = epoch + 1, 0

    def validate(self, step: int, *, metrics: Metrics) -> None:
        """Record the loss on the held-out pictures."""
        self.watchdog.heartbeat()
        batches = (micro_batch(self.cache, b) for b in self.order.validation())
        device, seed = self.plan.engine.device, self.plan.train.seed
        self.runner.release()
        self.snapshots.wait_on_device()
        with metrics.aside(), self.training_state.inference_weights():
            loss = validation_loss(batches, predict=self.predict, objective=self.objective, device=device, seed=seed)
        metrics.record({"step": step, "validation_loss": loss})
        log.info("Validation loss at step %d: %.4f", step, loss)

    def sample(self, step: int, *, status: Status, metrics: Metrics) -> None:
        """Draw what is not there yet of the samples of `step`; a stop is looked for before each picture."""
        prompts, folder = self.plan.prompts, self.out / "sample"
        if not prompts or self.stop.requested:
            return
        status.phase("sampling")
        started, device, model = time.monotonic(), self.plan.engine.device, Path(self.plan.model.path)
        dtype = torch_dtype(self.plan.engine)
        self.runner.release()

        def draw(vae: Any, prompt: Prompt) -> Image.Image:
            self.watchdog.heartbeat()
            cached = (
                (c, {k: v[None].to(device, dtype) for k, v in caching.load(self.cache.text_path(c)).items()})
                for c in (prompt.text, prompt.negative)
            )
            text, negative = (self.training_state.texts.encode_trained(item, [c]) for c, item in cached)
            return self.kind.sample(
                self.training_state.denoiser,
                vae,
                model,
                prompt=prompt,
                text=text,
                negative=negative,
                scheduler=scheduler_changes(self.plan.train),
            )

        self.snapshots.wait_on_device()
        try:
            with metrics.aside(), self.training_state.inference_weights(), torch.no_grad(), without_new_compilation():
                count = sampling.draw_all(
                    folder,
                    prompts,
                    step=step,
                    draw=partial(draw, encoders.load_vae(self.kind, model, self.plan.engine)),
                    stopped=lambda: self.stop.requested,
                )
            log.info("Drew %d samples of step %d in %.1f s.", count, step, time.monotonic() - started)
        except torch.OutOfMemoryError as problem:
            log.warning("There is no memory to draw all samples of step %d; training goes on: %s", step, problem)
        release()

    def save(self, step: int, epoch: int) -> None:
        """Begin to write the LoRA file and the state of `step`; training goes on meanwhile."""
        self.workers.check_same(self.training_state.optimizer_params)
        if not self.workers.is_first:
            return
        started = time.monotonic()
        self.background.join()  # of the save before, whose buffers these are; only a slow volume lets it wait
        waited = time.monotonic() - started
        if waited > SLOW_SAVE_WARNING_S:
            log.warning("Training waited %.1f s for the save before: the volume of OUTPUT_PATH is slow.", waited)
        self.snapshots.release()
        with self.training_state.inference_weights():
            modules = self.snapshots.copy(self._modules())
            if self.training_state.has_averaged_weights:
                self.snapshots.wait_on_device()
        tree = self.snapshots.copy(self.training_state.state())
        stalled = time.monotonic() - started
        self.background.begin(partial(self._save, step, epoch, modules=modules, tree=tree, stalled=stalled))

    def _save(self, step: int, epoch: int, *, modules: LoraModules, tree: dict[str, Any], stalled: float) -> None:
        started = time.monotonic()
        self.snapshots.wait()

        def lora() -> None:
            for path, made, header in self._files(f"{self.plan.output.name}-step{step:08d}", modules, step, epoch):
                write_lora(path, made.tensors, header)

        def state() -> None:
            data, attention = fingerprint(self.found.images), self.plan.engine.attention
            about = {"essence": self.plan.essence(), "data": data, "made_by": resume.made_by(attention)}
            state_files.save(self.out / "state", step, {**about, **tree})

        # The state comes last, so that where it is, all is; but a stop leaves few seconds, and it matters most.
        left = [state, lora] if self.stop.requested else [lora, state]

        def save() -> None:
            while left:
                left[0]()
                del left[0]

        self.retention.write(save, step)
        log.info(
            "Saved step %d: training stood still for %.0f ms; written and read back in %.2f s beside it.",
            step, 1000 * stalled, time.monotonic() - started,
        )  # fmt: skip

    def export(self, stem: str, *, step: int, epoch: int) -> Path:
        """The LoRA in every format that this job leaves, each verified before it gets its name; returns the main one.

        Raises FileMismatchError where a file is not what was trained; it stays beside its place, as `.unverified`.
        """
        facts = self.kind.FACTS
        models = {facts.lora_prefix: self.training_state.denoiser, **self.training_state.texts.models}
        self.runner.release()
        self.snapshots.release()
        with self.training_state.inference_weights():
            modules = self.snapshots.copy(self._modules())
            self.snapshots.wait()
            for path, made, header in self._files(stem, modules, step, epoch):
                unverified = path.with_name(f"{path.name}.unverified")
                write_lora(unverified, made.tensors, header)
                error = verify(
                    unverified, models, family_name=facts.name, fused=facts.fused_targets, output=self._one_output
                )
                unverified.rename(path)
                atomic.flush(path.parent)
                log.info("%s: read back, its output differs from the trained model's by %.1e.", path.name, error)
        return path

    def _modules(self) -> LoraModules:
        """The adapters as they are, by the names of the layers that they belong to."""
        scale, facts, training_state = self.plan.lora.scale, self.kind.FACTS, self.training_state
        found = peft_bridge.from_peft_state(
            training_state.adapters, prefix=facts.lora_prefix, fused=facts.fused_targets, scale=scale
        )
        for component, state in training_state.text_adapters.items():
            found |= text_encoders.modules(state, component, family_name=facts.name, scale=scale)
        return found

    def _files(
        self, stem: str, modules: LoraModules, step: int, epoch: int
    ) -> Iterator[tuple[Path, convert.LoraFile, dict[str, str]]]:
        """Path, tensors and header of each file to write; the main one comes last: where it is, all are."""
        plan = self.plan
        run = saving.trained(plan, self.kind, self.objective, order=self.order, found=self.found)
        # The second file is for diffusers, which knows kohya's keys at the published models' width and depth only.
        miniature = base_models()[plan.model.base][1].is_miniature
        dora = plan.lora.kind == "dora"
        for to in reversed(("kohya", "peft") if miniature or dora else self.kind.LORA_KEYS.file_formats):
            made = convert.to_file(modules, to, self.kind.FACTS.name)
            header = metadata.lora_metadata(run, step=step, epoch=epoch, rank=made.rank, alpha=made.alpha)
            header |= {"kiln_dora_read_by": convert.DORA_READERS[to]} if dora else {}
            yield self.out / f"{stem}{convert.KEY_FORMATS[to]}.safetensors", made, header

    def _one_output(self) -> torch.Tensor:
        """The denoiser's output for one picture of the dataset, the same each time."""
        device = self.plan.engine.device
        batch = micro_batch(self.cache, self.order.epoch(0)[0][:1]).to(device)
        generator = seeded(torch.Generator(device), self.plan.train.seed)
        drawn = self.objective.add_noise(latents(batch.moments_B2CHW, generator), generator)
        return self.predict(drawn.noisy_BCHW, drawn.t_B, batch)
