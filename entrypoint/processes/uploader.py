"""The uploading process: `python -m entrypoint.processes.uploader` reads a job and then commands, one a line.

Everything that the Hub's client may raise is translated here: into what passes (tried again), what only the user can
help, and what only another start can. Its native part (Xet) is tried once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from entrypoint.fetch import http
from entrypoint.processes.store import Store
from entrypoint.processes.upload import POLL_S, STALL_TIMEOUT_S, Job, current_run, identity_of
from entrypoint.report.card import card
from entrypoint.report.gather import gather_run
from entrypoint.system import public_addresses, secrets
from trainer.network import addresses
from trainer.network.errors import HopelessError, TransientError
from trainer.spec.errors import GatedError, KilnError, SettingsError, StorageError, UnreachableError
from trainer.spec.log_lines import log_to
from trainer.storage import own_files, run_records
from trainer.storage.atomic import VOLUME_ERRORS
from trainer.storage.folders import write_text
from trainer.storage.safe_names import is_safe
from trainer.storage.safetensors_header import read_header

if TYPE_CHECKING:
    import httpx

log = logging.getLogger("entrypoint.processes.upload")
COMMIT_CONFLICTS = (409, 412)  # somebody else commits at this moment
# Of all kinds: the client raises what an odd answer makes of its code, and its native part errors of its own, which are
# FileNotFoundError and PermissionError. What else there may be ends the process, and the entrypoint starts another.
CLIENT_ERRORS = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(NameError, ImportError, EOFError, BufferError),
)


class Target(Protocol):
    """A place that takes files: a repository of the Hub, or a bucket."""

    def check(self) -> None:
        """Whether files may be written there. Raises TransientError, and KilnErrors for what no other try mends."""

    def send(self, title: str, files: Mapping[str, Path], texts: Mapping[str, str], *, run: str, final: bool) -> str:
        """Write files and texts of a run by their names; returns what tells this state of the place from others."""


class Uploader:
    """Uploads the saves and the final files of a job."""

    def __init__(self, job: Job, ended: threading.Event) -> None:
        self.job, self.out = job, Path(job.out)
        self.ended = ended  # training is over: uploads of saves give up
        self._seen: set[tuple[int | str, ...]] = set()
        self.target = _target_of(job)
        self._is_checked = False

    def check(self, retries: http.RetryPolicy | None = None) -> None:
        """Check that the place may be written to. Raises GatedError, SettingsError, UnreachableError."""

        def call() -> str:
            self._check_target()
            return ""

        self._persist(call, retries or self.job.at_start)

    def _check_target(self) -> None:
        self.target.check()
        self._is_checked = True

    def saves(self) -> None:
        """Upload the files of the newest save, unless they were tried already."""
        run = current_run(self.job)
        if run is None:
            return  # the newest saves may be those of another run
        name, _ = run
        suffixes = "|".join(run_records.SUFFIXES)
        save = re.compile(rf"{re.escape(name)}-step\d{{8}}({suffixes})\.safetensors")
        found = sorted(path for path in self.out.glob("*.safetensors") if save.fullmatch(path.name) and _is_own(path))
        main = next((p for p in reversed(found) if p.stem.rpartition("-step")[2].isdecimal()), None)
        if main is None or self.ended.is_set():
            return
        try:
            identity = tuple(identity_of(main))
            if identity in self._seen:
                return
            self._seen.add(identity)  # once: if it fails, the next save or the end uploads
            paths = [path for path in found if path.stem.startswith(main.stem)]
            self._commit(main.stem, paths, run, retries=self.job.at_start)
        except KilnError as problem:
            if not self.ended.is_set():
                log.warning("%s is not uploaded: %s", main.name, problem)
        except FileNotFoundError:
            log.info("%s was removed before it was uploaded.", main.name)

    def final(self) -> None:
        """Upload the final files, and record that in upload.json. Raises KilnError."""
        self.ended.clear()
        # Without a run in status.json nothing was trained: the final files of a run that is done are uploaded.
        name, home = current_run(self.job) or (self.job.name, self.out / self.job.folder)
        main = self.out / f"{name}.safetensors"
        others = [self.out / f"{name}{suffix}.safetensors" for suffix in run_records.SUFFIXES if suffix]
        others = [path for path in others if path.is_file()]
        try:
            identity = identity_of(main)
            self.check(self.job.at_end)  # the repository may be gone by now, and the token revoked
            commit = self._commit(main.stem, [*others, main], (name, home), retries=self.job.at_end, final=True)
        except OSError as problem:
            why = f"{problem.filename} cannot be read: {problem.strerror}"
            raise UnreachableError(f"{self.job.label}: {why}.") from problem
        name_of_marker = self.job.marker
        marker = {"repo": self.job.where, "commit": commit, "file": identity}
        try:
            write_text(home / name_of_marker, json.dumps(marker))
        except StorageError as problem:
            text = "Uploaded, but %s cannot be written: the next start uploads again. %s"
            log.warning(text, name_of_marker, problem)
        if self.job.variable == "UPLOAD_TO":
            log.info("Uploaded to %s; the SHA-256 of the LoRA is %s.", self.job.where, commit)
        else:
            log.info("Uploaded to %s/%s at commit %s.", addresses.hub_endpoint(os.environ), self.job.repo, commit)

    def _commit(
        self, title: str, paths: list[Path], run: tuple[str, Path], *, retries: http.RetryPolicy, final: bool = False
    ) -> str:
        """Send `paths`, the samples and the card of a run, which has a name and a folder; returns what `send` returns.

        Files that are there are skipped.
        """
        name, home = run
        # Not what a user has put there.
        samples = sorted(p for p in (home / "sample").glob("*.png") if own_files.is_in_samples(p.name) and _is_own(p))
        folder = (home / "sample").relative_to(self.out).as_posix()  # of a further run: runs/<name>/sample
        about = replace(gather_run(self.out, home, name), header=dict(read_header(paths[-1]).metadata))
        text = card(about, samples=folder if samples else None, base=self.job.base, place=self.job.where)
        files = {**{f"{folder}/{p.name}": p for p in samples}, **{p.name: p for p in paths}}

        def attempt() -> str:
            for path in files.values():
                path.stat()  # raises OSError: an older save may have been removed
            if not self._is_checked:  # nobody answered when the job began
                self._check_target()
            return self.target.send(title, files, {"README.md": text}, run=name, final=final)

        return self._persist(attempt, retries)

    def _persist(self, attempt: Callable[[], str], retries: http.RetryPolicy) -> str:
        return http.persist(attempt, what=self.job.label, retries=retries, cancelled=self.ended)


def _target_of(job: Job) -> Target:
    from trainer.network.client import open_client

    if job.variable == "UPLOAD_TO":
        return Store(job, open_client(timeout=STALL_TIMEOUT_S))
    return _Repository(job)


class _Repository:
    """A repository of the Hub, through its client."""

    def __init__(self, job: Job) -> None:
        from huggingface_hub import HfApi

        _use_our_client()
        self.job = job
        self.api = HfApi(token=job.token)

    def check(self) -> None:
        """Check that the token may write to the repository; create it if it does not exist."""
        from huggingface_hub.errors import RepositoryNotFoundError

        repo = self.job.repo

        def call() -> None:
            try:
                self.api.auth_check(repo, write=True)
            except RepositoryNotFoundError as problem:
                if problem.response.status_code != 404:  # 401: no access, or an unknown token
                    raise
                if self.job.creates:
                    self.api.create_repo(repo, private=True, exist_ok=True)
                    log.info("Created the private repository %s.", repo)

        self._translated(call)

    def send(
        self,
        title: str,
        files: Mapping[str, Path],
        texts: Mapping[str, str],
        *,
        run: str,  # noqa: ARG002
        final: bool,  # noqa: ARG002
    ) -> str:
        """One commit; returns its hash."""
        from huggingface_hub import CommitOperationAdd

        def call() -> str:
            operations = [CommitOperationAdd(name, path) for name, path in files.items()]
            operations += [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
            done = self.api.create_commit(self.job.repo, operations, commit_message=f"Kiln: {title}")
            return str(done.oid)

        return str(self._translated(call))

    def _translated(self, call: Callable[[], Any]) -> Any:
        """`call`, with the client's errors turned into ours, without their texts: they may hold signed addresses."""
        import httpx
        from huggingface_hub.errors import HfHubHTTPError

        known = (HfHubHTTPError, TransientError, HopelessError, KilnError)
        try:
            return call()
        except (TransientError, HopelessError, KilnError):
            raise
        except (*CLIENT_ERRORS, httpx.HTTPError, httpx.InvalidURL, HfHubHTTPError) as problem:
            cause: BaseException = problem
            while cause.__cause__ is not None and not isinstance(cause, known):
                cause = cause.__cause__
            if isinstance(cause, (TransientError, HopelessError, KilnError)):
                raise cause from None
            if isinstance(cause, HfHubHTTPError):
                raise self._of_status(cause.response) from None
            raise self._of_client(cause) from None

    def _of_status(self, response: httpx.Response) -> Exception:
        status = response.status_code
        place = addresses.hub_endpoint(os.environ)
        if not str(response.url).startswith(f"{place}/"):  # a signed address that has expired: the Hub gives another
            return TransientError(f"the Hub's storage answers {status}")
        return _refusal(self.job.repo, status)

    def _of_client(self, cause: BaseException) -> Exception:
        """The error for what is none of the Hub's answers."""
        from huggingface_hub import constants

        name = type(cause).__name__
        if isinstance(cause, OSError) and (cause.errno in VOLUME_ERRORS or cause.filename is not None):
            reason = os.strerror(cause.errno or errno.EIO)
            return UnreachableError(f"PUSH_TO_HUB={self.job.repo}: this machine cannot upload now: {reason} ({name}).")
        if not constants.HF_HUB_DISABLE_XET:
            constants.HF_HUB_DISABLE_XET = True
            return TransientError(f"the client failed ({name}); the next try does without its Xet protocol")
        return TransientError(f"the client failed, or the answer is not one of the Hub ({name})")


def _is_own(path: Path) -> bool:
    """Whether a file can be one of the job's: no link, which may lead anywhere, and no name that the Hub refuses."""
    return not path.name.startswith(".") and is_safe(path.name) and not path.is_symlink() and path.is_file()


def _refusal(repo: str, status: int) -> KilnError:
    if status == 401:
        return GatedError(
            f"PUSH_TO_HUB={repo}: the Hub does not accept the token (401). Make a new one for HF_WRITE_TOKEN."
        )
    if status in (402, 413, 507):
        return GatedError(
            f"PUSH_TO_HUB={repo}: the Hub takes no more ({status}): the storage of the account is full, or the files "
            "are too large for it. Free storage at the Hub, or name another repository."
        )
    if status in (403, 404):
        return GatedError(
            f"PUSH_TO_HUB={repo}: the token may not write there ({status}). Set HF_WRITE_TOKEN to one of the role "
            "write, or a fine-grained one that may write to this repository or create it. (The Hub says the same where "
            "the storage of the account is full.)"
        )
    return SettingsError(f"PUSH_TO_HUB={repo}: the Hub refuses it ({status}). Check the name.")


def main() -> int:
    """Read a job and then commands, one a line; end of input ends the process. Returns 0, or the error's exit code."""
    sys.excepthook = _bare
    public_addresses.guard(os.environ)
    for number in (signal.SIGINT, signal.SIGHUP):  # from a terminal: the entrypoint decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    known = secrets.known({"HF_WRITE_TOKEN": job["token"], "UPLOAD_TO": job["repo"], **job["clouds"]})
    log_to(logging.StreamHandler(), "%(asctime)s %(levelname)s %(message)s", known=known)
    job |= {k: http.RetryPolicy(**job[k]) for k in ("at_start", "at_end")}
    ended, final = threading.Event(), threading.Event()

    def listen() -> None:
        if sys.stdin.readline() == "final\n":
            ended.set()
            final.set()
            sys.stdin.readline()
        os._exit(143)  # the entrypoint has ended

    threading.Thread(target=listen, daemon=True).start()
    try:
        addresses.hub_endpoint(os.environ)  # before the client is imported, which fails without a name
        uploader = Uploader(Job(**job), ended)
        uploader.check()
    except UnreachableError as problem:
        log.warning("%s Training continues; each save tries to upload again.", problem)
    except KilnError as problem:
        _answer(answers, known.hide(f"{type(problem).__name__}: {' '.join(str(problem).split())}"))
        return problem.exit_code
    _answer(answers, "ready")
    while not final.wait(POLL_S):
        uploader.saves()
    try:
        uploader.final()
    except KilnError as problem:
        log.error("%s", problem)
        return problem.exit_code
    return 0


def _answer(answers: TextIO, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the entrypoint has ended
        print(line, file=answers, flush=True)


def _use_our_client() -> None:
    """Let the Hub's client speak through ours, which has bounds, and leave all retries to `http.persist`."""
    from huggingface_hub import set_client_factory

    from trainer.network.client import open_client

    def check(answer: httpx.Response) -> None:
        http.check_status(answer, "the Hub")
        if answer.status_code in COMMIT_CONFLICTS and "/commit/" in answer.url.path:
            raise TransientError(f"somebody else writes there ({answer.status_code})")

    set_client_factory(lambda: open_client(timeout=STALL_TIMEOUT_S, on_answer=check))
    for chatty in ("httpx", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def _bare(kind: type[BaseException], _value: BaseException, trace: TracebackType | None) -> None:
    """Log an unexpected error without its text, which may hold signed addresses."""
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(trace)]
    log.error("Unexpected error while uploading: %s at %s", kind.__name__, " > ".join(places))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the thread that reads commands blocks
