"""Draw images from prompts, with LoRA files or without, and one contact sheet.

python -m trainer.sample --base BASE_MODEL --lora a.safetensors:0.8 b.safetensors --prompts prompts.txt --out DIR
python -m trainer.sample --base BASE_MODEL --prompt "a red fox --w 768 --d 7" --out DIR

Everything that imports torch is imported late, so that --help and mistakes in the arguments answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from trainer.data import caption_length
from trainer.lora_files.arguments import (
    Parser,
    check_folder,
    load_lora,
    plural,
    read_family,
    run_command,
    split_weights,
)
from trainer.spec.errors import GatedError, OutOfMemoryError, SettingsError, StorageError, UnreachableError
from trainer.spec.family import OPTIONAL, PREFIXES, BaseModel, Facts, Family, base_models, family_names, get_family
from trainer.spec.plan import ModelPlan, Prompt
from trainer.spec.prompts import FLAGS, PromptRequest, complete_prompts, parse_line, parse_lines
from trainer.spec.values import Problems
from trainer.storage import atomic, safetensors_header

if TYPE_CHECKING:
    import torch

    from trainer.lora_files.weights import LoraModules

log = logging.getLogger(__name__)
CACHE = Path.home() / ".cache" / "kiln"
SEED = 42  # the default of --seed, as of PARAMS_SEED
MAX_SEED = 2**32 - 1
IMAGES = "step-00000000-*.png"


def sample_command(arguments: list[str]) -> int:
    """`python -m trainer.sample`; returns the exit code."""
    flags = " ".join(f"--{flag}" for flag in FLAGS)
    parser = Parser("python -m trainer.sample", description="Draw images, with LoRAs or without.")
    parser.add_argument("--base", required=True, help="a value of BASE_MODEL, a folder in diffusers layout, or a file")
    parser.add_argument("--lora", nargs="+", action="extend", default=[], metavar="FILE[:STRENGTH]")
    parser.add_argument("--prompts", type=Path, help=f"a text file with a prompt a line, like a job's: text {flags}")
    parser.add_argument("--prompt", action="append", default=[], help="one prompt, like such a line; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument(
        "--seed", type=int, default=SEED, help=f"of the first prompt; the next adds 1 (default: {SEED})"
    )
    parser.add_argument("--family", choices=family_names(), help="of --base, if it is a folder that does not tell")
    parser.add_argument("--config", help="if --base is a file: the value of BASE_MODEL that has the parts it lacks")
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
    prompts = read_prompts(options.prompts, family.FACTS, base.model, texts=options.prompt, seed=options.seed)
    max_tokens = _max_token_length(options.max_token_length, [path for path, _ in lora_paths], family.FACTS)
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
            draw = _load(family, folder, prompts, loras, device=device, dtype=dtype, max_tokens=max_tokens)
        with torch.no_grad():
            _draw_all(options.out, prompts, draw)
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

    return draw


def _draw_all(out: Path, prompts: Sequence[Prompt], draw: Callable[[Prompt], Any]) -> None:
    """Draw all prompts into `out`, and say which file has which."""
    from trainer.job import contact_sheet, sampling

    for old in out.glob(IMAGES):
        old.unlink()  # draw_all skips images that exist
    try:
        sampling.draw_all(out, prompts, step=0, draw=draw, stopped=lambda: False)
    except OSError as problem:
        raise StorageError(f"--out {out} cannot be written: {problem.strerror or problem}.") from problem
    for path, prompt in zip(sorted(out.glob(IMAGES)), prompts, strict=True):
        log.info(
            "%s: %s (%d x %d, seed %d, %d steps)",
            path, prompt.text, prompt.width, prompt.height, prompt.seed, prompt.steps,
        )  # fmt: skip
    log.info("%s: all in one.", out / contact_sheet.SHEET_NAME)


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
    from trainer.engine.device import release
    from trainer.job import prepare

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


class _Base:
    """--base: its family, its defaults for prompts, and its folder, which may have to be downloaded or converted."""

    def __init__(self, family: str, model: BaseModel, folder: Callable[[], Path]) -> None:
        self.family = family
        self.model = model
        self.folder = folder


def _find_base(options: argparse.Namespace, lora_paths: Sequence[tuple[Path, float]]) -> _Base:
    """The base model by --base: a value of BASE_MODEL, a folder or a file."""
    known = base_models()
    place = Path(options.base)
    if options.base in known:
        name, model = known[options.base]
        files = get_family(name).FACTS.files
        return _Base(name, model, functools.partial(_download, model, files, where=f"--base {options.base}"))
    if place.is_file():
        return _find_file(place, options.config, options.cache)
    if not place.is_dir():
        near = difflib.get_close_matches(options.base.lower(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
        raise SettingsError(f"--base {options.base} is neither a folder, a file, nor a value of BASE_MODEL; {hint}")
    family = _folder_family(place, options.family, lora_paths)
    if family is None:
        choices = ", ".join(family_names())
        raise SettingsError(
            f"--base {place} is a folder without a denoiser of {choices}. Fix: name a folder in diffusers layout (with "
            "model_index.json), a .safetensors file, or a value of BASE_MODEL."
        )
    missing = _missing(place, get_family(family).FACTS.files)
    if missing:
        raise SettingsError(f"--base {place} is not a whole model for {family}: it has no {', '.join(missing)}.")
    model = BaseModel(str(place.absolute()), files_gib=0.0)
    for known_model in get_family(family).FACTS.models.values():
        if Path(known_model.source) == place.absolute():  # a miniature by its folder
            model = known_model
    return _Base(family, model, place.absolute)


def _folder_family(folder: Path, asked: str | None, lora_paths: Sequence[tuple[Path, float]]) -> str | None:
    """The family of a folder: by the names of its denoiser's tensors, or else --family, or that of the first LoRA."""
    found = _denoiser_family(folder)
    if found and asked and found != asked:
        raise SettingsError(f"--family {asked}: --base {folder} is for {found}. Fix: leave --family out.")
    if found or asked:
        return found or asked
    if lora_paths:
        return read_family(lora_paths[0][0], None)[0]
    return None


def _denoiser_family(folder: Path) -> str | None:
    for name in family_names():
        facts = get_family(name).FACTS
        for file in sorted((folder / facts.parts["denoiser"]).glob("*.safetensors")):
            if set(facts.landmarks) & _tensor_names(file):
                return name
    return None


def _tensor_names(file: Path) -> set[str]:
    try:
        return set(safetensors_header.read_header(file).entries)
    except ValueError as problem:
        raise SettingsError(f"--base {file}: {problem}.") from problem


def _missing(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The files and folders that the patterns need and `folder` lacks."""
    missing: dict[str, None] = {}
    for pattern in patterns:
        top = pattern.split("/")[0]
        if not pattern.startswith(OPTIONAL) and not (folder / top).exists():
            missing[top] = None
    return list(missing)


def _find_file(file: Path, config: str | None, cache: Path) -> _Base:
    """A model in one file, converted once into `cache`.

    The parts that it lacks come from the model `config` (a value of BASE_MODEL), or from the family's first model.
    """
    tensor_names = _tensor_names(file)
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

    def folder() -> Path:
        from trainer.base_model.single_file import convert_single_files

        folders = {facts.parts[part] for part in parts}
        others = [pattern for pattern in facts.files if pattern.removeprefix(OPTIONAL).split("/")[0] not in folders]
        files = (*others, *(f"{folder}/config.json" for folder in folders))
        source = _download(model, files, where=f"--config {base}")
        return convert_single_files(ModelPlan(base, name, model.source, path=str(source), parts=parts), cache)

    return _Base(name, model, folder)


def _download(model: BaseModel, files: Sequence[str], *, where: str) -> Path:
    """The folder of the model. Downloads the `files` (patterns) that the Hub's cache lacks.

    Raises GatedError, UnreachableError, StorageError or SettingsError, as a job does.
    """
    if Path(model.source).is_absolute():
        return Path(model.source)
    # late: it takes a while, and most bases need no download
    import httpx
    from huggingface_hub import constants, errors, snapshot_download

    page = f"{constants.ENDPOINT}/{model.source}"
    patterns = [pattern.removeprefix(OPTIONAL) for pattern in files]
    try:
        folder = Path(snapshot_download(model.source, allow_patterns=patterns))
    except errors.GatedRepoError as problem:
        raise GatedError(
            f"{where}: the Hub guards {model.source} by a licence. Open {page}, accept the conditions, and set "
            "HF_TOKEN to a token of the same account."
        ) from problem
    except errors.RepositoryNotFoundError as problem:
        raise SettingsError(
            f"{where}: the Hub knows no {model.source}, or does not show it. Fix: set HF_TOKEN to a token that may "
            f"read {page}."
        ) from problem
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as problem:
        raise UnreachableError(_unreachable(where, page)) from problem
    except httpx.RequestError as problem:
        raise UnreachableError(_unreachable(where, page)) from problem
    except OSError as problem:
        if problem.errno not in atomic.VOLUME_ERRORS:
            raise UnreachableError(_unreachable(where, page)) from problem
        raise StorageError(f"HF_HOME cannot take {model.source}: {problem.strerror}.") from problem
    missing = _missing(folder, files)
    if missing:
        raise UnreachableError(f"{_unreachable(where, page)} The cache lacks {', '.join(missing)}.")
    return folder


def _unreachable(where: str, page: str) -> str:
    return (
        f"{where} is not downloaded yet, and {page} cannot be reached. Fix: check the network and HF_HUB_OFFLINE, or "
        "name a folder or file that is here."
    )


def _check_out(out: Path) -> None:
    """Refuse a folder that has a job's samples: they would be replaced."""
    check_folder(out, "--out")
    own = set(out.glob(IMAGES))
    if (out.parent / "status.json").exists() or set(out.glob("step-*.png")) - own:
        raise SettingsError(f"--out {out} holds the samples of a job. Fix: name another folder.")


def read_prompts(
    path: Path | None, facts: Facts, model: BaseModel, *, texts: Sequence[str] = (), seed: int = SEED
) -> tuple[Prompt, ...]:
    """The lines of a prompts.txt and single prompts, completed as a job does it, with the model's resolution.

    Raises SettingsError with every line that is wrong.
    """
    problems = Problems()
    requests: list[PromptRequest] = []
    for number, text in enumerate(texts, start=1):
        place = "--prompt" if len(texts) == 1 else f"--prompt {number}"
        request = parse_line(text, place=place, problems=problems)
        if request is not None:
            requests.append(request)
    if path is not None:
        requests += parse_lines(_read_text(path), origin=str(path), problems=problems)
    prompts = complete_prompts(
        requests,
        facts=facts,
        model=model,
        resolution=(model.resolution, model.resolution),
        seed=seed,
        prefix="",
        problems=problems,
    )
    problems.raise_if_any(f"--prompts {path} cannot be used" if path else "--prompt cannot be used")
    if not prompts:
        raise SettingsError(f"--prompts {path} has no prompt.")
    return prompts


def _read_text(path: Path) -> str:
    """The text of a file of prompts."""
    if path.suffix.lower() in (".json", ".toml", ".yaml", ".yml"):
        raise SettingsError(
            f"--prompts {path}: this command reads text files with a prompt a line, like a job's prompts.txt. Fix: "
            f"write the prompts so, or give each with --prompt."
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise SettingsError(f"--prompts {path}: {problem.strerror}.") from problem
    except UnicodeDecodeError as problem:
        raise SettingsError(f"--prompts {path} is not UTF-8 text.") from problem


if __name__ == "__main__":
    sys.exit(sample_command(sys.argv[1:]))
