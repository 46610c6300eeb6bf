"""Draw images from prompts, with LoRA files or without, and one contact sheet.

python -m trainer.sample --base BASE_MODEL --lora a.safetensors:0.8 b.safetensors --prompts prompts.txt --out DIR
python -m trainer.sample --base BASE_MODEL --prompt "a red fox --w 768 --d 7" --out DIR

Everything that imports torch is imported late, so that --help and mistakes in the arguments answer at once.
"""

from __future__ import annotations

from trainer.process import guard

if __name__ == "__main__":
    guard.begin()  # before everything else is imported: from here on a stop is a stop

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from trainer.base_model.named import OPTIONS, Asked, NamedBase, find_base
from trainer.data import caption_length
from trainer.lora_files.arguments import (
    check_folder,
    load_lora,
    plural,
    read_family,
    run_command,
    split_weights,
)
from trainer.process import streams
from trainer.spec.commands.parser import Parser
from trainer.spec.documents import forms
from trainer.spec.documents.prompt_trees import parse_tree
from trainer.spec.errors import OutOfMemoryError, SettingsError, StorageError
from trainer.spec.family import BaseModel, Facts, Family, family_names, get_family
from trainer.spec.plan import Prompt
from trainer.spec.prompts import FLAGS, PromptRequest, complete_prompts, idle_guidance, parse_line, parse_lines
from trainer.spec.values import Problems
from trainer.storage import own_files
from trainer.storage.read import read_regular

if TYPE_CHECKING:
    import torch

    from trainer.lora_files.weights import LoraModules

log = logging.getLogger(__name__)
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "kiln"  # noqa: PTH111 (never raises)
SEED = 42  # the default of --seed, as of PARAMS_SEED
MAX_SEED = 2**32 - 1
# Option → the part that it names: of several that share one, the last stands for the one that the family has.
PARTS = {option: part for part, option in OPTIONS.items() if part != "denoiser"}


def sample_command(arguments: list[str]) -> int:
    """`python -m trainer.sample`; returns the exit code."""
    flags = " ".join(f"--{flag}" for flag in FLAGS)
    parser = Parser("python -m trainer.sample", description="Draw images, with LoRAs or without.")
    parser.add_argument("--base", required=True, help="a value of BASE_MODEL, a folder in diffusers layout, or a file")
    parser.add_argument("--lora", nargs="+", action="extend", default=[], metavar="FILE[:STRENGTH]")
    parser.add_argument(
        "--prompts", type=Path, help=f"a file as SAMPLE_PROMPTS: a prompt a line ({flags}), JSON, YAML or TOML"
    )
    parser.add_argument("--prompt", action="append", default=[], help="one prompt, like such a line; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument(
        "--seed", type=int, default=SEED, help=f"of the first prompt; the next adds 1 (default: {SEED})"
    )
    parser.add_argument("--family", choices=family_names(), help="of --base, if it is a folder that does not tell")
    parser.add_argument(
        "--config",
        metavar="MODEL|FOLDER",
        help="if --base is a file: the value of BASE_MODEL, or a folder, that has what no file holds",
    )
    for option, part in PARTS.items():
        parser.add_argument(
            option, dest=part, metavar="FILE", help="this part of the model from a file or folder of its own"
        )
    parser.add_argument(
        "--max-token-length",
        type=int,
        metavar="N",
        help="as PARAMS_MAX_TOKEN_LENGTH (default: what the LoRA was trained with)",
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"folder for converted files (default: {CACHE})")
    options = parser.parse_args(arguments)
    if options.prompts is None and not options.prompt:
        parser.error("give --prompt TEXT, or --prompts FILE")
    if not 0 <= options.seed <= MAX_SEED:
        parser.error(f"--seed {options.seed} is out of range: 0 to {MAX_SEED}")
    return run_command(lambda: _sample(options))


# ---- images


def _sample(options: argparse.Namespace) -> None:
    """Everything that can be wrong with the arguments is found before a model is downloaded or loaded."""
    lora_paths = split_weights(options.lora, "--lora")
    base = _find_base(options, lora_paths)
    family = get_family(base.family)
    prompts = read_prompts(options.prompts, base.facts, base.model, texts=options.prompt, seed=options.seed)
    max_tokens = _max_token_length(options.max_token_length, [path for path, _ in lora_paths], base.facts)
    _check_out(options.out)
    loras = [(load_lora(path, base.family), strength) for path, strength in lora_paths]
    folder = base.folder()

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    images = plural(len(prompts), "image")
    log.info("Drawing %s with %s by %s on %s.", images, plural(len(loras), "LoRA"), options.base, device)
    try:
        with _named_errors(options.base):
            _warn_of_long_prompts(base.facts, folder, prompts, max_tokens=max_tokens)
            draw = _load(family, folder, prompts, loras, device=device, dtype=dtype, max_tokens=max_tokens)
        with torch.no_grad():
            _draw_all(options.out, prompts, draw, label=_label(lora_paths))
    except torch.OutOfMemoryError as problem:
        raise OutOfMemoryError(
            f"The GPU's memory does not hold this: {str(problem).splitlines()[0]} Fix: smaller --w and --h, or end "
            "other programs on the GPU."
        ) from problem


@contextlib.contextmanager
def _named_errors(base: str) -> Iterator[None]:
    """The errors of the libraries that load the model name it."""
    try:
        yield
    except (OSError, SafetensorError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise SettingsError(f"--base {base} cannot be loaded: {reason}") from problem


def _warn_of_long_prompts(facts: Facts, folder: Path, prompts: Sequence[Prompt], *, max_tokens: int) -> None:
    reader = caption_length.load_reader(facts, folder, max_tokens=max_tokens)
    for line in caption_length.describe_prompts(reader, prompts) if reader else []:
        log.warning("%s", line)


def _load(
    family: Family,
    folder: Path,
    prompts: Sequence[Prompt],
    loras: Sequence[tuple[LoraModules, float]],
    *,
    device: str,
    dtype: torch.dtype,
    max_tokens: int,
) -> Callable[[Prompt], Any]:
    """What draws a prompt. The text encoders come and go before the denoiser is loaded: both need not fit at once."""
    from transformers.utils import logging as transformers_logging

    from trainer.base_model import weight_check

    transformers_logging.disable_progress_bar()
    texts = _encode_prompts(family, folder, prompts, loras, device=device, dtype=dtype, max_tokens=max_tokens)
    denoiser = family.load_denoiser(folder, device=device, dtype=dtype)
    weight_check.check_weights(denoiser.named_parameters(), folder / family.FACTS.parts["denoiser"])
    apply_loras(denoiser, loras, component=family.FACTS.lora_prefix)
    vae = family.load_vae(folder, device=device)

    def draw(prompt: Prompt) -> Any:
        text = texts[prompt.text]
        negative = texts[prompt.negative]
        return family.sample(denoiser, vae, folder, prompt=prompt, text=text, negative=negative)

    return draw


def _label(lora_paths: Sequence[tuple[Path, float]]) -> str:
    """What the images were drawn with, for the contact sheet."""
    if not lora_paths:
        return "without a LoRA"
    return " + ".join(f"{path.stem} at {strength:g}" for path, strength in lora_paths)


def _draw_all(out: Path, prompts: Sequence[Prompt], draw: Callable[[Prompt], Any], *, label: str) -> None:
    """Draw all prompts into `out`, and say which file has which. `label`: above the images of the sheet."""
    from trainer.job import sampling
    from trainer.job.reporting.contact_sheet import contact_sheet

    for old in _drawn_before(out):
        old.unlink()  # those that exist are not missing
    try:
        wanted = [number for _, number in sampling.missing(out, prompts, step=0)]
        sampling.draw_all(out, prompts, wanted, step=0, draw=draw, stopped=lambda: False)
        contact_sheet(out, prompts, labels={0: label})
    except OSError as problem:
        raise StorageError(f"--out {out} cannot be written: {problem.strerror or problem}.") from problem
    for number, prompt in enumerate(prompts):
        log.info(
            "%s: %s (%d x %d, seed %d, %d steps)",
            out / f"step-00000000-{number:02d}.png",
            prompt.text, prompt.width, prompt.height, prompt.seed, prompt.steps,
        )  # fmt: skip
    log.info("%s: all in one.", out / own_files.SHEET_NAME)


def _drawn_before(out: Path) -> list[Path]:
    """The images of this command in a folder, as their own text chunk says. A user's images stay."""
    from trainer.job.sampling import drawn_with

    found = []
    for path in sorted(out.iterdir()):
        match = own_files.SAMPLE_NAME.fullmatch(path.name)
        if match and int(match[1]) == 0 and drawn_with(path) is not None:
            found.append(path)
    return found


def apply_loras(model: Any, loras: Sequence[tuple[LoraModules, float]], *, component: str) -> None:
    """Merge LoRAs, each times its strength, into the weights of `model`, one after the other.

    `component`: the model's name in diffusers' pipeline; modules of others are ignored. With DoRA, the strength scales
    the whole change of the weight. Raises SettingsError for modules that the model lacks.
    """
    import torch

    prefix = f"{component}."
    with torch.no_grad():
        for modules, strength in loras:
            for name, in_file in modules.items():
                if not name.startswith(prefix):
                    continue
                weight = _find_layer(model, name.removeprefix(prefix)).weight
                lora = in_file.without_kernel() if weight.ndim == 2 else in_file
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
    from trainer.data import encode
    from trainer.engine.device import release

    texts = list(dict.fromkeys(encode.prompt_texts(prompts)))
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


def _find_base(options: argparse.Namespace, lora_paths: Sequence[tuple[Path, float]]) -> NamedBase:
    """The base model by --base and the options for its parts."""
    parts = {part: getattr(options, part) for part in PARTS.values() if getattr(options, part) is not None}

    def lora_family() -> str | None:
        return read_family(lora_paths[0][0], None)[0] if lora_paths else None

    return find_base(
        Asked(
            base=options.base,
            config=options.config,
            family=options.family,
            parts=parts,
            lora_family=lora_family,
            cache=options.cache,
        )
    )


def _check_out(out: Path) -> None:
    """Refuse a folder that has a job's samples: they would be replaced."""
    check_folder(out, "--out")
    matches = [own_files.SAMPLE_NAME.fullmatch(path.name) for path in out.iterdir()]
    has_steps = any(match and int(match[1]) > 0 for match in matches)
    if (out.parent / "status.json").exists() or has_steps:
        raise SettingsError(f"--out {out} holds the samples of a job. Fix: name another folder.")


def read_prompts(
    path: Path | None, facts: Facts, model: BaseModel, *, texts: Sequence[str] = (), seed: int = SEED
) -> tuple[Prompt, ...]:
    """The prompts of a file and single prompts, completed as a job does it, with the model's resolution.

    Raises SettingsError with every line that is wrong.
    """
    problems = Problems()
    notes: list[str] = []  # what was read otherwise than it is written
    requests: list[PromptRequest] = []
    for number, text in enumerate(texts, start=1):
        place = "--prompt" if len(texts) == 1 else f"--prompt {number}"
        request = parse_line(text, place=place, problems=problems, notes=notes)
        if request is not None:
            requests.append(request)
    if path is not None:
        requests += _read_requests(path, problems, notes)
    prompts = complete_prompts(
        requests,
        facts=facts,
        model=model,
        resolution=(model.resolution, model.resolution),
        seed=seed,
        prefix="",
        problems=problems,
        notes=notes,
    )
    notes += idle_guidance(requests, facts, model)
    problems.raise_if_any(f"--prompts {path} cannot be used" if path else "--prompt cannot be used")
    if not prompts:
        raise SettingsError(f"--prompts {path} has no prompt.")
    for note in notes:
        log.info("%s.", note.rstrip("."))
    return prompts


def _read_requests(path: Path, problems: Problems, notes: list[str]) -> Sequence[PromptRequest]:
    """The prompts of a file: lines, or a tree in JSON, YAML or TOML."""
    try:
        text = forms.decode(read_regular(path, limit=forms.MAX_BYTES))
    except OSError as problem:
        raise SettingsError(f"--prompts {path}: {problem.strerror}.") from problem
    except UnicodeDecodeError as problem:
        raise SettingsError(f"--prompts {path} is not UTF-8 text. Fix: save it as UTF-8.") from problem
    text_format = forms.format_of(path.name, "txt")
    if text_format == "txt":
        return parse_lines(text, origin=str(path), problems=problems, notes=notes)
    tree = forms.parse_text(text, text_format=text_format, origin=str(path), problems=problems, notes=notes)
    return () if tree is None else parse_tree(tree, origin=str(path), problems=problems, notes=notes)


if __name__ == "__main__":
    streams.protect()
    sys.exit(sample_command(sys.argv[1:]))
