"""Find the state that a job resumes from, and warn if another device or torch version made it."""

from __future__ import annotations

import logging
import platform
from pathlib import Path

import torch

from trainer.checkpoints import state_files
from trainer.data.identity import fingerprint_differences
from trainer.spec.errors import SettingsError
from trainer.spec.plan import EnginePlan, Plan
from trainer.spec.rules.resume_rules import check_named_state

log = logging.getLogger(__name__)


def made_by(attention: str) -> dict[str, str]:
    """What decides the last bits of a sum. Another version or device may resume a state, but not to the same bytes."""
    device = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {"torch": torch.__version__, "device": device, "PARAMS_ATTENTION": attention}


def resumable_state(plan: Plan, home: Path, prints: dict[str, str]) -> state_files.State | None:
    """The state to resume from: the newest in `home`, or else the folder that PARAMS_RESUME_FROM names; or None.

    `prints`: the fingerprint of the dataset. Raises SettingsError for a named state of other settings or images, unless
    RESUME_WITH_CHANGES accepts them, and for a folder that is not a complete state.
    """
    state = state_files.latest(home / "state")
    resume_from = Path(plan.lora.resume_from) if plan.lora.resume_from else None
    if state is None and resume_from is not None and resume_from.is_dir():
        try:
            state = state_files.read(resume_from)
        except ValueError as problem:
            raise SettingsError(f"PARAMS_RESUME_FROM {resume_from} is not a complete state: {problem}.") from problem
        changed = fingerprint_differences(state.tree["data"], prints)
        check_named_state(plan, state.tree["essence"], step=state.step, places_differ=bool(changed))
        if changed and not plan.output.resume_with_changes:
            raise SettingsError(
                f"PARAMS_RESUME_FROM={resume_from} is the state of a run with another dataset:\n  "
                + "\n  ".join(changed)
                + "\nPut it back; or set RESUME_WITH_CHANGES=true to go on with these changes; or name a LoRA file of "
                "that run to start from its weights alone."
            )
    if state is not None:
        _warn_of_other_software(state, plan.engine)
    return state


def total_steps(state: state_files.State, *, steps_per_epoch: int) -> int:
    """How many steps the run of a state was to have when it was saved."""
    total = state.tree.get("total")
    if isinstance(total, int):
        return total
    essence = state.tree["essence"]  # of a version that did not record it
    return int(essence.get("train.max_steps") or essence.get("train.max_epochs", 0) * steps_per_epoch)


def _warn_of_other_software(state: state_files.State, engine: EnginePlan) -> None:
    """Log what the state was made with if that differs: it is why the bytes of this run will differ."""
    essence = state.tree["essence"]  # of older states, which lack these keys: of one GPU, of one machine
    then = {
        **state.tree["made_by"],
        "NUM_GPUS": essence.get("engine.num_gpus", 1),
        "NODES": essence.get("engine.nodes", 1),
    }
    now = {**made_by(engine.attention), "NUM_GPUS": engine.num_gpus, "NODES": engine.nodes}
    for key, value in then.items():
        if value != now[key]:
            log.warning(
                "The state was made with %s %s, and this is %s: the result will not be bit-identical.",
                key,
                value,
                now[key],
            )
