"""Open the run that a job is: its folder, its record, and how it differs from what was asked for.

The order is what makes it safe to kill: nothing of another run is changed, and a folder holds a run once it has a
plan.json.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoints import state_files
from trainer.data.identity import content_changes, fingerprint
from trainer.data.records import ImageRecord
from trainer.spec.plan import AUTO, Plan
from trainer.storage import atomic, digests, own_files, run_records
from trainer.storage.choose_run import Choice, choose
from trainer.storage.run_records import RunRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenRun:
    """The run that this process trains. `home`: its folder; `out`: of the LoRA files of all runs."""

    plan: Plan
    out: Path
    home: Path
    record: RunRecord
    was_done: bool  # with as many steps as it was asked for then

    def trained(self, state_step: int) -> int:
        """How many steps this run has behind it. `state_step`: of its state, 0 without one."""
        total = self.record.values.get("total")
        if self.was_done and isinstance(total, int):
            return max(total, state_step)
        return state_step


def open_run(plan: Plan, images: Sequence[ImageRecord]) -> OpenRun:
    """The run of `plan` on these images, with its folder and record; logs what the entrypoint could not know."""
    out = Path(plan.output.path)
    prints = fingerprint(images)
    model = _model_digest(plan)
    adapter = digests.sha256(Path(plan.model.training_adapter_path)) if plan.model.training_adapter_path else None
    choice = choose(plan, content_changes=content_changes(prints, model, adapter))
    _log_choice(plan, choice)
    home = choice.home
    if choice.plan.output.folder:
        own_files.set_aside_no_folders(out, (run_records.RUNS_FOLDER,))
    own_files.set_aside_foreign(home, own_files.OF_RUN)
    own_files.set_aside_no_folders(home)
    if choice.run is None:
        own_files.set_aside_samples(home / "sample")
    used = max([run_records.last_used(run) for run in run_records.known_runs(out)], default=0) + 1
    if choice.run is None:
        # Of settings that left nothing else. It goes before the new plan comes: a kill in between must not leave the
        # length that one run had chosen to another.
        (home / run_records.RECORD).unlink(missing_ok=True)
    atomic.write_text(home / "plan.json", choice.plan.to_json())
    record = RunRecord(home)
    output = choice.plan.output
    values: dict[str, Any] = {
        "name": output.name,
        "requested": output.requested,
        "started": output.started,
        "used": used,
    }
    values |= {"data": prints, "model": model, "listing": run_records.listing_digest(plan)}
    if adapter is not None:
        values["training_adapter"] = adapter
    values["essence"] = choice.plan.essence()
    if "states" not in record.values:  # of a version that did not list them
        values["states"] = [path.name for path in run_records.state_folders(home / "state")]
    record.update({**values, **_history(choice, record)})
    return OpenRun(choice.plan, out, home, record, was_done=choice.finished is not None)


def _history(choice: Choice, record: RunRecord) -> dict[str, Any]:
    """With RESUME_WITH_CHANGES, the list of what changed and at which step, with the new changes."""
    if choice.run is None or not choice.changes:
        return {}
    history = record.values.get("changed")
    if not isinstance(history, list):
        history = []
    return {"changed": [*history, {"step": choice.run.step, "changes": list(choice.changes)}]}


def _log_choice(asked: Plan, choice: Choice) -> None:
    """Log what only the content of the images and weights has shown."""
    told = (asked.output.name, asked.output.folder) == (choice.plan.output.name, choice.plan.output.folder)
    text = choice.describe()
    if text and not told:
        log.warning("%s", text)
    if choice.run is None:
        return
    for moved in (*choice.found.places, *choice.found.model):
        log.info("The same content is elsewhere, so run %s goes on: %s.", choice.run.name, moved)
    for other in choice.found.hardware:
        log.warning("The hardware differs, so the result will not be bit-identical: %s.", other)


def _model_digest(plan: Plan) -> str:
    """A fingerprint of the base model's files; empty where they are damaged, which shows when they load."""
    try:
        return digests.weights_digest(Path(plan.model.path))
    except (ValueError, OSError):
        return ""


def remove_leftovers(out: Path) -> None:
    """Remove what a killed process was writing in `out`, which this process holds the lock of."""
    own_files.remove_leftovers(out)
    for run in run_records.known_runs(out):
        state_files.remove_unfinished(run.home / "state")


def adopt_older_run(out: Path) -> None:
    """Write the record of each run in `out` that has none: a version without records left it, or it was damaged.

    To be called before status.json is written: that says whether the run was finished.
    """
    for run in run_records.known_runs(out):
        if run.record or run.is_barren:  # nothing to keep: perhaps a new one, killed before it had its record
            continue
        steps = run_records.state_steps(run.home)
        values: dict[str, Any] = {"name": run.name, "done": run.done}
        values["files"] = run_records.written_names(out, run.name, steps=steps, final=run.done)
        if run.done and run.step:
            values |= {"finished": [run.step], "total": run.step}
        if run.plan is not None and run.plan.train.max_epochs != AUTO:
            values["automatic_epochs"] = run.plan.train.max_epochs  # its default: where PARAMS_MAX_EPOCHS is auto now
        RunRecord(run.home).update(values)
