"""Whether a state may be resumed under a plan, and what differs if it may not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trainer.spec.errors import SettingsError
from trainer.spec.plan import Plan

SPREAD = ("engine.num_gpus", "train.gradient_accumulation")  # of an essence: their product is the batches of a step
ONCE = ("engine.attention",)  # what essences in older states have as well


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each entry of `Plan.essence` that is not the same."""
    keys = sorted(old.keys() | new.keys())
    return [f"{k}: {old.get(k, 'absent')} → {new.get(k, 'absent')}" for k in keys if old.get(k) != new.get(k)]


def changes(begun: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences for which a run cannot be gone on with: none, if a step has as many batches on other GPUs."""
    begun = dict.fromkeys(SPREAD, 1) | {key: value for key, value in begun.items() if key not in ONCE}
    batches = [math.prod(int(essence[key]) for key in SPREAD) for essence in (begun, now)]
    return differences(begun | {key: now[key] for key in SPREAD} if batches[0] == batches[1] else begun, now)


def goes_on(plan: Plan, begun: dict[str, Any], *, step: int, own: bool) -> bool:
    """Whether a run that was begun as `begun` (an essence) is gone on with; False: with its weights alone.

    `own`: its state is in the output; else it is what PARAMS_RESUME_FROM names. Raises SettingsError where the plan is
    another and PARAMS_RESUME_FROM does not ask for weights alone.
    """
    asked = plan.lora.resume_from
    changed = changes(begun if own else {**begun, "lora.resume_from": asked}, plan.essence())
    if not changed:
        return True
    if own and asked and Path(asked).is_file() and begun.get("lora.resume_from") != asked:
        return False
    gpus = any(line.startswith(SPREAD) for line in changed)
    holder, elsewhere = (
        (f"OUTPUT_PATH={plan.output.path}", "choose another OUTPUT_PATH; or ")
        if own
        else (f"PARAMS_RESUME_FROM={asked}", "")
    )
    raise SettingsError(
        f"{holder} holds a run of another plan, at step {step}. What differs (then → now):\n  "
        + "\n  ".join(changed)
        + ("\nNUM_GPUS times PARAMS_GRADIENT_ACCUMULATION must stay the same." if gpus else "")
        + f"\nPut it back to resume; or {elsewhere}set PARAMS_RESUME_FROM to a LoRA file of that run to go on from its "
        "weights alone."
    )
