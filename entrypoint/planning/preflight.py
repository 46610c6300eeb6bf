"""What can be known in seconds before the first large download: access, free space, and that there are images at all.

Everything is checked before anything is reported, so that a user corrects all problems at once. The sizes of what will
be written are estimates: captions and latents do not exist yet.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoint.fetch import archive, fetch, flash_attention, http, hub, local_weights, streams, training_adapter
from entrypoint.fetch.doors import folders
from entrypoint.fetch.doors.keys import NO_KEYS, Keys
from entrypoint.fetch.http import RetryPolicy
from entrypoint.fetch.hub_dataset import hub_choice
from entrypoint.planning import single_files
from entrypoint.planning.captions import captioner
from entrypoint.settings.checks import raise_together
from entrypoint.system.answers import Answers
from entrypoint.system.machine import Machine
from trainer.base_model import model_folder, weight_kinds, without_weights
from trainer.data.folder_listing import SHARD, Folder, list_folder
from trainer.data.folders import formats
from trainer.data.folders.own_output import Written
from trainer.spec import memory_model
from trainer.spec.errors import DataError, GatedError, KilnError, SettingsError, StorageError, UnreachableError
from trainer.spec.family import base_models, facts_of
from trainer.spec.plan import AUTO, ModelPlan, Plan, Source, Subset
from trainer.spec.rules.cache_size import LEAST_BYTES, bytes_per_image
from trainer.spec.values import printable, some
from trainer.storage.atomic import human_size, storage_error
from trainer.storage.folders import nearest_existing
from trainer.storage.json_files import LONGEST_NAME_BYTES
from trainer.storage.read import files_below

if TYPE_CHECKING:
    from entrypoint.fetch.doors.files import Arrival

logger = logging.getLogger(__name__)

# Estimates.
TYPICAL_IMAGE_BYTES = 500_000
LORA_BYTES_PER_RANK = 0.0005  # bytes of a float32 LoRA of rank 1 for each byte of the base model's weights
STATE_BYTES_PER_LORA_BYTE = 5  # a state has the adapter and up to four optimiser tensors of its size
AUTOMATIC_CHECKPOINTS = 2  # with their states, that KEEP_CHECKPOINTS=auto needs at least
UNPACKED_BYTES_PER_ARCHIVE_BYTE = 1.1  # images are compressed already, so that archives hardly shrink them
ENCODED = "encoded images"
LOGGED_FILE_MIN_BYTES = 100 * 2**20  # larger files of a model are named in the log before they are fetched


@dataclass
class NeededSpace:
    """Bytes that the job will write, by the variable that names the place."""

    places: dict[str, Path]
    most: int | None = None  # MAX_CACHE_GIB in bytes
    parts: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))  # variable → what → bytes

    def add(self, variable: str, what: str, size: float) -> None:
        if size > 0:
            self.parts[variable][what] = self.parts[variable].get(what, 0) + size


def preflight(
    plan: Plan,
    *,
    token: str | None,
    hub_cache: Path,
    arrivals: Sequence[Arrival] = (),
    keys: Keys = NO_KEYS,
    retries: RetryPolicy = http.USUAL,
    answers: Answers | None = None,
) -> bool:
    """Check all that can be checked before the first large download; asks the network only for what no cache has.

    `hub_cache` is where downloads from the Hub are kept (HF_HOME/hub). `arrivals`: files that are still to come from
    other services, and are checked already. `keys`: of these services, `token`: of the Hub. `answers`: of other jobs.
    Returns whether anything will be downloaded to HF_HOME. Raises one error with all problems in its message:
    SettingsError, GatedError, DataError, StorageError or UnreachableError, the first of these that applies.
    """
    places = {"OUTPUT_PATH": Path(plan.output.path), "CACHE_PATH": Path(plan.output.cache), "HF_HOME": hub_cache}
    space = NeededSpace(places, plan.output.max_cache_bytes)
    answers = answers or Answers(Machine())
    problems: list[KilnError] = []

    def attempt(check: Callable[[], None]) -> None:
        try:
            check()
        except KilnError as problem:
            problems.append(problem)
        except OSError as problem:
            problems.append(storage_error(problem, Path(str(problem.filename or "."))))

    for arrival in arrivals:
        if size := arrival.missing_bytes:
            logger.info("To fetch: %s, %s.", arrival.named, human_size(size))
            space.add("CACHE_PATH", f"the file of {arrival.variable}", size)
    attempt(partial(_check_resume, plan.lora.resume_from))
    if plan.engine.attention == "flash_4" and not flash_attention.is_installed(places["CACHE_PATH"]):
        logger.info("To fetch: FlashAttention 4 with its compiler, %s.", human_size(flash_attention.INSTALL_BYTES))
        space.add("CACHE_PATH", "FlashAttention 4", flash_attention.INSTALL_BYTES)
    attempt(partial(_check_model, plan, space, answers, token=token, hub_cache=hub_cache, retries=retries))
    attempt(partial(_check_captioner, plan, space, token=token, hub_cache=hub_cache, retries=retries))
    attempt(partial(_check_training_adapter, plan.model, space, token=token, hub_cache=hub_cache, retries=retries))
    for source, cache_bytes in _cache_bytes_per_image(plan).items():
        if any(isinstance(problem, UnreachableError) for problem in problems):
            # It has been waited for long enough once: the same network will not answer the next request either.
            retries = replace(retries, budget=0.0)
        attempt(partial(_check_source, source, cache_bytes, space, answers, token=token, keys=keys, retries=retries))
    for variable in ("OUTPUT_PATH", "CACHE_PATH", "HF_HOME"):
        if variable != "HF_HOME" or space.parts["HF_HOME"]:
            attempt(partial(_check_writable, variable, places[variable], answers))
    if not any(isinstance(p, StorageError) for p in problems):
        problems += _full_volumes(space, all_known=not problems, rolls=plan.engine.nodes == 1)
    raise_together(problems)
    return bool(space.parts["HF_HOME"])


def _cache_bytes_per_image(plan: Plan) -> dict[Source, int]:
    """Every source once, with the bytes that each of its images takes in the cache, its captions included."""
    sizes: dict[Source, int] = defaultdict(int)
    for dataset in plan.data.datasets:
        for subset in dataset.subsets:
            sizes[subset.source] += bytes_per_image(plan, dataset, subset)
    return sizes


# ---- the model


def _check_resume(resume_from: str | None) -> None:
    if resume_from is not None and not Path(resume_from).exists():
        raise SettingsError(
            f"PARAMS_RESUME_FROM={resume_from}: there is no such file or folder. Name a LoRA file (.safetensors) or "
            "the folder of a state, or leave it empty to start from the beginning."
        )


def _check_model(
    plan: Plan, space: NeededSpace, answers: Answers, *, token: str | None, hub_cache: Path, retries: RetryPolicy
) -> None:
    """Check the base model, and add the space that it and the checkpoints will take. Names its licence first."""
    licence = base_models()[plan.model.base][1].licence
    if licence is not None:
        logger.info("Licence of %s, and so of its LoRAs: %s. %s", plan.model.base, licence.name, licence.allows)
    model_bytes = _model_bytes(plan.model, space, answers, token=token, hub_cache=hub_cache, retries=retries)
    lora_bytes, state_bytes = _save_bytes(plan, model_bytes)
    # Where that is left to the job, it keeps more LoRA files if there is room (trainer.job.saving).
    keep = AUTOMATIC_CHECKPOINTS if plan.output.keep_checkpoints == AUTO else plan.output.keep_checkpoints
    kept = keep + 1  # while one is written, the oldest is still there
    space.add("OUTPUT_PATH", f"{kept} checkpoints", (lora_bytes + state_bytes) * kept + lora_bytes)


def _check_training_adapter(
    model: ModelPlan, space: NeededSpace, *, token: str | None, hub_cache: Path, retries: RetryPolicy
) -> None:
    """That the file is on the Hub or in the cache, and its bytes; a local file has been read for the plan."""
    name = model.training_adapter
    if name is None or Path(name).is_absolute():
        return
    repo, file = training_adapter.repository(name, token=token, hub_cache=hub_cache, retries=retries)
    if training_adapter.cached(repo, file) is not None:
        return
    listing, remote = training_adapter.describe(repo, file)
    hub.check_access(repo, listing, file)
    logger.info("To fetch: %s from %s, %s.", file, repo.name, human_size(remote.size))
    space.add("HF_HOME", file, hub.missing_bytes(repo, [remote]))


def _save_bytes(plan: Plan, model_bytes: int) -> tuple[float, float]:
    """What the LoRA files of a save take, and its state. `model_bytes`: from which a miniature's are guessed."""
    footprint = base_models()[plan.model.base][1].footprint
    lora_bytes = memory_model.lora_bytes(plan)
    if footprint is not None and lora_bytes is not None:
        return lora_bytes, memory_model.state_bytes(footprint, plan)
    in_fp32 = model_bytes * LORA_BYTES_PER_RANK * plan.lora.rank
    return in_fp32, in_fp32 * STATE_BYTES_PER_LORA_BYTE


def _model_bytes(
    model: ModelPlan, space: NeededSpace, answers: Answers, *, token: str | None, hub_cache: Path, retries: RetryPolicy
) -> int:
    """Bytes of the model's files, converted ones included. Checks the files: a folder's headers, else their names."""
    facts = facts_of(model.family, model.base)
    patterns = model_folder.file_patterns(facts, model.parts)
    converted_bytes = single_files.converted_bytes(model)
    space.add("CACHE_PATH", "converted weights", converted_bytes)
    if published := without_weights.published(model):
        wanted = without_weights.missing(model, published, hub_cache=hub_cache)
        downloads = local_weights.describe(wanted, hub_cache=hub_cache, retries=retries)
        local_weights.log_downloads(downloads)
        for repo, _, files in downloads:
            space.add("HF_HOME", repo.variable, hub.missing_bytes(repo, files))
        return converted_bytes
    variable = model_folder.variable(model)
    if folder := fetch.local_model(model):
        same = (variable, folder, repr(model))
        answers.of(model_folder.check_kind, variable, folder, model, by=same)
        answers.of(model_folder.check_folder, variable, folder, patterns, facts, by=same)
        logger.info("To fetch for the model: nothing. %s is here.", folder)
        return answers.of(_weight_bytes, folder) + converted_bytes
    repo = fetch.model_repo(model, token=token, hub_cache=hub_cache, retries=retries)
    cached = answers.of(fetch.cached_model, repo, patterns, facts, by=(repo, patterns, model.base))
    if cached is not None:
        logger.info("To fetch for the model: nothing. HF_HOME has %s at commit %s.", repo.name, cached.commit[:12])
        return answers.of(_weight_bytes, cached.folder) + converted_bytes
    try:
        return _download_bytes(repo, patterns, space, answers) + converted_bytes
    except (GatedError, UnreachableError) as problem:
        variables = without_weights.missing_parts(model, weight_kinds.VARIABLES)
        if not variables:
            raise
        raise type(problem)(
            f"{problem} Or use local files, which need neither a token nor this repository: set {', '.join(variables)}."
        ) from problem


def _download_bytes(repo: hub.Repo, patterns: tuple[str, ...], space: NeededSpace, answers: Answers) -> int:
    """Bytes of the files to download, after a check that they are complete and that they may be read."""
    listing = answers.of(hub.describe, repo)
    names = [file.name for file in listing.files]
    model_folder.check_names(repo.variable, names, patterns)
    needed = model_folder.wanted(names, patterns)
    files = [file for file in listing.files if file.name in needed]
    total_bytes = sum(file.size for file in files)
    answers.of(hub.check_access, repo, listing, "model_index.json")
    for file in sorted(files, key=lambda file: -file.size):
        if file.size >= LOGGED_FILE_MIN_BYTES:
            logger.info("To fetch: %s/%s, %s.", repo.name, file.name, human_size(file.size))
    logger.info("To fetch: %d files of %s, %s.", len(files), repo.name, human_size(total_bytes))
    space.add("HF_HOME", f"the weights of {repo.name}", hub.missing_bytes(repo, files))
    return total_bytes


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_below(folder) if path.suffix == ".safetensors")


def _check_captioner(
    plan: Plan, space: NeededSpace, *, token: str | None, hub_cache: Path, retries: RetryPolicy
) -> None:
    """Check the model that captions images, and add the space that it will take, where it is needed."""
    written = Written(space.places)
    needed = captioner.check(plan, written=written, token=token, hub_cache=hub_cache, retries=retries)
    space.add("HF_HOME", "the weights of the model that captions", needed)


# ---- the sources of images


def _check_source(
    source: Source,
    cache_bytes: int,
    space: NeededSpace,
    answers: Answers,
    *,
    token: str | None,
    keys: Keys,
    retries: RetryPolicy,
) -> None:
    """Check one source of images, and add the space that it and its encoded images will take.

    `cache_bytes` is for each image. How many images a download holds is estimated from its size.
    """
    if source.kind == "generated":
        count = source.count
        space.add("CACHE_PATH", "class images", count * TYPICAL_IMAGE_BYTES)
    elif source.kind == "folder":
        folder = list_folder(Subset(replace(source, path=str(fetch.local_folder(source)))), Written(space.places))
        count = len(folder.images) or _images_in_shards(folder)
        if not count:
            names = [printable(name) for name in folder.all_names()]
            raise DataError(f"{fetch.named(source)}: {_without_images(source, names)}")
    elif source.kind == "hub":
        count = _check_hub_dataset(source, space, answers, token=token, retries=retries) // TYPICAL_IMAGE_BYTES
    elif source.kind == "bucket":
        count = _check_bucket(source, space, answers, replace(keys, hub=token), retries=retries)
    elif fetch.is_url(source):
        count = _check_url(source, space, answers, replace(keys, hub=token), retries=retries) // TYPICAL_IMAGE_BYTES
    else:
        path = fetch.local_archive(source)
        if not archive.has_file(path, formats.READABLE_SUFFIXES):
            raise DataError(f"{fetch.named(source)}: {_archive_without_images(path)}")
        size = path.stat().st_size
        space.add("CACHE_PATH", "unpacked archives", size * UNPACKED_BYTES_PER_ARCHIVE_BYTE)
        count = size // TYPICAL_IMAGE_BYTES
    space.add("CACHE_PATH", ENCODED, count * cache_bytes)


def _images_in_shards(folder: Folder) -> int:
    """About how many: those of a folder that holds shards alone."""
    total = sum((folder.root / name).stat().st_size for name in folder.shards)
    return -(-total // TYPICAL_IMAGE_BYTES)


def _without_images(source: Source, names: list[str]) -> str:
    """That a folder has no images; where it has archives, what to name instead."""
    folder = fetch.local_folder(source)
    packed = fetch.archives_in(folder)
    if not packed:
        return formats.why_none(names)
    return (
        f"there is no image in it, only {some(packed)}. Name the archive itself, {folder / packed[0]}, or "
        "unpack it there."
    )


def _archive_without_images(path: Path) -> str:
    """That an archive has no images; where it has archives, these by name."""
    names = archive.first_names(path)
    packed = [name for name in names if name.lower().endswith(fetch.ANY_ARCHIVE)]
    if packed:
        return f"there is no image in it, only archives ({some(packed)}). Unpack it, and name the folder."
    known = ", ".join(formats.READABLE_SUFFIXES)
    held = some(names) or "nothing"
    return f"there is no image among its first entries. Read are {known}. It holds {held}."


def _check_hub_dataset(
    source: Source, space: NeededSpace, answers: Answers, *, token: str | None, retries: RetryPolicy
) -> int:
    """The bytes of the files that will be downloaded; 0 if they are unpacked already."""
    repo = fetch.dataset_repo(source, token=token, hub_cache=space.places["HF_HOME"], retries=retries)
    if fetch.cached_dataset(source, repo, space.places["CACHE_PATH"]):
        return 0
    listing = answers.of(fetch.describe_dataset, source, repo)
    chosen = set(hub_choice.choose(repo.variable, repo.name, [file.name for file in listing.files]).names)
    files = [file for file in listing.files if file.name in chosen]
    with_images = (*formats.READABLE_SUFFIXES, *hub_choice.STREAMED, *hub_choice.ARCHIVES)
    if not any(name.lower().endswith(with_images) for name in chosen):
        raise DataError(f"{repo.variable}: {formats.why_none(sorted(chosen))}")
    answers.of(hub.check_access, repo, listing, files[0].name)
    size = sum(file.size for file in files)
    space.add("HF_HOME", f"the dataset {repo.name}", hub.missing_bytes(repo, files))
    space.add("CACHE_PATH", f"the images of {repo.name}", size * UNPACKED_BYTES_PER_ARCHIVE_BYTE)
    return size


def _check_bucket(source: Source, space: NeededSpace, answers: Answers, keys: Keys, *, retries: RetryPolicy) -> int:
    """The number of images in a bucket that will be downloaded; 0 if an earlier run has all that is there now."""
    named = fetch.named(source)
    cache = space.places["CACHE_PATH"]
    found = answers.of(_missing, source, keys, retries, cache, by=(source, _as_key(keys), retries, cache))
    if not found:
        return 0
    names = [name for name, _, _ in found]
    images = [name for name in names if name.lower().endswith(tuple(formats.READABLE_SUFFIXES))]
    are_known = all(size >= 0 for _, size, _ in found)
    size = sum(size if size >= 0 else TYPICAL_IMAGE_BYTES for _, size, _ in found)
    count = len(images)
    if not images and any(name.lower().endswith(SHARD) for name in names):
        count = -(-size // TYPICAL_IMAGE_BYTES)
    if not count:
        raise DataError(f"{named}: {formats.why_none(names)}")
    shown = human_size(size) if are_known else "of sizes that are known once they come"
    if streams.are_needed(found, cache, most=space.most):
        logger.info("To stream: %s, %d files, %s.", named, len(found), shown)
        return count
    logger.info("To fetch: %s, %d files, %s.", named, len(found), shown)
    space.add("CACHE_PATH", "the files of the bucket", size)
    return count


def _check_url(source: Source, space: NeededSpace, answers: Answers, keys: Keys, *, retries: RetryPolicy) -> int:
    """The bytes of an archive that will be downloaded; 0 if an earlier run has unpacked it."""
    if fetch.known_download(source, space.places["CACHE_PATH"]) is not None:
        return 0
    size = answers.of(_archive_size, source, keys, retries, by=(source, _as_key(keys), retries)) or 0
    # The download stays until it is unpacked, so that both are there at once.
    space.add("CACHE_PATH", "the download and its images", size * (1 + UNPACKED_BYTES_PER_ARCHIVE_BYTE))
    return size


def _missing(source: Source, keys: Keys, retries: RetryPolicy, cache: Path) -> list[folders.Listed]:
    return folders.missing(fetch.named(source), source.location, keys, cache=cache, retries=retries)[1]


def _archive_size(source: Source, keys: Keys, retries: RetryPolicy) -> int | None:
    return fetch.remote_archive(source, keys, retries=retries).size


def _as_key(keys: Keys) -> Hashable:
    return (keys.hub, keys.civitai, tuple(sorted(keys.hosts.items())), tuple(sorted(keys.clouds.items())))


# ---- places


def _check_writable(variable: str, place: Path, answers: Answers) -> None:
    """Write, flush and delete a file where `place` is, or will be made: some volumes fail on a write only."""
    longest = max(len(os.fsencode(name)) for name in place.parts)
    if longest > LONGEST_NAME_BYTES:
        raise SettingsError(
            f"{variable}={printable(str(place))}: a name in it has {longest} bytes, and no name of a file or folder "
            f"may have more than {LONGEST_NAME_BYTES}. Fix: choose a shorter one."
        )
    folder = nearest_existing(place)
    if not folder.is_dir():
        raise SettingsError(f"{variable}={place}: {folder} is a file. Name a folder.")
    try:
        answers.of(_probe, folder)
    except OSError as problem:
        raise StorageError(
            f"{variable}={place} cannot be written: {problem.strerror} (as user {os.getuid()}, in {folder}). Mount a "
            f"volume that this user may write to, or choose another place with {variable}."
        ) from problem


def _probe(folder: Path) -> None:
    """Raises OSError where no file can be written."""
    probe = folder / f".kiln-probe-{uuid.uuid4().hex[:8]}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _full_volumes(space: NeededSpace, *, all_known: bool, rolls: bool) -> list[KilnError]:
    """One error for each file system without enough free space, with both numbers and what they are made of.

    Places on one file system share its space, so their needs are added up. `all_known`: False where a model or a
    dataset could not be asked for its size, so that the log must not say that little is needed. `rolls`: images can be
    encoded part by part, so that the cache needs not hold all.
    """
    about = "about %s needed" if all_known else "at least %s needed, and what could not be looked up"
    text = f"Room on the volume of %s: {about}, %s free."
    variables_by_device: dict[int, list[str]] = defaultdict(list)
    for variable in space.parts:
        device = nearest_existing(space.places[variable]).stat().st_dev
        variables_by_device[device].append(variable)
    errors: list[KilnError] = []
    for variables in variables_by_device.values():
        parts: dict[str, float] = {}
        for variable in variables:
            parts |= space.parts[variable]
        place = nearest_existing(space.places[variables[0]])
        free = shutil.disk_usage(place).free
        needed = sum(parts.values())
        logger.info(text, place, human_size(needed), human_size(free))
        encoded = parts.get(ENCODED, 0)
        if rolls and encoded and needed > free >= needed - encoded + min(encoded, LEAST_BYTES):
            said = "Not all encoded images (%s) fit there beside the rest: the job encodes them part by part."
            logger.info(said, human_size(encoded))
        elif needed > free:
            made_of = ", ".join(f"{what}: {human_size(size)}" for what, size in parts.items())
            errors.append(
                StorageError(
                    f"{', '.join(variables)}: about {human_size(needed)} are needed on the volume of {place} "
                    f"({made_of}), and {human_size(free)} are free. Free some space, or choose another volume."
                )
            )
    return errors
