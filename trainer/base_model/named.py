"""The base model that a command line names: a value of BASE_MODEL, a folder, or files, one for each part.

A job's plan is made by the entrypoint; this is its counterpart for `python -m trainer.sample`. It refuses the same
files, and like a job it needs neither a token nor a gated repository where every part is a local file.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.base_model import configs, hub_files, model_folder, weight_kinds, without_weights
from trainer.spec.errors import SettingsError
from trainer.spec.family import PREFIXES, BaseModel, Facts, base_models, facts_of, family_names, get_family
from trainer.spec.plan import ModelPlan

log = logging.getLogger(__name__)
LEFT_OUT = "none"  # the value of --t5 and the others that leaves the part out
# Part → the option that names its file.
OPTIONS = {"denoiser": "--base", "vae": "--vae", "clip_l": "--clip-l", "clip_g": "--clip-g", "t5": "--t5"}
OPTIONS |= dict.fromkeys(weight_kinds.LANGUAGE_MODELS, "--text-encoder")
CONFIG = "--config "


@dataclass(frozen=True)
class NamedBase:
    """A base model: its family and facts, its defaults for prompts, and its folder, which may be downloaded or
    converted.
    """

    family: str
    facts: Facts
    model: BaseModel
    folder: Callable[[], Path]


@dataclass(frozen=True)
class Asked:
    """What the command line says about the base model."""

    base: str  # --base
    config: str | None  # --config
    family: str | None  # --family
    parts: Mapping[str, str]  # part → the value of its option, as far as it is given
    lora_family: Callable[[], str | None]  # the family of the LoRAs, for a folder that does not tell its own
    cache: Path  # for converted weights


def find_base(asked: Asked) -> NamedBase:
    """The base model by --base and the options beside it. Raises SettingsError for what is wrong with them."""
    known = base_models()
    place = Path(asked.base).expanduser()
    if asked.base in known:
        name, model = known[asked.base]
        source = model.source
        _no_config(asked)
        plan = ModelPlan(asked.base, name, source, parts=_chosen_parts(asked, facts_of(name, asked.base), model))
    elif place.is_file():
        plan = _plan_file(asked, place)
    elif place.is_dir():
        _no_config(asked)
        plan = _plan_folder(asked, place)
    else:
        near = difflib.get_close_matches(asked.base.lower(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
        raise SettingsError(f"--base {asked.base} is neither a folder, a file, nor a value of BASE_MODEL; {hint}")
    if asked.family and asked.family != plan.family:
        raise SettingsError(f"--family {asked.family}: --base {asked.base} is for {plan.family}. Fix: leave it out.")
    facts = facts_of(plan.family, plan.base)
    return NamedBase(plan.family, facts, _defaults(plan), lambda: _folder(plan, asked))


def _no_config(asked: Asked) -> None:
    if asked.config is not None:
        raise SettingsError(f"--config {asked.config}: it goes with a --base that is a file. Fix: leave it out.")


def _defaults(plan: ModelPlan) -> BaseModel:
    """The model whose defaults for prompts count."""
    facts = facts_of(plan.family, plan.base)
    if plan.path and facts.distilled_defaults and configs.is_distilled(Path(plan.path)):
        return BaseModel(plan.source, files_gib=0.0, defaults=facts.distilled_defaults)
    known = base_models().get(plan.base)
    if known is not None:
        return known[1]
    for model in facts.models.values():
        if model.source == plan.source:  # a miniature by its folder
            return model
    return BaseModel(plan.source, files_gib=0.0)


def _folder(plan: ModelPlan, asked: Asked) -> Path:
    """The whole model in diffusers' layout: downloads and converts what is not here yet."""
    from trainer.base_model.single_file import convert_single_files

    facts = facts_of(plan.family, plan.base)
    patterns = model_folder.file_patterns(facts, plan.parts)
    if published := without_weights.published(plan):
        hub_files.bring_vocabularies(
            without_weights.missing(plan, published, hub_cache=None, option=CONFIG), option=CONFIG
        )
        source = without_weights.assemble(plan, published, hub_cache=None)
    elif plan.path:
        source = Path(plan.path)
    else:
        where = f"--base {plan.base}" if asked.base == plan.base else f"{CONFIG}{plan.base}"
        with hub_files.advised(lambda: without_weights.missing_parts(plan, OPTIONS, separator=" ")):
            source = hub_files.bring_model(base_models()[plan.base][1], facts, patterns, where=where)
    return convert_single_files(replace(plan, path=str(source)), asked.cache)


# ---- a folder


def _plan_folder(asked: Asked, folder: Path) -> ModelPlan:
    family = _folder_family(folder, asked)
    if family is None:
        choices = ", ".join(family_names())
        raise SettingsError(
            f"--base {folder} is a folder without a denoiser of {choices}. Fix: name a folder in diffusers layout "
            "(with model_index.json), a .safetensors file, or a value of BASE_MODEL."
        )
    path = str(folder.absolute())
    base = _base_of_folder(folder, family) or path
    facts = facts_of(family, base)
    parts = _chosen_parts(asked, facts, None)
    model_folder.check_folder(f"--base {folder}", folder, model_folder.file_patterns(facts, parts), facts)
    return ModelPlan(base, family, path, path=path, parts=parts)


def _base_of_folder(folder: Path, family: str) -> str | None:
    """The first base model of a family that has a pipeline of its own, if the folder's index names that one."""
    if not (folder / configs.INDEX).is_file():
        return None
    pipeline = configs.pipeline_name(folder)
    for base, model in get_family(family).FACTS.models.items():
        if pipeline in model.own_facts.get("pipelines", ()):
            return base
    return None


def _folder_family(folder: Path, asked: Asked) -> str | None:
    """The family of a folder: by the names of its denoiser's tensors, or else --family, or that of the first LoRA."""
    for name in family_names():
        facts = get_family(name).FACTS
        for file in sorted((folder / facts.parts["denoiser"]).glob("*.safetensors")):
            if set(facts.landmarks) & model_folder.tensors(file):
                return name
    return asked.family or asked.lora_family()


# ---- files


def _plan_file(asked: Asked, file: Path) -> ModelPlan:
    """A model in one file or several. What no file holds comes from --config, or from the base that the file is of."""
    where = f"--base {file}"
    if problem := model_folder.foreign_problem(file.name) or model_folder.damage(file):
        raise SettingsError(f"{where} {problem}.")
    entries = model_folder.read(file).entries
    if tool := weight_kinds.quantised(entries):
        raise SettingsError(f"{where} is quantised by {tool}, which is not read. {weight_kinds.QUANTISED_FIX}.")
    if found := weight_kinds.addition(entries):
        fix = f"--base MODEL --lora {file}" if found[0] == "a LoRA" else "name the base model itself"
        raise SettingsError(f"{where} is {found[0]}, not a base model: it has no denoiser. Fix: {fix}.")
    if other := weight_kinds.lookalike(entries):
        raise SettingsError(f"{where} is {other}, which is not one of {', '.join(family_names())}.")
    bare = weight_kinds.bare_names(entries, "denoiser")
    name = next((n for n in family_names() if bare.keys() & set(get_family(n).FACTS.landmarks)), None)
    if name is None:
        part = weight_kinds.part_of(entries)
        fix = f" It is {weight_kinds.part_name(part)}: {OPTIONS[part]} {file}." if part else ""
        raise SettingsError(f"{where} has no denoiser of {', '.join(family_names())}.{fix}")
    base, source = _config(asked, file, get_family(name).FACTS, bare)
    facts = facts_of(name, base)
    parts = {}
    for part in facts.parts:
        if part == "denoiser" or any(tensor.startswith(PREFIXES[part]) for tensor in entries):
            parts[part] = str(file.absolute())
    parts |= _chosen_parts(asked, facts, facts.models[base])
    plan = ModelPlan(base, name, source or facts.models[base].source, parts=parts)
    if source is None or without_weights.published(plan):
        return plan
    model_folder.check_folder(f"{CONFIG}{source}", Path(source), model_folder.file_patterns(facts, parts), facts)
    return replace(plan, path=source)


def _config(asked: Asked, file: Path, facts: Facts, bare: weight_kinds.Entries) -> tuple[str, str | None]:
    """The value of BASE_MODEL that a file is completed from, and the folder by --config, if it names one."""
    fitting = [base for base in weight_kinds.fitting_bases(bare) if base in facts.models]
    if asked.config is None:
        return _base_of_file(file, fitting or list(facts.models)[:1], facts), None
    base = _by_name(file, fitting, facts) or (fitting or list(facts.models))[0]
    if asked.config not in facts.models:
        folder = Path(asked.config).expanduser()
        if folder.is_dir():
            return base, str(folder.absolute())
        choices = ", ".join(facts.models)
        raise SettingsError(
            f"--config {asked.config} is neither a folder nor one of {choices}, and {file} is for {facts.name}."
        )
    if fitting and asked.config not in fitting and facts.models[asked.config].published:
        raise SettingsError(f"--config {asked.config}: {file} is of another base model. Fix: --config {fitting[0]}.")
    return asked.config, None


def _base_of_file(file: Path, fitting: list[str], facts: Facts) -> str:
    """The base that a file is taken for: its tensors fit all of `fitting`. Raises SettingsError where that is open."""
    base = fitting[0]
    if any(_draws_otherwise(facts.models[other], facts.models[base]) for other in fitting):
        named = _by_name(file, fitting, facts)
        if named is None:
            choices = ", ".join(fitting)
            raise SettingsError(
                f"--base {file} fits several base models, which draw in other ways, and its name does not tell which: "
                f"{choices}. Fix: --config and one of them."
            )
        base = named
        log.info("%s is taken for %s, by its name. If it is not, add --config.", file, base)
    else:
        log.info("%s is taken for %s, by its tensors.", file, base)
    return base


def _draws_otherwise(one: BaseModel, other: BaseModel) -> bool:
    return one.published is not other.published or one.defaults != other.defaults


def _by_name(file: Path, fitting: list[str], facts: Facts) -> str | None:
    """The one of `fitting` whose name is in the file's; None if none is, or a word of another's is there too.

    z_image_turbo_bf16 is z-image-turbo, and z_image_bf16 is z-image. z-image-de-turbo may be either.
    """
    stem = _letters(file.stem)
    lengths: dict[str, int] = {}
    for base in fitting:
        for name in _names(base, facts.models[base]):
            if _letters(name) in stem:
                lengths[base] = max(lengths.get(base, 0), len(_letters(name)))
    if not lengths:
        return None
    best = max(lengths, key=lambda base: lengths[base])
    own_words = {word for name in _names(best, facts.models[best]) for word in _words(name)}
    for base in fitting:
        if _draws_otherwise(facts.models[base], facts.models[best]):
            others = {word for name in _names(base, facts.models[base]) for word in _words(name)}
            if any(word in stem for word in others - own_words):
                return None
    return best


def _names(base: str, model: BaseModel) -> list[str]:
    return [base, *model.aliases, model.source.rpartition("/")[2]]


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]{2,}", name.lower())


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _chosen_parts(asked: Asked, facts: Facts, model: BaseModel | None) -> dict[str, str]:
    """`ModelPlan.parts` by the options for one part. Raises SettingsError for the first that cannot be used."""
    parts = {}
    for asked_part, path in asked.parts.items():
        same = [part for part in facts.parts if OPTIONS[part] == OPTIONS[asked_part]]
        part = same[0] if same else asked_part
        problem = _part_problem(part, path, facts, model)
        if problem is not None:
            raise SettingsError(f"{OPTIONS[part]} {path} {problem}.")
        parts[part] = "" if path == LEFT_OUT else str(Path(path).expanduser().absolute())
    return parts


def _part_problem(part: str, path: str, facts: Facts, model: BaseModel | None) -> str | None:
    """Why `path` cannot be a part of the model."""
    if part not in facts.parts:
        return f"is not used: {facts.name} has no such part. Fix: leave it out"
    if path == LEFT_OUT:
        if not model_folder.is_optional(part, facts):
            return "leaves out a part that the base model needs"
        return None
    place = Path(path).expanduser()
    if place.is_dir():
        return model_folder.part_folder_problem(place, facts.kinds[facts.parts[part]])
    if not place.is_file():
        return "is not there. Fix: name a .safetensors file, or the folder of this part"
    if problem := model_folder.foreign_problem(place.name) or model_folder.damage(place):
        return problem
    published = model.published if model is not None else None
    return weight_kinds.part_problem(part, model_folder.read(place), published, facts.parts[part], names=OPTIONS)
