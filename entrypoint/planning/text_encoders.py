"""Which text encoders get adapters, and how fast they learn; which targets DoRA needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from entrypoint.settings.checks import Notes
from trainer.spec.family import get_family, trainable_encoders
from trainer.spec.optimizers import OPTIMIZERS

# By the names that LoRA files have for them. T5 is not trained: it is larger than some denoisers.
ENCODER_NAMES = {"te1": "CLIP-L", "te2": "CLIP-G"}


def learning_rates(
    requested: Sequence[float],
    *,
    family_name: str,
    base_model: str,
    optimizer: str,
    learning_rate: float,
    notes: Notes,
) -> dict[str, float]:
    """`OptimPlan.text_encoders` for PARAMS_TEXT_ENCODER_LR: one number for all, or one each, CLIP-L first.

    An encoder whose rate is 0 is not trained, and left out.
    """
    encoders = trainable_encoders(family_name)
    shown = f"PARAMS_TEXT_ENCODER_LR={','.join(f'{rate:g}' for rate in requested)}"
    names = " and ".join(ENCODER_NAMES[short] for short in encoders.values())
    if len(requested) not in (1, len(encoders)):
        notes.add(f"{shown}: {base_model} has {len(encoders)} to train, {names}. Fix: one number, or as many.")
        return {}
    rates = list(requested)
    if len(rates) == 1:
        rates = rates * len(encoders)
    trained = {}
    for component, rate in zip(encoders, rates, strict=True):
        if rate:
            trained[component] = rate
    if OPTIMIZERS[optimizer].one_rate and any(rate != learning_rate for rate in trained.values()):
        notes.add(
            f"{shown}: {optimizer} finds one step size for all, and takes no second learning rate. "
            f"Fix: {learning_rate:g} or 0; or PARAMS_OPTIMIZER_TYPE=adamw, prodigy-schedulefree or another."
        )
    return trained


def check_dora(family_name: str, targets: Collection[str], notes: Notes) -> None:
    """Log which tools read DoRA files; refuse targets of which these files could not be written.

    Layers that files have as one (q, k and v) have one list of magnitudes: all of them need an adapter, or none.
    """
    notes.chose(
        "PARAMS_LORA_TYPE",
        "dora",
        "ComfyUI and Forge read <name>.safetensors, diffusers reads <name>-diffusers.safetensors; sd-scripts and older "
        "tools read neither",
    )
    for layer in get_family(family_name).LORA_KEYS.layers:
        without_adapter = [part for part in layer.diffusers_names if not _is_targeted(part, targets)]
        if without_adapter and len(without_adapter) < len(layer.diffusers_names):
            missing = ", ".join(part.rpartition("{}.")[2] for part in without_adapter)
            notes.add(
                f"PARAMS_TARGET_MODULES: with PARAMS_LORA_TYPE=dora, {layer.name} is one in files, and {missing} "
                "would be missing from it. Fix: add it, or leave PARAMS_TARGET_MODULES unset."
            )
            return


def _is_targeted(module: str, targets: Collection[str]) -> bool:
    return any(module.endswith(f".{target}") for target in targets)
