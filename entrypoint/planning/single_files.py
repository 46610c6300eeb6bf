"""Single files instead of a model's folder: which part of the model comes from which file, and what is still needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from entrypoint.fetch import model_folder
from entrypoint.settings import Settings
from entrypoint.settings.checks import Notes, absolute, is_file, is_folder, show
from trainer.spec.family import OPTIONAL, PREFIXES, Facts
from trainer.spec.plan import ModelPlan

FILE = ".safetensors"
WITHOUT = "none"
PICKLE = "is a pickle, which can run code when it is loaded, and is never read: convert it to .safetensors where you"
OPTIONS = {"vae": "VAE_PATH", "clip_l": "CLIP_L_PATH", "clip_g": "CLIP_G_PATH", "t5": "T5_PATH"}


def is_single(path: str | None) -> bool:
    """Whether a value of MODEL_PATH means one file with weights."""
    return path is not None and path.lower().endswith(FILE) and is_file(path)


def problem(path: str) -> str | None:
    """What is wrong with a path, or a name, that is no folder; None: nothing that its name would tell."""
    if path.lower().endswith(model_folder.PICKLES):
        return f"{PICKLE} trust it"
    if path.lower().endswith(model_folder.FOREIGN):
        return "is a format that is not read here: take the .safetensors file"
    if path.lower().endswith(FILE):
        return model_folder.damage(Path(path).expanduser()) if is_file(path) else "is not there"
    return "is a file without .safetensors at the end of its name" if is_file(path) else None


def choose(settings: Settings, facts: Facts, notes: Notes) -> dict[str, str]:
    """`ModelPlan.parts`: what MODEL_PATH, if it is one file, and the variables for one part name."""
    parts: dict[str, str] = {}
    single = settings.model.model_path
    if single is not None and is_single(single) and problem(single) is None:
        names = model_folder.tensors(Path(absolute(single)))
        inside = [p for p in facts.parts if any(n.startswith(PREFIXES[p]) for n in names)]
        if "denoiser" not in inside and names & set(facts.landmarks):
            inside.append("denoiser")
        if "denoiser" not in inside:
            notes.add(
                f"MODEL_PATH={show(single)} holds no denoiser that BASE_MODEL={settings.model.base_model} could have."
            )
        parts = dict.fromkeys(inside, absolute(single))
        lacks = ", ".join(p for p in facts.parts if p not in inside)
        notes.chose("MODEL_PATH", ", ".join(inside), f"what the file holds; not in it: {lacks or 'no part'}")
    for part, variable in OPTIONS.items():
        asked: str | None = getattr(settings.model, variable.lower())
        if asked is None:
            continue
        wrong = _override_problem(part, asked, facts)
        if wrong:
            notes.add(f"{variable}={show(asked)} {wrong}. Allowed: a {FILE} file, or the folder of this part.")
        else:
            parts[part] = "" if asked == WITHOUT else absolute(asked)
    return parts


def _override_problem(part: str, asked: str, facts: Facts) -> str | None:
    if part not in facts.parts:
        return "has no use: the base model has no such part"
    if asked == WITHOUT:
        needed = not any(p.startswith(f"{OPTIONAL}{facts.parts[part]}/") for p in facts.files)
        return "leaves out what the base model cannot go without" if needed else None
    if is_folder(asked):
        folder = Path(absolute(asked))
        if not (folder / "config.json").is_file():
            return "has no config.json"
        return None if any(folder.glob(f"*{FILE}")) else "has no .safetensors file"
    return problem(asked) or (None if is_file(asked) else "is not there")


def patterns(facts: Facts, parts: Mapping[str, str]) -> tuple[str, ...]:
    """`Facts.files` without the weights that come from elsewhere; configs stay, which single files lack."""
    if not parts:
        return facts.files
    folders = {facts.parts[part]: path for part, path in parts.items()}
    kept = [p for p in facts.files if p.removeprefix(OPTIONAL).split("/")[0] not in folders]
    return (*kept, *(f"{folder}/config.json" for folder, path in folders.items() if Path(path).is_file()))


def room(model: ModelPlan) -> int:
    """Bytes that the parts will take when they are converted: fp8 becomes twice as large."""
    sizes = {p: Path(p).stat().st_size for p in model.parts.values() if p and Path(p).is_file()}
    return sum(size * (2 if model_folder.has_fp8(Path(path)) else 1) for path, size in sizes.items())
