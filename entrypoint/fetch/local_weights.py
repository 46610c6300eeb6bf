"""A model whose weights are all local files: no token, no gated repository and, with its tokenizers here, no network.

Single files have weights only. The configs that go with them are written down in the family
(`trainer.spec.family`); the vocabularies of the tokenizers come from open repositories, once. Both become a folder
in diffusers' layout without weights, which `trainer.base_model.single_file` completes.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from entrypoint.fetch import hub
from entrypoint.fetch.http import RetryPolicy
from entrypoint.system.folders import build_folder, naming
from trainer.spec.errors import GatedError, SettingsError, UnreachableError
from trainer.spec.family import OPTIONAL, Published, Tokenizer, base_models, get_family
from trainer.spec.plan import ModelPlan
from trainer.storage import digests
from trainer.storage.atomic import human_size

logger = logging.getLogger(__name__)
T = TypeVar("T")

IN_IMAGE = Path("/opt/kiln-models/tokenizers")  # where `entrypoint.bake` puts them
PATIENCE_S = 10.0  # for a Hub that is silent: a few files are no reason to wait long
ALL_IN_ONE = "tokenizer.json"  # a fast tokenizer's file, which replaces those with the vocabulary


def published(model: ModelPlan) -> Published | None:
    """What `model` is put together from, if every part of it is a local file; None: it needs a folder or repository."""
    base = base_models().get(model.base)
    if base is None or base[1].published is None or model.path or model.revision:
        return None
    if set(model.parts) != set(get_family(model.family).FACTS.parts):
        return None
    if model.source != base[1].source and not is_without_model(model.source):
        return None
    return base[1].published


def is_without_model(folder: str) -> bool:
    """Whether `folder` exists and holds tokenizers at most, not a whole model."""
    return Path(folder).is_dir() and not (Path(folder) / "model_index.json").exists()


def missing_parts(model: ModelPlan) -> list[str]:
    """The variables that would make every part of `model` a local file, as far as they are not set."""
    base = base_models().get(model.base)
    if base is None or base[1].published is None:
        return []
    variables = {"denoiser": "MODEL_PATH"}
    parts = get_family(model.family).FACTS.parts
    missing_variables = [variables.get(part, f"{part.upper()}_PATH") for part in parts if part not in model.parts]
    return [f"{name} (or {name}=none)" if _is_optional(model, name) else name for name in missing_variables]


def _is_optional(model: ModelPlan, variable: str) -> bool:
    """Whether the model does without the part that `variable` names."""
    facts = get_family(model.family).FACTS
    folder = facts.parts.get(variable.removesuffix("_PATH").lower())
    return any(pattern.startswith(f"{OPTIONAL}{folder}/") for pattern in facts.files)


# ---- tokenizers


@dataclass(frozen=True)
class Vocabulary:
    """A repository whose files are not on this machine."""

    tokenizer: Tokenizer
    folders: tuple[str, ...]  # of the model, which need it


def needed(model: ModelPlan, facts: Published) -> dict[str, Tokenizer]:
    """`Published.tokenizers` without those of text encoders that are left out."""
    encoders = get_family(model.family).FACTS.parts
    left_out = {encoders[part].replace("text_encoder", "tokenizer") for part, path in model.parts.items() if not path}
    return {folder: tokenizer for folder, tokenizer in facts.tokenizers.items() if folder not in left_out}


def find(model: ModelPlan, folder: str, tokenizer: Tokenizer, *, hub_cache: Path | None) -> list[Path] | None:
    """The files of a tokenizer on this machine; None if they are not here."""
    places = [Path(model.source) / folder] if is_without_model(model.source) else []
    places.append(IN_IMAGE / tokenizer.repository.replace("/", "--"))
    for name, inside in ((tokenizer.repository, "."), (base_models()[model.base][1].source, folder)):
        repo = hub.Repo("model", name, name, cache=hub_cache)
        commit = hub.cached_commit(repo)
        if commit is not None:
            places.append(repo.folder / "snapshots" / commit / inside)
    for place in places:
        for names in (tokenizer.files, (ALL_IN_ONE,)):
            files = [place / name for name in names]
            if all(file.is_file() for file in files):
                return files
    return None


def missing(model: ModelPlan, facts: Published, *, hub_cache: Path | None) -> list[Vocabulary]:
    """What is still to be fetched, each repository once."""
    by_repository: dict[str, Vocabulary] = {}
    for folder, tokenizer in needed(model, facts).items():
        files = find(model, folder, tokenizer, hub_cache=hub_cache)
        if is_without_model(model.source) and (files is None or files[0].parent != Path(model.source) / folder):
            names = ", ".join(tokenizer.files)
            logger.warning("MODEL_CONFIG_PATH=%s has no %s/ with %s.", model.source, folder, names)
        if files is None:
            known = by_repository.get(tokenizer.repository)
            folders = known.folders if known else ()
            by_repository[tokenizer.repository] = Vocabulary(tokenizer, (*folders, folder))
    return list(by_repository.values())


def describe(
    vocabularies: list[Vocabulary], *, hub_cache: Path | None, retries: RetryPolicy
) -> list[tuple[hub.Repo, hub.Listing, list[hub.RemoteFile]]]:
    """The files to fetch, with their sizes. Raises UnreachableError and others with what else would help."""
    found = []
    for vocabulary in vocabularies:
        tokenizer = vocabulary.tokenizer
        # Without a token: the repositories are open, and the Hub would refuse a token that has expired.
        repo = hub.Repo(
            *("model", tokenizer.repository, f"{tokenizer.name}'s tokenizer"),
            cache=hub_cache,
            retries=replace(retries, budget=min(PATIENCE_S, retries.budget)),
        )
        listing = _advised(vocabularies, partial(hub.describe, repo))
        files = [file for file in listing.files if file.name in tokenizer.files]
        if len(files) < len(tokenizer.files):
            raise SettingsError(f"{repo.page} lacks one of {', '.join(tokenizer.files)}. {_way_out(vocabularies)}")
        found.append((repo, listing, files))
    return found


def _advised(vocabularies: list[Vocabulary], ask: Callable[[], T]) -> T:
    """`ask`; its error says which tokenizers are missing, and how to bring them by hand."""
    try:
        return ask()
    except (UnreachableError, GatedError, SettingsError) as problem:
        names = " and ".join(vocabulary.tokenizer.name for vocabulary in vocabularies)
        raise type(problem)(f"Not on this machine: the tokenizer of {names}. {problem} {_way_out(vocabularies)}") from (
            problem
        )


def _way_out(vocabularies: list[Vocabulary]) -> str:
    """How to bring the vocabularies by hand."""
    from huggingface_hub import constants

    steps = []
    for vocabulary in vocabularies:
        tokenizer = vocabulary.tokenizer
        addresses = [f"{constants.ENDPOINT}/{tokenizer.repository}/resolve/main/{name}" for name in tokenizer.files]
        places = " and ".join(f"FOLDER/{folder}" for folder in vocabulary.folders)
        steps.append(f"{' and '.join(addresses)} to {places}")
    return f"Or download {'; '.join(steps)} (no token is needed), and set MODEL_CONFIG_PATH=FOLDER."


def bake(place: Path, *, hub_cache: Path, retries: RetryPolicy) -> None:
    """Put the vocabularies of all base models below `place`, where jobs in the image find them (`IN_IMAGE`)."""
    for _, model in base_models().values():
        for folder, tokenizer in model.published.tokenizers.items() if model.published else ():
            target = place / tokenizer.repository.replace("/", "--")
            if target.is_dir():
                continue
            found = describe([Vocabulary(tokenizer, (folder,))], hub_cache=hub_cache, retries=retries)
            for repo, listing, files in found:
                source = hub.bring(repo, listing, files)
                target.mkdir(parents=True)
                for file in files:
                    shutil.copyfile(source / file.name, target / file.name)


# ---- the folder


def log_downloads(downloads: list[tuple[hub.Repo, hub.Listing, list[hub.RemoteFile]]]) -> None:
    """Say what will be fetched, or that nothing will."""
    if not downloads:
        logger.info("To fetch for the model: nothing. Its weights are local files, and its tokenizers are here.")
    for repo, _, files in downloads:
        size = human_size(sum(file.size for file in files))
        logger.info("To fetch: %s from %s, %s. It needs no token.", repo.variable, repo.name, size)


def assemble(model: ModelPlan, facts: Published, *, hub_cache: Path | None, retries: RetryPolicy) -> Path:
    """The folder of the model without weights, in HF_HOME; fetches the tokenizers that are missing.

    Raises UnreachableError and others with what to do without a network, StorageError.
    """
    wanted = missing(model, facts, hub_cache=hub_cache)
    for repo, listing, remote in describe(wanted, hub_cache=hub_cache, retries=retries):
        _advised(wanted, partial(hub.bring, repo, listing, remote))
    files_by_folder = {}
    for folder, tokenizer in needed(model, facts).items():
        files = find(model, folder, tokenizer, hub_cache=hub_cache)
        if files is None:
            raise SettingsError(f"The tokenizer of {tokenizer.name} has vanished from HF_HOME. Start again.")
        files_by_folder[folder] = files
    home = hub.Repo("model", model.source, model.source, cache=hub_cache).folder.parents[1]
    with naming("HF_HOME"):
        return _write(home / "kiln", facts, files_by_folder)


def _write(place: Path, facts: Published, files_by_folder: Mapping[str, list[Path]]) -> Path:
    """The folder below `place` with the configs and the tokenizers, named by its content."""
    content: list[Any] = [facts.configs]
    for name, files in files_by_folder.items():
        content.append([name, facts.tokenizers[name].config, *(digests.sha256(file) for file in files)])
    folder = place / digests.digest(content)[:32]

    def fill(target: Path) -> dict[str, Any]:
        for name, config in facts.configs.items():
            _write_json(target / name, config)
        for name, files in files_by_folder.items():
            _write_json(target / name / "tokenizer_config.json", facts.tokenizers[name].config)
            for file in files:
                shutil.copyfile(file, target / name / file.name)
        return {}

    build_folder(folder, fill)
    return folder


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
