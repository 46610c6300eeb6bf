"""A model whose weights are all local files: no token, no gated repository and, with its tokenizers here, no network.

Single files have weights only. The configs that go with them are written down in the family
(`trainer.spec.family`); the vocabularies of the tokenizers come from open repositories, once. Both become a folder
in diffusers' layout without weights, which `single_file` completes. Whoever has a network fetches the vocabularies
that are missing: for a job `entrypoint.fetch.local_weights`, for `python -m trainer.sample` `hub_files`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.base_model import model_folder
from trainer.spec.errors import SettingsError
from trainer.spec.family import Published, Tokenizer, base_models, facts_of
from trainer.spec.plan import ModelPlan
from trainer.storage import digests, json_files
from trainer.storage.folders import build_folder, naming

logger = logging.getLogger(__name__)

IN_IMAGE = Path("/opt/kiln-models/tokenizers")  # where `entrypoint.bake` puts them
CLIP_FILES = ("vocab.json", "merges.txt")
NO_LIMIT = 10**6  # tokens
ALL_IN_ONE = "tokenizer.json"  # a fast tokenizer's file, which replaces those with the vocabulary
FOLDER_VARIABLE = "MODEL_CONFIG_PATH="  # how a folder of tokenizers is named, in messages


def published(model: ModelPlan) -> Published | None:
    """What `model` is put together from, if every part of it is a local file; None: it needs a folder or repository."""
    base = base_models().get(model.base)
    if base is None or base[1].published is None or model.path or model.revision:
        return None
    if set(model.parts) != set(facts_of(model.family, model.base).parts):
        return None
    if model.source != base[1].source and not is_without_model(model.source):
        return None
    return base[1].published


def is_without_model(folder: str) -> bool:
    """Whether `folder` exists and holds tokenizers at most, not a whole model."""
    return Path(folder).is_dir() and not (Path(folder) / "model_index.json").exists()


def missing_parts(model: ModelPlan, names: Mapping[str, str], *, separator: str = "=") -> list[str]:
    """What would make every part of `model` a local file, as far as it is not set.

    `names`: part → the variable or option that names its file; `separator`: what stands before its value.
    """
    base = base_models().get(model.base)
    if base is None or base[1].published is None:
        return []
    missing_names = []
    facts = facts_of(model.family, model.base)
    for part in facts.parts:
        if part in model.parts:
            continue
        name = names[part]
        missing_names.append(f"{name} (or {name}{separator}none)" if model_folder.is_optional(part, facts) else name)
    return missing_names


# ---- tokenizers


@dataclass(frozen=True)
class Vocabulary:
    """A repository whose files are not on this machine."""

    tokenizer: Tokenizer
    folders: tuple[str, ...]  # of the model, which need it


def needed(model: ModelPlan, facts: Published) -> dict[str, Tokenizer]:
    """`Published.tokenizers` without those of text encoders that are left out."""
    encoders = facts_of(model.family, model.base).parts
    left_out = {encoders[part].replace("text_encoder", "tokenizer") for part, path in model.parts.items() if not path}
    return {folder: tokenizer for folder, tokenizer in facts.tokenizers.items() if folder not in left_out}


def find(model: ModelPlan, folder: str, tokenizer: Tokenizer, *, hub_cache: Path | None) -> list[Path] | None:
    """The files of a tokenizer on this machine; None if they are not here. `hub_cache`: None means that of HF_HOME."""
    places = [Path(model.source) / folder] if is_without_model(model.source) else []
    places.append(IN_IMAGE / tokenizer.repository.replace("/", "--"))
    for name, inside in ((tokenizer.repository, "."), (base_models()[model.base][1].source, folder)):
        snapshot = _cached_snapshot(name, hub_cache)
        if snapshot is not None:
            places.append(snapshot / inside)
    for place in places:
        for names in (tokenizer.files, (ALL_IN_ONE,)):
            files = [place / name for name in names]
            if all(file.is_file() for file in files):
                return files
    return None


def tokenizer_of(model: ModelPlan, folder: str, *, hub_cache: Path | None) -> tuple[list[Path], int] | None:
    """The files of the tokenizer in `folder` of the model, and the most tokens that it allows; None if not here."""
    base = base_models().get(model.base)
    facts = base[1].published if base is not None else None
    if facts is not None and folder in facts.tokenizers:
        tokenizer = facts.tokenizers[folder]
        files = find(model, folder, tokenizer, hub_cache=hub_cache)
        if files is not None:
            return files, int(tokenizer.config["model_max_length"])
    place = Path(model.path or model.source) / folder
    for names in ((ALL_IN_ONE,), CLIP_FILES):
        files = [place / name for name in names]
        if all(file.is_file() for file in files):
            config = json_files.read_object(place / "tokenizer_config.json") or {}
            longest = config.get("model_max_length")
            return files, longest if isinstance(longest, int) else NO_LIMIT
    return None


def _cached_snapshot(repository: str, hub_cache: Path | None) -> Path | None:
    """The folder of a repository at its last download, in huggingface_hub's cache."""
    folder = _hub_cache(hub_cache) / f"models--{repository.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return folder / "snapshots" / commit


def _hub_cache(hub_cache: Path | None) -> Path:
    from huggingface_hub import constants

    return hub_cache or Path(constants.HF_HUB_CACHE)


def missing(
    model: ModelPlan, facts: Published, *, hub_cache: Path | None, option: str = FOLDER_VARIABLE
) -> list[Vocabulary]:
    """What is still to be fetched, each repository once. `option`: how a folder of tokenizers is named."""
    by_repository: dict[str, Vocabulary] = {}
    for folder, tokenizer in needed(model, facts).items():
        files = find(model, folder, tokenizer, hub_cache=hub_cache)
        if is_without_model(model.source) and (files is None or files[0].parent != Path(model.source) / folder):
            names = ", ".join(tokenizer.files)
            logger.warning("%s%s has no %s/ with %s.", option, model.source, folder, names)
        if files is None:
            known = by_repository.get(tokenizer.repository)
            folders = known.folders if known else ()
            by_repository[tokenizer.repository] = Vocabulary(tokenizer, (*folders, folder))
    return list(by_repository.values())


def what_is_missing(vocabularies: Sequence[Vocabulary]) -> str:
    names = " and ".join(vocabulary.tokenizer.name for vocabulary in vocabularies)
    return f"Not on this machine: the tokenizer of {names}."


def way_out(vocabularies: Sequence[Vocabulary], *, option: str = FOLDER_VARIABLE) -> str:
    """How to bring the vocabularies by hand."""
    from huggingface_hub import constants

    steps = []
    for vocabulary in vocabularies:
        tokenizer = vocabulary.tokenizer
        addresses = [f"{constants.ENDPOINT}/{tokenizer.repository}/resolve/main/{name}" for name in tokenizer.files]
        places = " and ".join(f"FOLDER/{folder}" for folder in vocabulary.folders)
        steps.append(f"{' and '.join(addresses)} to {places}")
    verb = "set" if option.endswith("=") else "add"
    return f"Or download {'; '.join(steps)} (no token is needed), and {verb} {option}FOLDER."


# ---- the folder


def assemble(model: ModelPlan, facts: Published, *, hub_cache: Path | None) -> Path:
    """The folder of the model without weights, in HF_HOME. Raises SettingsError if a tokenizer is not here after all,
    StorageError.
    """
    files_by_folder = {}
    for folder, tokenizer in needed(model, facts).items():
        files = find(model, folder, tokenizer, hub_cache=hub_cache)
        if files is None:
            raise SettingsError(f"The tokenizer of {tokenizer.name} has vanished from HF_HOME. Start again.")
        files_by_folder[folder] = files
    with naming("HF_HOME"):
        return _write(_hub_cache(hub_cache).parent / "kiln", facts, files_by_folder)


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
