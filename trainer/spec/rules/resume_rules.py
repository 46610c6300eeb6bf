"""How a plan differs from an earlier run's, and what follows from that.

A run keeps the essence of its plan (`Plan.essence`: every field that decides which weights come out). The same essence
is the same run. Some fields may differ all the same: how many steps (the run goes on), where the same images and
weights are (their content decides), and what `auto` chose on other hardware. Any other difference is another run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from trainer.spec.errors import SettingsError
from trainer.spec.plan import AUTO, Plan

# Their product is the number of batches in a step. Each process takes its share of them, so a run may resume on another
# number of GPUs or machines as long as the product stays the same.
BATCHES_PER_STEP_KEYS = ("engine.num_gpus", "engine.nodes", "train.gradient_accumulation")
ADDED_KEYS = {"train.max_token_length": 77}  # that older states lack → the value that they were trained with
RETIRED_KEYS = ("engine.attention",)  # in the essences of older states; neutral today
STEP_KEYS = ("train.max_epochs", "train.max_steps")
CYCLES_KEY = "optim.num_cycles"  # follows from PARAMS_MAX_EPOCHS where PARAMS_NUM_CYCLES is not set
CHECK_KEYS = ("data.strict",)  # decides whether a job begins, and not what comes out
# Where the images and the weights of the base model are: the same content elsewhere is the same run.
PLACE = re.compile(
    r"data\.datasets\[\d+\]\.subsets\[\d+\]\.(source\.(kind|location|revision)|metadata_file|conditioning_data_dir)"
)
MODEL_PLACES = ("model.source", "model.revision", "model.parts")
TRAINING_ADAPTER = "model.training_adapter"  # a place as well, where there was one and is one
# Chosen by the hardware where the variable is `auto`: a card of another kind does not begin the run anew.
HARDWARE_KEYS = re.compile(r"engine\.(device|precision|dtype)|data\.datasets\[\d+\]\.batch_size")
# Essence key → variable. Fields of `train` are their variables in small letters.
VARIABLES = {
    "model.base": "BASE_MODEL",
    "model.source": "MODEL_PATH",
    "model.revision": "MODEL_REVISION",
    "model.parts": "VAE_PATH, CLIP_L_PATH, CLIP_G_PATH, T5_PATH, TEXT_ENCODER_PATH, MODEL_PATH",
    TRAINING_ADAPTER: "PARAMS_TRAINING_ADAPTER",
    "lora.kind": "PARAMS_LORA_TYPE",
    "lora.rank": "PARAMS_NETWORK_DIM",
    "lora.alpha": "PARAMS_NETWORK_ALPHA",
    "lora.targets": "PARAMS_TARGET_MODULES",
    "optim.name": "PARAMS_OPTIMIZER_TYPE",
    "optim.args": "PARAMS_OPTIMIZER_ARGS and PARAMS_D_COEF",
    "optim.scheduler": "PARAMS_LEARNING_SCHEDULER",
    "optim.text_encoders": "PARAMS_TEXT_ENCODER_LR",
    "engine.device": "BACKEND",
    "engine.dtype": "PARAMS_PRECISION",
    "engine.num_gpus": "NUM_GPUS",
    "engine.nodes": "NODES",
    "version": "Kiln's format of plans",
}
DATASET_VARIABLES = {  # ends of keys of `data` → variable
    "source.location": "DATASET_NAME",
    "source.revision": "DATASET_REVISION",
    "source.subset": "DATASET_SUBSET",
    "source.split": "DATASET_SPLIT",
    "source.image_column": "IMAGE_COLUMN",
    "source.caption_column": "CAPTION_COLUMN",
    "trigger_word": "TRIGGER_WORD",
    "resolution": "PARAMS_RESOLUTION",
    "batch_size": "PARAMS_BATCH_SIZE",
    "num_repeats": "PARAMS_NUM_REPEATS",
}
SHOWN_CHARACTERS = 120  # of a value in a line
# What a state fixes: with another value of these, its tensors have no place, or were trained on top of other weights.
FIXED_KEYS = (
    *("model.family", TRAINING_ADAPTER, "lora.kind", "lora.rank", "lora.split_qkv", "lora.targets", "optim.name"),
)
# Arguments of optimisers that only change how the next step is computed from the same state.
FREE_ARGUMENTS = (
    "betas",
    "beta3",
    "eps",
    "d_coef",
    "growth_rate",
    "safeguard_warmup",
    "use_bias_correction",
    "clip_threshold",
    "decay_rate",
    "d_limiter",
    "weight_lr_power",
    "r",
    "weight_decay_by_lr",
)


@dataclass(frozen=True)
class Changes:
    """How a plan differs from a run's essence: lines of "VARIABLE: old → new", by what follows."""

    settings: tuple[str, ...] = ()  # another run
    places: tuple[str, ...] = ()  # another run if the images differ too
    model: tuple[str, ...] = ()  # another run if the weights differ too
    hardware: tuple[str, ...] = ()  # the same run, but its bytes will be others
    steps: tuple[str, ...] = ()  # the same run, longer or shorter


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each entry of `Plan.essence` that is not the same."""
    return [line(key, old, new) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]


def changes(begun: dict[str, Any], plan: Plan) -> Changes:
    """How `plan` differs from the run that began as `begun` (an essence)."""
    now = plan.essence()
    begun = completed(begun, now)
    found: dict[str, list[str]] = {"settings": [], "places": [], "model": [], "hardware": [], "steps": []}
    changed = [key for key in sorted(begun.keys() | now.keys()) if begun.get(key) != now.get(key)]
    for key in changed:
        if key in STEP_KEYS or (key == CYCLES_KEY and set(STEP_KEYS) & set(changed)):
            kind = "steps"
        elif PLACE.fullmatch(key):
            kind = "places"
        elif key in MODEL_PLACES or (key == TRAINING_ADAPTER and begun.get(key) and now[key]):
            kind = "model"
        elif HARDWARE_KEYS.fullmatch(key) and variable(key) in plan.automatic:
            kind = "hardware"
        elif _follows(key, changed):
            continue
        else:
            kind = "settings"
        found[kind].append(line(key, begun, now))
    return Changes(**{kind: tuple(dict.fromkeys(lines)) for kind, lines in found.items()})


def _follows(key: str, changed: Collection[str]) -> bool:
    """Whether another changed key says it: the family follows from BASE_MODEL, the buckets from the resolution."""
    if key == "model.family":
        return "model.base" in changed
    dataset, _, name = key.rpartition(".")
    return name in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps") and f"{dataset}.resolution" in changed


def completed(begun: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """`begun`, as a version of today would have written it. A step of as many batches is no difference."""
    begun = {key: value for key, value in begun.items() if key not in (*RETIRED_KEYS, *CHECK_KEYS)}
    begun = ADDED_KEYS | begun
    now_without = now.keys() - set(CHECK_KEYS)
    for key in now_without - begun.keys():
        default = _default(key)
        if default is not dataclasses.MISSING:
            begun[key] = default
    for key in CHECK_KEYS:
        if key in now:
            begun[key] = now[key]
    if _batches_per_step(begun) == _batches_per_step(now):
        begun |= {key: now[key] for key in BATCHES_PER_STEP_KEYS}
    return begun


def _batches_per_step(essence: dict[str, Any]) -> int:
    return math.prod(int(essence[key]) for key in BATCHES_PER_STEP_KEYS)


@functools.cache
def _default(key: str) -> Any:
    """The default of a field of the plan, as the essence has it; MISSING where it has none."""
    kind: Any = Plan
    default: Any = dataclasses.MISSING
    for name in re.sub(r"\[\d+\]", "", key).split("."):
        if not dataclasses.is_dataclass(kind):
            return dataclasses.MISSING
        fields = {field.name: field for field in dataclasses.fields(kind)}
        if name not in fields:
            return dataclasses.MISSING
        field = fields[name]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        kind = typing.get_type_hints(kind)[name]
        if typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
    return list(default) if isinstance(default, tuple) else default


# ---- words


def variable(key: str) -> str:
    """The variable that sets a key of the essence, or the key of dataset.json."""
    if key in VARIABLES:
        return VARIABLES[key]
    section, _, name = key.partition(".")
    if section == "data":
        end = re.sub(r"^datasets\[\d+\]\.(subsets\[\d+\]\.)?", "", name)
        return DATASET_VARIABLES.get(end, f"{end.removeprefix('source.')} in dataset.json ({name.rpartition('.')[0]})")
    return f"PARAMS_{name.upper()}"


def line(key: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    """ "PARAMS_SEED: 42 → 1"."""
    return f"{variable(key)}: {_shown(key, old)} → {_shown(key, new)}"


def _shown(key: str, essence: dict[str, Any]) -> str:
    value = essence.get(key)
    if key == "train.max_epochs" and value == AUTO:
        return "auto"
    if value is None or value == {} or value == []:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        text = " ".join(f"{name}={_shown(name, value)}" for name in value)
    elif isinstance(value, list):
        text = ("x" if key.endswith("resolution") else ",").join(_shown("", {"": item}) for item in value)
    else:
        text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


# ---- going on with other settings


def misfits(begun: dict[str, Any], plan: Plan) -> list[str]:
    """Lines "VARIABLE: old → new" for what a state of the run that began as `begun` cannot go on with."""
    now = plan.essence()
    begun = completed(begun, now)
    lines = [line(key, begun, now) for key in FIXED_KEYS if begun.get(key) != now.get(key)]
    encoders_then = begun.get("optim.text_encoders") or {}
    if encoders_then.keys() != now["optim.text_encoders"].keys():
        lines.append(line("optim.text_encoders", begun, now))
    old, new = begun.get("optim.args") or {}, now["optim.args"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and name not in FREE_ARGUMENTS and begun.get("optim.name") == plan.optim.name:
            lines.append(f"{name} in PARAMS_OPTIMIZER_ARGS: {_shown(name, old)} → {_shown(name, new)}")
    return lines


def check_fits(begun: dict[str, Any], plan: Plan, *, step: int, lora: str | None) -> None:
    """Raises SettingsError where RESUME_WITH_CHANGES cannot go on with the state of `step`."""
    unfit = misfits(begun, plan)
    if not unfit:
        return
    kept = " ".join(f"{text.partition(':')[0]}={text.partition(': ')[2].partition(' → ')[0]}" for text in unfit)
    weights = f"Or start from the weights alone: PARAMS_RESUME_FROM={lora}." if lora else ""
    raise SettingsError(
        f"RESUME_WITH_CHANGES=true: the state at step {step} does not fit these settings:\n  "
        + "\n  ".join(unfit)
        + f"\nIt fits {kept}. Put that back, or unset RESUME_WITH_CHANGES to begin a new run. {weights}".rstrip()
    )


def check_named_state(plan: Plan, begun: dict[str, Any], *, step: int, places_differ: bool = False) -> None:
    """Raises SettingsError where the state that PARAMS_RESUME_FROM names is of other settings.

    `places_differ`: whether images that are elsewhere are other images; that is not known before they are read.
    """
    resume_from = plan.lora.resume_from
    begun = {**begun, "lora.resume_from": resume_from}  # the state to resume from cannot have named itself
    found = changes(begun, plan)
    changed = [*found.settings, *found.model, *(found.places if places_differ else ())]
    if not changed:
        return
    if plan.output.resume_with_changes:
        check_fits(begun, plan, step=step, lora=None)
        return
    gpus = any(text.startswith(("NUM_GPUS", "NODES", "PARAMS_GRADIENT_ACCUMULATION")) for text in changed)
    raise SettingsError(
        f"PARAMS_RESUME_FROM={resume_from} is the state of a run with other settings, at step {step}. What differs "
        "(then → now):\n  "
        + "\n  ".join(changed)
        + ("\nNODES times NUM_GPUS times PARAMS_GRADIENT_ACCUMULATION must stay the same." if gpus else "")
        + "\nPut it back; or set RESUME_WITH_CHANGES=true to go on with these changes; or name a LoRA file of that run "
        "to start from its weights alone."
    )
