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


def made_by(attention: str) -> dict[str, str]:
    """What decides the last bits of a sum: another version or device goes on, but not to the same bytes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"torch": torch.__version__, "device": device, "PARAMS_ATTENTION": attention}


log = logging.getLogger(__name__)


def resumable_state(plan: Plan, out: Path) -> state_files.State | None:
    """The state to go on from: this output's own, or the folder PARAMS_RESUME_FROM. Refuses another plan's."""
    state = state_files.latest(out / "state")
    asked, own = Path(plan.lora.resume_from) if plan.lora.resume_from else None, state is not None
    if state is None and asked is not None and asked.is_dir():
        try:
            state = state_files.read(asked)
        except ValueError as problem:
            raise SettingsError(f"PARAMS_RESUME_FROM {asked} is not a whole state: {problem}.") from problem
    if state is None or resumes_state(plan, state.tree["essence"], step=state.step, own=own):
        _say_what_made(state, plan.engine)
        return state
    aside = out / f"state.before-{int(time.time())}"
    (out / "state").rename(aside)
    log.warning("The plan changed and PARAMS_RESUME_FROM is set: weights only; the old states are in %s.", aside)
    return None


def _say_what_made(state: state_files.State | None, engine: EnginePlan) -> None:
    """Other software or another device may go on, but the log shall tell why the bytes are not the same."""
    if state is None:
        return
    now = {**made_by(engine.attention), "NUM_GPUS": engine.num_gpus}
    for key, then in {**state.tree["made_by"], "NUM_GPUS": state.tree["essence"].get("engine.num_gpus", 1)}.items():
        if then != now[key]:
            log.warning("The state was made with %s %s, and this is %s: bit-identity ends here.", key, then, now[key])
