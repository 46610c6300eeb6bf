"""Single files → a model's folder in diffusers' layout, in the cache: each part is converted once, tensor by tensor.

CACHE_PATH/weights/KEY holds one converted part; CACHE_PATH/models/KEY is a whole model of links to parts. Both keys
are digests of everything that decides the content, so jobs share them and nothing in them is ever out of date.

A part is a key of `Family.FACTS.parts`: denoiser, vae, clip_l, clip_g, t5, or one of LANGUAGE_MODELS.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.base_model import configs, lazy_tensors, loading, weight_check
from trainer.base_model.loading import WEIGHT_FILES
from trainer.base_model.weight_kinds import LANGUAGE_MODELS
from trainer.spec.errors import SettingsError, StorageError
from trainer.spec.family import PREFIXES, Facts, Family, facts_of, get_family
from trainer.spec.plan import ModelPlan
from trainer.spec.prediction_marks import MARKS, prediction_marks
from trainer.storage import atomic, digests, safetensors_header
from trainer.storage.locks import locked
from trainer.storage.read import files_below

log = logging.getLogger(__name__)
VERSION = 1  # of the conversion; a change of it converts all files again
FP16_VARIANT = ".fp16"  # in the names of copies in 16 bits: diffusers' `variant`
State = dict[str, torch.Tensor]


def convert_single_files(model: ModelPlan, cache: Path) -> Path:
    """The folder of the whole model: `model.path` itself, or links to its files and to what `model.parts` name instead.

    Raises SettingsError for a file that is not what the base model needs, StorageError where the cache fails.
    """
    source = Path(model.path)
    facts = facts_of(model.family, model.base)
    if not model.parts and not any(_has_fp16_only(folder) for folder in source.iterdir()):
        _check_parts(source, facts)
        return source
    part_folders = facts.parts
    with locked(cache / "models", lambda: log.info("Another job converts weights: waiting for it.")):
        try:
            places: dict[str, Path | None] = {entry.name: entry for entry in source.iterdir()}
            for part, path in model.parts.items():
                places[part_folders[part]] = _convert_part(part, path, model, cache=cache)
            listed = [(name, str(place)) for name, place in sorted(places.items())]
            key = digests.digest([VERSION, *listed])
            folder = cache / "models" / key[:32]
            for name, place in places.items():
                if place is not None:
                    _link(place, folder / name)
            _remove_dead_links(folder)
            if facts.objective == "denoising":
                _write_schedule(folder / "scheduler" / "scheduler_config.json", model.parts.get("denoiser", ""))
        except OSError as problem:
            raise StorageError(f"CACHE_PATH {cache}: {problem.strerror or problem}.") from problem
    _check_parts(folder, facts)
    return folder


def _check_parts(folder: Path, facts: Facts) -> None:
    """Raises SettingsError where the configs of the parts are not allowed, or do not go together."""
    try:
        configs.check_parts(folder, facts)
    except ValueError as problem:
        raise SettingsError(f"{folder} cannot be used: {problem}. {loading.FIX}.") from problem


def _write_schedule(config: Path, denoiser: str) -> None:
    """Set the prediction type that a single file was trained with, in the model's scheduler, if the file says it.

    Raises SettingsError for noise levels that are not trained here.
    """
    if not Path(denoiser).is_file():
        return
    header = safetensors_header.read_header(Path(denoiser))
    marks = prediction_marks(header.entries.keys(), header.metadata)
    if marks.edm:
        raise SettingsError(f"{denoiser} was trained with the noise levels of EDM, which Kiln does not support.")
    if marks.prediction is None:
        return
    changes: dict[str, Any] = {"prediction_type": marks.prediction}
    if marks.prediction == "v_prediction" and marks.zero_terminal_snr:
        changes["rescale_betas_zero_snr"] = True
    before = _read_config(config)
    after = before | changes
    if before != after:
        atomic.write_text(config, json.dumps(after, indent=2))
        log.info(
            "%s was trained with %s: %s says so.",
            denoiser, ", ".join(f"{key} {value}" for key, value in changes.items()), marks.said_by,
        )  # fmt: skip


def _has_fp16_only(folder: Path) -> bool:
    """Whether the only weights in `folder` are copies in 16 bits (model.fp16.safetensors)."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.glob("*.safetensors")]
    return bool(names) and all(FP16_VARIANT in name for name in names)


def _remove_dead_links(folder: Path) -> None:
    for path in list(folder.rglob("*")):
        if path.is_symlink() and not path.exists():
            path.unlink()


def _link(place: Path, target: Path) -> None:
    """A file as a link; a folder as a folder of links, since glob patterns do not follow links to folders.

    Copies in 16 bits get the names of full weights where there are no others: diffusers then finds them.
    """
    if place.is_file():
        _link_file(place, target, is_fp16=False)
        return
    is_fp16 = _has_fp16_only(place)
    for file in files_below(place):
        _link_file(file, target / file.relative_to(place), is_fp16=is_fp16)


def _link_file(file: Path, link: Path, *, is_fp16: bool) -> None:
    if is_fp16:
        link = link.with_name(link.name.replace(FP16_VARIANT, ""))
    if link.exists():  # another run made it, and may be using it
        return
    if is_fp16 and link.name.endswith(".index.json"):  # it names the shards
        atomic.write_text(link, file.read_text(encoding="utf-8").replace(FP16_VARIANT, ""))
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)  # a link to a file that is gone
    try:
        link.symlink_to(file.resolve())
    except OSError:  # a volume without links
        shutil.copyfile(file, link)


def _convert_part(part: str, path: str, model: ModelPlan, *, cache: Path) -> Path | None:
    """The folder of one part: as it is, or converted from a file. None: the model does without the part."""
    if not path:
        return None
    if Path(path).is_dir():
        return Path(path)
    family = get_family(model.family)
    source = Path(model.path)
    facts = facts_of(model.family, model.base)
    part_folder = facts.parts[part]
    config = source / part_folder / "config.json"
    kind = facts.kinds[part_folder]
    depth = _layers_in(Path(path)) if part == "mistral3" else None
    skeleton = loading.empty_model(kind, config.parent, depth=depth)
    config_text = config.read_text(encoding="utf-8")
    if depth is not None:
        config_text = json.dumps(loading.shallower(loading.read_config(config.parent, kind), depth))
    key = digests.digest([VERSION, part, kind.names[0], digests.file_digest(Path(path)), config_text])
    folder = cache / "weights" / key[:32]
    if (folder / "config.json").is_file():  # written last
        return folder
    started = time.monotonic()
    try:
        state = _load_state(part, Path(path), family, config=_read_config(config))
        fitted = _fit(state, skeleton, part=part)
        with atomic.replacing(folder / WEIGHT_FILES[kind.library]) as temporary:
            lazy_tensors.write_file(temporary, fitted)
    except weight_check.NotFiniteError as problem:
        raise SettingsError(f"{path}: {problem} (in the {part}). {weight_check.FIX}.") from problem
    except ValueError as problem:
        raise SettingsError(
            f"{path} cannot be the {part} of BASE_MODEL={model.base}: {problem}. Name the base model that the file was "
            "made from, or another file."
        ) from problem
    atomic.write_text(folder / "config.json", config_text)
    log.info("Converted the %s of %s in %.1f s.", part, path, time.monotonic() - started)
    return folder


def _layers_in(file: Path) -> int:
    """How many layers of a language model a file holds: ComfyUI's of Mistral has those that FLUX.2 reads, 30 of 40."""
    numbers = [0]
    for name in safetensors_header.read_header(file).entries:
        if found := re.search(r"(?:^|model\.)layers\.(\d+)\.", name):
            numbers.append(int(found[1]) + 1)
    return max(numbers)


def _read_config(config: Path) -> dict[str, Any]:
    """Raises SettingsError for a config that cannot be read."""
    try:
        return configs.read_object(config)
    except ValueError as problem:
        raise SettingsError(f"{config} {problem}. {loading.FIX}.") from problem


def _load_state(part: str, path: Path, family: Family, *, config: dict[str, Any]) -> State:
    """The tensors of `part`, lazily, under the names that diffusers and transformers give them."""
    state: State = {}
    for prefix in PREFIXES[part]:  # of a file with several parts; one with a single part often has none
        state = lazy_tensors.load_file(path, prefix)
        if state:
            break
    if not state:
        state = lazy_tensors.load_file(path, "")
    if part == "denoiser":
        state = {name: tensor for name, tensor in state.items() if name not in MARKS}  # which are no weights
    if part == "denoiser" and family.FACTS.landmarks[0] in state:
        return _convert(lambda: family.from_original(state, config))
    if part == "vae" and "decoder.head.0.gamma" in state:  # Wan's names, which Qwen-Image's file has too
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers  # slow to import

        return _convert(lambda: dict(convert_wan_vae_to_diffusers(state)))
    if part == "vae" and not state.keys() & {"decoder.conv_norm_out.weight", "decoder.norm_out.gamma"}:
        return _convert(lambda: _vae_from_original(state, config))
    if part == "clip_g" and {"transformer.resblocks.0.ln_1.weight", "text_projection"} <= state.keys():
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint  # slow to import

        return _convert(lambda: dict(convert_open_clip_checkpoint(None, state, prefix="")))
    return state


def _vae_from_original(state: State, config: dict[str, Any]) -> State:
    """A VAE's tensors by diffusers' names. FLUX.2's has its first and last convolution inside, and statistics."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint  # slow to import

    outside = {}
    for name, tensor in state.items():
        name = name.removeprefix("encoder.") if name.startswith("encoder.quant_conv.") else name
        name = name.removeprefix("decoder.") if name.startswith("decoder.post_quant_conv.") else name
        outside[name] = tensor
    statistics = {name: tensor for name, tensor in state.items() if name.startswith("bn.")}
    return dict(convert_ldm_vae_checkpoint(outside, config)) | statistics


def _convert(function: Callable[[], State]) -> State:
    """The result of a conversion. Raises ValueError where it fails: the file is of another model."""
    try:
        return function()
    except KeyError as problem:
        raise ValueError(f"it has no tensor {problem.args[0]}") from problem
    except (RuntimeError, IndexError) as problem:
        raise ValueError(str(problem).splitlines()[0]) from problem


def _language_model_name(name: str) -> str:
    return name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")


def _fit(state: State, model: torch.nn.Module, *, part: str) -> State:
    """`state` under the names of `model`.

    Raises ValueError for tensors that are missing, have another shape, or (in a denoiser) belong to no layer.
    """
    rest = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    # With its output layer a language model has one level more, which transformers leaves out without it. Nobody reads
    # the last norm of a file with the first layers alone, as ComfyUI's of Mistral is; it lacks that.
    if part in LANGUAGE_MODELS:
        rest = {_language_model_name(name): t for name, t in rest.items()}
    if part == "clip_l":
        # Every tool reads CLIP-L from single files without its own projection: the identity takes its place.
        rest.pop("text_projection.weight", None)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    fitted: State = {}
    for name, tensor in expected.items():
        short = name.removeprefix("text_model.")
        if part == "clip_l" and short == "text_projection.weight":
            rest[short] = torch.eye(*tensor.shape, dtype=torch.float16)
        if part == "mistral3" and short == "norm.weight":
            rest.setdefault(short, torch.ones(tensor.shape, dtype=torch.bfloat16))
        if short in rest:
            fitted[name] = rest.pop(short)
    problems = []
    for name, tensor in fitted.items():
        if tensor.shape != expected[name].shape:
            problems.append(f"{name} has the shape {[*tensor.shape]} and not {[*expected[name].shape]}")
    for name in expected:
        if name not in fitted:
            problems.append(f"{name} is missing")
    if part == "denoiser":
        problems += [f"{name} is not of this model" for name in rest]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError("; ".join(problems[:3]) + more)
    return fitted
