"""The datasets of a manifest, completed from the variables → the datasets of a plan.

A variable wins over dataset.json, and dataset.json over the model's default. The exceptions are the keys that name a
subset's own images (`revision`, `split` and the columns), and `trigger_word`: there, dataset.json wins.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from entrypoint.dataset_config.manifest import HUB_KEYS, Manifest
from entrypoint.dataset_config.sources import classify
from entrypoint.settings.checks import Notes
from entrypoint.settings.variables.data import DataSettings
from trainer.spec.plan import Dataset, Prompt, Source, Subset
from trainer.spec.prompts import TRIGGER_PLACEHOLDER
from trainer.spec.values import show

# Pixels. With a shorter side, the default limits of buckets (256 to 1024, in steps of 64) leave hardly a bucket.
MIN_SIDE_FOR_DEFAULT_BUCKETS = 512
NO_SOURCE = Source("", "")
SOURCE_WORDS = {
    "hub": "a dataset of the Hub",
    "folder": "a folder",
    "archive": "an archive",
    "bucket": "files in a bucket, or a shared folder",
}


def complete_datasets(
    manifest: Manifest, settings: DataSettings, *, model_resolution: int, multiple: int, notes: Notes
) -> tuple[Dataset, ...]:
    """The datasets with a source for each subset, sizes that fit the model, and the variables applied.

    `model_resolution` is the side that the base model was trained at, `multiple` what sides must be a multiple of, both
    in pixels. Problems and choices go to `notes`.
    """
    notes.reasons.extend(manifest.notes)
    default_source = _source_of_dataset_name(manifest, settings, notes)
    completed = []
    for index, dataset in enumerate(manifest.datasets):
        where = f"{manifest.origin}: datasets[{index}]"
        # The keys of this program's own dataset.json are not a choice of the user.
        chosen_keys: frozenset[str] = frozenset()
        if not manifest.datasets_packaged:
            chosen_keys = manifest.named[index]
        resolution = settings.resolution
        if resolution is None and "resolution" in chosen_keys:
            resolution = dataset.resolution
        if resolution is None:
            resolution = (model_resolution, model_resolution)
            if manifest.datasets_packaged:
                notes.chose("PARAMS_RESOLUTION", model_resolution, "the base model's")
            else:
                notes.add(f"{where}.resolution is missing. Fix: add it ({model_resolution} suits this model).")
        sized = _with_sizes(dataset, resolution, chosen_keys=chosen_keys, multiple=multiple, where=where, notes=notes)
        _check_sizes(sized, multiple=multiple, where=where, notes=notes)
        subsets = []
        for number, subset in enumerate(dataset.subsets):
            place = f"{where}.subsets[{number}]"
            subsets.append(_complete_subset(subset, default_source, settings, where=place, notes=notes))
        batch_size = settings.batch_size or dataset.batch_size
        completed.append(dataclasses.replace(sized, subsets=tuple(subsets), batch_size=batch_size))
    kinds = {subset.source.kind for dataset in completed for subset in dataset.subsets}
    for_hub = {"DATASET_SPLIT": settings.dataset_split, "DATASET_SUBSET": settings.dataset_subset}
    for variable, value in for_hub.items():
        if value and not kinds & {"hub", ""}:
            what = variable.removeprefix("DATASET_").lower()
            notes.add(f"{variable}={show(value)}: only Hub datasets have a {what}. Fix: remove it.")
    return tuple(completed)


# ---- sources


def _source_of_dataset_name(manifest: Manifest, settings: DataSettings, notes: Notes) -> Source:
    """The source that DATASET_NAME names; NO_SOURCE if it is not set, or cannot be used."""
    needed = any(not subset.source.kind for dataset in manifest.datasets for subset in dataset.subsets)
    name = settings.dataset_name
    revision = settings.dataset_revision
    if name is None:
        if needed:
            reason = "" if manifest.datasets_packaged else f", and a subset of {manifest.origin} names no images"
            allowed = "a Hub dataset (org/name), a folder, an archive or its URL"
            notes.add(f"DATASET_NAME is not set{reason}. Allowed: {allowed}.")
        elif revision:
            notes.add(f"DATASET_REVISION={show(revision)} belongs to DATASET_NAME, which is not set. Fix: remove it.")
        return NO_SOURCE
    if not needed:
        fix = "Fix: remove it, or remove image_dir or dataset from the subset that is to take it"
        notes.add(f"DATASET_NAME={show(name)}: every subset of {manifest.origin} names its own images. {fix}.")
    try:
        place = classify(name)
    except ValueError as problem:
        notes.add(f"DATASET_NAME: {problem}.")
        return NO_SOURCE
    if revision and place.revision and revision != place.revision:
        notes.add(f"DATASET_REVISION={show(revision)}: DATASET_NAME names {show(place.revision)}. Fix: remove one.")
    source = Source(
        place.kind,
        place.location,
        revision or place.revision,
        image_column=settings.image_column,
        caption_column=settings.caption_column,
    )
    notes.chose("DATASET_NAME", source.public, place.note or SOURCE_WORDS[place.kind])
    if revision and place.kind != "hub":
        notes.add(f"DATASET_REVISION={show(revision)}: {SOURCE_WORDS[place.kind]} has no revisions. Fix: remove it.")
    return source


def _complete_subset(
    subset: Subset, default_source: Source, settings: DataSettings, *, where: str, notes: Notes
) -> Subset:
    """The subset with its source complete and the variables applied."""
    own = subset.source
    source = dataclasses.replace(own, named_in=where) if own.kind else default_source
    if source.kind == "hub":
        source = dataclasses.replace(
            source,
            revision=own.revision or source.revision,
            split=own.split or settings.dataset_split or "train",
            subset=own.subset or settings.dataset_subset,
        )
    elif source.kind and not own.kind:
        for key in HUB_KEYS:
            if getattr(own, key):
                notes.add(f"{where}: {key} is for Hub datasets, and DATASET_NAME is a {source.kind}. Fix: remove it.")
    if source.kind in SOURCE_WORDS:  # generated images have no columns
        source = dataclasses.replace(
            source,
            image_column=own.image_column or settings.image_column,
            caption_column=own.caption_column or settings.caption_column,
        )
    dropout_rate = settings.caption_dropout_rate
    if dropout_rate is None:
        dropout_rate = subset.caption_dropout_rate
    trigger_word = subset.trigger_word
    if trigger_word is None:
        trigger_word = settings.trigger_word
    return dataclasses.replace(
        subset,
        source=source,
        num_repeats=settings.num_repeats or subset.num_repeats,
        repeats_chosen=settings.num_repeats is not None or subset.repeats_chosen,
        trigger_word=trigger_word or None,
        caption_dropout_rate=dropout_rate,
        caption_prompt=subset.caption_prompt or settings.caption_prompt,
    )


# ---- the trigger word in prompts


def trigger_of(datasets: tuple[Dataset, ...]) -> str | None:
    """The trigger word of the first subset that has one and whose captions get it; None if there is none."""
    for dataset in datasets:
        for subset in dataset.subsets:
            if subset.trigger_word and not subset.is_reg:
                return subset.trigger_word
    return None


def fill_trigger(prompts: tuple[Prompt, ...], trigger: str | None, notes: Notes) -> tuple[Prompt, ...]:
    """The prompts with the trigger word in the place of each [trigger]."""
    filled = []
    for prompt in prompts:
        wants_trigger = TRIGGER_PLACEHOLDER.search(prompt.text) or TRIGGER_PLACEHOLDER.search(prompt.negative)
        if wants_trigger and trigger is None:
            notes.warn(
                f"The prompt {show(prompt.text)} has [trigger] in it, which stays as it is: there is no trigger word. "
                "Set TRIGGER_WORD, or trigger_word in dataset.json."
            )
        elif wants_trigger and trigger is not None:
            text = trigger.join(TRIGGER_PLACEHOLDER.split(prompt.text))
            negative = trigger.join(TRIGGER_PLACEHOLDER.split(prompt.negative))
            prompt = dataclasses.replace(prompt, text=text, negative=negative)
        filled.append(prompt)
    return tuple(filled)


# ---- sizes


def _with_sizes(
    dataset: Dataset,
    resolution: tuple[int, int],
    *,
    chosen_keys: frozenset[str],
    multiple: int,
    where: str,
    notes: Notes,
) -> Dataset:
    """The dataset with its resolution, and with limits of buckets that fit it where the user has chosen none."""
    fitting: dict[str, Any] = {"max_bucket_reso": max(dataset.max_bucket_reso, *resolution)}
    if min(resolution) < MIN_SIDE_FOR_DEFAULT_BUCKETS:
        fitting = {
            "min_bucket_reso": max(multiple, min(resolution) // 2 // multiple * multiple),
            "max_bucket_reso": 2 * max(resolution),
            "bucket_reso_steps": multiple,
        }
    changed = {}
    for key, value in fitting.items():
        if key not in chosen_keys and value != getattr(dataset, key):
            changed[key] = value
    if dataset.enable_bucket and changed:
        words = ", ".join(f"{key} {value}" for key, value in changed.items())
        notes.chose(where, words, f"fits a resolution of {resolution[0]}x{resolution[1]}")
    return dataclasses.replace(dataset, resolution=resolution, **changed)


def _check_sizes(dataset: Dataset, *, multiple: int, where: str, notes: Notes) -> None:
    """Refuse sizes that the model's latents cannot have, and buckets that no image fits."""
    width, height = dataset.resolution
    if not dataset.enable_bucket:
        if width % multiple or height % multiple:
            fits = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (width, height))
            notes.add(
                f"{where}: resolution {width}x{height}: sides must be multiples of {multiple} for this model. "
                f"Fix: {fits}, or enable_bucket true."
            )
        return
    step = dataset.bucket_reso_steps
    smallest = dataset.min_bucket_reso
    largest = dataset.max_bucket_reso
    if step % multiple:
        next_multiple = math.ceil(step / multiple) * multiple
        notes.add(
            f"{where}.bucket_reso_steps {step} is not a multiple of {multiple}, as this model needs. "
            f"Fix: {next_multiple}."
        )
    if step > math.isqrt(width * height):
        notes.add(f"{where}.bucket_reso_steps {step} is larger than the resolution {width}x{height}. Fix: {multiple}.")
    if smallest > largest and not dataset.bucket_no_upscale:
        notes.add(f"{where}: min_bucket_reso {smallest} is larger than max_bucket_reso {largest}. Fix: swap them.")
