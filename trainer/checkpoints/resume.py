"""Find the state that a job resumes from, and warn if another device or torch version made it."""

from __future__ import annotations

import logging
import platform
import time
from pathlib import Path

import torch

from trainer.checkpoints import state_files
from trainer.spec.errors import SettingsError
from trainer.spec.plan import EnginePlan, Plan
from trainer.spec.resume_rules import resumes_state

log = logging.getLogger(__name__)


def made_by(attention: str) -> dict[str, str]:
    """What decides the last bits of a sum. Another version or device may resume a state, but not to the same bytes."""
    device = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {"torch": torch.__version__, "device": device, "PARAMS_ATTENTION": attention}


def resumable_state(plan: Plan, out: Path) -> state_files.State | None:
    """The state to resume from: the newest in `out`, or else the folder that PARAMS_RESUME_FROM names.

    None where there is none, and where the plan asks for the weights of a LoRA file alone: the old states are moved
    aside then. Raises SettingsError for the state of another plan, and for a folder that is not a complete state.
    """
    state = state_files.latest(out / "state")
    in_output = state is not None
    resume_from = Path(plan.lora.resume_from) if plan.lora.resume_from else None
    if state is None and resume_from is not None and resume_from.is_dir():
        try:
            state = state_files.read(resume_from)
        except ValueError as problem:
            raise SettingsError(f"PARAMS_RESUME_FROM {resume_from} is not a complete state: {problem}.") from problem
    if state is None:
        return None
    if resumes_state(plan, state.tree["essence"], step=state.step, in_output=in_output):
        _warn_of_other_software(state, plan.engine)
        return state
    aside = out / f"state.before-{int(time.time())}"
    (out / "state").rename(aside)
    log.warning(
        "The plan changed and PARAMS_RESUME_FROM names a LoRA file: weights only. The old states are in %s.", aside
    )
    return None


def _warn_of_other_software(state: state_files.State, engine: EnginePlan) -> None:
    """Log what the state was made with if that differs: it is why the bytes of this run will differ."""
    gpus_then = state.tree["essence"].get("engine.num_gpus", 1)  # older states lack the key
    then = {**state.tree["made_by"], "NUM_GPUS": gpus_then}
    now = {**made_by(engine.attention), "NUM_GPUS": engine.num_gpus}
    for key, value in then.items():
        if value != now[key]:
            log.warning(
                "The state was made with %s %s, and this is %s: the result will not be bit-identical.",
                key,
                value,
                now[key],
            )
