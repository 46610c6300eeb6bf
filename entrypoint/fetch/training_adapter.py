"""The LoRA of PARAMS_TRAINING_ADAPTER: which file it is, where it is, and that it is one of the base model's family."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from entrypoint.fetch import hub
from entrypoint.fetch.http import RetryPolicy
from trainer.lora_files import inspect
from trainer.spec.errors import SettingsError
from trainer.spec.plan import ModelPlan
from trainer.spec.values import show, some
from trainer.storage import safetensors_header

VARIABLE = "PARAMS_TRAINING_ADAPTER"
ON_THE_HUB = re.compile(r"(\w[\w.-]{0,95}/\w[\w.-]{0,95})/((?:\w[\w.-]*/)*\w[\w.-]*\.safetensors)", re.ASCII)
ALLOWED = "Allowed: a .safetensors file, or one of the Hub, owner/name/file.safetensors."


def repository(name: str, *, token: str | None, hub_cache: Path | None, retries: RetryPolicy) -> tuple[hub.Repo, str]:
    """The repository that `name` is in, and the file's name there."""
    match = ON_THE_HUB.fullmatch(name)
    assert match is not None, "the plan has checked it"
    repo = hub.Repo("model", match[1], f"{VARIABLE}={name}", token=token, cache=hub_cache, retries=retries)
    return repo, match[2]


def describe(repo: hub.Repo, file: str) -> tuple[hub.Listing, hub.RemoteFile]:
    """The file in the repository. Raises SettingsError if it is not there, GatedError, UnreachableError."""
    listing = hub.describe(repo)
    for remote in listing.files:
        if remote.name == file:
            return listing, remote
    others = [remote.name for remote in listing.files if remote.name.endswith(".safetensors")]
    held = f"It has {some(others)}." if others else "It has no .safetensors file."
    raise SettingsError(f"{repo.variable}: {repo.page} has no {file}. {held}")


def cached(repo: hub.Repo, file: str) -> Path | None:
    """The file in the cache, where an earlier job has put it."""

    def choose(names: Collection[str]) -> set[str]:
        return {file} & set(names)

    snapshot = hub.cached_snapshot(repo, choose)
    if snapshot is None or not snapshot.is_verified or not (snapshot.folder / file).is_file():
        return None
    return snapshot.folder / file


def fetch_training_adapter(
    model: ModelPlan, *, token: str | None, hub_cache: Path | None, retries: RetryPolicy
) -> ModelPlan:
    """`model` with the local path of its training adapter, if it has one: from the cache, or else from the Hub.

    A run that resumes so has the file that it began with, whatever has become of the repository. Raises SettingsError
    for a file that is no LoRA of this family, and what `hub` raises.
    """
    name = model.training_adapter
    if name is None:
        return model
    path = Path(name)
    if not path.is_absolute():
        repo, file = repository(name, token=token, hub_cache=hub_cache, retries=retries)
        found = cached(repo, file)
        if found is None:
            listing, remote = describe(repo, file)
            found = hub.bring(repo, listing, [remote]) / file
        path = found
    if problem := problem_of(path, model.family):
        raise SettingsError(f"{VARIABLE}={name} {problem}")
    return replace(model, training_adapter_path=str(path))


def problem_of(path: Path, family: str) -> str | None:
    """Why this file cannot be a training adapter of the family, as far as its header shows."""
    try:
        lora = inspect.summarize(safetensors_header.read_header(path), family)
    except ValueError as problem:
        return f"cannot be read: {problem}."
    if lora.dora:
        return "is a DoRA, whose layers cannot be left out again for samples. Fix: name a LoRA."
    return None


def named(text: str) -> str | None:
    """Why `text`, which is no file, is no name of a file on the Hub either."""
    if ON_THE_HUB.fullmatch(text):
        return None
    return f"{VARIABLE}={show(text)} is not there. {ALLOWED}"
