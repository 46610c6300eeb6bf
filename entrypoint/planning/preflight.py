"""What can be known in seconds before the first large download: access, room, and that there are pictures at all."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from entrypoint.fetch import archive, fetch, flash_attention, http, hub, hub_rows, model_folder
from entrypoint.fetch.http import RetryPolicy
from entrypoint.planning import single_files
from entrypoint.system.folders import human, storage_error
from trainer.spec.errors import DataError, GatedError, KilnError, SettingsError, StorageError, UnreachableError
from trainer.spec.family import base_models, get_family
from trainer.spec.plan import ModelPlan, Plan, Source
from trainer.spec.weight_formats import PRECISIONS

logger = logging.getLogger(__name__)

# When problems of several kinds are found, the first of these gives the exit code: what only the user can mend first.
ORDER: tuple[type[KilnError], ...] = (SettingsError, GatedError, DataError, StorageError, UnreachableError)
# Sizes are not known yet, so that these are estimates, of the largest family.
LATENTS_PER_PIXEL = 2  # bytes: mean and deviation of 16 channels in fp32 for 8 × 8 pixels
TOKEN = 4096  # numbers of a caption's token
FEWEST_TOKENS = 77
TYPICAL_PICTURE = 500_000  # bytes
LISTED = 100 * 2**20  # bytes; larger files are named before they are fetched
LORA_PER_RANK = 0.0005  # bytes of an fp32 LoRA of rank 1 for each byte of weights
STATE_PER_LORA = 5  # bytes of a resumable state (adapter, four optimiser tensors) for each byte of the LoRA


@dataclass
class Needs:
    """Room that will be taken, by the variable that names the place."""

    places: dict[str, Path]
    parts: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))  # variable → what → bytes

    def add(self, variable: str, what: str, size: float) -> None:
        if size > 0:
            self.parts[variable][what] = self.parts[variable].get(what, 0) + size


def preflight(plan: Plan, *, token: str | None, hub_cache: Path, retries: RetryPolicy = http.USUAL) -> None:
    """Check all that can be checked before the first large download; asks the network only for what no cache has.

    `hub_cache` is where downloads from the Hub are kept (HF_HOME/hub). Raises one error with all problems in its
    message: SettingsError, GatedError, DataError, StorageError or UnreachableError, the first of these that applies.
    """
    places = {"OUTPUT_PATH": Path(plan.output.path), "CACHE_PATH": Path(plan.output.cache), "HF_HOME": hub_cache}
    needs = Needs(places)
    problems: list[KilnError] = []

    def attempt(check: Callable[[], None]) -> None:
        try:
            check()
        except KilnError as problem:
            problems.append(problem)
        except OSError as problem:
            problems.append(storage_error(problem, Path(str(problem.filename or "."))))

    attempt(partial(_check_resume, plan.lora.resume_from))
    if plan.engine.attention == "flash_4" and not flash_attention.is_installed(places["CACHE_PATH"]):
        logger.info("To fetch: FlashAttention 4 with its compiler, %s.", human(flash_attention.BYTES))
        needs.add("CACHE_PATH", "FlashAttention 4", flash_attention.BYTES)
    attempt(partial(_check_model, plan, needs, token=token, hub_cache=hub_cache, retries=retries))
    for source, encoded in _sources(plan):
        if any(isinstance(p, UnreachableError) for p in problems):  # waited for long enough
            retries = replace(retries, budget=0.0)
        attempt(partial(_check_source, source, encoded, needs, token=token, retries=retries))
    for variable in ("OUTPUT_PATH", "CACHE_PATH", "HF_HOME"):
        if variable != "HF_HOME" or needs.parts["HF_HOME"]:
            attempt(partial(_check_writable, variable, places[variable]))
    if not any(isinstance(p, StorageError) for p in problems):
        problems += _too_full(needs)
    _raise(problems)


def _raise(problems: list[KilnError]) -> None:
    if not problems:
        return
    texts = list(dict.fromkeys(str(p) for p in sorted(problems, key=lambda p: ORDER.index(type(p)))))
    kind = next(k for k in ORDER if any(isinstance(p, k) for p in problems))
    raise kind(texts[0] if len(texts) == 1 else "\n".join(f"- {text}" for text in texts)) from problems[0]


def _sources(plan: Plan) -> Iterator[tuple[Source, int]]:
    """Every source once, with the bytes that each of its pictures takes in the cache with its captions."""
    found: dict[Source, int] = {}
    footprint = base_models()[plan.model.base][1].footprint  # a miniature has none, and small tokens
    number = 4 if PRECISIONS[plan.engine.precision].dtype == "float32" else 2
    text = max(footprint.text_tokens, FEWEST_TOKENS) * TOKEN * number if footprint else 0
    for dataset in plan.data.datasets:
        for subset in dataset.subsets:
            width, height = dataset.resolution
            encoded = width * height * LATENTS_PER_PIXEL * subset.image_variants + text * subset.caption_variants
            found[subset.source] = found.get(subset.source, 0) + encoded
    yield from found.items()


def _check_resume(resume_from: str | None) -> None:
    if resume_from is not None and not Path(resume_from).exists():
        raise SettingsError(
            f"PARAMS_RESUME_FROM={resume_from}: there is no such file or folder. Name a LoRA file (.safetensors) or "
            "the folder of a state, or leave it empty to start anew."
        )


def _check_model(plan: Plan, needs: Needs, *, token: str | None, hub_cache: Path, retries: RetryPolicy) -> None:
    """Check the base model, and note the room that it and the checkpoints will take."""
    weights = _model_bytes(plan.model, needs, token=token, hub_cache=hub_cache, retries=retries)
    lora = weights * LORA_PER_RANK * plan.lora.rank
    kept = plan.output.keep_checkpoints + 1  # while one is written, the oldest is still there
    needs.add("OUTPUT_PATH", f"{kept} checkpoints", lora * (1 + STATE_PER_LORA) * kept + lora)


def _model_bytes(model: ModelPlan, needs: Needs, *, token: str | None, hub_cache: Path, retries: RetryPolicy) -> int:
    """Bytes of the model's files, which are checked as far as they are known."""
    patterns = single_files.patterns(get_family(model.family).FACTS, model.parts)
    converted = single_files.room(model)
    needs.add("CACHE_PATH", "converted weights", converted)
    variable = model_folder.variable(model)
    if folder := fetch.local_model(model):
        model_folder.check_folder(variable, folder, patterns)
        return _weights(folder) + converted
    repo = fetch.model_repo(model, token=token, hub_cache=hub_cache, retries=retries)
    cached = fetch.cached_model(repo, patterns)
    if cached is not None:
        return _weights(cached.folder) + converted
    listing = hub.describe(repo)
    model_folder.check_names(variable, [f.name for f in listing.files], patterns)
    needed = model_folder.wanted([f.name for f in listing.files], patterns)
    files = [f for f in listing.files if f.name in needed]
    hub.check_access(repo, listing, "model_index.json")
    for file in sorted(files, key=lambda f: -f.size):
        if file.size >= LISTED:
            logger.info("To fetch: %s/%s, %s.", repo.name, file.name, human(file.size))
    logger.info("To fetch: %d files of %s, %s.", len(files), repo.name, human(sum(f.size for f in files)))
    needs.add("HF_HOME", f"the weights of {repo.name}", hub.missing_bytes(repo, files))
    return sum(f.size for f in files) + converted


def _weights(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*.safetensors"))


def _check_source(source: Source, encoded: int, needs: Needs, *, token: str | None, retries: RetryPolicy) -> None:
    """Check one source of pictures, and note the room that it and its encoded pictures will take."""
    if source.kind == "generated":
        count = source.count
        needs.add("CACHE_PATH", "class pictures", count * TYPICAL_PICTURE)
    elif source.kind == "folder":
        count = _count_pictures(fetch.local_folder(source))
        if not count:
            raise DataError(f"{fetch.named(source)}: there is no picture in it. Put pictures there (or mount them).")
    elif source.kind == "hub":
        count = _check_hub_dataset(source, needs, token=token, retries=retries) // TYPICAL_PICTURE
    elif fetch.is_url(source):
        count = _check_address(source, needs, token=token, retries=retries) // TYPICAL_PICTURE
    else:
        path = fetch.local_archive(source)
        if not archive.has_file(path, hub_rows.PICTURES):
            raise DataError(f"{fetch.named(source)}: there is no picture among its first entries.")
        needs.add("CACHE_PATH", "unpacked archives", path.stat().st_size * 1.1)
        count = path.stat().st_size // TYPICAL_PICTURE
    needs.add("CACHE_PATH", "encoded pictures", count * encoded)


def _count_pictures(folder: Path) -> int:
    return sum(name.lower().endswith(hub_rows.PICTURES) for _, _, names in os.walk(folder) for name in names)


def _check_hub_dataset(source: Source, needs: Needs, *, token: str | None, retries: RetryPolicy) -> int:
    """The bytes of the files that will be downloaded; 0 if they are unpacked already."""
    repo = fetch.dataset_repo(source, token=token, hub_cache=needs.places["HF_HOME"], retries=retries)
    if fetch.cached_dataset(source, repo, needs.places["CACHE_PATH"]):
        return 0
    listing = hub.describe(repo)
    names = set(hub_rows.choose(repo.variable, repo.name, [f.name for f in listing.files]).names)
    files = [f for f in listing.files if f.name in names]
    hub.check_access(repo, listing, files[0].name)
    size = sum(f.size for f in files)
    needs.add("HF_HOME", f"the dataset {repo.name}", hub.missing_bytes(repo, files))
    needs.add("CACHE_PATH", f"the pictures of {repo.name}", size * 1.1)
    return size


def _check_address(source: Source, needs: Needs, *, token: str | None, retries: RetryPolicy) -> int:
    """The bytes of an archive that will be downloaded; 0 if an earlier run has unpacked it."""
    import httpx

    if fetch.known_download(source, needs.places["CACHE_PATH"]) is not None:
        return 0
    with httpx.Client() as client:
        size = fetch.remote_archive(client, source, token=token, retries=retries).size or 0
    needs.add("CACHE_PATH", "the download and its pictures", size * 2.1)
    return size


def _check_writable(variable: str, place: Path) -> None:
    """Write, flush and delete a file where `place` is, or will be made."""
    ground = _ground(place)
    if not ground.is_dir():
        raise SettingsError(f"{variable}={place}: {ground} is a file. Name a folder.")
    probe = ground / f".kiln-probe-{uuid.uuid4().hex[:8]}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        raise StorageError(
            f"{variable}={place} cannot be written: {problem.strerror} (as user {os.getuid()}, in {ground}). Mount a "
            f"volume that this user may write to, or choose another place with {variable}."
        ) from problem
    finally:
        probe.unlink(missing_ok=True)


def _ground(place: Path) -> Path:
    """`place`, or the nearest folder above it that exists: nothing is made by only looking."""
    place = place.expanduser().absolute()
    return next(p for p in (place, *place.parents) if p.exists())


def _too_full(needs: Needs) -> list[KilnError]:
    """One error for each file system without enough room, with both numbers and what they are made of."""
    variables: dict[int, list[str]] = defaultdict(list)
    for variable in needs.parts:
        variables[_ground(needs.places[variable]).stat().st_dev].append(variable)
    found: list[KilnError] = []
    for group in variables.values():
        parts = {what: size for variable in group for what, size in needs.parts[variable].items()}
        place = _ground(needs.places[group[0]])
        free, need = shutil.disk_usage(place).free, sum(parts.values())
        logger.info("Room on the volume of %s: about %s needed, %s free.", place, human(need), human(free))
        if need > free:
            made_of = ", ".join(f"{what}: {human(size)}" for what, size in parts.items())
            found.append(
                StorageError(
                    f"{', '.join(group)}: about {human(need)} are needed on the volume of {place} ({made_of}), and "
                    f"{human(free)} are free. Free some room, or choose another volume."
                )
            )
    return found
