"""Repositories of the Hugging Face Hub: what they hold, who may read them, and their files in the Hub's local cache.

The cache has huggingface_hub's own layout (blobs by hash, snapshots of links, refs), so other tools share it. We
download ourselves for two reasons: after a kill, the client starts a file again from its first byte; and it does not
compare a file with the hash that the Hub announces. The questions are ours too: the client reads an answer of any size
whole, and passes on what is in it. Here every name, hash and number is checked before it is used (`_listing`).
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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from entrypoint.fetch import http
from entrypoint.fetch.http import RetryPolicy
from trainer.network import addresses
from trainer.spec.errors import DataError, GatedError, KilnError, SettingsError, StorageError, UnreachableError
from trainer.spec.values import printable
from trainer.storage.folders import locked, read_json, storage_error, write_text
from trainer.storage.safe_names import Names, is_safe

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

PARALLEL_FILES = 8
COMMIT = re.compile(r"[0-9a-f]{40}")
ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
REPOSITORY = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
LICENCE = re.compile(r"[\w.-]{2,60}", re.ASCII)
MOST_FILES = 200_000  # of a repository, as of an archive
LARGEST_FILE = 2**50  # bytes
TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads its variables


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
    revision_named: str = ""  # what named the revision, for messages; "": MODEL_REVISION or DATASET_REVISION

    @property
    def folder(self) -> Path:
        """Its folder in the cache."""
        from huggingface_hub import constants

        return (self.cache or Path(constants.HF_HUB_CACHE)) / f"{self.kind}s--{self.name.replace('/', '--')}"

    @property
    def page(self) -> str:
        """The address of its page. Raises SettingsError where HF_ENDPOINT is none."""
        return f"{addresses.hub_endpoint(os.environ)}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def headers(self) -> dict[str, str]:
        """Of requests: the token, if there is one. None comes from the environment or the home folder."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    @property
    def revision_variable(self) -> str:
        return self.revision_named or f"{self.kind.upper()}_REVISION"


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
    licence: str = ""  # as its page names it; "": it names none


@dataclass(frozen=True)
class Cached:
    """A snapshot in the cache."""

    commit: str
    folder: Path
    is_verified: bool  # by us; what another tool put there may be damaged or incomplete


def describe(repo: Repo) -> Listing:
    """Ask the Hub which commit `repo` is at and which files it has.

    Raises GatedError, SettingsError (no such repository or revision, an impossible answer), UnreachableError.
    """
    if problem := _names_problem(repo):
        raise SettingsError(problem)
    url = f"{addresses.hub_endpoint(os.environ)}/api/{repo.kind}s/{repo.name}"
    if repo.revision is not None:
        url += f"/revision/{quote(repo.revision, safe='')}"
    answer = _ask(repo, "GET", f"{url}?blobs=true")
    return _listing(repo, answer)


def _names_problem(repo: Repo) -> str | None:
    """Why the name or the revision, which become parts of paths and addresses, cannot be one; None if they can."""
    is_name = REPOSITORY.fullmatch(repo.name) is not None
    if not is_name or "--" in repo.name or ".." in repo.name or repo.name.endswith(".git"):
        return f"{repo.variable} is neither a folder nor the name of a Hub repository (org/name)."
    if repo.revision is not None and not is_safe(repo.revision):
        return (
            f"{repo.revision_variable}={printable(repo.revision)}: this is no name of a branch, tag or commit. "
            f"Choose one of {repo.page}/commits/main, or leave {repo.revision_variable} empty."
        )
    return None


def _listing(repo: Repo, answer: Any) -> Listing:
    """The commit and the files that the Hub announces, once each name, hash and size is one."""
    commit, siblings = (answer.get("sha"), answer.get("siblings")) if isinstance(answer, dict) else (None, None)
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit) or not isinstance(siblings, list):
        raise _impossible(repo, f"a commit {printable(str(commit)[:100])!r}")
    if repo.revision is not None and COMMIT.fullmatch(repo.revision) and commit != repo.revision:
        raise _impossible(repo, f"commit {commit} in the place of {repo.revision}")
    if len(siblings) > MOST_FILES:
        raise _impossible(repo, f"{len(siblings):,} files; at most {MOST_FILES:,} are accepted")
    names = Names(ignores_case=False)
    files = []
    for sibling in siblings:
        file = _remote_file(sibling)
        try:
            if file is None:
                raise DataError("no name, hash or size")
            names.add(file.name, folder=False)
        except DataError as problem:
            raise _impossible(repo, f"an impossible file ({printable(str(problem))})") from problem
        files.append(file)
    return Listing(commit, tuple(files), _licence(answer))


def _licence(answer: dict[str, Any]) -> str:
    """The licence that a repository's card names: a short word such as apache-2.0; "" where it is none."""
    card = answer.get("cardData")
    named = card.get("license_name") or card.get("license") if isinstance(card, dict) else None
    return named if isinstance(named, str) and LICENCE.fullmatch(named) else ""


def _remote_file(sibling: Any) -> RemoteFile | None:
    """A file of the Hub's list; None if that entry is none."""
    if not isinstance(sibling, dict):
        return None
    large = sibling.get("lfs")
    name, size, etag = sibling.get("rfilename"), sibling.get("size"), sibling.get("blobId")
    if isinstance(large, dict):
        size, etag = large.get("size"), large.get("sha256")
    size = 0 if size is None else size
    if not isinstance(name, str) or not isinstance(etag, str) or not ETAG.fullmatch(etag):
        return None
    if not isinstance(size, int) or not 0 <= size <= LARGEST_FILE:
        return None
    return RemoteFile(name, size, etag)


def _impossible(repo: Repo, what: str) -> SettingsError:
    return SettingsError(
        f"{repo.variable}: {repo.page} announces {what}, and is refused. Nothing was downloaded. Check the name, and "
        "HF_ENDPOINT if that is set."
    )


def check_access(repo: Repo, listing: Listing, name: str) -> None:
    """Ask whether the token may read the file `name`. Listing is no proof: gated repositories let anyone list their
    files.

    Raises GatedError, SettingsError, UnreachableError.
    """
    _ask(repo, "HEAD", _address(repo, listing, name))


def _address(repo: Repo, listing: Listing, name: str) -> str:
    return f"{repo.page}/resolve/{listing.commit}/{quote(name)}"


def cached_commit(repo: Repo) -> str | None:
    """The commit of `repo` at its last download, read from the cache."""
    if _names_problem(repo):
        return None
    revision = repo.revision or "main"
    if COMMIT.fullmatch(revision):
        return revision
    try:
        commit = (repo.folder / "refs" / revision).read_text(encoding="utf-8")[:100].strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def cached_snapshot(repo: Repo, choose: Callable[[Collection[str]], set[str]]) -> Cached | None:
    """The snapshot of `repo` in the cache; None if it lacks any file that `choose` picks."""
    commit = cached_commit(repo)
    folder = repo.folder / "snapshots" / (commit or "-")
    if commit is None or not folder.is_dir():
        return None
    listed = _listed(repo, commit)
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
    from trainer.network.client import open_client

    blobs = repo.folder / "blobs"
    once = {f.etag: f for f in files}  # the same content under two names is one blob
    missing = [f for f in once.values() if _size(blobs / f.etag) != f.size]
    if missing:
        total = sum(f.size for f in missing)
        logger.info("%s: downloading %d files, %.1f MiB", repo.name, len(missing), total / 2**20)
    progress = http.Progress(repo.name, sum(f.size for f in missing))
    cancelled = repo.retries.cancelled or threading.Event()

    def one(client: httpx.Client, file: RemoteFile) -> None:
        blob = blobs / file.etag
        if _stamp(blob) == verified.get(file.etag) and _size(blob) == file.size:
            return
        if not _is_sound(blob, file, cancelled):
            blob.unlink(missing_ok=True)
            _download(client, repo, listing, file, progress=progress, cancelled=cancelled)
        if stamp := _stamp(blob):
            verified[file.etag] = stamp

    with open_client(timeout=repo.retries.timeout) as client:
        jobs = [functools.partial(one, client, file) for file in once.values()]
        http.in_parallel(jobs, workers=PARALLEL_FILES, cancelled=cancelled)


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
    client: httpx.Client,
    repo: Repo,
    listing: Listing,
    file: RemoteFile,
    *,
    progress: http.Progress,
    cancelled: threading.Event,
) -> None:
    job = http.Download(
        url=_address(repo, listing, file.name),
        path=repo.folder / "blobs" / file.etag,
        part=_own_folder(repo) / f"{file.etag}.part",
        what=f"{repo.name}/{file.name}",
        headers=repo.headers,
        size=file.size,
        digest=file.etag,
        new_hash=file.new_hash,
    )

    def refuse(response: httpx.Response) -> None:
        raise refusal(repo, response.status_code, response.headers)

    _check_online(repo)
    http.download(client, job, retries=repo.retries, refuse=refuse, progress=progress, cancelled=cancelled)


def _check_online(repo: Repo) -> None:
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    if said.upper() in TRUE:
        raise UnreachableError(f"{repo.variable}: {repo.page} is needed, but HF_HUB_OFFLINE is set: unset it.")


def _ask(repo: Repo, method: str, url: str) -> Any:
    """The JSON that the Hub answers to a question, with retries; None for HEAD.

    Raises GatedError, SettingsError, UnreachableError.
    """
    from trainer.network.client import open_client

    _check_online(repo)
    # A file's own answer may be a redirect to another host, which has not been asked whether it may be read.
    follow = method == "GET"

    def call() -> Any:
        answer = client.request(method, url, headers=repo.headers, follow_redirects=follow)
        if (
            not follow
            and answer.has_redirect_location
            and answer.url.join(answer.headers["location"]).host == (answer.url.host)
        ):
            answer = client.request(method, url, headers=repo.headers)  # the repository has another name by now
        http.check_status(answer, "the Hub")
        if answer.status_code >= 400:
            raise refusal(repo, answer.status_code, answer.headers)
        return http.parse_json(answer, "the Hub") if method == "GET" else None

    with open_client(timeout=repo.retries.timeout) as client:
        return http.persist(call, what=f"{repo.variable}: {repo.page}", retries=repo.retries)


def refusal(repo: Repo, status: int, headers: Mapping[str, str]) -> KilnError:
    """The error for a refusal of the Hub: what it means, and what to do."""
    asked = f"{repo.variable}: the Hub"
    have = "HF_TOKEN is set" if repo.token else "HF_TOKEN is not set"
    code = headers.get("X-Error-Code", "")
    if "Invalid credentials" in headers.get("X-Error-Message", ""):
        return GatedError(
            f"{asked} does not accept HF_TOKEN ({status}): it is misspelt, expired or revoked. Make a new token in the "
            f"settings of your account, or unset HF_TOKEN for public repositories."
        )
    if code == "GatedRepo":
        have += ", but its account has not been granted access" if repo.token else ""
        return GatedError(
            f"{asked} guards {repo.name} by a licence ({status}); {have}. Open {repo.page}, accept the conditions, and "
            "set HF_TOKEN to a token of the same account that may read gated repositories."
        )
    if code == "RevisionNotFound":
        return SettingsError(
            f"{repo.revision_variable}={repo.revision}: {repo.page} has no such branch, tag or commit ({status}). "
            f"Choose one of {repo.page}/commits/main, or leave {repo.revision_variable} empty."
        )
    if code == "RepoNotFound" or status in (401, 404):
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


def _listed(repo: Repo, commit: str) -> dict[str, tuple[int, str]] | None:
    """The files of a snapshot with size and hash, as `bring` noted them; None where the note is missing or damaged."""
    listed = {}
    for name, entry in (read_json(_listing_file(repo, commit)) or {}).items():
        match entry:
            case [int(size), str(etag)] if is_safe(name) and ETAG.fullmatch(etag):
                listed[name] = size, etag
            case _:
                return None
    return listed or None


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
