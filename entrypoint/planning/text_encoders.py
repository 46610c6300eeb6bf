"""What of the model gets adapters: which text encoders train along, and how fast; what DoRA needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from entrypoint.settings.checks import Notes
from trainer.spec.family import get_family, trainable_encoders
from trainer.spec.optimizers import OPTIMIZERS

PARTS = {"te1": "CLIP-L", "te2": "CLIP-G"}


def rates(
    asked: Sequence[float], *, family_name: str, base: str, optimizer: str, learning_rate: float, notes: Notes
) -> dict[str, float]:
    """`OptimPlan.text_encoders` for PARAMS_TEXT_ENCODER_LR: one number for all, or one each, CLIP-L first."""
    encoders = trainable_encoders(family_name)
    shown = f"PARAMS_TEXT_ENCODER_LR={','.join(f'{rate:g}' for rate in asked)}"
    called = " and ".join(PARTS[short] for short in encoders.values())
    if len(asked) not in (1, len(encoders)):
        notes.add(f"{shown}: {base} has {len(encoders)} to train, {called}. Fix: one number, or as many.")
        return {}
    each = asked if len(asked) > 1 else [*asked] * len(encoders)
    found = {component: rate for component, rate in zip(encoders, each, strict=True) if rate}
    if OPTIMIZERS[optimizer].one_rate and any(rate != learning_rate for rate in found.values()):
        notes.add(
            f"{shown}: {optimizer} finds one step size for all, and takes no second learning rate. "
            f"Fix: {learning_rate:g} or 0; or PARAMS_OPTIMIZER_TYPE=adamw, prodigy-schedulefree or another."
        )
    return found


def check_dora(family_name: str, targets: Collection[str], notes: Notes) -> None:
    """Say who reads DoRA files; refuse targets of which these files could not be written.

    Layers that files have as one (q, k and v) have one list of magnitudes: all of them need an adapter, or none.
    """
    notes.chose(
        "PARAMS_LORA_TYPE",
        "dora",
        "ComfyUI and Forge read <name>.safetensors, diffusers reads <name>-diffusers.safetensors; sd-scripts and older "
        "tools read neither",
    )
    for native in get_family(family_name).LORA_KEYS.layers:
        without = [
            part for part in native.diffusers_names if not any(part.endswith(f".{target}") for target in targets)
        ]
        if without and len(without) < len(native.diffusers_names):
            missing = ", ".join(part.rpartition("{}.")[2] for part in without)
            notes.add(
                f"PARAMS_TARGET_MODULES: with PARAMS_LORA_TYPE=dora, {native.name} is one in files, and {missing} "
                "would be missing from it. Fix: add it, or leave PARAMS_TARGET_MODULES unset."
            )
            return
