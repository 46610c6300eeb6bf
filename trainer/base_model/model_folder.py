"""What a model's folder must hold: the diffusers layout, whole, with weights as safetensors only."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from trainer.base_model import configs, tokenizer_files, weight_kinds
from trainer.spec.errors import SettingsError
from trainer.spec.family import OPTIONAL, Facts, base_models, get_family
from trainer.spec.plan import ModelPlan
from trainer.spec.prediction_marks import PredictionMarks, prediction_marks
from trainer.spec.rules.config_rules import QUANTISED_KEYS, ConfigKind
from trainer.spec.values import printable, show
from trainer.storage.atomic import human_size
from trainer.storage.read import files_below
from trainer.storage.safetensors_header import MAX_HEADER_BYTES, Header, check_layout, parse_header

# Formats that run code when they are loaded, and weights of other frameworks: never downloaded, never read.
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
FILE, HALF = ".safetensors", ".fp16"  # the second is in the names of copies in 16 bits
FOREIGN = (*PICKLES, ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf")
NEVER = (*FOREIGN, ".py", ".pyc", ".so", ".sh", ".jinja")  # code is not even downloaded
UNQUANTISED = "use the bf16, fp16 or fp8 .safetensors file, which is quantised as it is loaded"
SHAPE_KEYS = ("in_channels", "cross_attention_dim", "joint_attention_dim")  # of a denoiser's config
FIRST_BYTES = 512  # of a file, which tell what it is
INDEX_ENDS = (".safetensors.index.json", ".safetensors.index.fp16.json")
LARGEST_INDEX = 2**26  # bytes
SMALL_FILE_BYTES = 100_000  # an error message that was saved under a file's name is smaller
TENSOR_END = re.compile(rb'"data_offsets":\s*\[\s*\d+\s*,\s*(\d{1,19})(?!\d)')


def variable(model: ModelPlan) -> str:
    """The variable that chose the model, with its value."""
    known = base_models().get(model.base)
    if known is not None and known[1].source == model.source:
        return f"BASE_MODEL={model.base}"
    return f"{'MODEL_CONFIG_PATH' if 'denoiser' in model.parts else 'MODEL_PATH'}={model.source}"


def is_local(model: ModelPlan) -> bool:
    """Whether the model is a path on this machine, not a repository of the Hub."""
    return model.source.startswith(("/", "./", "../", "~")) or Path(model.source).exists()


def file_patterns(facts: Facts, parts: Mapping[str, str]) -> tuple[str, ...]:
    """`Facts.files` without the weights that come from elsewhere; single files lack configs, so these stay."""
    if not parts:
        return facts.files
    replaced_folders = {facts.parts[part] for part in parts}
    patterns = []
    for pattern in facts.files:
        folder = pattern.removeprefix(OPTIONAL).split("/")[0]
        if folder not in replaced_folders:
            patterns.append(pattern)
    for part, path in parts.items():
        if Path(path).is_file():
            patterns.append(f"{facts.parts[part]}/config.json")
    return tuple(patterns)


def is_optional(part: str, facts: Facts) -> bool:
    """Whether a model does without `part`."""
    return any(pattern.startswith(f"{OPTIONAL}{facts.parts[part]}/") for pattern in facts.files)


def is_wanted(name: str, patterns: Collection[str]) -> bool:
    """Whether the file `name` of a repository is needed for training and sampling."""
    for pattern in patterns:
        plain = pattern.removeprefix(OPTIONAL)
        # A * also stands for /, and files in folders of folders are never needed.
        if fnmatchcase(name, plain) and name.count("/") == plain.count("/"):
            return not name.endswith(NEVER)
    return False


def wanted(names: Collection[str], patterns: Collection[str]) -> set[str]:
    """The files of a repository that are needed. A part without full-precision weights contributes its fp16 copies."""
    found = {name for name in names if is_wanted(name, patterns)}
    for part in {p.removeprefix(OPTIONAL).split("/")[0] for p in patterns if "/" in p}:
        plain = f"{part}/model.safetensors"
        if is_wanted(plain, patterns) and not any(n.startswith(f"{part}/") and n.endswith(FILE) for n in found):
            found |= {n for n in names if n.startswith(f"{part}/") and _is_half(n)}
    return found


def _is_half(name: str) -> bool:
    """Whether a file, in the folder of a part, is a copy of weights in 16 bits or the index of such files."""
    return HALF in name and name.count("/") == 1 and name.endswith((FILE, *INDEX_ENDS))


def problems(names: Collection[str], patterns: Collection[str]) -> list[str]:
    """What is missing or unusable in a model with these files (names relative to its folder)."""
    if "model_index.json" not in names:
        return [_without_index(names)]
    found, needed = [], wanted(names, patterns)
    for first in dict.fromkeys(p.split("/")[0] for p in patterns if "/" in p):
        part = first.removeprefix(OPTIONAL)
        inside = [n for n in names if n.startswith(f"{part}/")]
        has_weights = is_wanted(f"{part}/model.safetensors", patterns)  # otherwise its weights come from elsewhere
        others = [n for n in inside if n.endswith(FOREIGN)]
        if not inside and part != first:
            continue
        if not inside:
            found.append(f"the folder {part}/ is missing")
        elif any(n.endswith(FILE) and n in needed for n in inside):
            continue
        elif others and has_weights:
            found.append(f"{others[0]} {foreign_problem(others[0])}, and no .safetensors is there")
        elif f"{part}/config.json" in inside and has_weights:
            found.append(f"{part}/ has no .safetensors file")
    return found


def _without_index(names: Collection[str]) -> str:
    """What a folder or repository is that is no model in diffusers' layout, by the names of its files."""
    top = [name for name in names if "/" not in name]
    if any(name.startswith(("adapter_model.", "pytorch_lora_weights.")) for name in top):
        return "it is a LoRA and not a base model; PARAMS_RESUME_FROM starts from a LoRA file"
    if any(name.endswith(".gguf") for name in names):
        return f"it holds GGUF files, which are not read: {UNQUANTISED}"
    weights = [name for name in top if name.endswith(FILE)]
    if "config.json" in top and weights:
        file = f"; if {weights[0]} is the denoiser, set MODEL_PATH to that file" if len(weights) == 1 else ""
        return f"it is one part of a model alone (config.json without model_index.json){file}"
    hint = "; name its .safetensors files one by one: MODEL_PATH, VAE_PATH and the like" if weights else ""
    return f"it has no model_index.json, so it is not a model in the folder layout of diffusers{hint}"


def foreign_problem(path: str) -> str | None:
    """Why a file with this name is not read, with what to do; None if its name shows nothing wrong."""
    name = path.lower()
    if name.endswith(PICKLES):
        return (
            "is a pickle, which can run code when it is loaded, and is never read: convert it to .safetensors where "
            "you trust it"
        )
    if name.endswith(".gguf"):
        return f"is a GGUF file, which is quantised in a way that is not read: {UNQUANTISED}"
    if name.endswith((".onnx", ".onnx_data")):
        return "is an ONNX file, which cannot be trained: use the .safetensors file"
    if name.endswith((".msgpack", ".h5")):
        return "has the weights for Flax or TensorFlow, which are not read: use the .safetensors file"
    return None


def check_names(variable: str, names: Collection[str], patterns: Collection[str]) -> None:
    """Raises SettingsError with all `problems`."""
    if found := problems(names, patterns):
        raise SettingsError(
            f"{variable} cannot be used: {'; '.join(found)}. Name a complete model, or repair this one."
        )


def check_folder(variable: str, folder: Path, patterns: Collection[str], facts: Facts) -> None:
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
    names = {str(path.relative_to(folder)) for path in files_below(folder)}
    check_names(variable, names, patterns)
    needed = sorted(wanted(names, patterns))
    check_configs(variable, folder, needed, facts)
    damaged = []
    for part in dict.fromkeys(name.partition("/")[0] for name in needed if name.endswith((FILE, *INDEX_ENDS))):
        damaged += weight_problems(folder / part, [name for name in needed if name.startswith(f"{part}/")])
    if damaged:
        raise SettingsError(f"{variable} cannot be used: {'; '.join(damaged)}. Copy or download it again.")
    check_quantised(variable, folder, needed)


def check_configs(
    variable: str, folder: Path, names: Collection[str], facts: Facts, *, configs_only: bool = False
) -> None:
    """Check the configs and tokenizers among `names`. Raises SettingsError with all that is not allowed in them.

    `configs_only`: the other files are not here yet.
    """
    found = configs.problems(folder, names, facts, unused=_unused(names, facts))
    found += tokenizer_files.problems(folder, names, facts, configs_only=configs_only)
    if found:
        raise SettingsError(
            f"{variable} cannot be used: {'; '.join(found)}. Download these files again, or take another model."
        )


def _unused(names: Collection[str], facts: Facts) -> list[str]:
    """The folders of parts that a model with these files does without, or has from elsewhere."""
    return [part for part in facts.parts.values() if f"{part}/config.json" not in names]


def check_quantised(variable: str, folder: Path, names: Collection[str]) -> None:
    """Raises SettingsError if one of the files `names`, configs or weights, says that weights are quantised."""
    for name in names:
        if tool := _quantised(folder / name):
            raise SettingsError(
                f"{variable} cannot be used: {name} is quantised by {tool}, which is not read. "
                f"{weight_kinds.QUANTISED_FIX}s of the model."
            )


def check_kind(variable: str, folder: Path, model: ModelPlan) -> None:
    """Check that the denoiser in a model's folder is of the class and shape that BASE_MODEL has. Raises SettingsError.

    A folder whose denoiser comes from another file is not looked at.
    """
    base = base_models().get(model.base)
    published = base[1].published if base is not None else None
    if published is None or "denoiser" in model.parts:
        return
    place = get_family(model.family).FACTS.parts["denoiser"]
    expected = published.configs[f"{place}/config.json"]
    index = _json(folder / "model_index.json")
    if not index:
        return  # it is no whole model, which others report
    config = _json(folder / place / "config.json")
    difference = _difference(index, config, place, expected)
    if difference is None:
        return
    for name, (family, other) in base_models().items():
        if other.published is None:
            continue
        other_place = get_family(family).FACTS.parts["denoiser"]
        other_config = _json(folder / other_place / "config.json")
        own = other.published.configs[f"{other_place}/config.json"]
        if other_config and _difference(index, other_config, other_place, own) is None:
            raise SettingsError(
                f"{variable} is of another base model than {model.base}: {difference}. Fix: BASE_MODEL={name}."
            )
    raise SettingsError(f"{variable} is not of {model.base}, but of a model that is not trained here: {difference}.")


def _difference(index: dict[str, Any], config: dict[str, Any], place: str, expected: dict[str, Any]) -> str | None:
    """How a folder's denoiser in `place` differs from the one with the config `expected`."""
    names_components = any(isinstance(value, list) for value in index.values())
    if place not in index and names_components:
        return f"its model_index.json says {index.get('_class_name')}, without a {place}"
    class_name = config.get("_class_name", expected["_class_name"])
    if class_name != expected["_class_name"]:
        return f"{place}/ has a {class_name}, and not a {expected['_class_name']}"
    for key in SHAPE_KEYS:
        if key in expected and config.get(key, expected[key]) != expected[key]:
            return f"{place}/config.json says {key}={config[key]}, and not {expected[key]}"
    return None


def _json(path: Path) -> dict[str, Any]:
    """A config; empty if it is missing or damaged, which others report."""
    try:
        return configs.read_object(path)
    except ValueError:
        return {}


# ---- the weights of one part


def weight_problems(part: Path, names: Collection[str]) -> list[str]:
    """What is wrong with the files of weights of the part in folder `part`; `names` of files begin with that folder."""
    found = []
    for name in names:
        if name.endswith(FILE) and (problem := damage(part.parent / name)):
            found.append(f"{printable(name)} {problem}")
    for name in names:
        if name.endswith(INDEX_ENDS) and not found:
            found += _index_problems(part.parent / name)
    return found


def shards(index: Path) -> dict[str, str]:
    """The table of an index of shards: tensor → file beside the index. Raises ValueError for one that is damaged."""
    content = configs.read_object(index, limit=LARGEST_INDEX)
    table = content.get("weight_map")
    if not isinstance(table, dict) or not table or not isinstance(content.get("metadata"), dict):
        raise ValueError("is damaged: it has no weight_map or no metadata")
    for name, file in table.items():
        if not isinstance(file, str) or not file.endswith(FILE) or "/" in file or file.startswith("."):
            raise ValueError(f"says that {printable(name)} is in {show(file)}; allowed is a {FILE} file beside it")
    return table


def _index_problems(index: Path) -> list[str]:
    """What is wrong with an index of shards whose files are sound."""
    own = f"{index.parent.name}/{index.name}"
    try:
        table = shards(index)
    except ValueError as damaged:
        return [f"{own} {damaged}"]
    files = sorted(set(table.values()))
    missing = [f"{index.parent.name}/{printable(file)} is missing" for file in files if not _is_file(index, file)]
    if missing:
        return missing
    places: dict[str, str] = {}
    for file in files:
        if problem := damage(index.parent / file):
            return [f"{index.parent.name}/{file} {problem}"]
        for name in read(index.parent / file).entries:
            if name in places:
                return [f"{own}: {printable(name)} is in {places[name]} and in {file}"]
            places[name] = file
    for name, file in table.items():
        if places.get(name) != file:
            return [f"{own} says that {printable(name)} is in {file}, which has no such tensor"]
    return []


def _is_file(index: Path, file: str) -> bool:
    return (index.parent / file).is_file()


def part_folder_problem(folder: Path, kind: ConfigKind) -> str | None:
    """Why a folder cannot be the part of a model that a variable names, which has to be of this `kind`."""
    if not (folder / "config.json").is_file():
        return "has no config.json"
    files = sorted(folder.glob(f"*{FILE}"))
    if not files:
        return "has no .safetensors file"
    indexes = sorted(file for file in folder.glob("*.json") if file.name.endswith(INDEX_ENDS))
    names = [f"{folder.name}/{file.name}" for file in (*files, *indexes)]
    if found := weight_problems(folder, names):
        return f"cannot be used: {found[0].removeprefix(f'{folder.name}/')}"
    try:
        configs.read_values(folder / "config.json", kind)
    except ValueError as problem:
        return f"cannot be used: config.json {problem}"
    if tool := quantised_folder(folder):
        return f"is quantised by {tool}, which is not read. {weight_kinds.QUANTISED_FIX}"
    return None


def quantised_folder(folder: Path) -> str | None:
    """Who quantised the part of a model in `folder`; None if its weights can be read."""
    for file in (folder / "config.json", *sorted(folder.glob(f"*{FILE}"))):
        if tool := _quantised(file):
            return tool
    return None


def _quantised(file: Path) -> str | None:
    """Who quantised the weights that a config or a safetensors file is about."""
    if file.name.endswith(FILE):
        header = _header(file)
        return None if header is None else weight_kinds.quantised(header.entries)
    if file.name != "config.json":
        return None
    config = next((value for key in QUANTISED_KEYS if (value := _json(file).get(key)) is not None), None)
    if config is None:
        return None
    if not isinstance(config, dict):
        return "a tool that its config.json does not name"
    method = str(config.get("quant_method", "a tool that its config.json does not name"))
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        return f"{method} ({config.get('bnb_4bit_quant_type', 'in 4 bits')})"
    return method


def damage(path: Path) -> str | None:
    """Why the safetensors file `path` cannot be read; None if it can."""
    try:
        header = parse_header(path)
    except ValueError as problem:
        return _other_content(path) or f"is damaged or cut short: {str(problem).removeprefix('it ')}"
    size = path.stat().st_size
    end = max((entry.end for entry in header.entries.values()), default=header.data_begin)
    if size > end:
        return f"is damaged: {size - end} bytes follow its last tensor"
    try:
        check_layout(header)
    except ValueError as problem:
        return f"is damaged: {str(problem).removeprefix('it ')}"
    return None


def _other_content(path: Path) -> str | None:
    """What a file is that only has the name of a safetensors file, told by how it begins."""
    if not path.is_file():
        return None
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(FIRST_BYTES)
    if not begin:
        return "is damaged or cut short: it is empty"
    if begin.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file that it stands for: run `git lfs pull`, or download the file"
    if begin.startswith(b"GGUF"):
        return f"is a GGUF file, which is quantised in a way that is not read: {UNQUANTISED}"
    if begin.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        return "is a pickle with the name of a safetensors file, and is never read: convert it where you trust it"
    text = begin.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        return "is a web page and not weights: the download was refused, or needed a login"
    if text.startswith((b"{", b"access to", b"invalid", b"not found", b"unauthorized")) and size < SMALL_FILE_BYTES:
        return "is a message and not weights: the download was refused, or needed a login"
    header_bytes = int.from_bytes(begin[:8], "little")
    if len(begin) > 8 and begin[8:9] == b"{" and header_bytes < MAX_HEADER_BYTES:
        return _cut_short(path, size)
    return None


def _cut_short(path: Path, size: int) -> str:
    """How much of a file that begins as a safetensors file is there."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    ends = [int(end) for end in TENSOR_END.findall(header)]
    if len(header) < length or not ends:
        return f"is damaged or cut short: it ends within its header, after {human_size(size)}"
    whole = 8 + length + max(ends)
    return f"is damaged or cut short: it has {human_size(size)} of {human_size(whole)}"


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


def read(path: Path) -> Header:
    """The header of a file that `damage` found nothing wrong with."""
    return parse_header(path)


def _header(path: Path) -> Header | None:
    """The header of a safetensors file; None if it is damaged, or if the file does not end where its tensors end."""
    try:
        header = parse_header(path)
    except ValueError:
        return None
    end = max((entry.end for entry in header.entries.values()), default=header.data_begin)
    return header if path.stat().st_size == end else None
