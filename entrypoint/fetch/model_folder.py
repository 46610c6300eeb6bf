"""What a model's folder must hold: the diffusers layout, whole, with weights as safetensors only."""

from __future__ import annotations

import json
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from trainer.spec.errors import SettingsError
from trainer.spec.family import OPTIONAL, base_models
from trainer.spec.plan import ModelPlan
from trainer.spec.prediction_marks import PredictionMarks, prediction_marks
from trainer.storage.safetensors_header import Header, parse_header

# Formats that run code when they are loaded, and weights of other frameworks: never downloaded, never read.
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
FILE, HALF = ".safetensors", ".fp16"  # the second is in the names of copies in 16 bits
FOREIGN = (*PICKLES, ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf")


def variable(model: ModelPlan) -> str:
    """The variable that chose the model, with its value."""
    known = base_models().get(model.base)
    if known is not None and known[1].source == model.source:
        return f"BASE_MODEL={model.base}"
    return f"{'MODEL_CONFIG_PATH' if 'denoiser' in model.parts else 'MODEL_PATH'}={model.source}"


def is_local(model: ModelPlan) -> bool:
    """Whether the model is a path on this machine, not a repository of the Hub."""
    return model.source.startswith(("/", "./", "../", "~")) or Path(model.source).exists()


def is_wanted(name: str, patterns: Collection[str]) -> bool:
    """Whether the file `name` of a repository is needed for training and sampling."""
    return any(fnmatchcase(name, p.removeprefix(OPTIONAL)) for p in patterns) and not name.endswith(FOREIGN)


def wanted(names: Collection[str], patterns: Collection[str]) -> set[str]:
    """The files of a repository that are needed. A part without full-precision weights contributes its fp16 copies."""
    found = {name for name in names if is_wanted(name, patterns)}
    for part in {p.removeprefix(OPTIONAL).split("/")[0] for p in patterns if "/" in p}:
        plain = f"{part}/model.safetensors"
        if is_wanted(plain, patterns) and not any(n.startswith(f"{part}/") and n.endswith(FILE) for n in found):
            found |= {n for n in names if n.startswith(f"{part}/") and HALF in n and not n.endswith(FOREIGN)}
    return found


def problems(names: Collection[str], patterns: Collection[str]) -> list[str]:
    """What is missing or unusable in a model with these files (names relative to its folder)."""
    if "model_index.json" not in names:
        return ["it has no model_index.json, so it is not a model in the folder layout of diffusers"]
    found, needed = [], wanted(names, patterns)
    for first in dict.fromkeys(p.split("/")[0] for p in patterns if "/" in p):
        part = first.removeprefix(OPTIONAL)
        inside = [n for n in names if n.startswith(f"{part}/")]
        has_weights = is_wanted(f"{part}/model.safetensors", patterns)  # otherwise its weights come from elsewhere
        pickles = [n for n in inside if n.endswith(PICKLES)]
        if not inside and part != first:
            continue
        if not inside:
            found.append(f"the folder {part}/ is missing")
        elif any(n.endswith(FILE) and n in needed for n in inside):
            continue
        elif pickles and has_weights:
            found.append(
                f"{pickles[0]} is a pickle, which can run code when it is loaded, and no .safetensors is there"
            )
        elif f"{part}/config.json" in inside and has_weights:
            found.append(f"{part}/ has no .safetensors file")
    return found


def check_names(variable: str, names: Collection[str], patterns: Collection[str]) -> None:
    """Raises SettingsError with all `problems`."""
    if found := problems(names, patterns):
        raise SettingsError(
            f"{variable} cannot be used: {'; '.join(found)}. Name a complete model, or repair this one."
        )


def check_folder(variable: str, folder: Path, patterns: Collection[str]) -> None:
    """Check that a model is complete: its parts, the shards that its indexes name, the lengths of its weight files.

    Reads headers only, so it takes milliseconds. Raises SettingsError.
    """
    if folder.is_file():
        raise SettingsError(
            f"{variable} is a single file. Name a folder in the layout of diffusers (with model_index.json), or a Hub "
            "repository with one; diffusers' from_single_file(...).save_pretrained(...) makes such a folder."
        )
    if not folder.is_dir():
        raise SettingsError(f"{variable}: there is no folder {folder}. Check the path and what is mounted there.")
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    check_names(variable, names, patterns)
    damaged = []
    for name in sorted(wanted(names, patterns)):
        if name.endswith((".safetensors.index.json", ".safetensors.index.fp16.json")):
            damaged += _missing_shards(folder / name)
        elif name.endswith(".safetensors") and not _is_whole(folder / name):
            damaged.append(f"{name} is damaged or cut short (or a Git LFS pointer)")
    if damaged:
        raise SettingsError(f"{variable} cannot be used: {'; '.join(damaged)}. Copy or download it again.")


def _missing_shards(index: Path) -> list[str]:
    try:
        shards = {str(s) for s in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, AttributeError):
        return [f"{index.name} is damaged"]
    return [f"{index.parent.name}/{s} is missing" for s in sorted(shards) if not (index.parent / s).is_file()]


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    return _header(path) is not None


def damage(path: Path) -> str | None:
    """Why the safetensors file `path` cannot be read; None if it can."""
    return None if _is_whole(path) else "is damaged or cut short (or a Git LFS pointer)"


def tensors(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file; none, if it is damaged."""
    header = _header(path)
    return set() if header is None else set(header.entries)


def prediction(path: Path) -> PredictionMarks:
    """What a file of weights says that its model predicts; nothing, if it is damaged."""
    header = _header(path)
    if header is None:
        return PredictionMarks()
    return prediction_marks(header.entries.keys(), header.metadata)


def has_fp8(path: Path) -> bool:
    """Whether a safetensors file has weights of one byte."""
    header = _header(path)
    return header is not None and any(str(entry.dtype).startswith("F8_") for entry in header.entries.values())


def _header(path: Path) -> Header | None:
    """The header of a safetensors file; None if it is damaged, or if the file does not end where its tensors end."""
    try:
        header = parse_header(path)
    except ValueError:
        return None
    end = max((entry.end for entry in header.entries.values()), default=header.data_begin)
    return header if path.stat().st_size == end else None
