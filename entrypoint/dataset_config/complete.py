"""The datasets of a manifest and what the settings say about them → the complete datasets of a plan."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from entrypoint.dataset_config.manifest import Manifest, classify
from entrypoint.settings.checks import Notes, show
from trainer.spec.plan import Dataset, Source, Subset

SMALL = 512  # pixels: with a shorter side the usual limits of buckets (256 to 1024, steps of 64) leave hardly a bucket


@dataclass(frozen=True)
class Overrides:
    """What the settings say about the data; None: nothing."""

    dataset_name: str | None = None
    revision: str | None = None
    split: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    resolution: tuple[int, int] | None = None
    batch_size: int | None = None
    num_repeats: int | None = None
    caption_dropout_rate: float | None = None
    trigger_word: str | None = None


def complete_datasets(
    manifest: Manifest, overrides: Overrides, *, model_resolution: int, multiple: int, notes: Notes
) -> tuple[Dataset, ...]:
    """The datasets with a source for each subset, sizes that fit the model, and the overrides in place.

    `model_resolution` and `multiple` are the base model's, in pixels. Problems and choices go to `notes`.
    """
    default = _named_source(manifest, overrides, notes)
    found = []
    for index, dataset in enumerate(manifest.datasets):
        where = f"{manifest.origin}: datasets[{index}]"
        # What this program's own dataset.json says, the user has not asked for.
        named = frozenset() if manifest.datasets_packaged else manifest.named[index]
        area = overrides.resolution or (dataset.resolution if "resolution" in named else None)
        if area is None:
            area = (model_resolution, model_resolution)
            if manifest.datasets_packaged:
                notes.chose("PARAMS_RESOLUTION", model_resolution, "the base model's")
            else:
                notes.add(f"{where}.resolution is missing. Fix: add it ({model_resolution} suits this model).")
        sized = _sized(dataset, area, named=named, multiple=multiple, where=where, notes=notes)
        _refuse_sizes(sized, multiple=multiple, where=where, notes=notes)
        subsets = [_subset(s, default, overrides, where=where, notes=notes) for s in dataset.subsets]
        batch_size = overrides.batch_size or dataset.batch_size
        found.append(dataclasses.replace(sized, subsets=tuple(subsets), batch_size=batch_size))
    if overrides.split and not any(s.source.kind in ("hub", "") for d in found for s in d.subsets):
        notes.add(f"DATASET_SPLIT={show(overrides.split)}: only Hub datasets have splits. Fix: remove it.")
    return tuple(found)


def _named_source(manifest: Manifest, overrides: Overrides, notes: Notes) -> Source:
    """What DATASET_NAME names; an empty source if that is nothing."""
    unnamed = any(not s.source.kind for d in manifest.datasets for s in d.subsets)
    name, nothing = overrides.dataset_name, Source("", "")
    if name is None:
        if unnamed:
            needed = "" if manifest.datasets_packaged else f", and a subset of {manifest.origin} names no pictures"
            allowed = "a Hub dataset (org/name), a folder, an archive or its URL"
            notes.add(f"DATASET_NAME is not set{needed}. Allowed: {allowed}.")
        elif overrides.revision:
            notes.add(f"DATASET_REVISION={show(overrides.revision)} goes with DATASET_NAME, which is not set.")
        return nothing
    if not unnamed:
        fix = "Fix: remove it, or remove image_dir or dataset from the subset that is to take it"
        notes.add(f"DATASET_NAME={show(name)}: every subset of {manifest.origin} names its own pictures. {fix}.")
    try:
        kind, location = classify(name)
    except ValueError as problem:
        notes.add(f"DATASET_NAME: {problem}.")
        return nothing
    source = Source(kind, location, overrides.revision, "train", overrides.image_column, overrides.caption_column)
    words = {"hub": "a dataset of the Hub", "folder": "a folder", "archive": "an archive"}[kind]
    notes.chose("DATASET_NAME", source.public, words)
    if overrides.revision and kind != "hub":
        notes.add(f"DATASET_REVISION={show(overrides.revision)}: {words} has no revisions. Fix: remove it.")
    return source


def _subset(subset: Subset, default: Source, overrides: Overrides, *, where: str, notes: Notes) -> Subset:
    """With its source complete and the overrides in place."""
    own, rate = subset.source, overrides.caption_dropout_rate
    source = own if own.kind else default
    if source.kind == "hub":
        source = dataclasses.replace(
            source,
            revision=own.revision or source.revision,
            split=own.split or overrides.split or "train",
            image_column=own.image_column or overrides.image_column,
            caption_column=own.caption_column or overrides.caption_column,
        )
    elif source.kind and not own.kind and (own.revision or own.split or own.image_column or own.caption_column):
        notes.add(f"{where}: revision, split and columns are of Hub datasets, and DATASET_NAME is a {source.kind}.")
    return dataclasses.replace(
        subset,
        source=source,
        num_repeats=overrides.num_repeats or subset.num_repeats,
        trigger_word=overrides.trigger_word,
        caption_dropout_rate=subset.caption_dropout_rate if rate is None else rate,
    )


def _sized(
    dataset: Dataset, area: tuple[int, int], *, named: frozenset[str], multiple: int, where: str, notes: Notes
) -> Dataset:
    """With its resolution, and with limits of buckets that fit it where the user has named none."""
    limits: dict[str, Any] = {"max_bucket_reso": max(dataset.max_bucket_reso, *area)}
    if min(area) < SMALL:
        limits = {
            "min_bucket_reso": max(multiple, min(area) // 2 // multiple * multiple),
            "max_bucket_reso": 2 * max(area),
            "bucket_reso_steps": multiple,
        }
    chosen = {key: value for key, value in limits.items() if key not in named and value != getattr(dataset, key)}
    if dataset.enable_bucket and chosen:
        words = ", ".join(f"{key} {value}" for key, value in chosen.items())
        notes.chose(where, words, f"fits a resolution of {area[0]}x{area[1]}")
    return dataclasses.replace(dataset, resolution=area, **chosen)


def _refuse_sizes(dataset: Dataset, *, multiple: int, where: str, notes: Notes) -> None:
    width, height = dataset.resolution
    step, low, high = dataset.bucket_reso_steps, dataset.min_bucket_reso, dataset.max_bucket_reso
    if not dataset.enable_bucket:
        if width % multiple or height % multiple:
            fits = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (width, height))
            notes.add(
                f"{where}: resolution {width}x{height}: sides must be multiples of {multiple} for this model. "
                f"Fix: {fits}, or enable_bucket true."
            )
        return
    if step % multiple:
        fits = f"{-(-step // multiple) * multiple}"
        notes.add(f"{where}.bucket_reso_steps {step} is no multiple of {multiple}, as this model needs. Fix: {fits}.")
    if step > math.isqrt(width * height):
        notes.add(f"{where}.bucket_reso_steps {step} is larger than the resolution {width}x{height}. Fix: {multiple}.")
    if low > high and not dataset.bucket_no_upscale:
        notes.add(f"{where}: min_bucket_reso {low} is larger than max_bucket_reso {high}. Fix: swap them.")
