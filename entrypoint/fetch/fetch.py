"""Bring models and datasets to local folders: resumable, verified, idempotent; from the cache where there is no
network.

`fetch_model` and `fetch_source` are the two entries. Everything that a job needs is on this machine when they return,
so the trainer runs without network and without secrets.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint.dataset_config.sources import ARCHIVES, no_such_folder
from entrypoint.fetch import archive, http, hub, local_weights, streams
from entrypoint.fetch.doors import folders, service
from entrypoint.fetch.doors.keys import NO_KEYS, Keys
from entrypoint.fetch.doors.offer import Offer, refusal
from entrypoint.fetch.http import RetryPolicy
from entrypoint.fetch.hub_dataset import hub_choice, hub_folder, hub_rows
from entrypoint.system import public_addresses
from trainer.base_model import model_folder, without_weights
from trainer.network import addresses
from trainer.spec.errors import DataError, GatedError, SettingsError, UnreachableError
from trainer.spec.family import Facts, facts_of
from trainer.spec.plan import ModelPlan, Source
from trainer.spec.values import printable, some
from trainer.storage.atomic import human_size
from trainer.storage.folders import build_folder, completed, locked, naming, read_json, storage_error, write_text
from trainer.storage.read import open_regular, special_kind

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

ANY_ARCHIVE = (*ARCHIVES, ".7z", ".rar")
SHA256 = re.compile(r"[0-9a-f]{64}")
PART_NAME = re.compile(r"[0-9a-f]{16}\.part")  # of a download that is not complete
QUICK_TIMEOUT_S = 5.0  # for the answer to a name that is hardly one of a dataset
SHORT_BUDGET_S = 10.0  # how long a silent server is waited for when the cache could serve instead


def fetch_model(
    model: ModelPlan,
    *,
    patterns: tuple[str, ...],
    token: str | None,
    hub_cache: Path | None = None,
    retries: RetryPolicy = http.USUAL,
) -> ModelPlan:
    """`model` with `path` filled in (and `commit`, if it is from the Hub): a complete model in diffusers' layout.

    `patterns`: the files that are needed. A `path` that is set already is kept. `hub_cache`: None means the cache that
    HF_HOME points to. Raises SettingsError (no such model, or not a usable one), GatedError, UnreachableError,
    StorageError.
    """
    if published := without_weights.published(model):
        return replace(model, path=str(local_weights.assemble(model, published, hub_cache=hub_cache, retries=retries)))
    variable = model_folder.variable(model)
    facts = facts_of(model.family, model.base)
    if folder := local_model(model):
        model_folder.check_kind(variable, folder, model)
        model_folder.check_folder(variable, folder, patterns, facts)
        return replace(model, path=str(folder))
    repo = model_repo(model, token=token, hub_cache=hub_cache, retries=retries)
    cached = cached_model(repo, patterns, facts)
    sure = cached.commit if cached is not None and cached.is_verified else None
    if cached is None or sure is None or repo.revision != sure:
        try:
            listing = hub.describe(_less_patient(repo) if cached else repo)
            model_folder.check_names(variable, [f.name for f in listing.files], patterns)
            if listing.commit != sure:
                needed = model_folder.wanted([f.name for f in listing.files], patterns)
                files = [f for f in listing.files if f.name in needed]
                # The configs first: they may say that the gigabytes which follow are of no use.
                configs = [f for f in files if f.name.endswith("config.json") or f.name == "model_index.json"]
                folder = hub.bring(repo, listing, configs)
                model_folder.check_kind(variable, folder, model)
                names = [f.name for f in configs]
                model_folder.check_quantised(variable, folder, names)
                model_folder.check_configs(variable, folder, names, facts, configs_only=True)
                cached = hub.Cached(listing.commit, hub.bring(repo, listing, files), is_verified=True)
        except (UnreachableError, GatedError) as problem:
            if cached is None:
                raise
            logger.warning("%s The cache has %s at commit %s: using that.", problem, repo.name, cached.commit)
    assert cached is not None
    model_folder.check_folder(variable, cached.folder, patterns, facts)
    model_folder.check_kind(variable, cached.folder, model)
    return replace(model, commit=cached.commit, path=str(cached.folder))


def fetch_source(
    source: Source,
    *,
    cache: Path,
    token: str | None,
    keys: Keys = NO_KEYS,
    hub_cache: Path | None = None,
    retries: RetryPolicy = http.USUAL,
    most: int | None = None,
    owner: str = "",
) -> Source:
    """`source` with `path` filled in (and `commit`, if it is from the Hub): a folder of image files.

    Archives, Hub datasets and what is in buckets become folders in `cache`/datasets, named by their content, so that
    the next run finds them. `token`: the Hub's; `keys`: those of other services. Shards that do not all fit get the
    folder of a stream (`streams`, which has `most` and `owner`). Raises SettingsError, DataError (no or dangerous
    content), GatedError, UnreachableError, StorageError.
    """
    if source.kind == "generated":
        return source  # the trainer draws these images
    if source.kind == "folder":
        return replace(source, path=str(local_folder(source)))
    with naming("CACHE_PATH"):
        if source.kind == "archive":
            keys = replace(keys, hub=token)
            return replace(source, path=str(_archive_folder(source, cache=cache, keys=keys, retries=retries)))
        if source.kind == "bucket":
            keys = replace(keys, hub=token)
            stream = partial(streams.begin, source, cache=cache, most=most, owner=owner)
            folder = folders.bring(named(source), source.location, keys, cache=cache, retries=retries, stream=stream)
            return replace(source, path=str(folder))
        return _hub_dataset(source, cache=cache, token=token, hub_cache=hub_cache, retries=retries)


def model_repo(model: ModelPlan, *, token: str | None, hub_cache: Path | None, retries: RetryPolicy) -> hub.Repo:
    """The repository of a model that is not a local folder; pinned to the commit of an earlier run, if there was
    one.
    """
    return hub.Repo(
        *("model", model.source, model_folder.variable(model)),
        revision=model.commit or model.revision,
        token=token,
        cache=hub_cache,
        retries=retries,
    )


def describe_dataset(source: Source, repo: hub.Repo) -> hub.Listing:
    """`hub.describe`, for a name that may be meant as a folder. Raises what that raises.

    A name without an owner is hardly ever a dataset, so that it is asked for once, and not for two minutes.
    """
    if "/" not in source.location:
        retries = replace(repo.retries, budget=0.0, timeout=min(QUICK_TIMEOUT_S, repo.retries.timeout))
        repo = replace(repo, retries=retries)
    # A stranger learns nothing of what is here.
    folder = no_such_folder(source.location, from_root=not os.environ.get(public_addresses.VARIABLE))
    try:
        return hub.describe(repo)
    except (SettingsError, UnreachableError) as problem:
        if "/" in source.location:
            raise type(problem)(f"{problem} If a folder was meant: {folder}.") from problem
        hub_says = "the Hub does not answer"
        if isinstance(problem, SettingsError):
            hub_says = "the Hub has no dataset of this name"
        raise SettingsError(
            f"{named(source)}: {folder}, and {hub_says}. Write the path of a folder, or a dataset as owner/name."
        ) from problem


def dataset_repo(source: Source, *, token: str | None, hub_cache: Path | None, retries: RetryPolicy) -> hub.Repo:
    """The repository of a source of kind hub; pinned to the commit of an earlier run, if there was one."""
    return hub.Repo(
        *("dataset", source.location, named(source)),
        revision=source.commit or source.revision,
        token=token,
        cache=hub_cache,
        retries=retries,
    )


def named(source: Source) -> str:
    """How the user named a source, for messages; without the secrets that an address may hold."""
    place = addresses.shown(source.location) if is_url(source) else printable(source.location)
    return f"{source.named_in}: {place}" if source.named_in else f"DATASET_NAME={place}"


def is_url(source: Source) -> bool:
    """Whether it is an address, of whichever service: local paths begin with a slash."""
    return "://" in source.location


def local_model(model: ModelPlan) -> Path | None:
    """The folder of a model that is on this machine already: baked into the image, or named by the user."""
    if model.path:
        return Path(model.path)
    return Path(model.source).expanduser().resolve() if model_folder.is_local(model) else None


def local_folder(source: Source) -> Path:
    """The folder of a source of kind folder. Raises SettingsError if there is none."""
    folder, kind = _on_this_machine(source)
    if kind == "a folder":
        return folder
    problem = no_such_folder(source.location) if kind is None else f"{printable(source.location)} is {kind}"
    raise SettingsError(f"{named(source)}: {problem}. Check the path and what is mounted there.")


def local_archive(source: Source) -> Path:
    """The file of an archive that is not an address. Raises SettingsError if there is none, DataError for a giant."""
    path, kind = _on_this_machine(source)
    if kind != "a file":
        problem = f"there is no file {printable(str(path))}" if kind is None else f"it is {kind} and not a file"
        raise SettingsError(f"{named(source)}: {problem}. Check the path and what is mounted there.")
    if path.stat().st_size > archive.USUAL.total:  # unpacked, it would be larger still; hashing it takes hours
        limit = human_size(archive.USUAL.total)
        raise DataError(f"{named(source)}: the archive has more than {limit}. Unpack it, and name the folder.")
    try:
        with open_regular(path) as file:
            head = file.read(archive.HEAD_BYTES)
    except OSError as problem:
        raise SettingsError(f"{named(source)}: it cannot be read: {problem.strerror}.") from problem
    if head and not head.strip(b"\0"):  # a file with a hole of many gigabytes would be hashed first
        raise DataError(f"{named(source)}: it is no archive, it begins with zeros. Bring it again.")
    return path


def _on_this_machine(source: Source) -> tuple[Path, str | None]:
    """The path of a source without links, and what is there: "a folder", "a file", "a FIFO"; None: nothing."""
    # Not Path.resolve, which raises where links lead round in a circle.
    path = Path(source.location).expanduser()
    try:
        path = Path(os.path.realpath(path))
        mode = path.stat().st_mode
    except (OSError, ValueError):  # not there, a closed folder, a name too long, links in a circle
        return path, None
    return path, special_kind(mode) or "a file"


def cached_model(repo: hub.Repo, patterns: tuple[str, ...], facts: Facts) -> hub.Cached | None:
    """A complete snapshot of the model in the cache, whichever tool downloaded it; None if there is none."""
    cached = hub.cached_snapshot(repo, lambda names: model_folder.wanted(names, patterns))
    if cached is not None and not cached.is_verified:
        try:
            model_folder.check_folder(repo.variable, cached.folder, patterns, facts)
        except SettingsError:
            return None
    return cached


def cached_dataset(source: Source, repo: hub.Repo, cache: Path) -> tuple[str, Path] | None:
    """Commit and folder of a Hub dataset that an earlier run has unpacked; None if there is none."""
    commit = hub.cached_commit(repo)
    if commit is None or completed(_dataset_folder(source, commit, cache)) is None:
        return None
    return commit, _dataset_folder(source, commit, cache)


def _less_patient(repo: hub.Repo) -> hub.Repo:
    return replace(repo, retries=replace(repo.retries, budget=min(SHORT_BUDGET_S, repo.retries.budget)))


def _dataset_folder(source: Source, commit: str, cache: Path) -> Path:
    asked: list[str | int | None] = [source.location, commit, source.split, source.image_column, source.caption_column]
    asked += [source.subset, hub_rows.VERSION]
    return cache / "datasets" / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def _hub_dataset(
    source: Source, *, cache: Path, token: str | None, hub_cache: Path | None, retries: RetryPolicy
) -> Source:
    repo = dataset_repo(source, token=token, hub_cache=hub_cache, retries=retries)
    cached = cached_dataset(source, repo, cache)
    if cached is not None and cached[0] == repo.revision:
        return _logged(source, repo, *cached)
    try:
        listing = describe_dataset(source, _less_patient(repo) if cached else repo)
        folder = _dataset_folder(source, listing.commit, cache)
        if completed(folder) is None:
            _unpack_hub_dataset(source, repo, listing, folder)
        cached = listing.commit, folder
    except (UnreachableError, GatedError, SettingsError) as problem:
        # A name without an owner: its errors are those of a folder, though the Hub may only be out of reach.
        if cached is None or (isinstance(problem, SettingsError) and "/" in source.location):
            raise
        logger.warning("%s The cache has %s at commit %s: using that.", problem, repo.name, cached[0])
    return _logged(source, repo, *cached)


def _logged(source: Source, repo: hub.Repo, commit: str, folder: Path) -> Source:
    """The source in its folder, after the log has said what of the dataset takes part."""
    _log_hub_dataset(repo.name, commit, completed(folder) or {})
    return replace(source, commit=commit, path=str(folder))


def _unpack_hub_dataset(source: Source, repo: hub.Repo, listing: hub.Listing, folder: Path) -> None:
    choice = hub_choice.choose(repo.variable, repo.name, [f.name for f in listing.files])
    snapshot = hub.bring(repo, listing, [f for f in listing.files if f.name in set(choice.names)])
    asked = hub_rows.Asked(
        variable=repo.variable,
        split=source.split,
        configuration=source.subset,
        image_column=source.image_column,
        caption_column=source.caption_column,
    )

    def fill(target: Path) -> dict[str, Any]:
        facts = hub_rows.unpack(snapshot, target, asked)
        return {**facts, "left_out": choice.left_out}

    build_folder(folder, fill)


def _log_hub_dataset(name: str, commit: str, facts: dict[str, Any]) -> None:
    """Say what was read of a Hub dataset, and name what takes no part. In every run, not only in the first."""
    said = [f"{facts['images']} images of the split {facts['split']}"]
    if facts["subset"] != "default":
        said.append(f"subset {facts['subset']}")
    if facts.get("image"):
        said.append(f"images from the column {facts['image']}")
        said.append(f"captions from {facts['caption']}" if facts.get("caption") else "no captions")
    unused = {
        "splits not used": facts["other_splits"],
        "columns not used": facts.get("unused_columns", ()),
        "files not used": facts["left_out"],
    }
    said += [f"{what}: {some(names, most=hub_choice.MOST_NAMED)}" for what, names in unused.items() if names]
    logger.info("%s at commit %s: %s.", name, commit[:12], "; ".join(said))
    for note in facts["notes"]:
        logger.warning("%s: %s", name, note)


def _archive_folder(source: Source, *, cache: Path, keys: Keys, retries: RetryPolicy) -> Path:
    if is_url(source):
        folder = _downloaded_archive(source, cache=cache, keys=keys, retries=retries)
    else:
        path = local_archive(source)
        try:
            with open_regular(path) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as problem:
            raise storage_error(problem, path) from problem
        folder = _unpacked(path, digest, cache)
    return archive.content_root(folder)


def _unpacked(path: Path, digest: str, cache: Path) -> Path:
    """The folder of the archive `path` with this SHA-256, unpacked now or by an earlier run."""

    def fill(target: Path) -> dict[str, Any]:
        count = archive.extract(path, target)
        if not count:
            raise DataError(f"{path.name} is empty. Name an archive with images in it.")
        described = hub_folder.write_json_captions(target)
        inner = [name for name in hub_folder.names(target) if name.lower().endswith(ANY_ARCHIVE)]
        return {"archive": path.name, "entries": count, "described": described, "inner": inner}

    folder = cache / "datasets" / digest[:32]
    facts = build_folder(folder, fill)
    logger.info("%s: %d files in %s", path.name, facts["entries"], folder)
    if facts.get("described"):
        logger.info("%s: the captions of %d images come from .json files beside them", path.name, facts["described"])
    if facts.get("inner"):
        inner = some(facts["inner"], most=hub_choice.MOST_NAMED)
        logger.warning("%s: archives in it are not used: %s. Unpack it, or name them.", path.name, inner)
    return folder


def archives_in(folder: Path) -> list[str]:
    """The archives that are directly in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(ANY_ARCHIVE))


def known_download(source: Source, cache: Path) -> Path | None:
    """The folder of a remote archive that an earlier run has downloaded and unpacked."""
    known = read_json(_download_place(source, cache) / "known.json") or {}
    digest = str(known.get("digest"))
    folder = cache / "datasets" / digest[:32]
    return folder if SHA256.fullmatch(digest) and completed(folder) is not None else None


def _download_place(source: Source, cache: Path) -> Path:
    return cache / "downloads" / hashlib.sha256(service.identity(source.location).encode()).hexdigest()[:16]


def _downloaded_archive(source: Source, *, cache: Path, keys: Keys, retries: RetryPolicy) -> Path:
    """The folder of a remote archive, downloaded unless the server says that it has not changed."""
    from trainer.network.client import open_client

    place = _download_place(source, cache)
    with locked(place / "lock"), open_client(timeout=retries.timeout) as client:
        folder = known_download(source, cache)
        version = (read_json(place / "known.json") or {}).get("version")
        try:
            policy = replace(retries, budget=min(SHORT_BUDGET_S, retries.budget)) if folder else retries
            remote = remote_archive(source, keys, retries=policy)
        except (UnreachableError, GatedError) as problem:
            if folder is None:
                raise
            logger.warning("%s Using what was downloaded before.", problem)
            return folder
        if folder is not None and remote.version is not None and remote.version == version:
            return folder
        part = place / f"{hashlib.sha256((remote.version or '').encode()).hexdigest()[:16]}.part"
        for other in place.iterdir():
            if not PART_NAME.fullmatch(other.name):
                continue
            if other != part or remote.version is None:  # it belongs to another version
                other.unlink()
        stated = None if remote.digest else remote.version
        limits: dict[str, Any] = {"most": archive.USUAL.total, "version": stated, "digest": remote.digest}
        shown = addresses.shown(source.location)
        whole = place / "whole" / remote.name
        job = http.Download(remote.url, whole, part, shown, remote.headers, remote.size, **limits)
        digest = http.download(client, job, retries=retries, refuse=partial(_refuse_address, source))
        folder = _unpacked(job.path, digest, cache)
        job.path.unlink()
        write_text(place / "known.json", json.dumps({"version": remote.version, "digest": digest}))
    return folder


def remote_archive(source: Source, keys: Keys, *, retries: RetryPolicy) -> Offer:
    """What its service says of a remote archive. Raises SettingsError, GatedError, UnreachableError."""
    return service.ask(named(source), source.location, keys, retries=retries)


def _refuse_address(source: Source, response: httpx.Response) -> None:
    raise refusal(named(source), response, key=service.key_for(source.location))
