"""Saves during training, and the final LoRA.

A save copies the weights and the state on the training thread (`Snapshots`), which takes milliseconds; a background
thread writes, reads back and compares them (`Saver.save`). The final LoRA is also run through the model before it gets
its name (`Saver.export`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoints import resume, state_files
from trainer.checkpoints.retention import CheckpointRetention
from trainer.checkpoints.snapshots import BackgroundWriter, Snapshots
from trainer.data.captions import fill_placeholders, own_trigger, tag_frequency
from trainer.data.epochs import EpochSampler
from trainer.data.identity import fingerprint
from trainer.data.records import Scan
from trainer.job.verify import Verified, verify
from trainer.lora_files import convert, key_names, metadata, peft_bridge
from trainer.lora_files.metadata import DatasetSummary, SubsetSummary, TrainingRun
from trainer.lora_files.weights import LoraModules, LoraWeights
from trainer.lora_files.write import write_lora
from trainer.spec.errors import FileMismatchError
from trainer.spec.family import Family, base_models, lora_formats
from trainer.spec.plan import AUTO, Plan
from trainer.spec.weight_formats import SAVE_PRECISIONS
from trainer.storage import atomic, json_files
from trainer.storage.run_records import RunRecord
from trainer.training import text_encoders
from trainer.training.objective import Objective
from trainer.training.state import TrainingState
from trainer.training.stop_flag import StopFlag

log = logging.getLogger(__name__)
KEPT_STATES = 2  # where KEEP_CHECKPOINTS is auto: only the newest is resumed from, and one may be damaged
LEAST_KEPT = 2  # LoRA files, however little room there is
SLOW_SAVE_WARNING_S = 0.2  # of waiting for the save before, until the log warns


@dataclass
class Saver:
    """Writes what a run leaves: LoRA files in `out`, under names that `record` lists first, and states in `home`.

    `describe_run`: for the LoRA's header; it is called on the background thread, since it counts all captions.
    """

    plan: Plan
    family: Family
    out: Path
    home: Path
    record: RunRecord
    stop: StopFlag
    training_state: TrainingState
    snapshots: Snapshots
    scan: Scan
    describe_run: Callable[[], TrainingRun]
    total: int  # optimiser steps of the run
    essence: dict[str, Any]  # of the plan as it was launched: names of folders and `auto` may have completed it since
    writer: BackgroundWriter = field(default_factory=BackgroundWriter)

    def __post_init__(self) -> None:
        self.last_saved: int | None = None  # step of the newest state that this process wrote
        keep = self.plan.output.keep_checkpoints
        states, loras = (KEPT_STATES, 0) if keep == AUTO else (keep, keep)
        every = self.plan.output.save_every
        self.retention = CheckpointRetention(
            self.out, self.home, self.record, keep_states=states, keep_loras=loras, every=every
        )

    def saved_step(self) -> int | None:
        return self.last_saved

    def choose_kept(self, total: int) -> None:
        """Decide how many LoRA files are kept where KEEP_CHECKPOINTS is `auto`: all, as far as there is room."""
        every = self.plan.output.save_every
        if self.plan.output.keep_checkpoints != AUTO or not every:
            return
        modules = self.lora_modules()
        lora_bytes = self._lora_bytes(modules)
        copied_bytes = sum(module.nbytes for module in modules.values())
        state_bytes = max(self.snapshots.copied_bytes - copied_bytes, copied_bytes)  # a save copies both
        there = len(self.retention.saved_steps())
        rounds = math.ceil(total / every)
        free = shutil.disk_usage(self.out).free - (KEPT_STATES + 1) * state_bytes - lora_bytes
        room = there + max(0, int(free // max(lora_bytes, 1)) - 1)
        if room >= rounds:
            kept = f"the LoRA files of all {rounds} saves"
        else:
            self.retention.keep_loras = max(room, LEAST_KEPT)
            kept = f"only the newest {self.retention.keep_loras} of {rounds} LoRA files ({atomic.free_space(self.out)})"
        log.info(
            "KEEP_CHECKPOINTS: auto, keeps %s, %s each, and the newest %d states, about %s each.",
            kept, atomic.human_size(lora_bytes), KEPT_STATES, atomic.human_size(state_bytes),
        )  # fmt: skip

    def _lora_bytes(self, modules: LoraModules) -> int:
        """The size of all files of one save, but for their headers."""
        total = 0
        for key_format in self._formats():
            in_matrices, besides = convert.count_numbers(modules, key_format, self.family.FACTS.name)
            total += in_matrices * SAVE_PRECISIONS[self.plan.output.save_precision].bytes
            total += besides * SAVE_PRECISIONS["fp32"].bytes
        return total

    def save(self, step: int, epoch: int) -> None:
        """Copy the LoRA and the state of `step`, and begin to write them; training continues meanwhile.

        Raises what the save before has raised.
        """
        started = time.monotonic()
        self.writer.join()  # the save before: its buffers are reused. Only a slow volume makes this wait.
        waited = time.monotonic() - started
        if waited > SLOW_SAVE_WARNING_S:
            log.warning("Training waited %.1f s for the previous save: the volume of OUTPUT_PATH is slow.", waited)
        self.snapshots.release()
        with self.training_state.inference_weights():
            modules = self.snapshots.copy(self.lora_modules())
            if self.training_state.has_averaged_weights:
                self.snapshots.wait_on_device()  # the training weights are about to overwrite what is being copied
        tree = self.snapshots.copy(self.training_state.state())
        paused_s = time.monotonic() - started
        self.writer.begin(partial(self._write, step, epoch, modules=modules, tree=tree, paused_s=paused_s))

    def _write(self, step: int, epoch: int, *, modules: LoraModules, tree: dict[str, Any], paused_s: float) -> None:
        """Write the copies of `step`; on the background thread."""
        started = time.monotonic()
        self.snapshots.wait()
        write_files = partial(self._write_lora_files, step, epoch, modules)
        write_state = partial(self._write_state, step, tree)
        # The state comes last, so where it is, the LoRA is too. But a stop leaves few seconds, and the state matters
        # most: the LoRA can be made from it.
        remaining = [write_files, write_state]
        if self.stop.requested:
            remaining.reverse()

        def write() -> None:
            """Called again if the disk was full; what is written already is not written again."""
            while remaining:
                remaining[0]()
                del remaining[0]

        self.retention.write(write, step)
        self.last_saved = step
        log.info(
            "Saved step %d: training paused for %.0f ms; written and read back in %.2f s in the background.",
            step, 1000 * paused_s, time.monotonic() - started,
        )  # fmt: skip

    def _write_lora_files(self, step: int, epoch: int, modules: LoraModules) -> None:
        stem = f"{self.plan.output.name}-step{step:08d}"
        for path, lora_file, header in self._files(stem, modules, step, epoch):
            self._set_aside_foreign(path, self.record.files)
            self.record.own(path.name)
            write_lora(path, lora_file.tensors, header)

    def _set_aside_foreign(self, path: Path, own: Collection[str]) -> None:
        """Free a name that a user has given to a file since the run began. `own`: the names that the run has given."""
        json_files.set_aside_unless(path, lambda found: found.name in own, "was not written by this run")

    def _write_state(self, step: int, tree: dict[str, Any]) -> None:
        about_run = {
            "run": {"name": self.plan.output.name, "requested": self.plan.output.requested},
            "essence": self.essence,
            "total": self.total,
            "data": fingerprint(self.scan.images),
            "made_by": resume.made_by(self.plan.engine.attention),
        }
        self.record.own_state(step)
        state_files.save(self.home / "state", step, {**about_run, **tree})

    def export(self, stem: str, *, step: int, epoch: int, output: Callable[[], torch.Tensor]) -> Path:
        """Write the LoRA in every format that this job leaves, each verified first; returns the main one's path.

        `output`: computes the denoiser's output for a fixed input. Raises FileMismatchError where a file is not what
        was trained; that file stays as `….unverified`, and those that are right get their names all the same.
        """
        stem = self._free_stem(stem)
        wrong: list[FileMismatchError] = []
        self.snapshots.release()
        with self.training_state.inference_weights():
            modules = self.snapshots.copy(self.lora_modules())
            self.snapshots.wait()
            for path, lora_file, header in self._files(stem, modules, step, epoch):
                unverified = path.with_name(f"{path.name}.unverified")
                self._set_aside_foreign(unverified, self.record.unverified)
                self.record.own_unverified(unverified.name)
                write_lora(unverified, lora_file.tensors, header)
                try:
                    verified = self._verify(unverified, output)
                except FileMismatchError as problem:
                    wrong.append(problem)
                    continue
                self.record.own(path.name)
                unverified.rename(path)
                atomic.flush(path.parent)
                log.info("%s: %s.", path.name, verified)
                log.info("%s: %s", path.name, self._describe(lora_file))
        if wrong:
            raise FileMismatchError(" ".join(str(problem) for problem in wrong))
        return path

    def _verify(self, path: Path, output: Callable[[], torch.Tensor]) -> Verified:
        facts = self.family.FACTS
        return verify(
            path,
            {facts.lora_prefix: self.training_state.denoiser, **self.training_state.texts.models},
            family_name=facts.name,
            fused=facts.fused_targets,
            save_precision=self.plan.output.save_precision,
            output=output,
        )

    def _describe(self, lora_file: convert.LoraFile) -> str:
        """How the numbers of a file are stored, for the log."""
        save_precision = self.plan.output.save_precision
        size = atomic.human_size(sum(tensor.nbytes for tensor in lora_file.tensors.values()))
        if save_precision == "fp32":
            return f"{size} in fp32, as they were trained (PARAMS_SAVE_PRECISION)."
        text = f"{size} in {save_precision} (PARAMS_SAVE_PRECISION): each layer's change is exact to "
        text += f"{SAVE_PRECISIONS[save_precision].bound:.1g} of it."
        if lora_file.wide_count:
            text += f" {lora_file.wide_count} of {lora_file.pair_count} pairs of matrices stay in fp32, since "
            text += f"{save_precision} cannot hold them so exactly."
        return text

    def _free_stem(self, stem: str) -> str:
        """`stem`; or, where a file of that name has come from elsewhere since the run began, another one."""
        found = stem
        number = 1
        while any(self._is_taken(name) for name in self._final_names(found)):
            number += 1
            found = f"{stem}-{number}"
        if found != stem:
            log.warning("%s.safetensors exists, and this run did not write it: the LoRA is called %s.", stem, found)
        return found

    def _is_taken(self, name: str) -> bool:
        return os.path.lexists(self.out / name) and name not in self.record.files

    def _final_names(self, stem: str) -> list[str]:
        return [f"{stem}{convert.KEY_FORMATS[key_format]}.safetensors" for key_format in self._formats()]

    def lora_modules(self) -> LoraModules:
        """The live adapters, by the names of the layers that they belong to."""
        facts = self.family.FACTS
        scale = self.plan.lora.scale
        modules = peft_bridge.from_peft_state(
            self.training_state.adapters, prefix=facts.lora_prefix, fused=facts.fused_targets, scale=scale
        )
        for name, norms in self.training_state.untrained_norms.items():
            module = f"{facts.lora_prefix}.{name}"
            modules[module] = LoraWeights(norms.new_zeros(0, 1), norms.new_zeros(len(norms), 0), scale, norms)
        for component, state in self.training_state.text_adapters.items():
            modules |= text_encoders.modules(state, component, family_name=facts.name, scale=scale)
        return modules

    def _files(
        self, stem: str, modules: LoraModules, step: int, epoch: int
    ) -> Iterator[tuple[Path, convert.LoraFile, dict[str, str]]]:
        """Path, tensors and header of each file to write. The main one comes last: where it is, all are."""
        run = self.describe_run()
        dora = self.plan.lora.kind == "dora"
        for key_format in reversed(self._formats()):
            save_precision = self.plan.output.save_precision
            lora_file = convert.to_file(modules, key_format, self.family.FACTS.name, save_precision)
            header = metadata.lora_metadata(run, step=step, epoch=epoch, rank=lora_file.rank, alpha=lora_file.alpha)
            header |= lora_file.header
            untrained = [name for name, weights in modules.items() if not weights.rank]
            if untrained:
                header[key_names.UNTRAINED] = json.dumps(untrained)
            if dora:
                header["kiln_dora_read_by"] = convert.DORA_READERS[key_format]
            yield self.out / f"{stem}{convert.KEY_FORMATS[key_format]}.safetensors", lora_file, header

    def _formats(self) -> Sequence[str]:
        """The key names of the files that this job leaves."""
        return lora_formats(self.plan.model.base, self.plan.lora.kind)


def describe_run(plan: Plan, family: Family, objective: Objective, *, sampler: EpochSampler, scan: Scan) -> TrainingRun:
    """The facts of this run for the header of its LoRA files."""
    datasets: list[DatasetSummary] = []
    names: list[str] = []
    triggers: dict[str, None] = {}  # those of all subsets, in order
    for d, dataset in enumerate(plan.data.datasets):
        subsets = []
        for s, subset in enumerate(dataset.subsets):
            captions = []
            for image in scan.images:
                if (image.dataset, image.subset) == (d, s):
                    captions.append(fill_placeholders(image.caption, subset))
            if not captions and any(other.part_of == s for other in dataset.subsets):
                continue  # all of its images are in folders that their names make subsets
            names.append(_unused(Path(subset.folder or subset.source.public).name, names))
            triggers[own_trigger(subset)] = None
            tags = tag_frequency(captions, subset.caption_separator)
            subsets.append(SubsetSummary(names[-1], len(captions), subset.num_repeats, subset.is_reg, tags))
        buckets = {size: count for (owner, size), count in sampler.buckets.items() if owner == d}
        datasets.append(DatasetSummary(dataset, tuple(subsets), buckets))
    first = plan.data.datasets[0]
    return TrainingRun(
        name=plan.output.name,
        base=plan.model.base,
        licence=str(base_models()[plan.model.base][1].licence or ""),
        base_version=family.FACTS.base_version,
        architecture=family.FACTS.architecture,
        lora_type=plan.lora.kind,
        rank=plan.lora.rank,
        split_qkv=plan.lora.split_qkv,
        targets=plan.lora.targets,
        alpha=plan.lora.alpha,
        started=plan.output.started,
        optimizer=plan.optim.name,
        learning_rate=plan.optim.learning_rate,
        text_encoders=plan.optim.text_encoders,
        schedule=plan.optim.scheduler,
        seed=plan.train.seed,
        noise_offset=plan.train.noise_offset,
        max_token_length=plan.train.max_token_length,
        resolution=first.resolution,
        trigger=", ".join(word for word in triggers if word),
        objective=objective.prediction.removesuffix("_prediction"),
        datasets=tuple(datasets),
    )


def _unused(name: str, taken: Collection[str]) -> str:
    """`name`; with a number where several sources, or one at several resolutions, have the same."""
    unused = name
    number = 2
    while unused in taken:
        unused = f"{name} ({number})"
        number += 1
    return unused
