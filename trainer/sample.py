"""prompts.txt → pictures at fixed seeds, and one contact sheet a run (rows: prompts; columns: steps).

python -m trainer.sample --base BASE_MODEL --lora a.safetensors:0.8 b.safetensors --prompts prompts.txt --out DIR
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.base_model.single_file import convert_single_files
from trainer.engine.device import release
from trainer.job import prepare, sampling
from trainer.lora_files.arguments import load_lora, read_family, run_command, split_weight
from trainer.lora_files.weights import LoraModules
from trainer.spec.errors import SettingsError
from trainer.spec.family import OPTIONAL, PREFIXES, BaseModel, Facts, Family, base_models, family_names, get_family
from trainer.spec.plan import ModelPlan, Prompt
from trainer.spec.prompts import complete_prompts, parse_lines
from trainer.spec.values import Problems
from trainer.storage import safetensors_header

log = logging.getLogger(__name__)
CACHE = Path.home() / ".cache" / "kiln"
SEED = 42  # of the first prompt, unless its line has --d


def sample_command(arguments: list[str]) -> int:
    """`python -m trainer.sample`; returns the exit code."""
    parser = argparse.ArgumentParser("python -m trainer.sample", description="Draw pictures, with LoRAs or without.")
    parser.add_argument("--base", required=True, help="a value of BASE_MODEL, a folder in diffusers layout, or a file")
    parser.add_argument("--lora", nargs="+", action="extend", default=[], metavar="FILE[:WEIGHT]")
    parser.add_argument("--prompts", type=Path, required=True, help="like a job's: text --w --h --d --s --g --l --n")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--family", choices=family_names(), help="if --base is a folder and no LoRA tells")
    parser.add_argument("--config", help="if --base is a file: the value of BASE_MODEL that has what it lacks")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where files are converted to ({CACHE})")
    asked = parser.parse_args(arguments)
    return run_command(lambda: _sample(asked))


# ---- pictures


def _sample(asked: argparse.Namespace) -> None:
    several = [split_weight(text) for text in asked.lora]
    name, model, folder = _base(asked, several)
    kind = get_family(name)
    loaded = [(load_lora(path, name), weight) for path, weight in several]
    prompts = read_prompts(asked.prompts, kind.FACTS, model)
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
        count = sampling.draw_all(asked.out, prompts, step=0, draw=draw, stopped=lambda: False)
    log.info("%d pictures with %d LoRAs are in %s.", count, len(several), asked.out)


def add(model: Any, several: list[tuple[LoraModules, float]], *, component: str) -> None:
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
            weight.copy_(before + strength * (adapter.applied_to(before) - before))


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
        return name, model, _folder(model, get_family(name).FACTS.files)
    if place.is_file():
        return _single(place, asked.config, asked.cache)
    if not place.is_dir():
        raise SettingsError(f"--base {place} is neither a folder, a file, nor one of {', '.join(sorted(known))}.")
    if asked.family is None and not several:
        choices = ", ".join(family_names())
        raise SettingsError(f"--base {place} is a folder: --family says what is in it, one of {choices}.")
    name = asked.family or read_family(several[0][0], None)[0]
    return name, BaseModel(str(place.absolute()), files_gib=0.0), place.absolute()


def _single(file: Path, config: str | None, cache: Path) -> tuple[str, BaseModel, Path]:
    """A model in one file: converted once, into `cache`. What it lacks is `config`'s, or the family's first model's."""
    try:
        found = safetensors_header.read_header(file).entries.keys()
    except ValueError as problem:
        raise SettingsError(f"--base {file}: {problem}.") from problem
    denoisers = {name.removeprefix(PREFIXES["denoiser"][0]) for name in found}
    name = next((n for n in family_names() if denoisers & set(get_family(n).FACTS.landmarks)), None)
    if name is None:
        raise SettingsError(f"--base {file} has no denoiser of {', '.join(family_names())}.")
    facts = get_family(name).FACTS
    base = config or next(iter(facts.models))
    if base not in facts.models:
        raise SettingsError(f"--config {base} is not one of {', '.join(facts.models)}, and {file} is for {name}.")
    inside = [p for p in facts.parts if p == "denoiser" or any(n.startswith(PREFIXES[p]) for n in found)]
    model, folders = facts.models[base], {facts.parts[part] for part in inside}
    rest = [f for f in facts.files if f.removeprefix(OPTIONAL).split("/")[0] not in folders]
    source = _folder(model, (*rest, *(f"{folder}/config.json" for folder in folders)))
    parts = dict.fromkeys(inside, str(file.absolute()))
    return name, model, convert_single_files(ModelPlan(base, name, model.source, path=str(source), parts=parts), cache)


def _folder(model: BaseModel, files: Sequence[str]) -> Path:
    """Where the weights are; downloads what the Hub's cache lacks."""
    if Path(model.source).is_absolute():
        return Path(model.source)
    from huggingface_hub import snapshot_download

    patterns = [pattern.removeprefix(OPTIONAL) for pattern in files]
    return Path(snapshot_download(model.source, allow_patterns=patterns))


def read_prompts(path: Path, facts: Facts, model: BaseModel) -> tuple[Prompt, ...]:
    """The lines of a prompts.txt, parsed and completed as a job does it, with the model's resolution."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise SettingsError(f"--prompts {path}: {problem.strerror}.") from problem
    except UnicodeDecodeError as problem:
        raise SettingsError(f"--prompts {path} is not UTF-8 text.") from problem
    problems = Problems()
    requests = parse_lines(text, origin=str(path), problems=problems)
    prompts = complete_prompts(
        requests,
        facts=facts,
        model=model,
        resolution=(model.resolution, model.resolution),
        seed=SEED,
        prefix="",
        problems=problems,
    )
    problems.raise_if_any(f"--prompts {path} cannot be used")
    if not prompts:
        raise SettingsError(f"--prompts {path} has no prompt.")
    return prompts


def _encoded(
    kind: Family,
    folder: Path,
    prompts: Sequence[Prompt],
    several: list[tuple[LoraModules, float]],
    *,
    device: str,
    dtype: torch.dtype,
) -> dict[str, dict[str, torch.Tensor]]:
    """Texts → embeddings with a batch axis, by encoders as the files change them; these are gone afterwards."""
    texts = list(dict.fromkeys(prepare.prompt_texts(prompts)))
    encoders = kind.load_encoders(folder, device=device, dtype=dtype)
    for component in kind.LORA_KEYS.encoders:
        add(getattr(encoders, component), several, component=component)
    found = kind.encode_text(encoders, texts)
    del encoders
    release()
    return {
        text: {k: v[None].to(device, dtype) for k, v in values.items()}
        for text, values in zip(texts, found, strict=True)
    }


if __name__ == "__main__":
    import sys

    sys.exit(sample_command(sys.argv[1:]))
