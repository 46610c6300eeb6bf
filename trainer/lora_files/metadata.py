"""The metadata in a LoRA file's header: sd-scripts' `ss_*` keys and modelspec 1.0.1."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer import __version__
from trainer.spec.family import CLIP_TOKENS
from trainer.spec.plan import Dataset


@dataclass(frozen=True)
class SubsetSummary:
    """One source of images, for the header."""

    name: str  # last part of the path of its folder, archive or repository; unique in a run
    images: int
    repeats: int
    is_reg: bool
    tags: dict[str, int]


@dataclass(frozen=True)
class DatasetSummary:
    """The images of one resolution and batch size, for the header."""

    plan: Dataset
    subsets: tuple[SubsetSummary, ...]
    buckets: dict[tuple[int, int], int]  # (width, height) → images × repeats

    def count(self, *, reg: bool) -> int:
        """Images × repeats: the regularisation images, or the others."""
        return sum(s.images * s.repeats for s in self.subsets if s.is_reg is reg)

    def to_entry(self) -> dict[str, Any]:
        """An entry of `ss_datasets`."""
        plan = self.plan
        return {
            "is_dreambooth": True,
            "batch_size_per_device": plan.batch_size,
            "num_train_images": self.count(reg=False),
            "num_reg_images": self.count(reg=True),
            "resolution": list(plan.resolution),
            "enable_bucket": plan.enable_bucket,
            "min_bucket_reso": plan.min_bucket_reso,
            "max_bucket_reso": plan.max_bucket_reso,
            "tag_frequency": {s.name: s.tags for s in self.subsets},
            "bucket_info": _bucket_info(self.buckets),
            "subsets": [
                {"image_dir": s.name, "img_count": s.images, "num_repeats": s.repeats, "is_reg": s.is_reg}
                for s in self.subsets
            ],
        }


def _bucket_info(buckets: Mapping[tuple[int, int], int]) -> dict[str, Any]:
    entries = {}
    for index, (size, count) in enumerate(sorted(buckets.items())):
        entries[str(index)] = {"resolution": list(size), "count": count}
    return {"buckets": entries}


@dataclass(frozen=True)
class TrainingRun:
    """A run, for the header of its files, besides the step."""

    name: str  # of the output
    base: str  # value of BASE_MODEL
    base_version: str
    licence: str  # of the base, with what it allows
    architecture: str
    lora_type: str  # lora, rslora or dora
    rank: int  # of training; layers that files keep as one may have more
    split_qkv: bool
    targets: tuple[str, ...]
    alpha: float  # of training; a file may have another, with the difference multiplied into lora_up
    started: int  # Unix seconds
    optimizer: str
    learning_rate: float
    text_encoders: dict[str, float]  # that train → learning rate
    schedule: str
    seed: int
    noise_offset: float
    max_token_length: int
    resolution: tuple[int, int]
    trigger: str | None
    objective: str
    datasets: tuple[DatasetSummary, ...]


def lora_metadata(run: TrainingRun, *, step: int, epoch: int, rank: int, alpha: float) -> dict[str, str]:
    """The metadata of a file, every value a string, as safetensors requires.

    `rank`, `alpha`: those of the file's tensors. The `ss_*` keys are those of sd-scripts' train_network.py,
    `modelspec.*` is Stability AI's ModelSpec 1.0.1, and `kiln_*` are our own.
    """
    date = datetime.datetime.fromtimestamp(run.started, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    resolution = f"{run.resolution[0]}x{run.resolution[1]}"
    subsets = [s for d in run.datasets for s in d.subsets]
    buckets: Counter[tuple[int, int]] = Counter()
    for dataset in run.datasets:
        buckets.update(dataset.buckets)
    values: dict[str, Any] = {
        "ss_output_name": run.name,
        "ss_sd_model_name": run.base,
        "ss_base_model_version": run.base_version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "kiln_alpha": run.alpha,
        "kiln_lora_type": run.lora_type,
        "kiln_rank": run.rank,
        "kiln_split_qkv": run.split_qkv,
        "kiln_targets": run.targets,
        "kiln_version": __version__,
        "ss_training_started_at": float(run.started),
        "ss_bucket_info": _bucket_info(buckets),
        "ss_resolution": f"({run.resolution[0]}, {run.resolution[1]})",
        "ss_dataset_dirs": {s.name: {"n_repeats": s.repeats, "img_count": s.images} for s in subsets},
        "ss_datasets": [d.to_entry() for d in run.datasets],
        "ss_tag_frequency": {s.name: s.tags for s in subsets},
        "ss_num_train_images": sum(d.count(reg=False) for d in run.datasets),
        "ss_num_reg_images": sum(d.count(reg=True) for d in run.datasets),
        "ss_steps": step,
        "ss_epoch": epoch,
        "ss_optimizer": run.optimizer,
        "ss_learning_rate": run.learning_rate,
        "ss_lr_scheduler": run.schedule,
        "ss_seed": run.seed,
        "ss_noise_offset": run.noise_offset,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{run.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": run.name,
        "modelspec.resolution": resolution,
        "modelspec.date": date,
        "modelspec.prediction_type": run.objective,
        "modelspec.trigger_phrase": run.trigger or "",
        "modelspec.license": run.licence,
        "modelspec.tags": "",
    }
    if run.max_token_length != CLIP_TOKENS:  # sd-scripts has no such key, or None, where CLIP reads as usual
        values["ss_max_token_length"] = run.max_token_length
    if run.text_encoders:
        values["ss_text_encoder_lr"] = [*run.text_encoders.values()]
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values.items()}
