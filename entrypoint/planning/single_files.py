"""Single .safetensors files in place of a model's folder: which part comes from which file, and what else is needed.

MODEL_PATH may name one file with several parts (a checkpoint of ComfyUI or the like); VAE_PATH, CLIP_L_PATH,
CLIP_G_PATH, T5_PATH and TEXT_ENCODER_PATH each name one part. `trainer.base_model.single_file` later converts them.
"""

from __future__ import annotations

from pathlib import Path

from entrypoint.settings.checks import Notes, absolute, is_file, is_folder
from entrypoint.settings.variables.model import ModelSettings
from entrypoint.settings.variables.training import TrainingSettings
from trainer.base_model import model_folder, weight_kinds
from trainer.spec.family import PREFIXES, Facts, base_models
from trainer.spec.plan import ModelPlan
from trainer.spec.prediction_marks import HEADER_KEY
from trainer.spec.values import show

SUFFIX = ".safetensors"
LEFT_OUT = "none"  # the value of T5_PATH and the others that leaves the part out


def is_single_file(path: str | None) -> bool:
    """Whether a value of MODEL_PATH means one file with weights."""
    return path is not None and path.lower().endswith(SUFFIX) and is_file(path)


def path_problem(path: str) -> str | None:
    """What is wrong with a path or name that is no folder; None if its name shows nothing wrong."""
    if problem := model_folder.foreign_problem(path):
        return problem
    if path.lower().endswith(SUFFIX):
        if not is_file(path):
            return "is not there"
        return model_folder.damage(Path(path).expanduser())
    if is_file(path):
        return "is a file whose name does not end in .safetensors"
    return None


def choose_parts(settings: ModelSettings, facts: Facts, notes: Notes) -> dict[str, str]:
    """`ModelPlan.parts`: a part's name → its file or folder, or "" if it is left out.

    From MODEL_PATH, if it is one file, and from the variables for one part, which win over it.
    """
    parts: dict[str, str] = {}
    file = settings.model_path
    if file is not None and is_single_file(file) and path_problem(file) is None:
        parts = _parts_in_file(file, settings.base_model, facts, notes)
    part_paths = {
        "vae": ("VAE_PATH", settings.vae_path),
        "clip_l": ("CLIP_L_PATH", settings.clip_l_path),
        "clip_g": ("CLIP_G_PATH", settings.clip_g_path),
        "t5": ("T5_PATH", settings.t5_path),
    }
    language_models = [part for part in facts.parts if weight_kinds.VARIABLES[part] == "TEXT_ENCODER_PATH"]
    for part in language_models or ["qwen3"]:  # the latter to say that the base model has no such part
        part_paths[part] = ("TEXT_ENCODER_PATH", settings.text_encoder_path)
    for part, (variable, path) in part_paths.items():
        if path is None:
            continue
        if problem := _part_problem(part, path, settings.base_model, facts):
            allowed = "" if "Fix:" in problem else f" Allowed: a {SUFFIX} file, or the folder of this part."
            notes.add(f"{variable}={show(path)} {problem}.{allowed}")
        else:
            parts[part] = "" if path == LEFT_OUT else absolute(path)
    return parts


def _parts_in_file(file: str, base_model: str, facts: Facts, notes: Notes) -> dict[str, str]:
    """The parts that a single file holds, told by the names of its tensors."""
    header = model_folder.read(Path(absolute(file)))
    if problem := weight_kinds.model_problem(header, base_model, facts):
        notes.add(f"MODEL_PATH={show(file)} {problem}")
        return {}
    parts = ["denoiser"]  # a file with the denoiser alone has no prefix, and was told by its landmarks
    for part in facts.parts:
        if part != "denoiser" and any(name.startswith(PREFIXES[part]) for name in header.entries):
            parts.append(part)
    missing = [part for part in facts.parts if part not in parts]
    reason = "the file holds every part"
    if missing:
        variables = ", ".join(weight_kinds.VARIABLES[part] for part in missing)
        reason = f"what the file holds; {', '.join(missing)} come from {variables}, or from the base model's folder"
    notes.chose("MODEL_PATH", ", ".join(parts), reason)
    return dict.fromkeys(parts, absolute(file))


def note_prediction(denoiser: str | None, training: TrainingSettings, facts: Facts, notes: Notes) -> None:
    """What a single file says that it predicts: a note where PARAMS_PREDICTION_TYPE=auto takes it, a warning if not.

    `denoiser`: the file that holds the denoiser. `trainer.base_model.single_file` puts it into the model's scheduler.
    """
    if not denoiser or not is_file(denoiser) or facts.objective != "denoising":
        return
    marks = model_folder.prediction(Path(denoiser))
    where = f"MODEL_PATH={show(denoiser)}"
    if marks.edm:
        notes.add(f"{where} was trained with the noise levels of EDM, which Kiln does not support. Fix: another file.")
    if marks.unknown is not None:
        notes.warn(
            f"{where}: {HEADER_KEY}={show(marks.unknown)} in its header is not one of epsilon and v, and does not "
            f"count. PARAMS_PREDICTION_TYPE={training.prediction_type} is used."
        )
    if marks.prediction is None:
        if marks.zero_terminal_snr:
            notes.warn(f"{where} is marked ztsnr but not v-prediction, so the mark is ignored.")
        return
    asked = training.prediction_type
    if asked == "auto":
        notes.chose("PARAMS_PREDICTION_TYPE", marks.prediction, f"{marks.said_by} says so")
    elif asked != marks.prediction:
        notes.warn(
            f"PARAMS_PREDICTION_TYPE={asked}, but {denoiser} predicts {marks.prediction}, by {marks.said_by}: samples "
            "would turn grey or into noise. Fix: leave PARAMS_PREDICTION_TYPE unset, unless you know that the file "
            "is marked wrongly."
        )
    if marks.prediction != "v_prediction" or not marks.zero_terminal_snr:
        return
    if training.zero_terminal_snr is None and asked in ("auto", "v_prediction"):
        notes.chose("PARAMS_ZERO_TERMINAL_SNR", True, "its tensor ztsnr says so")
    elif training.zero_terminal_snr is False:
        notes.warn(
            f"PARAMS_ZERO_TERMINAL_SNR=false, but {denoiser} was trained with it, by its tensor ztsnr. Fix: leave "
            "PARAMS_ZERO_TERMINAL_SNR unset."
        )


def _part_problem(part: str, path: str, base_model: str, facts: Facts) -> str | None:
    """Why `path` cannot be the VAE or text encoder that its variable names."""
    if part not in facts.parts:
        return "is not used: the base model has no such part. Fix: remove it"
    if path == LEFT_OUT:
        if not model_folder.is_optional(part, facts):
            return "leaves out a part that the base model needs"
        return None
    if is_folder(path):
        return model_folder.part_folder_problem(Path(absolute(path)), facts.kinds[facts.parts[part]])
    if problem := path_problem(path):
        return problem
    if not is_file(path):
        return "is not there"
    published = base_models()[base_model][1].published
    return weight_kinds.part_problem(part, model_folder.read(Path(absolute(path))), published, facts.parts[part])


def converted_bytes(model: ModelPlan) -> int:
    """Bytes that the parts will take when they are converted: FP8 weights become BF16, twice as large."""
    files = {path for path in model.parts.values() if path and Path(path).is_file()}
    total = 0
    for file in files:
        size = Path(file).stat().st_size
        total += 2 * size if model_folder.has_fp8(Path(file)) else size
    return total
