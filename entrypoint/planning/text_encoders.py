"""Which text encoders get adapters, and how fast they learn."""

from __future__ import annotations

from collections.abc import Sequence

from entrypoint.settings.checks import Notes
from trainer.spec.family import trainable_encoders
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

    An encoder whose rate is 0 is not trained, and left out. Where the family has none to train, only 0 is allowed.
    """
    encoders = trainable_encoders(family_name)
    shown = f"PARAMS_TEXT_ENCODER_LR={','.join(f'{rate:g}' for rate in requested)}"
    if not encoders:
        if any(requested):
            notes.add(f"{shown}: {base_model}'s text encoder is not trained. Fix: remove it.")
        return {}
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
