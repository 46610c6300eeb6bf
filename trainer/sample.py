"""Draw images from a prompts.txt, with LoRA files or without, and one contact sheet.

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

from trainer.base_model import weight_check
from trainer.base_model.single_file import convert_single_files
from trainer.data import caption_length
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
    parser = argparse.ArgumentParser("python -m trainer.sample", description="Draw images, with LoRAs or without.")
    parser.add_argument("--base", required=True, help="a value of BASE_MODEL, a folder in diffusers layout, or a file")
    parser.add_argument("--lora", nargs="+", action="extend", default=[], metavar="FILE[:WEIGHT]")
    parser.add_argument("--prompts", type=Path, required=True, help="like a job's: text --w --h --d --s --g --l --n")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument("--family", choices=family_names(), help="of --base, if it is a folder and --lora is unset")
    parser.add_argument("--config", help="if --base is a file: the value of BASE_MODEL that has the parts it lacks")
    parser.add_argument(
        "--max-token-length",
        type=int,
        metavar="N",
        help="as PARAMS_MAX_TOKEN_LENGTH (default: what the LoRA was trained with)",
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"folder for converted files (default: {CACHE})")
    options = parser.parse_args(arguments)
    return run_command(lambda: _sample(options))


# ---- images


def _sample(options: argparse.Namespace) -> None:
    lora_paths = [split_weight(text) for text in options.lora]
    name, model, folder = _find_base(options, lora_paths)
    family = get_family(name)
    loras = [(load_lora(path, name), strength) for path, strength in lora_paths]
    prompts = read_prompts(options.prompts, family.FACTS, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # The text encoders come and go before the denoiser is loaded, so that both need not fit at once.
    max_tokens = _max_token_length(options.max_token_length, [path for path, _ in lora_paths], family.FACTS)
    reader = caption_length.load_reader(family.FACTS, folder, max_tokens=max_tokens)
    for line in caption_length.describe_prompts(reader, prompts) if reader else []:
        log.warning("%s", line)
    texts = _encode_prompts(family, folder, prompts, loras, device=device, dtype=dtype, max_tokens=max_tokens)
    denoiser = family.load_denoiser(folder, device=device, dtype=dtype)
    weight_check.check_weights(denoiser.named_parameters(), folder / family.FACTS.parts["denoiser"])
    apply_loras(denoiser, loras, component=family.FACTS.lora_prefix)
    vae = family.load_vae(folder, device=device)

    def draw(prompt: Prompt) -> Any:
        text = texts[prompt.text]
        negative = texts[prompt.negative]
        return family.sample(denoiser, vae, folder, prompt=prompt, text=text, negative=negative)

    for old in options.out.glob("step-00000000-*.png"):
        old.unlink()  # draw_all skips images that exist
    with torch.no_grad():
        count = sampling.draw_all(options.out, prompts, step=0, draw=draw, stopped=lambda: False)
    log.info("%d images with %d LoRAs are in %s.", count, len(lora_paths), options.out)


def apply_loras(model: Any, loras: Sequence[tuple[LoraModules, float]], *, component: str) -> None:
    """Merge LoRAs, each times its strength, into the weights of `model`, one after the other.

    `component`: the model's name in diffusers' pipeline; modules of others are ignored. With DoRA, the strength scales
    the whole change of the weight. Raises SettingsError for modules that the model lacks.
    """
    prefix = f"{component}."
    with torch.no_grad():
        for modules, strength in loras:
            for name, lora in modules.items():
                if not name.startswith(prefix):
                    continue
                weight = _find_layer(model, name.removeprefix(prefix)).weight
                shape = (lora.up.shape[0], *lora.down.shape[1:])
                if shape != weight.shape:
                    layer_name = name.removeprefix(prefix)
                    raise SettingsError(
                        f"{layer_name} is {list(shape)} in the LoRA and {list(weight.shape)} in the model."
                    )
                before = weight.float()
                weight.copy_(before + strength * (lora.applied_to(before) - before))


def _find_layer(model: Any, name: str) -> Any:
    """A layer by its name in files. These have the level `text_model`, which some of transformers' classes lack."""
    for path in (name, name.removeprefix("text_model.")):
        with contextlib.suppress(AttributeError):
            return model.get_submodule(path)
    raise SettingsError(f"The base model has no layer {name}.")


def _encode_prompts(
    family: Family,
    folder: Path,
    prompts: Sequence[Prompt],
    loras: Sequence[tuple[LoraModules, float]],
    *,
    device: str,
    dtype: torch.dtype,
    max_tokens: int,
) -> dict[str, dict[str, torch.Tensor]]:
    """Texts → their embeddings, with a batch axis, by the text encoders with the LoRAs. Frees the encoders."""
    texts = list(dict.fromkeys(prepare.prompt_texts(prompts)))
    encoders = family.load_encoders(folder, device=device, dtype=dtype)
    for component in family.LORA_KEYS.encoders:
        apply_loras(getattr(encoders, component), loras, component=component)
    encoded = family.encode_text(encoders, texts, max_tokens=max_tokens)
    del encoders
    release()
    embeddings = {}
    for text, tensors in zip(texts, encoded, strict=True):
        embeddings[text] = {key: tensor[None].to(device, dtype) for key, tensor in tensors.items()}
    return embeddings


# ---- arguments


def _max_token_length(asked: int | None, lora_paths: Sequence[Path], facts: Facts) -> int:
    """How many tokens of a prompt CLIP reads: as asked for, or the most that one of the LoRAs was trained with."""
    lengths = [facts.max_token_lengths[0]]
    if asked is not None:
        lengths = [asked]
    else:
        for path in lora_paths:
            written = read_family(path, facts.name)[1].get("ss_max_token_length", "")
            if written.isdecimal() and int(written) in facts.max_token_lengths:
                lengths.append(int(written))
    if max(lengths) not in facts.max_token_lengths:
        allowed = ", ".join(map(str, facts.max_token_lengths))
        raise SettingsError(f"--max-token-length {asked} is not one of {facts.name}. Allowed: {allowed}.")
    return max(lengths)


def _find_base(options: argparse.Namespace, lora_paths: Sequence[tuple[Path, float]]) -> tuple[str, BaseModel, Path]:
    """The family, the model, and the folder of its weights.

    A folder's family is --family, or that of the first LoRA; a file's is known by the names of its tensors.
    """
    known = base_models()
    place = Path(options.base)
    if options.base in known:
        name, model = known[options.base]
        return name, model, _download(model, get_family(name).FACTS.files)
    if place.is_file():
        return _convert_file(place, options.config, options.cache)
    if not place.is_dir():
        raise SettingsError(f"--base {place} is neither a folder, a file, nor one of {', '.join(sorted(known))}.")
    if options.family is None and not lora_paths:
        choices = ", ".join(family_names())
        raise SettingsError(f"--base {place} is a folder. Set --family to its family: {choices}.")
    name = options.family or read_family(lora_paths[0][0], None)[0]
    return name, BaseModel(str(place.absolute()), files_gib=0.0), place.absolute()


def _convert_file(file: Path, config: str | None, cache: Path) -> tuple[str, BaseModel, Path]:
    """A model in one file, converted once into `cache`.

    The parts that it lacks come from the model `config` (a value of BASE_MODEL), or from the family's first model.
    """
    try:
        tensor_names = safetensors_header.read_header(file).entries.keys()
    except ValueError as problem:
        raise SettingsError(f"--base {file}: {problem}.") from problem
    denoiser_names = {name.removeprefix(PREFIXES["denoiser"][0]) for name in tensor_names}
    name = next((n for n in family_names() if denoiser_names & set(get_family(n).FACTS.landmarks)), None)
    if name is None:
        raise SettingsError(f"--base {file} has no denoiser of {', '.join(family_names())}.")
    facts = get_family(name).FACTS
    base = config or next(iter(facts.models))
    if base not in facts.models:
        raise SettingsError(f"--config {base} is not one of {', '.join(facts.models)}, and {file} is for {name}.")
    model = facts.models[base]
    parts = {}
    for part in facts.parts:
        if part == "denoiser" or any(tensor.startswith(PREFIXES[part]) for tensor in tensor_names):
            parts[part] = str(file.absolute())
    folders = {facts.parts[part] for part in parts}
    others = [pattern for pattern in facts.files if pattern.removeprefix(OPTIONAL).split("/")[0] not in folders]
    source = _download(model, (*others, *(f"{folder}/config.json" for folder in folders)))
    plan = ModelPlan(base, name, model.source, path=str(source), parts=parts)
    return name, model, convert_single_files(plan, cache)


def _download(model: BaseModel, files: Sequence[str]) -> Path:
    """The folder of the model. Downloads the `files` (patterns) that the Hub's cache lacks."""
    if Path(model.source).is_absolute():
        return Path(model.source)
    from huggingface_hub import snapshot_download  # late: it takes a while, and most bases need no download

    patterns = [pattern.removeprefix(OPTIONAL) for pattern in files]
    return Path(snapshot_download(model.source, allow_patterns=patterns))


def read_prompts(path: Path, facts: Facts, model: BaseModel) -> tuple[Prompt, ...]:
    """The lines of a prompts.txt, parsed and completed as a job does it, with the model's resolution.

    Raises SettingsError with every line that is wrong.
    """
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


if __name__ == "__main__":
    sys.exit(sample_command(sys.argv[1:]))
