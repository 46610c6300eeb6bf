"""What a job will do with the images that are there: how many, which shapes, how many steps, saves, samples and bytes.

`--check` prints it. A job prints it too before it downloads a model, so that a damaged dataset is found first.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections import Counter
from pathlib import Path

from entrypoint.fetch import archive, fetch, http
from trainer.data import caption_length
from trainer.data.epochs import EpochSampler
from trainer.data.folders.own_output import Written
from trainer.data.identity import content_changes, fingerprint
from trainer.data.records import WARNING, ImageRecord, Scan
from trainer.data.scan import scan
from trainer.spec import memory_model
from trainer.spec.family import base_models, get_family
from trainer.spec.plan import AUTO, Dataset, Plan, Source
from trainer.spec.rules import automatic, sanity
from trainer.storage.atomic import human_size
from trainer.storage.choose_run import choose
from trainer.storage.digests import sha256
from trainer.storage.folders import completed

log = logging.getLogger(__name__)
MAX_CPU_WORKERS = 16
PROGRESS_INTERVAL_S = 10.0
SHOWN_SHAPES = 8  # the most frequent ones; the rest are counted
FINAL_SAMPLES = 1  # rounds: that of the finished LoRA


def log_summary(plan: Plan, *, token: str | None, hub_cache: Path) -> None:
    """Scan the images that are on this machine, and log what the job will do with them.

    Raises DataError where the trainer would: no usable image, or too many unusable ones.
    """
    folders: dict[Source, Path | None] = {}
    for dataset in plan.data.datasets:
        for subset in dataset.subsets:
            source = subset.source
            if source not in folders:
                folders[source] = local_copy(source, cache=Path(plan.output.cache), token=token, hub_cache=hub_cache)
    missing = [source for source, folder in folders.items() if folder is None and source.kind != "generated"]
    for source in missing:
        log.info("%s is not on this machine yet: its images and captions are known once it is.", source.public)
    if missing:
        return

    def local(source: Source, _dataset: Dataset) -> Source:
        folder = folders[source]
        return dataclasses.replace(source, path=str(folder)) if folder else source

    local_plan = plan.map_sources(local)
    places = {"OUTPUT_PATH": Path(plan.output.path), "CACHE_PATH": Path(plan.output.cache), "HF_HOME": hub_cache.parent}
    scanned = _scan(local_plan, Written(places))
    local_plan = dataclasses.replace(local_plan, data=scanned.data)  # with the subsets that names of folders make
    for line in scanned.report().splitlines():
        level = logging.WARNING if WARNING in line or line.startswith("  skipped ") else logging.INFO
        log.log(level, "%s", line.replace(WARNING, ""))
    choice = choose(plan, content_changes=content_changes(fingerprint(scanned.images), None))
    text = choice.describe()
    if text and choice.plan.output.name != plan.output.name:  # the settings alone did not say so
        log.info("%s", text)
    images = [*scanned.images, *_class_images(local_plan)]
    sampler = EpochSampler(images, local_plan.data, seed=plan.train.seed)
    for line in describe(local_plan, sampler):
        log.info("%s", line)
    for line in long_captions(local_plan, sampler, hub_cache=hub_cache):
        log.warning("%s", line)
    for warning in sanity.warnings(local_plan, _length(local_plan, sampler, images=len(scanned.images))):
        log.warning("%s", warning)


def long_captions(plan: Plan, sampler: EpochSampler, *, hub_cache: Path) -> list[str]:
    """Lines about captions and prompts that the text encoder does not read to their end, as a job has them."""
    facts = get_family(plan.model.family).FACTS
    reader = caption_length.load_light_reader(plan.model, max_tokens=plan.train.max_token_length, hub_cache=hub_cache)
    if reader is None:
        log.info("Whether a caption is too long for the text encoder is known once its tokenizer is on this machine.")
        return []
    cuts = caption_length.find_cuts(reader, sampler.captions_by_image())
    lines = caption_length.describe_cuts(reader, cuts, facts, limit=caption_length.SHOWN_CAPTIONS, in_report=False)
    return lines + caption_length.describe_prompts(reader, plan.prompts)


def local_copy(source: Source, *, cache: Path, token: str | None, hub_cache: Path) -> Path | None:
    """The folder with a source's images, if it is on this machine; None: it must be downloaded, unpacked or drawn."""
    if source.kind == "generated":
        return None
    if source.kind == "folder":
        return fetch.local_folder(source)
    if source.kind == "hub":
        repo = fetch.dataset_repo(source, token=token, hub_cache=hub_cache, retries=http.USUAL)
        cached = fetch.cached_dataset(source, repo, cache)
        return cached[1] if cached else None
    if fetch.is_url(source):
        folder = fetch.known_download(source, cache)
    else:
        folder = cache / "datasets" / sha256(fetch.local_archive(source))[:32]
        folder = folder if completed(folder) is not None else None
    return archive.content_root(folder) if folder else None


def describe(plan: Plan, sampler: EpochSampler) -> list[str]:
    """Lines for the log: shapes, steps, saves and samples, and the size of the files."""
    lines = [_shapes(sampler)]
    images_per_step = plan.train.gradient_accumulation * plan.engine.num_gpus
    steps_per_epoch = max(1, math.ceil(sampler.batches_per_epoch / images_per_step))
    plan, chosen = automatic.with_lengths(
        plan, images_per_epoch=sampler.subject_examples_per_epoch, steps_per_epoch=steps_per_epoch
    )
    lines += chosen
    total = plan.train.max_steps or plan.train.max_epochs * steps_per_epoch
    batch_sizes = sorted({dataset.batch_size * images_per_step for dataset in plan.data.datasets})
    per_step = " or ".join(str(size) for size in batch_sizes)
    lines.append(
        f"Steps: {total:,}, which is {total / steps_per_epoch:.3g} times all images; an epoch has {steps_per_epoch:,} "
        f"steps of up to {per_step} image{'s' if per_step != '1' else ''}."
    )
    lines.append(_rounds(plan, total))
    footprint = base_models()[plan.model.base][1].footprint
    if footprint:
        lora_bytes = memory_model.lora_bytes(footprint, plan.lora.rank)
        state_bytes = memory_model.state_bytes(footprint, plan.lora.rank, plan.optim.name)
        lines.append(
            f"Files: a LoRA has about {human_size(lora_bytes)}, a state to resume from {human_size(state_bytes)}."
        )
    return lines


def _length(plan: Plan, sampler: EpochSampler, *, images: int) -> sanity.Length:
    """How long the job is with these images."""
    batches_per_step = plan.train.gradient_accumulation * plan.engine.num_gpus
    steps_per_epoch = math.ceil(sampler.batches_per_epoch / batches_per_step)
    plan, _ = automatic.with_lengths(
        plan, images_per_epoch=sampler.subject_examples_per_epoch, steps_per_epoch=steps_per_epoch
    )
    return sanity.Length(plan.train.max_steps or plan.train.max_epochs * steps_per_epoch, steps_per_epoch, images)


def _scan(plan: Plan, written: Written) -> Scan:
    """All images, decoded. A large dataset takes minutes, so the log shows how far it is."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_INTERVAL_S and done < total:
            last = time.monotonic()
            log.info("Read %d of %d images.", done, total)

    cpu_workers = min(MAX_CPU_WORKERS, len(os.sched_getaffinity(0)))
    scanned = scan(plan.data, cpu_workers=cpu_workers, progress=progress, written=written)
    scanned.check(strict=plan.data.strict)
    return scanned


def _class_images(plan: Plan) -> list[ImageRecord]:
    """Stand-ins for the images that the trainer will draw, for counting."""
    images: list[ImageRecord] = []
    for d, dataset in enumerate(plan.data.datasets):
        width, height = dataset.resolution
        for s, subset in enumerate(dataset.subsets):
            if subset.source.kind == "generated":
                for i in range(subset.source.count):
                    name = f"{i:04d}.png"
                    images.append(ImageRecord(name, Path(name), f"{d}.{s}/{name}", width, height, d, s, None))
    return images


def _shapes(sampler: EpochSampler) -> str:
    """The sizes that are trained, the most frequent first."""
    counts: Counter[tuple[int, int]] = Counter()
    for (_, size), examples in sampler.buckets.items():
        counts[size] += examples
    shown = [f"{width} × {height} ({examples})" for (width, height), examples in counts.most_common(SHOWN_SHAPES)]
    if len(counts) > SHOWN_SHAPES:
        shown.append(f"{len(counts) - SHOWN_SHAPES} more")
    return f"Shapes: {len(counts)}, in pixels (with examples an epoch): {', '.join(shown)}."


def _rounds(plan: Plan, total: int) -> str:
    """How often the job saves and draws samples."""
    output = plan.output
    saves = total // output.save_every if output.save_every else 0
    text = "Saves: only the finished LoRA"
    if saves:
        kept = f"the newest {min(saves, output.keep_checkpoints)}"
        if output.keep_checkpoints == AUTO:
            kept = "all LoRA files and the newest two states"
        text = f"Saves: {saves}, every {output.save_every} steps, of which {kept} are kept; the finished LoRA"
    if not output.sample_every or not plan.prompts:
        return f"{text}. Samples: none."
    drawn = 1 + (total - 1) // output.sample_every + FINAL_SAMPLES
    when = f"at step 0, every {output.sample_every} steps, and at the end"
    return f"{text}. Samples: {drawn} rounds of {len(plan.prompts)}, {when}."
