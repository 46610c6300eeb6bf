"""The one place that hands files of a model to diffusers and transformers, after everything in them was checked.

No code of a model is downloaded or run, and nobody is asked whether it may be: configs name no class that is not the
family's own (`configs`), tokenizers have no patterns of their own (`tokenizer_files`), and the shapes of all weights
are compared with what the config describes, on the device "meta", before memory is taken for them.

All functions raise SettingsError for a part that cannot be loaded, with the file and what is wrong in it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from trainer.base_model import configs, light_tokenizer, model_folder, tokenizer_files
from trainer.base_model.tokenizer_files import Token
from trainer.spec.errors import SettingsError
from trainer.spec.rules.config_rules import QUANTISED_KEYS, ConfigKind
from trainer.spec.values import printable
from trainer.storage import safetensors_header
from trainer.storage.safetensors_header import Entry

WEIGHT_FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
# What the classes of both libraries raise where a config is none of theirs, though each value is one that may be.
CONSTRUCTION_ERRORS = (
    *(ValueError, TypeError, ArithmeticError, LookupError),
    *(AttributeError, RuntimeError, AssertionError, StrictDataclassError),
)
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
TIED_SLACK = 1.01  # weights that share their numbers count once in a model, and may count twice in its files
# The language model inside one that also reads images: its names by newer versions of transformers → by older ones.
INNER_MODEL = {r"^(model\.)?language_model\.(model\.)?": "model."}
FIX = "Fix: download the model's folder again, or take another model"


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """ValueErrors of the checks become SettingsErrors that name the part's folder."""
    try:
        yield
    except ValueError as problem:
        raise SettingsError(f"{folder} cannot be used: {problem}. {FIX}.") from problem


def read_config(folder: Path, kind: ConfigKind) -> dict[str, Any]:
    """The values of a part's config that have an effect."""
    name = configs.SCHEDULER_CONFIG if (folder / configs.SCHEDULER_CONFIG).exists() else "config.json"
    with _named(folder):
        try:
            config = configs.read_object(folder / name)
            quantised = [key for key in QUANTISED_KEYS if config.get(key) is not None]
            if quantised:  # the libraries would ask another one to read the weights
                raise ValueError(f"says {quantised[0]}, and quantised weights are not read")
            return configs.check_values(config, kind)
        except ValueError as problem:
            raise ValueError(f"{name} {problem}") from problem


# ---- models


def empty_model(kind: ConfigKind, folder: Path, *, depth: int | None = None) -> torch.nn.Module:
    """A part's model on the device "meta": names and shapes without weights. `folder` has its config.json.

    `depth`: of a language model, as for `load_model`.
    """
    return _construct(kind, folder, shallower(read_config(folder, kind), depth))


def shallower(config: Mapping[str, Any], depth: int | None) -> dict[str, Any]:
    """The config of a language model with at most `depth` layers; None: with all of them."""
    if depth is None:
        return dict(config)
    changed = {**config, "num_hidden_layers": min(depth, config["num_hidden_layers"])}
    if "layer_types" in config:
        changed["layer_types"] = config["layer_types"][:depth]
    return changed


def _construct(kind: ConfigKind, folder: Path, config: Mapping[str, Any]) -> torch.nn.Module:
    model_class = _class(kind)
    try:
        with torch.device("meta"):
            model: torch.nn.Module
            if kind.library == "diffusers":
                model = model_class.from_config(dict(config))
            else:
                model = model_class(model_class.config_class(**config))
    except CONSTRUCTION_ERRORS as problem:
        raise SettingsError(
            f"{folder} cannot be used: no model is as config.json says: {_reason(problem)}. {FIX}."
        ) from problem
    return model


def load_model(
    kind: ConfigKind, folder: Path, *, device: str | None, dtype: torch.dtype, depth: int | None = None
) -> Any:
    """The frozen model of a part, with its weights. `device`: None leaves it where the library puts it, on the CPU.
    `depth`: of a language model, whose layers behind that many are not read.
    """
    config = shallower(read_config(folder, kind), depth)
    skeleton = _construct(kind, folder, config)
    with _named(folder):
        _check_fit(skeleton, folder, kind.library)
    model_class = _class(kind)
    if kind.library == "transformers":
        own_config = model_class.config_class(**config)
        with _without_report():
            model = model_class.from_pretrained(
                folder,
                config=own_config,
                dtype=dtype,
                use_safetensors=True,
                device_map=device,
                local_files_only=True,
                trust_remote_code=False,
                key_mapping=INNER_MODEL if kind.whole_type else None,
            )
    else:
        model = model_class.from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            low_cpu_mem_usage=True,
            device_map=device,
            local_files_only=True,
        )
    return model.requires_grad_(False)


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Inside, transformers prints no table of the weights that a file has besides: `_check_fit` has looked."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_whole(
    class_name: str,
    folder: Path,
    config: Mapping[str, Any],
    *,
    weights: int,
    device: str,
    dtype: torch.dtype,
    quantization: Any = None,
) -> Any:
    """A frozen model of transformers with several parts, whose `config` was checked, from the files in `folder`.

    `weights`: how many numbers these files have. `quantization`: a config of transformers, by which weights are
    quantised as they are loaded. Raises ValueError, as the rest of a sentence about the folder, where the weights are
    not those that the config describes: none is made up.
    """
    model_class: Any = getattr(importlib.import_module("transformers"), class_name)
    try:
        own_config = model_class.config_class(**config)
        with torch.device("meta"):  # sizes alone, before memory is taken for them
            described = sum(parameter.numel() for parameter in model_class(own_config).parameters())
    except CONSTRUCTION_ERRORS as problem:
        raise ValueError(f"no model is as config.json says: {_reason(problem)}") from problem
    if described > weights * TIED_SLACK:
        raise ValueError(f"config.json describes {described:,} weights, and its files have {weights:,}")
    try:
        model, report = model_class.from_pretrained(
            folder,
            config=own_config,
            dtype=dtype,
            device_map=device,
            quantization_config=quantization,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (*CONSTRUCTION_ERRORS, OSError) as problem:
        raise ValueError(f"its weights do not load: {_reason(problem)}") from problem
    wrong = sorted([*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])])
    if wrong:
        raise ValueError(f"its weights lack {wrong[0]}, and {len(wrong) - 1} more, which config.json describes")
    return model.requires_grad_(False).eval()


def _reason(problem: Exception) -> str:
    return printable(str(problem).strip().split("\n")[0] or type(problem).__name__)


def _class(kind: ConfigKind) -> Any:
    return getattr(importlib.import_module(kind.library), kind.names[0])


def _check_fit(skeleton: torch.nn.Module, folder: Path, library: str) -> None:
    """Raises ValueError where the weights are not those that the config describes."""
    entries = _entries(folder, library)
    fix_names = getattr(skeleton, "_fix_state_dict_keys_on_load", None)
    if fix_names is not None:  # of old VAEs, which diffusers renames
        fix_names(entries)
    by_short_name = {_short(name): entry for name, entry in entries.items()}
    tied: Mapping[str, str] = getattr(skeleton, "all_tied_weights_keys", {})
    for name, tensor in skeleton.state_dict().items():
        if name in tied:
            continue
        entry = by_short_name.get(_short(name))
        if entry is None:
            raise ValueError(f"its weights lack {name}, which config.json describes")
        if entry.shape != tuple(tensor.shape):
            raise ValueError(
                f"{name} has the shape {[*entry.shape]} in its weights, and {[*tensor.shape]} by config.json"
            )
        if tensor.is_floating_point() and entry.dtype not in WEIGHT_TYPES:
            raise ValueError(f"{name} is of type {printable(entry.dtype)}, which is not a type of weights")


def _short(name: str) -> str:
    """Versions of transformers differ in whether the first level is part of a text encoder's names, and so do files of
    a language model with its output layer and without."""
    name = name.removeprefix("text_model.").removeprefix("model.").removeprefix("language_model.")
    return name.removeprefix("model.")


def _entries(folder: Path, library: str) -> dict[str, Entry]:
    """The tensors in the files that `library` loads from a folder."""
    plain = folder / WEIGHT_FILES[library]
    index = plain.with_name(f"{plain.name}.index.json")
    files = [plain]
    if index.exists() and (library == "diffusers" or not plain.exists()):
        if found := model_folder.weight_problems(folder, [f"{folder.name}/{index.name}"]):
            raise ValueError(found[0])
        files = [folder / file for file in sorted(set(model_folder.shards(index).values()))]
    entries: dict[str, Entry] = {}
    for file in files:
        if problem := "is missing" if not file.is_file() else model_folder.damage(file):
            raise ValueError(f"{file.name} {problem}")
        header = safetensors_header.read_header(file)
        try:
            safetensors_header.check_is_here(header)
        except ValueError as missing:
            raise ValueError(f"{file.name}: {missing}") from missing
        entries |= header.entries
    return entries


# ---- schedulers


def load_scheduler(
    scheduler_class: Any, folder: Path, kind: ConfigKind, changes: Mapping[str, Any] | None = None
) -> Any:
    """A scheduler of diffusers by the config in `folder`. `changes`: values that differ from it."""
    config = {**read_config(folder, kind), **(changes or {})}
    try:
        return scheduler_class.from_config(config)
    except CONSTRUCTION_ERRORS as problem:
        raise SettingsError(
            f"{folder} cannot be used: no scheduler is as its config says: {_reason(problem)}. {FIX}."
        ) from problem


# ---- tokenizers


def load_tokenizer(folder: Path, kind: ConfigKind) -> Any:
    """A tokenizer of transformers."""
    import transformers
    from transformers import AddedToken

    def token(value: Token) -> Any:
        return value if isinstance(value, str) else AddedToken(**_without_type(value))

    with _named(folder):
        files = tokenizer_files.read(folder, kind.names[0])
    added = {place: AddedToken(**value) for place, value in files.added.items()}
    by_text = {str(value): value for value in added.values()}
    named = {name: token(value) for name, value in files.tokens.items()}
    named = {name: by_text.get(str(value), value) for name, value in named.items()}
    arguments: dict[str, Any] = {**files.options, **named, "added_tokens_decoder": added}
    for values in files.lists.values():
        arguments["extra_special_tokens"] = [token(value) for value in values]
    if files.class_name == tokenizer_files.TEKKEN:
        arguments = {**tokenizer_files.DEFAULTS[files.class_name], **arguments}
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=light_tokenizer.tekken(files.vocabulary), **arguments
        )
    if files.vocabulary.charsmap is not None:
        arguments["_spm_precompiled_charsmap"] = files.vocabulary.charsmap
    if files.vocabulary.numbers:
        arguments["merges"] = files.vocabulary.merges
    tokenizer_class: Any = getattr(transformers, files.class_name)
    return tokenizer_class(vocab=files.vocabulary.numbers or files.vocabulary.scores, **arguments)


def _without_type(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: inner for key, inner in value.items() if key not in ("__type", "id")}


def check_tokens(tokenizer: Any, encoder: Any, folder: Path) -> None:
    """Check that a text encoder has an embedding for every token, and a position for each place.

    `folder`: of the tokenizer, for messages.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= encoder.config.vocab_size:
        raise SettingsError(
            f"{folder} cannot be used: it has a token of number {largest}, and the text encoder has "
            f"{encoder.config.vocab_size} embeddings. {FIX}."
        )
    end = getattr(encoder.config, "eos_token_id", None)
    # CLIP's pooled output is that of the end token. Its first configs say 2, which means the token of highest number.
    if encoder.config.model_type == "clip_text_model" and end not in (2, tokenizer.eos_token_id):
        raise SettingsError(
            f"{folder} cannot be used: the end of a text is token {tokenizer.eos_token_id}, and {end} by the text "
            f"encoder's config.json. {FIX}."
        )
    positions = getattr(encoder.config, "max_position_embeddings", None)
    # Language models read far more than a caption has, and their tokenizers often name another number.
    if encoder.config.model_type == "clip_text_model" and tokenizer.model_max_length != positions:
        raise SettingsError(
            f"{folder} cannot be used: its model_max_length is {tokenizer.model_max_length:g}, and the text encoder "
            f"reads {positions} tokens. {FIX}."
        )
