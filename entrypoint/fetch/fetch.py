"""Bring models and datasets to local folders: resumable, verified, idempotent; from the cache where there is no
network.

`fetch_model` and `fetch_source` are the two entries. Everything that a job needs is on this machine when they return,
so the trainer runs without network and without secrets.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from entrypoint.fetch import archive, http, hub, hub_rows, local_weights, model_folder
from entrypoint.fetch.http import RetryPolicy
from entrypoint.system.folders import build_folder, completed, locked, naming, read_json, storage_error, write_text
from trainer.spec.errors import DataError, GatedError, SettingsError, UnreachableError
from trainer.spec.plan import ModelPlan, Source, public

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

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
    if published := local_weights.published(model):
        return replace(model, path=str(local_weights.assemble(model, published, hub_cache=hub_cache, retries=retries)))
    variable = model_folder.variable(model)
    if folder := local_model(model):
        model_folder.check_kind(variable, folder, model)
        model_folder.check_folder(variable, folder, patterns)
        return replace(model, path=str(folder))
    repo = model_repo(model, token=token, hub_cache=hub_cache, retries=retries)
    cached = cached_model(repo, patterns)
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
                model_folder.check_quantised(variable, folder, [f.name for f in configs])
                cached = hub.Cached(listing.commit, hub.bring(repo, listing, files), is_verified=True)
        except (UnreachableError, GatedError) as problem:
            if cached is None:
                raise
            logger.warning("%s The cache has %s at commit %s: using that.", problem, repo.name, cached.commit)
    assert cached is not None
    model_folder.check_folder(variable, cached.folder, patterns)
    model_folder.check_kind(variable, cached.folder, model)
    return replace(model, commit=cached.commit, path=str(cached.folder))


def fetch_source(
    source: Source,
    *,
    cache: Path,
    token: str | None,
    hub_cache: Path | None = None,
    retries: RetryPolicy = http.USUAL,
) -> Source:
    """`source` with `path` filled in (and `commit`, if it is from the Hub): a folder of image files.

    Archives and Hub datasets become folders in `cache`/datasets, named by their content, so that the next run finds
    them. Raises SettingsError, DataError (no or dangerous content), GatedError, UnreachableError, StorageError.
    """
    if source.kind == "generated":
        return source  # the trainer draws these images
    if source.kind == "folder":
        return replace(source, path=str(local_folder(source)))
    with naming("CACHE_PATH"):
        if source.kind == "archive":
            return replace(source, path=str(_archive_folder(source, cache=cache, token=token, retries=retries)))
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
    place = public(source.location) if is_url(source) else source.location
    return f"DATASET_NAME={place} (or a subset of DATASET_CONFIG)"


def is_url(source: Source) -> bool:
    return source.location.startswith(("http://", "https://"))


def local_model(model: ModelPlan) -> Path | None:
    """The folder of a model that is on this machine already: baked into the image, or named by the user."""
    if model.path:
        return Path(model.path)
    return Path(model.source).expanduser().resolve() if model_folder.is_local(model) else None


def local_folder(source: Source) -> Path:
    """The folder of a source of kind folder. Raises SettingsError if there is none."""
    folder = Path(source.location).expanduser().resolve()
    if not folder.is_dir():
        raise SettingsError(f"{named(source)}: there is no folder {folder}. Check the path and what is mounted there.")
    return folder


def local_archive(source: Source) -> Path:
    """The file of an archive that is not an address. Raises SettingsError if there is none."""
    path = Path(source.location).expanduser().resolve()
    if not path.is_file():
        raise SettingsError(f"{named(source)}: there is no file {path}. Check the path and what is mounted there.")
    return path


def cached_model(repo: hub.Repo, patterns: tuple[str, ...]) -> hub.Cached | None:
    """A complete snapshot of the model in the cache, whichever tool downloaded it; None if there is none."""
    cached = hub.cached_snapshot(repo, lambda names: model_folder.wanted(names, patterns))
    if cached is not None and not cached.is_verified:
        try:
            model_folder.check_folder(repo.variable, cached.folder, patterns)
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
    asked = [source.location, commit, source.split, source.image_column, source.caption_column]
    return cache / "datasets" / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def _hub_dataset(
    source: Source, *, cache: Path, token: str | None, hub_cache: Path | None, retries: RetryPolicy
) -> Source:
    repo = dataset_repo(source, token=token, hub_cache=hub_cache, retries=retries)
    cached = cached_dataset(source, repo, cache)
    if cached is not None and cached[0] == repo.revision:
        return replace(source, commit=cached[0], path=str(cached[1]))
    try:
        listing = hub.describe(_less_patient(repo) if cached else repo)
        folder = _dataset_folder(source, listing.commit, cache)
        if completed(folder) is None:
            _unpack_hub_dataset(source, repo, listing, folder)
        cached = listing.commit, folder
    except (UnreachableError, GatedError) as problem:
        if cached is None:
            raise
        logger.warning("%s The cache has %s at commit %s: using that.", problem, repo.name, cached[0])
    return replace(source, commit=cached[0], path=str(cached[1]))


def _unpack_hub_dataset(source: Source, repo: hub.Repo, listing: hub.Listing, folder: Path) -> None:
    choice = hub_rows.choose(repo.variable, repo.name, [f.name for f in listing.files])
    if choice.has_sidecars and source.split != "train":
        raise SettingsError(
            f"DATASET_SPLIT={source.split}: {repo.variable} is a folder of images with caption files and has no "
            "splits. Leave DATASET_SPLIT empty."
        )
    snapshot = hub.bring(repo, listing, [f for f in listing.files if f.name in set(choice.names)])

    def fill(target: Path) -> dict[str, Any]:
        if choice.has_sidecars:
            return hub_rows.copy_files(snapshot, choice.names, target)
        return hub_rows.unpack(
            *(snapshot, target),
            variable=repo.variable,
            split=source.split,
            image_column=source.image_column,
            caption_column=source.caption_column,
        )

    facts = build_folder(folder, fill)
    logger.info("%s at commit %s: %s", repo.name, listing.commit[:12], facts)
    if facts.get("unlisted"):
        logger.warning("%s: %d image files are not listed in its metadata.", repo.name, facts["unlisted"])
    if facts.get("empty"):
        logger.warning("%s: %d rows have no image.", repo.name, facts["empty"])


def _archive_folder(source: Source, *, cache: Path, token: str | None, retries: RetryPolicy) -> Path:
    if is_url(source):
        folder = _downloaded_archive(source, cache=cache, token=token, retries=retries)
    else:
        path = local_archive(source)
        try:
            with path.open("rb") as file:
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
        return {"archive": path.name, "entries": count}

    folder = cache / "datasets" / digest[:32]
    facts = build_folder(folder, fill)
    logger.info("%s: %d files in %s", path.name, facts["entries"], folder)
    return folder


def known_download(source: Source, cache: Path) -> Path | None:
    """The folder of a remote archive that an earlier run has downloaded and unpacked."""
    known = read_json(_download_place(source, cache) / "known.json") or {}
    folder = cache / "datasets" / str(known.get("digest"))[:32]
    return folder if completed(folder) is not None else None


def _download_place(source: Source, cache: Path) -> Path:
    return cache / "downloads" / hashlib.sha256(source.location.encode()).hexdigest()[:16]


def _downloaded_archive(source: Source, *, cache: Path, token: str | None, retries: RetryPolicy) -> Path:
    """The folder of a remote archive, downloaded unless the server says that it has not changed."""
    import httpx

    url, name = source.location, PurePosixPath(urlsplit(source.location).path).name or "archive"
    place = _download_place(source, cache)
    with locked(place / "lock"), httpx.Client() as client:
        folder = known_download(source, cache)
        version = (read_json(place / "known.json") or {}).get("version")
        try:
            policy = replace(retries, budget=min(SHORT_BUDGET_S, retries.budget)) if folder else retries
            remote = remote_archive(client, source, token=token, retries=policy)
        except UnreachableError as problem:
            if folder is None:
                raise
            logger.warning("%s Using what was downloaded before.", problem)
            return folder
        if folder is not None and remote.version is not None and remote.version == version:
            return folder
        part = place / f"{hashlib.sha256((remote.version or '').encode()).hexdigest()[:16]}.part"
        for other in place.glob("*.part"):
            if other != part or remote.version is None:  # it belongs to another version
                other.unlink()
        job = http.Download(url, place / name, part, public(url), remote.headers, remote.size, most=archive.USUAL.total)
        digest = http.download(client, job, retries=retries, refuse=partial(_refuse_address, source))
        folder = _unpacked(job.path, digest, cache)
        job.path.unlink()
        write_text(place / "known.json", json.dumps({"version": remote.version, "digest": digest}))
    return folder


@dataclass(frozen=True)
class RemoteArchive:
    """What a server says about a file. `version` (ETag or date) changes with its content; None: the server gives
    none.
    """

    size: int | None  # bytes
    version: str | None
    headers: dict[str, str] = field(repr=False)  # of the request; may hold a token


def remote_archive(client: httpx.Client, source: Source, *, token: str | None, retries: RetryPolicy) -> RemoteArchive:
    """Ask for the first byte of a remote archive, because signed addresses refuse HEAD requests.

    Raises SettingsError (refused, missing), UnreachableError.
    """
    import httpx
    from huggingface_hub import constants

    url = source.location
    to_hub = token is not None and url.startswith(f"{constants.ENDPOINT}/")  # no other server may see the token
    headers = {"Authorization": f"Bearer {token}"} if to_hub else {}

    def ask() -> RemoteArchive:
        first = {**headers, "Range": "bytes=0-0", "Accept-Encoding": "identity"}
        try:
            with client.stream("GET", url, headers=first, timeout=retries.timeout, follow_redirects=True) as response:
                http.check_status(response, "the server")
                if response.status_code not in (200, 206):
                    _refuse_address(source, response)
                length = response.headers.get(
                    *("content-length", "") if response.status_code == 200 else ("content-range", "")
                )
                size = length.rpartition("/")[2]
                version = response.headers.get("etag") or response.headers.get("last-modified")
        except httpx.RequestError as problem:
            raise http.TransientError(f"{type(problem).__name__} ({problem})") from problem
        return RemoteArchive(int(size) if size.isdecimal() else None, version, headers)

    return http.persist(ask, what=public(url), retries=retries)


def _refuse_address(source: Source, response: httpx.Response) -> None:
    status = response.status_code
    why = {401: "needs a login", 403: "forbids it (has a signed address expired?)", 404: "has no such file"}
    raise SettingsError(f"{named(source)}: the server {why.get(status, 'refuses it')} ({status}). Check the address.")
