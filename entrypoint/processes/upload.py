"""PUSH_TO_HUB: a process uploads the LoRA files, the samples and a model card to a repository of the Hub.

Only that process has the token, which it gets through a pipe. During training it uploads each save; a failure there is
only logged. At the end it uploads the final files in one commit, and upload.json in the run's folder records which file
the repository has. If that fails, starting the job again uploads them without training.

Only files of the job's own run are uploaded. Which run that is, the trainer knows once it has read the images, and
writes it into status.json.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from entrypoint.fetch import http, public_addresses
from entrypoint.system.environment import child_environment
from trainer.spec.errors import GatedError, KilnError, SettingsError, UnreachableError
from trainer.spec.family import base_models
from trainer.spec.log_lines import log_to
from trainer.spec.plan import Plan
from trainer.storage import run_records
from trainer.storage.folders import read_json, write_text
from trainer.storage.safetensors_header import read_header

log = logging.getLogger("entrypoint.processes.upload")
MARKER = "upload.json"
POLL_S = 2.0  # between two looks for a new save
STALL_TIMEOUT_S = 60.0  # a connection that transfers nothing for this long is closed
AT_START, AT_END = http.USUAL, http.RetryPolicy(budget=1800.0, first_wait=2.0, longest_wait=60.0)


@dataclass(frozen=True)
class Job:
    """What to upload, and where to: the process reads it from its standard input."""

    repo: str
    token: str = field(repr=False)
    out: str  # folder
    name: str  # of the LoRA file, without .safetensors, as far as it is known when the job starts
    base: str  # Hub repository of the base model; "" if it is none
    folder: str = ""  # of the run, below `out`; as far as it is known, too
    started: float = 0.0  # Unix seconds; an older status.json is another job's
    creates: bool = True  # a private repository, if it does not exist
    at_start: http.RetryPolicy = AT_START
    at_end: http.RetryPolicy = AT_END


def is_done(job: Job, final: Path) -> bool:
    """Whether the repository has this very file."""
    marker = read_json(Path(job.out) / job.folder / MARKER) or {}
    return marker.get("repo") == job.repo and marker.get("file") == _identity(final)


def current_run(job: Job) -> tuple[str, Path] | None:
    """The name and the folder of the run that the job trains; None until the trainer knows it."""
    out = Path(job.out)
    status = read_json(out / "status.json") or {}
    began = status.get("started")
    name, folder = status.get("run"), status.get("run_folder")
    if isinstance(began, (int, float)) and began >= job.started and isinstance(name, str) and isinstance(folder, str):
        return name, out / folder
    return None


def _identity(path: Path) -> list[int | str]:
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns]


def job(repo: str | None, token: str | None, plan: Plan, *, creates: bool = True) -> Job | None:
    """The job of the uploading process; None if nothing is to be uploaded. Raises SettingsError."""
    if repo is None:
        return None
    if not token:
        raise SettingsError("PUSH_TO_HUB needs a token that may write: set HF_WRITE_TOKEN, or HF_TOKEN.")
    known = base_models()[plan.model.base][1].source
    base = "" if Path(known).is_absolute() else known
    output = plan.output
    return Job(repo, token, output.path, output.name, base, folder=output.folder, started=time.time(), creates=creates)


# ---- in the entrypoint


@contextmanager
def beside(job: Job | None, environment: Mapping[str, str]) -> Iterator[Callable[[], int]]:
    """Inside the context, saves are uploaded. Yields a function that uploads the final files: 0, or 75 if it failed.

    Raises GatedError or SettingsError at once if the token may not write to the repository. Training starts even if the
    Hub does not answer.
    """
    if job is None:
        yield lambda: 0
        return
    hidden = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    own = {k: v for k, v in child_environment(environment, network=True).items() if k not in hidden}
    process = subprocess.Popen(
        [sys.executable, "-m", "entrypoint.processes.upload"],
        env={**own, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    try:
        _say(process, json.dumps(asdict(job)))
        answer = process.stdout.readline()
        if answer != "ready\n":
            kind, _, message = answer.strip().partition(": ")
            raise {"GatedError": GatedError, "SettingsError": SettingsError}.get(kind, KilnError)(
                message or "No answer."
            )

        def finish() -> int:
            _say(process, "final")
            if process.wait() == 0:
                return 0
            log.error("The LoRA is in %s, but not in %s. Start the same job again to upload it.", job.out, job.repo)
            return UnreachableError.exit_code

        yield finish
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin
    try:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    except BrokenPipeError:  # it has ended; its exit code says why
        log.warning("The uploading process has ended.")


# ---- in the uploading process


class Uploader:
    """Commits to the repository of a job."""

    def __init__(self, job: Job) -> None:
        from huggingface_hub import HfApi

        self.job, self.out = job, Path(job.out)
        self.api = HfApi(token=job.token)
        self.ended = threading.Event()  # training is over: uploads of saves give up
        self._seen: set[tuple[int | str, ...]] = set()

    def check(self) -> None:
        """Check that the token may write to the repository; create it if it does not exist.

        Raises GatedError, SettingsError, UnreachableError.
        """
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

        self._insist(call, self.job.at_start)

    def saves(self) -> None:
        """Upload the files of the newest save, unless they were tried already."""
        run = current_run(self.job)
        if run is None:
            return  # the newest saves may be those of another run
        name, home = run
        save = re.compile(rf"{re.escape(name)}-step\d{{8}}(-[a-z]+)?\.safetensors")
        found = sorted(path for path in self.out.glob("*.safetensors") if save.fullmatch(path.name))
        main = next((p for p in reversed(found) if p.stem.rpartition("-step")[2].isdecimal()), None)
        if main is None or self.ended.is_set():
            return
        try:
            identity = tuple(_identity(main))
            if identity in self._seen:
                return
            self._seen.add(identity)  # once: if it fails, the next save or the end uploads
            self._commit(main.stem, [p for p in found if p.stem.startswith(main.stem)], home, retries=self.job.at_start)
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
        identity = _identity(main)
        commit = self._commit(main.stem, [*others, main], home, retries=self.job.at_end)
        marker = {"repo": self.job.repo, "commit": commit, "file": identity}
        write_text(home / MARKER, json.dumps(marker))
        log.info("Uploaded to %s/%s at commit %s.", self.api.endpoint, self.job.repo, commit)

    def _commit(self, title: str, paths: list[Path], home: Path, *, retries: http.RetryPolicy) -> str:
        """Commit `paths`, the samples in `home` and the card; returns the commit's hash. The client skips files that
        are there.
        """
        from huggingface_hub import CommitOperationAdd

        samples = sorted(p for p in (home / "sample").glob("*.png") if not p.name.startswith("."))
        folder = (home / "sample").relative_to(self.out).as_posix()  # of a further run: runs/<name>/sample
        text = card(paths[-1], base=self.job.base, samples=folder if samples else None)
        files = {**{p.name: p for p in paths}, **{f"{folder}/{p.name}": p for p in samples}}

        def call() -> str:
            operations = [CommitOperationAdd(name, path) for name, path in files.items()]
            card_file = CommitOperationAdd("README.md", text.encode())
            done = self.api.create_commit(self.job.repo, [*operations, card_file], commit_message=f"Kiln: {title}")
            return str(done.oid)

        return self._insist(call, retries)

    def _insist(self, call: Callable[[], Any], retries: http.RetryPolicy) -> Any:
        return http.persist(
            lambda: self._translated(call), what=f"PUSH_TO_HUB={self.job.repo}", retries=retries, cancelled=self.ended
        )

    def _translated(self, call: Callable[[], Any]) -> Any:
        """`call`, with the client's errors turned into ours, without their texts: they may hold signed addresses."""
        import httpx
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return call()
        except (HfHubHTTPError, httpx.RequestError, RuntimeError, json.JSONDecodeError) as problem:
            cause = (
                problem.__cause__ if isinstance(problem.__cause__, (HfHubHTTPError, httpx.RequestError)) else problem
            )
            if isinstance(cause, HfHubHTTPError):
                http.check_status(cause.response, "the Hub")
                raise _refusal(self.job.repo, cause.response.status_code) from None
            if isinstance(cause, RuntimeError):
                raise http.TransientError(f"the client failed ({type(cause).__name__})") from None
            raise http.TransientError(f"no answer of the Hub ({type(cause).__name__})") from None


def _refusal(repo: str, status: int) -> KilnError:
    if status == 401:
        return GatedError(
            f"PUSH_TO_HUB={repo}: the Hub does not accept the token (401). Make a new one for HF_WRITE_TOKEN."
        )
    if status in (403, 404):
        return GatedError(
            f"PUSH_TO_HUB={repo}: the token may not write there ({status}). Set HF_WRITE_TOKEN to one of the role "
            "write, or a fine-grained one that may write to this repository or create it."
        )
    return SettingsError(f"PUSH_TO_HUB={repo}: the Hub refuses it ({status}). Check the name.")


def card(path: Path, *, base: str, samples: str | None) -> str:
    """README.md of the repository, from the header of the LoRA file alone. `base`: see `Job`. `samples`: their folder
    there.
    """
    from huggingface_hub import ModelCardData  # late: a job without PUSH_TO_HUB never imports it

    header = read_header(path).metadata
    title = header.get("ss_output_name", path.stem)
    trigger = header.get("modelspec.trigger_phrase", "")
    data = ModelCardData(
        base_model=base or None,
        base_model_relation="adapter" if base else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lora", "text-to-image"],
        instance_prompt=trigger or None,
    )
    rank, steps, images = (header.get(key, "?") for key in ("ss_network_dim", "ss_steps", "ss_num_train_images"))
    model = f"[{base}](https://huggingface.co/{base})" if base else header.get("ss_sd_model_name", "a local model")
    lines = ["---", data.to_yaml(), "---", "", f"# {title}", ""]
    lines.append(f"A LoRA of rank {rank} for {model}: {steps} steps on {images} images, repeats included.")
    if base:
        lines.append("The base model's licence applies.")
    if trigger:
        lines += ["", f"Trigger: `{trigger.replace('`', '')}`"]
    if samples:
        lines += ["", f"![samples by prompt and step]({samples}/contact-sheet.png)"]
    lines += ["", f"`{path.name}` has kohya's key names, which ComfyUI, Forge and sd-scripts read. In diffusers:", ""]
    lines += [f"    pipe.load_lora_weights(REPOSITORY, weight_name={json.dumps(path.name)})", ""]
    return "\n".join(lines)


def main() -> int:
    """Read a job and then commands, one a line; end of input ends the process. Returns 0, or the error's exit code."""
    log_to(logging.StreamHandler(), "%(asctime)s %(levelname)s %(message)s")
    sys.excepthook = _bare
    public_addresses.guard(os.environ)
    for number in (signal.SIGINT, signal.SIGHUP):  # from a terminal: the entrypoint decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    job |= {k: http.RetryPolicy(**job[k]) for k in ("at_start", "at_end")}
    uploader, final = Uploader(Job(**job)), threading.Event()
    _set_timeout()

    def listen() -> None:
        if sys.stdin.readline() == "final\n":
            uploader.ended.set()
            final.set()
            sys.stdin.readline()
        os._exit(143)  # the entrypoint has ended

    try:
        uploader.check()
    except UnreachableError as problem:
        log.warning("%s Training continues without uploads.", problem)
    except KilnError as problem:
        print(f"{type(problem).__name__}: {problem}", flush=True)  # noqa: T201
        return problem.exit_code
    threading.Thread(target=listen, daemon=True).start()
    print("ready", flush=True)  # noqa: T201
    while not final.wait(POLL_S):
        uploader.saves()
    try:
        uploader.final()
    except KilnError as problem:
        log.error("%s", problem)
        return problem.exit_code
    return 0


def _set_timeout() -> None:
    """Give the Hub's client a timeout: it has none."""
    import httpx
    from huggingface_hub import set_client_factory

    set_client_factory(lambda: httpx.Client(follow_redirects=True, timeout=STALL_TIMEOUT_S))
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
