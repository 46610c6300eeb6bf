"""Which files of a downloaded dataset belong to the configuration and the split that a user asked for.

The rules are those of the Hub's viewer, and `datasets` applies them: the `configs` of README.md with their globs, or
folders and files named after a split, else everything is `train`. Its choice of a reader does not count here: it takes
that of the most frequent suffix, so a folder of images with captions beside them would be a dataset of texts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.spec.errors import DataError, SettingsError
from trainer.spec.values import printable, show, some
from trainer.storage.safe_names import is_safe

MOST_NAMES = 40  # of subsets in one message
DEFAULT = "default"  # the name of a configuration that has none


@dataclass(frozen=True)
class Layout:
    """The files of one split, relative to the dataset's folder, in the order in which the Hub shows them."""

    configuration: str
    split: str
    files: tuple[str, ...]
    others: dict[str, tuple[str, ...]]  # the files of the other splits


def resolve(snapshot: Path, *, variable: str, configuration: str | None, split: str) -> Layout:
    """The files to read. Raises SettingsError (no such configuration or split), DataError (files outside)."""
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
    from datasets.exceptions import DataFilesNotFoundError

    known = _configurations(snapshot, variable)
    name = _chosen(variable, known, configuration)
    parameters = known[name]
    base = str((snapshot / _inside(variable, parameters.get("data_dir") or ".")).resolve())
    asked = parameters.get("data_files")
    try:
        patterns = sanitize_patterns(asked) if asked is not None else get_data_patterns(base)
        for pattern in _texts(patterns):
            _inside(variable, pattern)
        found = DataFilesDict.from_patterns(patterns, base_path=base)
    except (FileNotFoundError, DataFilesNotFoundError) as problem:
        raise DataError(f"{variable}: the files that its README.md names for {name!r} are missing.") from problem
    except (ValueError, TypeError, AttributeError, OSError, re.error) as problem:
        raise DataError(
            f"{variable}: its README.md names files in a way that cannot be read ({show(asked)})."
        ) from problem
    splits = {str(key): _relative(variable, list(files), snapshot) for key, files in found.items()}
    if split not in splits:
        of = f" (subset {name})" if name != DEFAULT else ""
        raise SettingsError(
            f"DATASET_SPLIT={split}: {variable}{of} has no such split, only {', '.join(splits)}. Set DATASET_SPLIT, or "
            "split in dataset.json."
        )
    others = {key: files for key, files in splits.items() if key != split}
    return Layout(name, split, splits[split], others)


def _configurations(snapshot: Path, variable: str) -> dict[str, Any]:
    """The configurations of README.md by name, each with its data_files and data_dir."""
    import yaml
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, DatasetCardData

    data: dict[str, Any] = {}
    try:
        if (snapshot / "README.md").is_file():
            data = DatasetCard.load(snapshot / "README.md", ignore_metadata_errors=True).data.to_dict()
        if (snapshot / ".huggingface.yaml").is_file():
            data |= yaml.safe_load((snapshot / ".huggingface.yaml").read_text(encoding="utf-8")) or {}
        configurations = MetadataConfigs.from_dataset_card_data(DatasetCardData(**data))
        default = configurations.get_default_config_name()
    except (ValueError, TypeError, yaml.YAMLError) as problem:
        raise DataError(f"{variable}: the head of its README.md cannot be read: {problem}") from problem
    if not configurations:
        return {DEFAULT: {}}
    if not all(isinstance(name, str) for name in configurations):
        raise DataError(f"{variable}: the head of its README.md has a configuration whose config_name is no text.")
    ordered = dict(configurations)
    if default is not None:  # first
        ordered = {default: {**ordered.pop(default), "default": True}, **ordered}
    return ordered


def _chosen(variable: str, known: dict[str, Any], asked: str | None) -> str:
    names = list(known)
    listed = some(names, most=MOST_NAMES)
    if asked is not None:
        if asked in known:
            return asked
        if names == [DEFAULT]:
            raise SettingsError(f"DATASET_SUBSET={asked}: {variable} has no subsets. Leave it empty.")
        raise SettingsError(f"DATASET_SUBSET={asked}: {variable} has no such subset, only {listed}.")
    if len(names) == 1 or known[names[0]].get("default"):
        return names[0]
    raise SettingsError(
        f"{variable} has several subsets and no default one: {listed}. Choose one with DATASET_SUBSET, or with "
        "subset in dataset.json."
    )


def _texts(patterns: Mapping[str, Any]) -> Iterator[str]:
    """The patterns of all splits."""
    for several in patterns.values():
        for pattern in several if isinstance(several, list) else [several]:
            yield str(pattern)


def _inside(variable: str, place: object) -> str:
    """A folder or pattern of README.md, before anything is looked for there.

    `datasets` follows a pattern to wherever it leads: to all of this machine's files, and to addresses.
    """
    text = str(place)
    if "://" in text or "::" in text or (text != "." and not is_safe(text)):
        raise DataError(f"{variable} names a file outside of itself, {printable(text)!r}, and is refused.")
    return text


def _relative(variable: str, files: list[str], snapshot: Path) -> tuple[str, ...]:
    """Files relative to the dataset's folder. Its README.md may name files anywhere: those are refused."""
    inside = str(snapshot.resolve()) + os.sep
    relative = []
    for file in files:
        place = os.path.normpath(file)
        if not place.startswith(inside):
            raise DataError(f"{variable} names a file outside of itself, {file!r}, and is refused.")
        relative.append(Path(place).relative_to(inside).as_posix())
    return tuple(dict.fromkeys(relative))  # two globs may match one file
