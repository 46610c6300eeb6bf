"""The configs of a model: read without trust, and checked by the rules of its family before anything is made of them.

Nothing here imports torch or the libraries that the configs are for. Every ValueError completes a sentence about the
file: "text_encoder/config.json says hidden_size=-3; allowed is a whole number, 1 to 65536".
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trainer.spec.errors import SettingsError
from trainer.spec.family import Facts
from trainer.spec.rules.config_rules import CODE_KEYS, COMMON, ConfigKind
from trainer.spec.values import printable, show, some
from trainer.storage.read import read_regular

LARGEST_CONFIG = 2**20  # bytes
INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
SCHEDULER_CONFIG = "scheduler_config.json"
NEVER_RUN = "it names code of its own, which Kiln never downloads or runs"


def read_object(path: Path, *, limit: int = LARGEST_CONFIG) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError for what is none, is damaged or is larger than `limit` bytes."""
    try:
        value = json.loads(read_regular(path, limit=limit).decode("utf-8"))
    except OSError as problem:
        raise ValueError(f"cannot be read: {problem.strerror or problem}") from problem
    except UnicodeDecodeError as problem:
        raise ValueError("is damaged: it is not text in UTF-8") from problem
    except (ValueError, RecursionError) as problem:
        raise ValueError("is damaged: it is not JSON, or nested too deeply") from problem
    if not isinstance(value, dict):
        raise ValueError("is damaged: it holds no JSON object")
    return value


def is_distilled(folder: Path) -> bool:
    """Whether the index of a model's folder says that it is distilled. Raises SettingsError where it cannot be read."""
    return _index(folder).get("is_distilled") is True


def pipeline_name(folder: Path) -> str | None:
    """The class that the index of a model's folder names. Raises SettingsError where it cannot be read."""
    return _index(folder).get("_class_name")


def _index(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / INDEX)
    except ValueError as problem:
        raise SettingsError(f"{folder / INDEX} {problem}. Fix: download the model's folder again.") from problem


def check_code(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a config that names code of its repository."""
    for key in CODE_KEYS:
        if config.get(key) not in (None, False, [], {}, ""):
            raise ValueError(f"says {key}={show(config[key])}: {NEVER_RUN}")


def check_values(config: Mapping[str, Any], kind: ConfigKind) -> dict[str, Any]:
    """The values of a config that have an effect. Raises ValueError for the first that the rules do not allow."""
    check_code(config)
    for key, rule in COMMON.items():
        if key in config and not rule.fits(config[key]):
            raise ValueError(f"says {key}={show(config[key])}; allowed is {rule.text}")
    config = _check_class(config, kind)
    chosen = {}
    for key, rule in kind.rules.items():
        if key not in config:
            continue
        if not rule.fits(config[key]):
            raise ValueError(f"says {key}={show(config[key])}; allowed is {rule.text}")
        chosen[key] = config[key]
    missing = [key for key in kind.required if key not in chosen]
    if missing:
        raise ValueError(f"does not say {', '.join(missing)}")
    if kind.library == "diffusers":
        for key in config.get("_use_default_values", ()):  # diffusers takes the defaults of its class for these
            chosen.pop(key, None)
    if problem := kind.differing(chosen):
        raise ValueError(f"contradicts itself: {problem}")
    return chosen


def _check_class(config: Mapping[str, Any], kind: ConfigKind) -> Mapping[str, Any]:
    """The part of the config that is about this class. Raises ValueError for a config of another one."""
    if kind.library == "diffusers":
        name = config.get("_class_name", kind.names[0])
        if name not in kind.names:
            raise ValueError(f"says _class_name={show(name)}; allowed is {some(kind.names)}")
        quantization = config.get("quantization_config")  # where it is one, `weight_kinds` says which
        named = isinstance(quantization, dict) and isinstance(quantization.get("quant_method"), str)
        if quantization is not None and not named:
            raise ValueError(f"says quantization_config={show(quantization)}; allowed is none")
        return config
    names = config.get("architectures") or kind.names[:1]
    known = (*kind.names, *kind.saved_as)
    if not isinstance(names, list | tuple) or any(name not in known for name in names):
        raise ValueError(f"says architectures={show(names)}; allowed is {some(known)}")
    found = config.get("model_type", kind.model_type)
    if found == kind.whole_type and found is not None:  # a model with an image encoder besides
        if isinstance(config.get("text_config"), dict):
            return dict(config["text_config"])
        if config.keys() >= set(kind.required):  # older versions had all keys on one level
            return config
    if found != kind.model_type:
        raise ValueError(f"says model_type={show(found)}; allowed is {kind.model_type}")
    return config


def read_values(path: Path, kind: ConfigKind) -> dict[str, Any]:
    """`check_values` of the config in a file. Raises ValueError."""
    return check_values(read_object(path), kind)


# ---- a whole folder


def check_parts(folder: Path, facts: Facts) -> None:
    """Raises ValueError where the parts of a whole model do not go together, or a config is not allowed."""
    values = {}
    for part, kind in facts.kinds.items():
        if kind.rules and (folder / part / "config.json").is_file():
            try:
                values[part] = read_values(folder / part / "config.json", kind)
            except ValueError as problem:
                raise ValueError(f"{part}/config.json {problem}") from problem
    for one, other, ours, theirs in facts.same_sizes(values):
        if ours != theirs:
            raise ValueError(f"its parts are of different models: {one} is {ours}, and {other} is {theirs}")


def problems(folder: Path, names: Collection[str], facts: Facts, *, unused: Collection[str] = ()) -> list[str]:
    """What the configs of a model's folder say that is not allowed, each with its file.

    `names`: the files that are needed, relative to the folder. `unused`: folders of parts that come from elsewhere or
    are left out.
    """
    found = []
    for name in sorted(names):
        part, _, file = name.rpartition("/")
        try:
            if name == INDEX:
                _check_index(read_object(folder / name), facts, unused)
            elif part in facts.kinds and file in ("config.json", SCHEDULER_CONFIG):
                read_values(folder / name, facts.kinds[part])
        except ValueError as problem:
            found.append(f"{printable(name)} {problem}")
    return found


def _check_index(index: Mapping[str, Any], facts: Facts, unused: Collection[str]) -> None:
    """Raises ValueError for model_index.json of another kind of model, or with classes that the family lacks."""
    check_code(index)
    name = index.get("_class_name")
    if isinstance(name, list):
        raise ValueError(f"says _class_name={show(name)}: {NEVER_RUN}")
    if name is not None and name not in facts.pipelines:
        raise ValueError(f"says _class_name={show(name)}; {facts.name} has {some(facts.pipelines)}")
    for key, value in index.items():
        rule = facts.index_rules.get(key)
        if rule is not None and not rule.fits(value):
            raise ValueError(f"says {key}={show(value)}; allowed is {rule.text}")
        if rule is None and isinstance(value, list):
            _check_component(key, value, facts.kinds.get(key))
    for part in facts.parts.values():
        if part in unused:
            continue
        if part not in index:
            raise ValueError(f"names no {part}")
        if not isinstance(index[part], list) or index[part][:1] == [None]:
            raise ValueError(f"says {part}={show(index[part])}; allowed is [library, class]")


def _check_component(key: str, value: list[Any], kind: ConfigKind | None) -> None:
    shown = f"says {printable(key)}={show(value)}"
    if len(value) != 2:
        raise ValueError(f"{shown}; allowed is [library, class]")
    library, name = value
    if library is None and name is None:
        return
    if library not in LIBRARIES:
        raise ValueError(f"{shown}: {NEVER_RUN}")
    if kind is not None and (library != kind.library or name not in kind.names):
        raise ValueError(f"{shown}; allowed is {kind.library}'s {some(kind.names)}")
