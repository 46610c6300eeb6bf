"""What a LoRA file's header says about the run that made it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from trainer.data.captions import tag_frequency
from trainer.data.epochs import EpochSampler
from trainer.data.records import Scan
from trainer.lora_files.metadata import DatasetSummary, SubsetSummary, TrainingRun
from trainer.spec.family import Family
from trainer.spec.plan import Plan
from trainer.training.objective import Objective


def _unused(name: str, taken: Collection[str]) -> str:
    """`name`; with a number where several sources, or one at several resolutions, have the same."""
    return next(n for n in (name, *(f"{name} ({i})" for i in range(2, len(taken) + 2))) if n not in taken)


def trained(plan: Plan, kind: Family, objective: Objective, *, order: EpochSampler, found: Scan) -> TrainingRun:
    """What the header of the LoRA file says about this run."""
    facts, first = kind.FACTS, plan.data.datasets[0]
    datasets: list[DatasetSummary] = []
    names: list[str] = []
    for d, dataset in enumerate(plan.data.datasets):
        subsets = []
        for i, subset in enumerate(dataset.subsets):
            names.append(_unused(Path(subset.source.public).name, names))
            own = [p.caption for p in found.images if (p.dataset, p.subset) == (d, i)]
            tags = tag_frequency(own, subset.caption_separator)
            subsets.append(SubsetSummary(names[-1], len(own), subset.num_repeats, subset.is_reg, tags))
        buckets = {size: count for (owner, size), count in order.buckets.items() if owner == d}
        datasets.append(DatasetSummary(dataset, tuple(subsets), buckets))
    return TrainingRun(
        name=plan.output.name,
        base=plan.model.base,
        base_version=facts.base_version,
        architecture=facts.architecture,
        lora_type=plan.lora.kind,
        alpha=plan.lora.alpha,
        started=plan.output.started,
        optimizer=plan.optim.name,
        learning_rate=plan.optim.learning_rate,
        text_encoders=plan.optim.text_encoders,
        schedule=plan.optim.scheduler,
        seed=plan.train.seed,
        noise_offset=plan.train.noise_offset,
        resolution=first.resolution,
        trigger=first.subsets[0].trigger_word,
        objective=objective.prediction.removesuffix("_prediction"),
        datasets=tuple(datasets),
    )
