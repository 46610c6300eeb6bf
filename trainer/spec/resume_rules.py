"""Whether a state may be resumed under a plan, and what differs if it may not.

A state keeps the essence of the plan that began it (`Plan.essence`: every field that decides which weights come out).
A run resumes only under an equal essence, since only then is it the same run; neutral fields may differ.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trainer.spec.errors import SettingsError
from trainer.spec.plan import Plan

# Their product is the number of batches in a step. Each process takes its share of them, so a run may resume on another
# number of GPUs as long as the product stays the same.
BATCHES_PER_STEP_KEYS = ("engine.num_gpus", "train.gradient_accumulation")
ADDED_KEYS = {"train.max_token_length": 77}  # that older states lack → the value that they were trained with
RETIRED_KEYS = ("engine.attention",)  # in the essences of older states; neutral today


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each entry of `Plan.essence` that is not the same."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            lines.append(f"{key}: {old.get(key, 'absent')} → {new.get(key, 'absent')}")
    return lines


def blocking_differences(begun: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences that forbid to resume. A step of as many batches, spread over other GPUs, is no difference."""
    # States from before there were several GPUs lack these keys.
    begun = dict.fromkeys(BATCHES_PER_STEP_KEYS, 1) | begun
    begun = ADDED_KEYS | begun
    for key in RETIRED_KEYS:
        begun.pop(key, None)
    if _batches_per_step(begun) == _batches_per_step(now):
        begun |= {key: now[key] for key in BATCHES_PER_STEP_KEYS}
    return differences(begun, now)


def _batches_per_step(essence: dict[str, Any]) -> int:
    return math.prod(int(essence[key]) for key in BATCHES_PER_STEP_KEYS)


def resumes_state(plan: Plan, begun: dict[str, Any], *, step: int, in_output: bool) -> bool:
    """True: the run that began as `begun` (an essence) resumes with its whole state. False: with its weights alone.

    `step`: of the state, for the message. `in_output`: the state is in the plan's output folder; otherwise it is the
    one that PARAMS_RESUME_FROM names. Raises SettingsError where the plans differ, unless PARAMS_RESUME_FROM names a
    LoRA file, which asks for the weights alone.
    """
    resume_from = plan.lora.resume_from
    if not in_output:
        begun = {**begun, "lora.resume_from": resume_from}  # the state to resume from cannot have named itself
    changed = blocking_differences(begun, plan.essence())
    if not changed:
        return True
    if in_output and resume_from and Path(resume_from).is_file() and begun.get("lora.resume_from") != resume_from:
        return False
    holder = f"OUTPUT_PATH={plan.output.path}"
    elsewhere = "choose another OUTPUT_PATH; or "
    if not in_output:
        holder = f"PARAMS_RESUME_FROM={resume_from}"
        elsewhere = ""
    gpus = any(line.startswith(BATCHES_PER_STEP_KEYS) for line in changed)
    raise SettingsError(
        f"{holder} holds a run of another plan, at step {step}. What differs (then → now):\n  "
        + "\n  ".join(changed)
        + ("\nNUM_GPUS times PARAMS_GRADIENT_ACCUMULATION must stay the same." if gpus else "")
        + f"\nPut it back to resume; or {elsewhere}set PARAMS_RESUME_FROM to a LoRA file of that run to start from its "
        "weights alone."
    )
