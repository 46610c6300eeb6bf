"""Single files → a model's folder in diffusers layout, in the cache: each part is converted once, tensor by tensor."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.base_model import lazy_tensors
from trainer.spec.errors import SettingsError, StorageError
from trainer.spec.family import PREFIXES, Family, get_family
from trainer.spec.plan import ModelPlan
from trainer.storage import atomic, digests, safetensors_header
from trainer.storage.locks import locked

log = logging.getLogger(__name__)
VERSION = 1  # of the conversion: another one makes the files anew
FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
FP16_VARIANT = ".fp16"
State = dict[str, torch.Tensor]


def convert_single_files(model: ModelPlan, cache: Path) -> Path:
    """The folder of the whole model: `model.path` itself, or links to its files and to what `model.parts` name instead.

    Raises SettingsError for a file that is not what the base model needs, StorageError.
    """
    source = Path(model.path)
    if not model.parts and not any(_halves(folder) for folder in source.iterdir()):
        return source
    kind = get_family(model.family)
    places = kind.FACTS.parts
    with locked(cache / "models", lambda: log.info("Another job converts weights: waiting for it.")):
        try:
            own = {places[part]: _part(part, path, model, cache=cache) for part, path in model.parts.items()}
            names = {f.name: f for f in source.iterdir()} | own
            key = digests.digest([VERSION, *((n, str(f)) for n, f in sorted(names.items()))])
            folder = cache / "models" / key[:32]
            for place, target in ((place, folder / name) for name, place in names.items() if place is not None):
                _link(place, target)
            for link in [p for p in folder.rglob("*") if p.is_symlink() and not p.exists()]:
                link.unlink()
            _schedule(folder / "scheduler" / "scheduler_config.json", model.parts.get("denoiser", ""))
        except OSError as problem:
            raise StorageError(f"CACHE_PATH {cache}: {problem.strerror or problem}.") from problem
    return folder


def _schedule(config: Path, denoiser: str) -> None:
    """What single files say of how they were trained, by tensors that nothing computes with (as ComfyUI reads them).

    Raises SettingsError for noise levels that are not trained here.
    """
    if not Path(denoiser).is_file():
        return
    marks = safetensors_header.read_header(Path(denoiser)).entries.keys()
    if marks & {"edm_vpred.sigma_max", "edm_mean"}:
        raise SettingsError(f"{denoiser} was trained with the noise levels of EDM, which Kiln does not train with.")
    if "v_pred" not in marks:
        return
    said = {"prediction_type": "v_prediction", **({"rescale_betas_zero_snr": True} if "ztsnr" in marks else {})}
    before = _plain(config)
    if before != before | said:
        atomic.write_text(config, json.dumps(before | said, indent=2))
        log.info("%s says of itself: %s.", denoiser, ", ".join(f"{k} {v}" for k, v in said.items()))


def _halves(folder: Path) -> bool:
    """Whether the only weights in `folder` are copies in 16 bits (model.fp16.safetensors)."""
    names = [p.name for p in folder.glob("*.safetensors")] if folder.is_dir() else []
    return bool(names) and all(FP16_VARIANT in name for name in names)


def _link(place: Path, target: Path) -> None:
    """A file as a link; a folder as a folder of links, since patterns do not look behind links to folders.

    Where copies in 16 bits are all that there is, they get the names of full weights.
    """
    halves = _halves(place)
    for file in [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]:
        link = target / file.relative_to(place) if place.is_dir() else target
        if halves:
            link = link.with_name(link.name.replace(FP16_VARIANT, ""))
        if link.exists():  # as another run has left it, or is using it
            continue
        if halves and link.name.endswith(".index.json"):  # it names the shards
            atomic.write_text(link, file.read_text(encoding="utf-8").replace(FP16_VARIANT, ""))
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # it has lost its end
        try:
            link.symlink_to(file.resolve())
        except OSError:  # a volume without links
            shutil.copyfile(file, link)


def _part(part: str, path: str, model: ModelPlan, *, cache: Path) -> Path | None:
    """The folder of one part: as it is, or converted from a file. None: the model goes without it."""
    if not path or Path(path).is_dir():
        return Path(path) if path else None
    kind, source = get_family(model.family), Path(model.path)
    config = source / kind.FACTS.parts[part] / "config.json"
    library, name = json.loads((source / "model_index.json").read_text(encoding="utf-8"))[kind.FACTS.parts[part]]
    key = digests.digest([VERSION, part, name, digests.file_digest(Path(path)), config.read_text(encoding="utf-8")])
    folder = cache / "weights" / key[:32]
    if (folder / "config.json").is_file():  # written last
        return folder
    started = time.monotonic()
    try:
        shape = empty_model(library, name, config.parent)
        state = _fitted(_converted(part, Path(path), kind, config=_plain(config)), shape, part=part)
        with atomic.replacing(folder / FILES[library]) as temporary:
            lazy_tensors.write_file(temporary, state)
    except ValueError as problem:
        raise SettingsError(
            f"{path} cannot be the {part} of BASE_MODEL={model.base}: {problem}. Name the base model that the file was "
            "made from, or another file."
        ) from problem
    atomic.write_text(folder / "config.json", config.read_text(encoding="utf-8"))
    log.info("Converted the %s of %s in %.1f s.", part, path, time.monotonic() - started)
    return folder


def _plain(config: Path) -> dict[str, Any]:
    return dict(json.loads(config.read_text(encoding="utf-8")))


def empty_model(library: str, name: str, folder: Path) -> torch.nn.Module:
    """The part's model on the device "meta": names and shapes without weights."""
    if library not in FILES:
        raise ValueError(f"model_index.json names {library}, which is neither of {', '.join(FILES)}")
    kind: Any = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        if library == "diffusers":
            made: torch.nn.Module = kind.from_config(kind.load_config(folder))
        else:
            made = kind(kind.config_class.from_pretrained(folder))
    return made


def _converted(part: str, path: Path, kind: Family, *, config: dict[str, Any]) -> State:
    """The tensors of `part`, as stand-ins, under diffusers' and transformers' names."""
    # A file with several parts has prefixes; that of one part alone often has none.
    found = [state for prefix in PREFIXES[part] if (state := lazy_tensors.load_file(path, prefix))]
    state = found[0] if found else lazy_tensors.load_file(path, "")
    if part == "denoiser" and kind.FACTS.landmarks[0] in state:
        return _tried(lambda: kind.from_original(state, config))
    if part == "vae" and "decoder.conv_norm_out.weight" not in state:
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        return _tried(lambda: dict(convert_ldm_vae_checkpoint(state, config)))
    if part == "clip_g" and {"transformer.resblocks.0.ln_1.weight", "text_projection"} <= state.keys():
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        return _tried(lambda: dict(convert_open_clip_checkpoint(None, state, prefix="")))
    return state


def _tried(convert: Callable[[], State]) -> State:
    try:
        return convert()
    except KeyError as problem:
        raise ValueError(f"it has no tensor {problem.args[0]}") from problem
    except (RuntimeError, IndexError) as problem:
        raise ValueError(str(problem).splitlines()[0]) from problem


def _fitted(state: State, shape: torch.nn.Module, *, part: str) -> State:
    """`state` as `shape` names it. Raises ValueError for what is missing, of another shape, or (denoisers) too much."""
    flat = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    if part == "clip_l":  # with no projection of its own, as every tool reads it: what is pooled stays as it is
        flat.pop("text_projection.weight", None)
    shared: dict[str, str] = getattr(shape, "all_tied_weights_keys", {})
    expected = {n: t for n, t in shape.state_dict().items() if n not in shared}
    fitted: State = {}
    for name, tensor in expected.items():
        plain = name.removeprefix("text_model.")
        if part == "clip_l" and plain == "text_projection.weight":
            flat[plain] = torch.eye(*tensor.shape, dtype=torch.float16)
        if plain in flat:
            fitted[name] = flat.pop(plain)
    wrong = [
        f"{n} has the shape {[*fitted[n].shape]} and not {[*expected[n].shape]}"
        for n in fitted
        if fitted[n].shape != expected[n].shape
    ]
    missing = [f"{n} is missing" for n in expected if n not in fitted]
    extra = [f"{n} is not of this model" for n in flat if part == "denoiser"]
    problems = [*wrong, *missing, *extra]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError("; ".join(problems[:3]) + more)
    return fitted
