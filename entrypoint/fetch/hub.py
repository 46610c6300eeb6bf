"""Repositories of the Hugging Face Hub: what they hold, who may read them, and their files in the Hub's local cache.

The cache has huggingface_hub's own layout (blobs by hash, snapshots of links, refs), so other tools share it. We
download ourselves for two reasons: after a kill, the client starts a file again from its first byte; and it does not
compare a file with the hash that the Hub announces.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from entrypoint.fetch import http
from entrypoint.fetch.http import RetryPolicy
from trainer.spec.errors import GatedError, KilnError, SettingsError, StorageError, UnreachableError
from trainer.storage.folders import locked, read_json, storage_error, write_text

if TYPE_CHECKING:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

logger = logging.getLogger(__name__)
T = TypeVar("T")

PARALLEL_FILES = 8
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repo:
    """A repository at a revision, as a user asked for it."""

    kind: str  # model | dataset
    name: str
    variable: str  # the variable that named it, for messages: "MODEL_PATH=org/name"
    revision: str | None = None  # branch, tag or commit; None: main
    token: str | None = field(default=None, repr=False)
    cache: Path | None = None  # None: the one that HF_HOME and HF_HUB_CACHE point to
    retries: RetryPolicy = http.USUAL

    @property
    def folder(self) -> Path:
        """Its folder in the cache."""
        from huggingface_hub import constants

        return (self.cache or Path(constants.HF_HUB_CACHE)) / f"{self.kind}s--{self.name.replace('/', '--')}"

    @property
    def page(self) -> str:
        """The address of its page."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def revision_variable(self) -> str:
        return f"{self.kind.upper()}_REVISION"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `etag`: its SHA-256 if it is in large file storage, else its git hash."""

    name: str
    size: int  # bytes
    etag: str

    def new_hash(self) -> http.Hash:
        if len(self.etag) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True)
class Listing:
    """All files of a repository at a commit."""

    commit: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class Cached:
    """A snapshot in the cache."""

    commit: str
    folder: Path
    is_verified: bool  # by us; what another tool put there may be damaged or incomplete


def describe(repo: Repo) -> Listing:
    """Ask the Hub which commit `repo` is at and which files it has.

    Raises GatedError, SettingsError (no such repository or revision), UnreachableError.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=repo.token or False)  # False: no token from the environment or the home folder

    def call() -> Listing:
        ask = api.model_info if repo.kind == "model" else api.dataset_info
        info = ask(repo.name, revision=repo.revision, files_metadata=True, timeout=repo.retries.timeout)
        files = tuple(
            RemoteFile(s.rfilename, s.lfs.size if s.lfs else s.size or 0, s.lfs.sha256 if s.lfs else s.blob_id or "")
            for s in info.siblings or ()
        )
        return Listing(info.sha or "", files)

    listing = _insist(repo, call)
    for file in listing.files:
        parts = PurePosixPath(file.name).parts
        if ".." in parts or file.name.startswith("/") or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", file.etag):
            raise SettingsError(f"{repo.variable}: {repo.page} lists an impossible file, {file.name!r}.")
    return listing


def check_access(repo: Repo, listing: Listing, name: str) -> None:
    """Ask whether the token may read the file `name`. Listing is no proof: gated repositories let anyone list their
    files.

    Raises GatedError, SettingsError, UnreachableError.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo.name, name, repo_type=repo.kind, revision=listing.commit)
    _insist(repo, lambda: get_hf_file_metadata(url, token=repo.token or False, timeout=repo.retries.timeout))


def cached_commit(repo: Repo) -> str | None:
    """The commit of `repo` at its last download, read from the cache."""
    revision = repo.revision or "main"
    if COMMIT.fullmatch(revision):
        return revision
    try:
        return (repo.folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def cached_snapshot(repo: Repo, choose: Callable[[Collection[str]], set[str]]) -> Cached | None:
    """The snapshot of `repo` in the cache; None if it lacks any file that `choose` picks."""
    commit = cached_commit(repo)
    folder = repo.folder / "snapshots" / (commit or "-")
    if commit is None or not folder.is_dir():
        return None
    listed = read_json(_listing_file(repo, commit))
    if listed is None:
        return Cached(commit, folder, is_verified=False)
    wanted = {name: listed[name] for name in choose(listed)}
    if any(_size(folder / name) != size for name, (size, _) in wanted.items()):
        return None
    verified = read_json(_own_folder(repo) / "verified.json") or {}
    known = all(_stamp(folder / name) == verified.get(etag, "") for name, (_, etag) in wanted.items())
    return Cached(commit, folder, is_verified=known)


def missing_bytes(repo: Repo, files: Sequence[RemoteFile]) -> int:
    """How many bytes of `files` are still to be downloaded."""
    blobs = repo.folder / "blobs"
    parts = _own_folder(repo)
    return sum(f.size - max(0, _size(parts / f"{f.etag}.part")) for f in files if _size(blobs / f.etag) != f.size)


def bring(repo: Repo, listing: Listing, files: Sequence[RemoteFile]) -> Path:
    """Download the missing `files` into the cache, compare each with its hash, and return the snapshot's folder.

    Resumes where an earlier process stopped. Each file is hashed once: verified.json remembers the result. Raises
    GatedError, SettingsError, UnreachableError, StorageError.
    """
    folder = repo.folder / "snapshots" / listing.commit
    try:
        with locked(_own_folder(repo) / "lock"):
            verified = read_json(_own_folder(repo) / "verified.json") or {}
            _bring_blobs(repo, listing, files, verified)
            write_text(_own_folder(repo) / "verified.json", json.dumps(verified))
            for file in files:
                _link(repo.folder / "blobs" / file.etag, folder / file.name)
            known = {f.name: (f.size, f.etag) for f in listing.files}
            write_text(_listing_file(repo, listing.commit), json.dumps(known))
            if repo.revision != listing.commit:
                write_text(repo.folder / "refs" / (repo.revision or "main"), listing.commit)
    except StorageError as problem:
        raise StorageError(f"HF_HOME: {problem}") from problem
    return folder


def _bring_blobs(repo: Repo, listing: Listing, files: Sequence[RemoteFile], verified: dict[str, list[int]]) -> None:
    """Make sure that the blob of each file exists and has the right content; adds to `verified`."""
    blobs = repo.folder / "blobs"
    once = {f.etag: f for f in files}  # the same content under two names is one blob
    missing = [f for f in once.values() if _size(blobs / f.etag) != f.size]
    if missing:
        total = sum(f.size for f in missing)
        logger.info("%s: downloading %d files, %.1f MiB", repo.name, len(missing), total / 2**20)
    progress = http.Progress(repo.name, sum(f.size for f in missing))
    cancelled = repo.retries.cancelled or threading.Event()

    def one(file: RemoteFile) -> None:
        blob = blobs / file.etag
        if _stamp(blob) == verified.get(file.etag) and _size(blob) == file.size:
            return
        if not _is_sound(blob, file, cancelled):
            blob.unlink(missing_ok=True)
            _download(repo, listing, file, progress=progress, cancelled=cancelled)
        if stamp := _stamp(blob):
            verified[file.etag] = stamp

    http.in_parallel([functools.partial(one, f) for f in once.values()], workers=PARALLEL_FILES, cancelled=cancelled)


def _is_sound(blob: Path, file: RemoteFile, cancelled: threading.Event) -> bool:
    """Whether an existing blob, whichever tool wrote it, has the right content."""
    if _size(blob) != file.size:
        return False
    digest = file.new_hash()
    try:
        with blob.open("rb") as stream:
            http.feed(stream, digest, cancelled=cancelled)
    except OSError as problem:
        raise storage_error(problem, blob) from problem
    if digest.hexdigest() == file.etag:
        return True
    logger.warning("%s in the cache is damaged (its hash is not %s). Downloading it again.", file.name, file.etag)
    return False


def _download(
    repo: Repo, listing: Listing, file: RemoteFile, *, progress: http.Progress, cancelled: threading.Event
) -> None:
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    job = http.Download(
        url=hf_hub_url(repo.name, file.name, repo_type=repo.kind, revision=listing.commit),
        path=repo.folder / "blobs" / file.etag,
        part=_own_folder(repo) / f"{file.etag}.part",
        what=f"{repo.name}/{file.name}",
        headers=build_hf_headers(token=repo.token or False),
        size=file.size,
        digest=file.etag,
        new_hash=file.new_hash,
    )

    def refuse(response: httpx.Response) -> None:
        from huggingface_hub.utils import hf_raise_for_status

        response.read()
        _translated(repo, lambda: hf_raise_for_status(response))

    _translated(
        repo,
        lambda: http.download(
            get_session(), job, retries=repo.retries, refuse=refuse, progress=progress, cancelled=cancelled
        ),
    )


def _insist(repo: Repo, call: Callable[[], T]) -> T:
    """`call` the Hub, with retries."""
    return http.persist(lambda: _translated(repo, call), what=f"{repo.variable}: {repo.page}", retries=repo.retries)


def _translated(repo: Repo, call: Callable[[], T]) -> T:
    """`call`, with the client's errors turned into ours. Their texts are dropped: they may hold signed addresses."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        return call()
    except OfflineModeIsEnabled as problem:
        raise UnreachableError(
            f"{repo.variable}: {repo.page} is needed, but HF_HUB_OFFLINE is set: unset it."
        ) from problem
    except HfHubHTTPError as problem:
        http.check_status(problem.response, "the Hub")
        raise refusal(repo, problem) from problem
    except HFValidationError as problem:
        raise SettingsError(
            f"{repo.variable} is neither a folder nor the name of a Hub repository (org/name)."
        ) from problem
    except httpx.RequestError as problem:
        unreached = isinstance(problem, (httpx.ConnectError, httpx.ConnectTimeout))
        raise http.TransientError(f"{type(problem).__name__} ({problem})", unreached=unreached) from problem
    except json.JSONDecodeError as problem:
        raise http.TransientError("the answer is not one of the Hub (a captive portal or proxy?)") from problem


def refusal(repo: Repo, problem: HfHubHTTPError) -> KilnError:
    """The error for a refusal of the Hub: what it means, and what to do."""
    from huggingface_hub import errors

    status = problem.response.status_code
    asked = f"{repo.variable}: the Hub"
    have = "HF_TOKEN is set" if repo.token else "HF_TOKEN is not set"
    if "Invalid credentials" in problem.response.headers.get("X-Error-Message", ""):
        return GatedError(
            f"{asked} does not accept HF_TOKEN ({status}): it is misspelt, expired or revoked. Make a new token in the "
            f"settings of your account, or unset HF_TOKEN for public repositories."
        )
    if isinstance(problem, errors.GatedRepoError):
        have += ", but its account has not been granted access" if repo.token else ""
        return GatedError(
            f"{asked} guards {repo.name} by a licence ({status}); {have}. Open {repo.page}, accept the conditions, and "
            "set HF_TOKEN to a token of the same account that may read gated repositories."
        )
    if isinstance(problem, errors.RevisionNotFoundError):
        return SettingsError(
            f"{repo.revision_variable}={repo.revision}: {repo.page} has no such branch, tag or commit ({status}). "
            f"Choose one of {repo.page}/commits/main, or leave {repo.revision_variable} empty."
        )
    if isinstance(problem, errors.RepositoryNotFoundError) or status in (401, 404):
        return SettingsError(
            f"{asked} knows no {repo.kind} {repo.name}, or does not show it ({status}); {have}. Check the spelling at "
            f"{repo.page}. If it is private or gated, set HF_TOKEN to a token that may read it: without one the Hub "
            "answers as if it did not exist."
        )
    if status == 403:
        return GatedError(f"{asked} forbids reading {repo.page} (403); {have}: give the token the right to read it.")
    return SettingsError(f"{asked} refuses {repo.page} with status {status}. Check the name and the revision.")


def _link(blob: Path, pointer: Path) -> None:
    """Make `pointer` a relative link to `blob`, or a copy if the volume does not support links."""
    if _size(pointer) == _size(blob) and pointer.resolve() == blob.resolve():
        return
    try:
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:
            shutil.copyfile(blob, pointer)
    except OSError as problem:
        raise storage_error(problem, pointer) from problem


def _own_folder(repo: Repo) -> Path:
    return repo.folder / "kiln"


def _listing_file(repo: Repo, commit: str) -> Path:
    return _own_folder(repo) / f"{commit}.json"


def _size(path: Path) -> int:
    """Bytes of a file; -1 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _stamp(path: Path) -> list[int] | None:
    """Size and modification time: a verified file with the same ones need not be hashed again."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
