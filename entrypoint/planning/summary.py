"""What a job will do with the images that are there: how many, which shapes, how many steps, saves, samples and bytes.

`--check` prints it. A job prints it too before it downloads a model, so that a damaged dataset is found first.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from entrypoint.fetch import archive, fetch, http
from entrypoint.fetch.doors import folders
from entrypoint.planning.captions import captioner
from entrypoint.system import environment
from entrypoint.system.answers import Answers
from entrypoint.system.machine import Machine
from trainer.data import caption_length
from trainer.data.compact.seen import SeenFiles
from trainer.data.epochs import EpochSampler
from trainer.data.folders.own_output import Written
from trainer.data.identity import content_changes, fingerprint
from trainer.data.records import WARNING, ImageRecord, Scan
from trainer.data.scan import cpu_workers, scan
from trainer.spec import memory_model
from trainer.spec.family import base_models, facts_of, lora_formats
from trainer.spec.plan import DataPlan, Dataset, ModelPlan, Plan, Source
from trainer.spec.rules import automatic, outlook, quote, sanity
from trainer.storage.atomic import human_size
from trainer.storage.choose_run import choose

log = logging.getLogger(__name__)
PROGRESS_INTERVAL_S = 10.0


@dataclass(frozen=True)
class Summary:
    """What was said, which the trainer need not print again, and the numbers in it, for programs (docs/agents.md)."""

    lines: tuple[str, ...] = ()
    figures: dict[str, Any] | None = None  # None: not all images are on this machine


def log_summary(
    plan: Plan, *, token: str | None, hub_cache: Path, estimate_captions: bool = False, answers: Answers | None = None
) -> Summary:
    """Scan the images that are on this machine, and log what the job will do with them.

    `estimate_captions`: where no tokenizer is here, warn of captions that are too long for any. `answers`: of other
    jobs. Raises DataError where the trainer would: no usable image, or too many unusable ones.
    """
    answers = answers or Answers(Machine())
    lines: list[str] = []

    def say(line: str, level: int = logging.INFO) -> None:
        log.log(level, "%s", line)
        lines.append(line)

    found = scan_here(plan, token=token, hub_cache=hub_cache, answers=answers)
    if found is None:
        return Summary()
    local_plan, scanned = found
    captions = captioner.outlook(local_plan, scanned, token=token, hub_cache=hub_cache)
    scanned = captions.scanned
    for line in scanned.report().splitlines():
        level = logging.WARNING if WARNING in line or line.startswith("  skipped ") else logging.INFO
        say(line.replace(WARNING, ""), level)
    for line in captions.lines(plan.quote):
        say(line)
    # Captions that are still to be made are content: which run this is, the trainer knows once it has them.
    compare = None if captions.missing else content_changes(fingerprint(scanned.images), None)
    choice = choose(plan, content_changes=compare)
    text = choice.describe()
    if text and choice.plan.output.name != plan.output.name:  # the settings alone did not say so
        say(text)
    elif choice.run is not None and choice.run.step:
        say(f"Run {choice.plan.output.name} goes on: it is at step {choice.run.step:,}.")
    sampler = make_sampler(local_plan, scanned)
    lengths = _lengths(local_plan, sampler)
    for line in _describe(lengths, sampler):
        say(line)
    first = choice.run.step if choice.run is not None else 0
    quoted = _quoted(lengths, sampler, first=first, images=len(scanned.images), to_caption=captions.missing)
    for line in quoted.lines:
        say(line)
    if quoted.warning:
        say(quoted.warning, logging.WARNING)
    images = {"found": scanned.num_found, "used": len(scanned.images), "to_caption": captions.missing}
    figures = {"images": images, **_figures(lengths, sampler)}
    figures["quote"] = quoted.figures
    for line in long_captions(local_plan, sampler, answers, hub_cache=hub_cache, estimate=estimate_captions):
        say(line, logging.WARNING)
    length = sanity.Length(lengths.total, lengths.steps_per_epoch, len(scanned.images))
    for warning in sanity.warnings(local_plan, length):
        say(warning, logging.WARNING)
    return Summary(tuple(lines), figures)


def scan_here(
    plan: Plan, *, token: str | None, hub_cache: Path, answers: Answers | None = None
) -> tuple[Plan, Scan] | None:
    """The plan with local folders, and a scan of them; None, which the log explains, where images are elsewhere."""
    answers = answers or Answers(Machine())
    folders: dict[Source, Path | None] = {}
    for dataset in plan.data.datasets:
        for subset in dataset.subsets:
            source = subset.source
            if source not in folders:
                folders[source] = answers.of(local_copy, source, Path(plan.output.cache), token, hub_cache)
    missing = [source for source, folder in folders.items() if folder is None and source.kind != "generated"]
    for source in missing:
        log.info("%s is not on this machine yet: its images and captions are known once it is.", source.public)
    if missing:
        return None

    def local(source: Source, _dataset: Dataset) -> Source:
        folder = folders[source]
        return dataclasses.replace(source, path=str(folder)) if folder else source

    local_plan = plan.map_sources(local)
    places = {"OUTPUT_PATH": Path(plan.output.path), "CACHE_PATH": Path(plan.output.cache), "HF_HOME": hub_cache.parent}
    written = Written(places)
    data = local_plan.data
    seen = answers.of(SeenFiles) if answers.several else None
    scanned = answers.of(_scan, data, written, seen, by=(data, _touching(data, written)))
    # With the subsets that names of folders make.
    return dataclasses.replace(local_plan, data=scanned.data), scanned


def make_sampler(plan: Plan, scanned: Scan) -> EpochSampler:
    """The order of the images, those included that the trainer will draw."""
    return EpochSampler(
        [*scanned.images, *_class_images(plan)],
        plan.data,
        seed=plan.train.seed,
        caption_dropout_rate=plan.train.caption_dropout_rate,
        prior_loss_weight=plan.train.prior_loss_weight,
    )


def predicted_quote(
    plan: Plan, sampler: EpochSampler, *, images: int, to_caption: int
) -> tuple[Plan, int, quote.Quote | None]:
    """The plan with its lengths, its steps, and the quote for all of them.

    `images`: to encode. `to_caption`: by a model.
    """
    lengths = _lengths(plan, sampler)
    return lengths.plan, lengths.total, _predict(lengths, sampler, first=0, images=images, to_caption=to_caption)


def _predict(
    lengths: _Lengths, sampler: EpochSampler, *, first: int, images: int, to_caption: int
) -> quote.Quote | None:
    return quote.predict(
        lengths.plan,
        first=first,
        total=lengths.total,
        images=images,
        examples=sampler.buckets,
        to_caption=to_caption,
    )


class _Lengths(NamedTuple):
    """How long a job is with its images."""

    plan: Plan  # with its lengths
    chosen: list[str]  # lines about those that were chosen
    steps_per_epoch: int  # of the optimiser
    total: int


def _lengths(plan: Plan, sampler: EpochSampler) -> _Lengths:
    batches_per_step = plan.train.gradient_accumulation * plan.engine.processes
    steps_per_epoch = max(1, math.ceil(sampler.batches_per_epoch / batches_per_step))
    plan, chosen = automatic.with_lengths(
        plan, images_per_epoch=sampler.subject_examples_per_epoch, steps_per_epoch=steps_per_epoch
    )
    total = plan.train.max_steps or plan.train.max_epochs * steps_per_epoch
    return _Lengths(plan, list(chosen), steps_per_epoch, total)


def _figures(lengths: _Lengths, sampler: EpochSampler) -> dict[str, Any]:
    """What `_describe` says, as numbers."""
    plan, _, steps_per_epoch, total = lengths
    shapes = []
    for (dataset, (width, height)), examples in sorted(sampler.buckets.items()):
        shapes.append({"dataset": dataset, "width": width, "height": height, "examples": examples})
    figures = {
        "shapes": shapes,
        "steps": total,
        "steps_per_epoch": steps_per_epoch,
        "saves": outlook.count_saves(plan, total),
        "sample_rounds": outlook.count_sample_rounds(plan, total),
        "images_per_round": len(plan.prompts),
    }
    footprint = base_models()[plan.model.base][1].footprint
    if footprint:
        figures["lora_bytes"] = memory_model.lora_bytes(plan)
        figures["state_bytes"] = memory_model.state_bytes(footprint, plan)
    return figures


class _Quoted(NamedTuple):
    """The quote in words, a limit that ends the job before it is done, and the figures for programs."""

    lines: list[str]
    warning: str | None
    figures: dict[str, Any] | None


def _quoted(lengths: _Lengths, sampler: EpochSampler, *, first: int, images: int, to_caption: int) -> _Quoted:
    """How long the steps after `first` take and what they cost. `images`: to encode. `to_caption`: by a model."""
    plan, total = lengths.plan, lengths.total
    predicted = _predict(lengths, sampler, first=first, images=images, to_caption=to_caption)
    if first >= total:
        return _Quoted([], None, None)
    lines = quote.describe(plan, predicted, first=first, total=total, to_caption=to_caption)
    if predicted is None:
        return _Quoted(lines, None, None)
    price = plan.quote.price_per_hour
    figures = {
        "card": plan.quote.card,
        "step_seconds": round(predicted.step, 3),
        "caption_seconds": None if to_caption and not predicted.captions else round(predicted.captions),
        "seconds": round(predicted.total),
        "cost": round(price * predicted.total / quote.HOUR_S, 2) if price else None,
        "is_measured": False,
    }
    return _Quoted(lines, quote.limit_warning(plan, predicted, first=first, total=total), figures)


def long_captions(plan: Plan, sampler: EpochSampler, answers: Answers, *, hub_cache: Path, estimate: bool) -> list[str]:
    """Lines about captions and prompts that the text encoder does not read to their end, as a job has them.

    `estimate`: where its tokenizer is not on this machine, name those that are too long in any case.
    """
    facts = facts_of(plan.model.family, plan.model.base)
    most = plan.train.max_token_length
    reader = answers.of(_light_reader, plan.model, most, hub_cache, by=(repr(plan.model), most, hub_cache))
    if reader is None:
        log.info("Whether a caption is too long for the text encoder is known once its tokenizer is on this machine.")
        if not estimate:
            return []
        length = plan.train.max_token_length
        return caption_length.describe_surely_cut(facts, sampler.captions_by_image(), plan.prompts, max_tokens=length)
    cuts = caption_length.find_cuts(reader, sampler.captions_by_image())
    lines = caption_length.describe_cuts(reader, cuts, facts, limit=caption_length.SHOWN_CAPTIONS, in_report=False)
    return lines + caption_length.describe_prompts(reader, plan.prompts)


def _light_reader(model: ModelPlan, max_tokens: int, hub_cache: Path) -> caption_length.Reader | None:
    return caption_length.load_light_reader(model, max_tokens=max_tokens, hub_cache=hub_cache)


def local_copy(source: Source, cache: Path, token: str | None, hub_cache: Path) -> Path | None:
    """The folder with a source's images, if it is on this machine; None: it must be downloaded or drawn.

    An archive on this machine is unpacked into the cache, where the job finds it.
    """
    if source.kind == "generated":
        return None
    if source.kind == "folder":
        return fetch.local_folder(source)
    if source.kind == "hub":
        repo = fetch.dataset_repo(source, token=token, hub_cache=hub_cache, retries=http.USUAL)
        cached = fetch.cached_dataset(source, repo, cache)
        return cached[1] if cached else None
    if source.kind == "bucket":
        return folders.known(source.location, cache, os.environ)
    if fetch.is_url(source):
        folder = fetch.known_download(source, cache)
        return archive.content_root(folder) if folder else None
    return Path(fetch.fetch_source(source, cache=cache, token=token).path)


def _describe(lengths: _Lengths, sampler: EpochSampler) -> list[str]:
    """Lines for the log: shapes, steps, saves and samples, and the size of the files."""
    plan = lengths.plan
    lines = [*sampler.describe(), *lengths.chosen]
    lines += outlook.describe_length(plan, steps_per_epoch=lengths.steps_per_epoch)
    footprint = base_models()[plan.model.base][1].footprint
    if footprint:
        lora_bytes = memory_model.lora_bytes(plan) or 0.0
        count = len(lora_formats(plan.model.base, plan.lora.kind))
        files = "a LoRA has" if count == 1 else f"the {count} LoRA files of a save have"
        state_bytes = memory_model.state_bytes(footprint, plan)
        lines.append(
            f"Files: {files} about {human_size(lora_bytes)} in {plan.output.save_precision}, a state to resume from "
            f"{human_size(state_bytes)}."
        )
    return lines


def _touching(data: DataPlan, written: Written) -> tuple[tuple[str, str], ...]:
    """The folders that a job writes to, as far as they are in a folder of the dataset, or around one.

    No others change what a scan finds.
    """
    roots = []
    for subset in data.subsets:
        root = Path(subset.source.path)
        roots += [os.path.realpath(root), os.path.realpath(root / (subset.conditioning_data_dir or "."))]
    found = []
    for variable, folder in written.folders.items():
        place = os.path.realpath(folder)
        for root_path in roots:
            if f"{place}/".startswith(f"{root_path}/") or f"{root_path}/".startswith(f"{place}/"):
                found.append((variable, place))
                break
    return tuple(found)


def _scan(data: DataPlan, written: Written, seen: SeenFiles | None) -> Scan:
    """All images, decoded. A large dataset takes minutes, so the log shows how far it is."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_INTERVAL_S and done < total:
            last = time.monotonic()
            log.info("Read %d of %d images.", done, total)

    with environment.offline(os.environ):  # which the processes that read images inherit
        scanned = scan(data, cpu_workers=cpu_workers(), progress=progress, written=written, seen=seen)
    scanned.check(strict=data.strict)
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
