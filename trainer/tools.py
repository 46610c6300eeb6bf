"""`python -m trainer.export` and `python -m trainer.sample`: convert and merge LoRA files, draw pictures with them."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer import export, formats, keys, prepare, sample
from trainer.assemble import assembled
from trainer.errors import KilnError, SettingsError
from trainer.families import OPTIONAL, PREFIXES, BaseModel, Family, base_models, family, names
from trainer.formats import Modules
from trainer.plan import ModelPlan, Prompt

log = logging.getLogger(__name__)
CACHE = Path.home() / ".cache" / "kiln"
FLAGS: dict[str, tuple[str, type]] = {  # as in prompts.txt of a job
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("steps", int),
    "l": ("cfg", float),
    "g": ("guidance", float),
    "n": ("negative", str),
}


def export_command(arguments: list[str]) -> int:
    """`python -m trainer.export`; returns the exit code."""
    parser = argparse.ArgumentParser("python -m trainer.export", description="Convert a LoRA file, or merge several.")
    parser.add_argument("file", nargs="?", type=Path, metavar="IN.safetensors")
    parser.add_argument("--merge", nargs="+", metavar="FILE[:WEIGHT]", help="add these up instead")
    parser.add_argument("--to", choices=sorted(formats.FORMATS), default="kohya", help="whose key names (kohya)")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.safetensors")
    parser.add_argument("--family", choices=names(), help="if the keys do not tell")
    parser.add_argument("--without-text-encoders", action="store_true", help="leave their modules out")
    asked = parser.parse_args(arguments)
    if (asked.file is None) == (asked.merge is None):
        parser.error("name one file to convert, or some after --merge")
    return _exit_code(lambda: _export(asked))


def sample_command(arguments: list[str]) -> int:
    """`python -m trainer.sample`; returns the exit code."""
    parser = argparse.ArgumentParser("python -m trainer.sample", description="Draw pictures, with LoRAs or without.")
    parser.add_argument("--base", required=True, help="a value of BASE_MODEL, a folder in diffusers layout, or a file")
    parser.add_argument("--lora", nargs="+", action="extend", default=[], metavar="FILE[:WEIGHT]")
    parser.add_argument("--prompts", type=Path, required=True, help="like a job's: text --w --h --d --s --g --l --n")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--family", choices=names(), help="if --base is a folder and no LoRA tells")
    parser.add_argument("--config", help="if --base is a file: the value of BASE_MODEL that has what it lacks")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where files are converted to ({CACHE})")
    asked = parser.parse_args(arguments)
    return _exit_code(lambda: _sample(asked))


def _exit_code(work: Callable[[], None]) -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        work()
    except KilnError as problem:
        log.error("%s", problem)
        return problem.exit_code
    return 0


# ---- files


def _weighted(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:WEIGHT`."""
    found = re.fullmatch(r"(.+?)(?::([+-]?[0-9]*\.?[0-9]+))?", text)
    assert found is not None
    return Path(found[1]), float(found[2] or 1)


def _family_of(path: Path, asked: str | None) -> tuple[str, dict[str, str]]:
    """A file's family and its header."""
    try:
        header = keys.read_header(path)
    except ValueError as problem:
        raise SettingsError(f"{path}: {problem}.") from problem
    stems = [found[0] for key in header.entries if (found := keys.role(key))]
    name = asked or keys.likely_family(stems, header.metadata)
    if name is None:
        raise SettingsError(f"{path} has no keys of a LoRA for {', '.join(names())}.")
    return name, header.metadata


def _load(path: Path, family_name: str) -> Modules:
    try:
        return formats.load(path, family_name)
    except ValueError as problem:
        raise SettingsError(f"{path}, as a LoRA for {family_name}: {problem}.") from problem


def _export(asked: argparse.Namespace) -> None:
    several = [_weighted(text) for text in asked.merge] if asked.merge else [(asked.file, 1.0)]
    found = [_family_of(path, asked.family) for path, _ in several]
    kinds = {name for name, _ in found}
    if len(kinds) > 1:
        each = ", ".join(f"{path} is for {name}" for (path, _), (name, _) in zip(several, found, strict=True))
        raise SettingsError(f"Only LoRAs of one family can be merged: {each}.")
    name = kinds.pop()
    loaded = [(_load(path, name), weight) for path, weight in several]
    try:
        modules = formats.merged(loaded) if asked.merge else loaded[0][0]
    except ValueError as problem:
        raise SettingsError(f"--merge: {problem}.") from problem
    if asked.without_text_encoders:
        own = f"{family(name).FACTS.lora_prefix}."
        modules = {module: adapter for module, adapter in modules.items() if module.startswith(own)}
    if not modules:
        raise SettingsError("Nothing is left to write.")
    try:
        made = formats.write(modules, asked.to, name)
    except ValueError as problem:
        raise SettingsError(f"This cannot be written with {asked.to}'s names: {problem}.") from problem
    # Peft's settings and the hashes are about the file that was read.
    gone = ("lora_adapter_metadata", "sshs_", "modelspec.hash")
    metadata = {} if asked.merge else {k: v for k, v in found[0][1].items() if not k.startswith(gone)}
    metadata |= {"ss_network_dim": str(made.rank), "ss_network_alpha": f"{made.alpha:g}"}
    metadata.setdefault("modelspec.architecture", f"{family(name).FACTS.architecture}/lora")
    if asked.merge:
        metadata["kiln_merged_from"] = json.dumps({path.name: weight for path, weight in several})
    export.write(asked.out, made.tensors, metadata)
    log.info("%s: %d modules for %s, rank %d, alpha %g.", asked.out, len(modules), name, made.rank, made.alpha)


# ---- pictures


def _sample(asked: argparse.Namespace) -> None:
    several = [_weighted(text) for text in asked.lora]
    name, model, folder = _base(asked, several)
    kind = family(name)
    loaded = [(_load(path, name), weight) for path, weight in several]
    prompts = _prompts(asked.prompts, kind, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    texts = _encoded(kind, folder, prompts, loaded, device=device, dtype=dtype)
    denoiser = kind.load_denoiser(folder, device=device, dtype=dtype)
    add(denoiser, loaded, component=kind.FACTS.lora_prefix)
    vae = kind.load_vae(folder, device=device)

    def draw(prompt: Prompt) -> Any:
        text, negative = texts[prompt.text], texts[prompt.negative]
        return kind.sample(denoiser, vae, folder, prompt=prompt, text=text, negative=negative)

    for old in asked.out.glob("step-00000000-*.png"):
        old.unlink()
    with torch.no_grad():
        count = sample.draw_all(asked.out, prompts, step=0, draw=draw, stopped=lambda: False)
    log.info("%d pictures with %d LoRAs are in %s.", count, len(several), asked.out)


def add(model: Any, several: list[tuple[Modules, float]], *, component: str) -> None:
    """Change the weights of `component` of the pipeline as the files say, each times its weight, one after the other.

    Raises SettingsError for modules that the model lacks.
    """
    own = [
        (name.removeprefix(f"{component}."), adapter, weight)
        for modules, weight in several
        for name, adapter in modules.items()
        if name.startswith(f"{component}.")
    ]
    with torch.no_grad():
        for name, adapter, strength in own:
            weight = _layer(model, name).weight
            shape = (adapter.up.shape[0], *adapter.down.shape[1:])
            if shape != weight.shape:
                raise SettingsError(f"{name} is {list(shape)} in the LoRA and {list(weight.shape)} in the model.")
            before = weight.float()
            weight.copy_(before + strength * (adapter.on(before) - before))


def _layer(model: Any, name: str) -> Any:
    """A layer by its name in files, which have the level `text_model` that some of transformers' classes lack."""
    for path in (name, name.removeprefix("text_model.")):
        with contextlib.suppress(AttributeError):
            return model.get_submodule(path)
    raise SettingsError(f"The base model has no {name}.")


def _base(asked: argparse.Namespace, several: list[tuple[Path, float]]) -> tuple[str, BaseModel, Path]:
    """The family, what is known of the model, and the folder of its weights.

    A folder's family is what --family says, or what the first LoRA is for; a file's is what its tensors' names say.
    """
    known, place = base_models(), Path(asked.base)
    if asked.base in known:
        name, model = known[asked.base]
        return name, model, _folder(model, family(name).FACTS.files)
    if place.is_file():
        return _single(place, asked.config, asked.cache)
    if not place.is_dir():
        raise SettingsError(f"--base {place} is neither a folder, a file, nor one of {', '.join(sorted(known))}.")
    if asked.family is None and not several:
        raise SettingsError(f"--base {place} is a folder: --family says what is in it, one of {', '.join(names())}.")
    name = asked.family or _family_of(several[0][0], None)[0]
    return name, BaseModel(str(place.absolute()), files_gib=0.0), place.absolute()


def _single(file: Path, config: str | None, cache: Path) -> tuple[str, BaseModel, Path]:
    """A model in one file: converted once, into `cache`. What it lacks is `config`'s, or the family's first model's."""
    try:
        found = keys.read_header(file).entries.keys()
    except ValueError as problem:
        raise SettingsError(f"--base {file}: {problem}.") from problem
    denoisers = {name.removeprefix(PREFIXES["denoiser"][0]) for name in found}
    name = next((n for n in names() if denoisers & set(family(n).FACTS.landmarks)), None)
    if name is None:
        raise SettingsError(f"--base {file} has no denoiser of {', '.join(names())}.")
    facts = family(name).FACTS
    base = config or next(iter(facts.models))
    if base not in facts.models:
        raise SettingsError(f"--config {base} is not one of {', '.join(facts.models)}, and {file} is for {name}.")
    inside = [p for p in facts.parts if p == "denoiser" or any(n.startswith(PREFIXES[p]) for n in found)]
    model, folders = facts.models[base], {facts.parts[part] for part in inside}
    rest = [f for f in facts.files if f.removeprefix(OPTIONAL).split("/")[0] not in folders]
    source = _folder(model, (*rest, *(f"{folder}/config.json" for folder in folders)))
    parts = dict.fromkeys(inside, str(file.absolute()))
    return name, model, assembled(ModelPlan(base, name, model.source, path=str(source), parts=parts), cache)


def _folder(model: BaseModel, files: Sequence[str]) -> Path:
    """Where the weights are; downloads what the Hub's cache lacks."""
    if Path(model.source).is_absolute():
        return Path(model.source)
    from huggingface_hub import snapshot_download

    patterns = [pattern.removeprefix(OPTIONAL) for pattern in files]
    return Path(snapshot_download(model.source, allow_patterns=patterns))


def _prompts(path: Path, kind: Family, model: BaseModel) -> list[Prompt]:
    """The lines of a prompts.txt, completed as a job does it."""
    facts = kind.FACTS
    common = {"steps": facts.prompt_steps, "guidance": facts.prompt_guidance, "cfg": facts.prompt_cfg, **model.defaults}
    common |= {"width": model.resolution, "height": model.resolution}
    found: list[Prompt] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as problem:
        raise SettingsError(f"--prompts {path}: {problem.strerror}.") from problem
    for line in (text for text in lines if text.strip() and not text.startswith("#")):
        text, *flags = re.split(r"\s+--(?=[a-z]\b)", line.strip())
        values: dict[str, Any] = {"seed": 42 + len(found), **common}
        try:
            for flag in flags:
                field, convert = FLAGS[flag[0]]
                values[field] = convert(flag[1:].strip())
        except (KeyError, ValueError) as problem:
            raise SettingsError(f"--prompts {path}: {line!r}: {problem}.") from problem
        for side in ("width", "height"):
            values[side] = max(facts.multiple, values[side] // facts.multiple * facts.multiple)
        found.append(Prompt(text=text, **values))
    if not found:
        raise SettingsError(f"--prompts {path} has no prompt.")
    return found


def _encoded(
    kind: Family,
    folder: Path,
    prompts: list[Prompt],
    several: list[tuple[Modules, float]],
    *,
    device: str,
    dtype: torch.dtype,
) -> dict[str, dict[str, torch.Tensor]]:
    """Texts → embeddings with a batch axis, by encoders as the files change them; these are gone afterwards."""
    texts = list(dict.fromkeys(prepare.prompt_texts(prompts)))
    encoders = kind.load_encoders(folder, device=device, dtype=dtype)
    for component in kind.KEYS.encoders:
        add(getattr(encoders, component), several, component=component)
    found = kind.encode_text(encoders, texts)
    del encoders
    prepare.release()
    return {
        text: {k: v[None].to(device, dtype) for k, v in values.items()}
        for text, values in zip(texts, found, strict=True)
    }
