"""What a captioning model's folder holds: which kind it is, and whether its files are taken. No torch.

A config decides which class is made and how large it is. So only the classes of `captioners.CLASSES` are made, of
parts that are known; keys that choose code, kernels or quantised weights are refused or dropped.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trainer.base_model import configs, model_folder
from trainer.spec.errors import SettingsError
from trainer.spec.plan import CaptionerPlan
from trainer.spec.rules import captioners
from trainer.spec.rules.captioners import CLASSES, CONFIG, FLORENCE2, LLAVA, ONNX, QWEN3_VL, TAGGER, TAGS
from trainer.spec.rules.config_rules import QUANTISED_KEYS
from trainer.spec.values import printable, show
from trainer.storage import safetensors_header

# Which parts a model of each kind may be made of: its text model and its image encoder, by their `model_type`.
PARTS: Mapping[str, Mapping[str, Collection[str]]] = {
    FLORENCE2: {"text_config": ("bart",), "vision_config": ("florence_vision",)},
    QWEN3_VL: {"text_config": ("qwen3_vl_text",), "vision_config": ("qwen3_vl", "qwen3_vl_vision")},
    LLAVA: {
        "text_config": ("llama", "qwen2", "qwen3", "mistral"),
        "vision_config": ("siglip_vision_model", "clip_vision_model"),
    },
}
MOST_LAYERS = 256
LARGEST_NUMBER = 2**31  # of anything that a config says: positions, tokens, sides
MOST_NESTED = 6
DROPPED = ("_", "attn_implementation", "dtype", "torch_dtype", "transformers_version", "use_kernels")
KNOWN = f"models for transformers' {', '.join(CLASSES.values())}, and taggers with {ONNX} and {TAGS}"


def named(captioner: CaptionerPlan) -> str:
    """How the user named the model, for messages."""
    place = f"{captioner.source}@{captioner.revision}" if captioner.revision else captioner.source
    return f"CAPTION_WITH={printable(place)}"


def files_of(names: Collection[str]) -> set[str]:
    """Those of the files `names` that are needed."""
    if ONNX in names and TAGS in names:
        return set(captioners.TAGGER_FILES)
    wanted = set()
    for name in names:
        if any(model_folder.is_wanted(name, [pattern]) for pattern in captioners.MODEL_FILES):
            wanted.add(name)
    if "model.safetensors" in wanted:
        wanted = {name for name in wanted if not name.startswith(("model-", "model.safetensors.index"))}
    return wanted


def problem_of_names(names: Collection[str]) -> str | None:
    """Why a repository or folder with these files is no model that captions, as the rest of a sentence."""
    if ONNX in names and TAGS in names:
        return None
    if CONFIG not in names:
        return f"has no {CONFIG}. Taken are {KNOWN}"
    if not any(name.endswith(".safetensors") for name in files_of(names)):
        return "has no weights as model.safetensors, and others are not read"
    if "tokenizer.json" not in names:
        return "has no tokenizer.json"
    return None


def kind_of(folder: Path, *, variable: str) -> str:
    """The kind of the model in `folder`, by its files and its config. Raises SettingsError for what is not taken."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if problem := problem_of_names(names):
        raise SettingsError(f"{variable}: {folder} {problem}.")
    return TAGGER if ONNX in names and TAGS in names else kind_of_config(folder / CONFIG, variable=variable)


def kind_of_config(path: Path, *, variable: str) -> str:
    """The kind of the model with the config `path`. Raises SettingsError for what is not taken."""
    try:
        return _kind(configs.read_object(path))
    except ValueError as problem:
        raise SettingsError(f"{variable}: {path.name} {problem}. Taken are {KNOWN}.") from problem


def read_config(folder: Path, *, variable: str) -> tuple[str, dict[str, Any]]:
    """The kind and the values of config.json that may have an effect. Raises SettingsError."""
    try:
        config = configs.read_object(folder / CONFIG)
        kind = _kind(config)
        cleaned = _cleaned(config, depth=0)
    except ValueError as problem:
        raise SettingsError(f"{variable}: {CONFIG} {problem}. Taken are {KNOWN}.") from problem
    return kind, cleaned


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a model for transformers. Raises SettingsError where one is missing or damaged."""
    plain = folder / "model.safetensors"
    files = [plain]
    if not plain.exists():
        index = folder / "model.safetensors.index.json"
        if problems := model_folder.weight_problems(folder, [f"{folder.name}/{index.name}"]):
            raise SettingsError(f"{folder} cannot be used: {problems[0]}.")
        files = [folder / name for name in sorted(set(model_folder.shards(index).values()))]
    for file in files:
        if problem := "is missing" if not file.is_file() else model_folder.damage(file):
            raise SettingsError(f"{file} {problem}.")
    return files


def weight_count(folder: Path) -> int:
    """How many numbers the weights of a model for transformers have."""
    count = 0
    for file in weight_files(folder):
        for entry in safetensors_header.read_header(file).entries.values():
            count += math.prod(entry.shape)
    return count


def _kind(config: Mapping[str, Any]) -> str:
    """Raises ValueError, as the rest of a sentence about config.json."""
    configs.check_code(config)
    for key in QUANTISED_KEYS:
        if config.get(key) is not None:
            raise ValueError(f"says {key}, and quantised weights are not read: take the original model")
    names = config.get("architectures")
    for kind, name in CLASSES.items():
        if names == [name]:
            _check_parts(config, kind)
            return kind
    raise ValueError(f"says architectures={show(names)}")


def _check_parts(config: Mapping[str, Any], kind: str) -> None:
    if config.get("model_type", kind) != kind:
        raise ValueError(f"says model_type={show(config['model_type'])}, and it is {kind} by its class")
    for part, allowed in PARTS[kind].items():
        inner = config.get(part)
        if not isinstance(inner, dict):
            raise ValueError(f"has no {part}")
        # Without a type, transformers takes its class's own, which is the first.
        if inner.get("model_type", next(iter(allowed))) not in allowed:
            raise ValueError(f"says {part}.model_type={show(inner['model_type'])}; allowed is {', '.join(allowed)}")


def _cleaned(value: Any, *, depth: int, key: str = "") -> Any:
    """The value without keys that choose code, kernels or types. Raises ValueError for sizes that no model has."""
    if depth > MOST_NESTED:
        raise ValueError("is nested too deeply")
    if isinstance(value, dict):
        configs.check_code(value)
        for name in QUANTISED_KEYS:
            if value.get(name) is not None:
                raise ValueError(f"says {name}, and quantised weights are not read")
        kept = {}
        for name, inner in value.items():
            if not name.startswith(DROPPED):
                kept[name] = _cleaned(inner, depth=depth + 1, key=name)
        return kept
    if isinstance(value, list):
        if len(value) > MOST_LAYERS:
            raise ValueError(f"says {printable(key)} with {len(value)} values")
        return [_cleaned(inner, depth=depth + 1, key=key) for inner in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        most = MOST_LAYERS if "layers" in key or key in ("depth", "depths") else LARGEST_NUMBER
        if not (math.isfinite(value) and abs(value) <= most):
            raise ValueError(f"says {printable(key)}={show(value)}; at most {most} is allowed")
    return value
