"""Which run of an output folder a plan goes on with, or the name and place of a new one beside the others.

The entrypoint asks before it downloads anything, and the trainer again once it has read the images, since only their
content says whether a dataset is the same. Both get the same answer as long as the content is the same. Nothing is
written here.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.spec.plan import AUTO, Plan
from trainer.spec.rules.resume_rules import Changes, changes, check_fits
from trainer.storage import run_records
from trainer.storage.run_records import Run

HOW_TO_GO_ON = (
    "For more steps set PARAMS_MAX_STEPS or PARAMS_MAX_EPOCHS higher; other settings begin a new run beside it."
)
# Lines for what differs in the content of images and weights between a run and this job; empty: the same content.
ContentChanges = Callable[[Run, Changes], Sequence[str]]


NO_CHANGES = Changes()


@dataclass(frozen=True)
class Choice:
    """The plan with the name, folder and start time of its run."""

    plan: Plan
    run: Run | None  # it goes on; None: a new one
    beside: Run | None = None  # the run that was used last, where this is a new one
    found: Changes = NO_CHANGES  # how it differs from the run that goes on, where that makes no new run
    changes: tuple[str, ...] = ()  # "VARIABLE: old → new": why it is a new one, or what it goes on with all the same

    @property
    def finished(self) -> Path | None:
        """The final LoRA, if the run is done, with as many steps as it was to have then."""
        final = Path(self.plan.output.path) / f"{self.plan.output.name}.safetensors"
        if self.run is None or not self.run.done or self.changes or not final.is_file():
            return None
        return final

    @property
    def done(self) -> Path | None:
        """The final LoRA, if the run is done and nothing else is asked for. None also where only a look at the images
        can tell.
        """
        if self.run is None or self.found.steps or self.found.places or self.found.model:
            return None
        record = self.run.record
        if record.get("asked", asked_length(self.plan)) != asked_length(self.plan):
            return None
        # Without a listing, the run is of a version that kept none.
        if record.get("listing") not in (None, run_records.listing_digest(self.plan)):
            return None
        return self.finished

    @property
    def home(self) -> Path:
        """The folder of everything of the run but its LoRA files."""
        return Path(self.plan.output.path) / self.plan.output.folder

    def describe(self) -> str | None:
        """The first line of the log where the run is a new one, has another name than was asked for, or has changed."""
        if self.run is not None:
            if not self.changes:
                return None
            return f"RESUME_WITH_CHANGES=true: run {self.run.name} goes on with {'; '.join(self.changes)}."
        name = self.plan.output.name
        wanted = self.plan.output.requested or name
        if self.beside is None:
            if name == wanted:
                return None
            return f"OUTPUT_PATH already has files named {wanted} that no run wrote: this run is called {name}."
        old = self.beside
        text = f"New run {name}, beside {old.name}, because these differ: {'; '.join(self.changes)}. "
        return text + self._how_to_go_on_from(old)

    def _how_to_go_on_from(self, old: Run) -> str:
        """What becomes of the run beside which this new one begins, and which variables would go on from it."""
        text = f"{old.name} stays as it is."
        if old.step:
            text = f"{old.name} stays as it is, at step {old.step}."
        ways = []
        if files := old.lora_files():
            ways.append(f"PARAMS_RESUME_FROM={files[-1]} starts from its weights")
        if old.step and not self.plan.output.resume_with_changes:
            ways.append("RESUME_WITH_CHANGES=true goes on with its state")
        if ways:
            text += f" To go on from it instead: {'; '.join(ways)}."
        if self.plan.output.resume_with_changes:
            why = f"{old.name} has no state"
            if old.step:
                why = f"{old.name} did not begin with this PARAMS_RESUME_FROM"
            text += f" RESUME_WITH_CHANGES=true does not apply: {why}."
        return text


def asked_length(plan: Plan) -> list[int | None]:
    """How long the user asked for, to compare with what a finished run was asked for."""
    return [plan.train.max_steps, plan.train.max_epochs]


@dataclass(frozen=True)
class Compared:
    """A run of the folder, and how the plan differs from it: sorted by what follows, and the lines that make another
    run of it.
    """

    run: Run
    found: Changes
    lines: tuple[str, ...]


def choose(plan: Plan, *, content_changes: ContentChanges | None = None) -> Choice:
    """The run in the plan's output folder that is this job's, or a new one.

    `content_changes`: None before the images are read; then only the settings are compared. Raises SettingsError where
    RESUME_WITH_CHANGES asks for what no state can do.
    """
    runs = run_records.known_runs(Path(plan.output.path))
    compared: list[Compared] = []
    for run in runs:
        found = changes(run.essence, plan)
        lines = [*found.settings, *_unreachable_steps(run, found, plan)]
        if content_changes and not lines:
            lines += content_changes(run, found)
        if not lines:
            return Choice(_named_as(run, plan, runs), run, found=found)
        compared.append(Compared(run, found, tuple(lines)))
    return _with_changes(plan, runs, compared) or _beside(plan, runs, compared)


def _with_changes(plan: Plan, runs: Sequence[Run], compared: Sequence[Compared]) -> Choice | None:
    """With RESUME_WITH_CHANGES, the run that was used last and has a state; None if there is none."""
    if not plan.output.resume_with_changes:
        return None
    for one in compared:
        run = one.run
        # A job that names another place to start from does not go on with the state of a run here.
        if not run.step or run.essence.get("lora.resume_from") != plan.lora.resume_from:
            continue
        state = run_records.newest_state(run.home)
        if state is not None:
            files = run.lora_files()
            check_fits(state.tree["essence"], plan, step=state.step, lora=str(files[-1]) if files else None)
        return Choice(_named_as(run, plan, runs), run, found=one.found, changes=one.lines)
    return None


def _beside(plan: Plan, runs: Sequence[Run], compared: Sequence[Compared]) -> Choice:
    """A new run beside the one that was used last and left something."""
    barren = [run for run in runs if run.is_barren]
    if barren:
        # Nothing came of it: its place and name are free again.
        others = [run for run in runs if run is not barren[0]]
        new = _new_run(plan, others, folder=barren[0].folder)
    elif any(run.folder == "" for run in runs):
        new = _new_run(plan, runs, folder=f"{run_records.RUNS_FOLDER}/")
    else:
        new = _new_run(plan, runs, folder="")
    for one in compared:
        if not one.run.is_barren:
            return Choice(new, None, one.run, changes=one.lines)
    return Choice(new, None)


def _unreachable_steps(run: Run, found: Changes, plan: Plan) -> list[str]:
    """More steps than a finished run has, which it cannot go on to: no state was kept."""
    if not found.steps or not run.done or run.step or (plan.train.max_steps is None and plan.train.max_epochs == AUTO):
        return []
    total = run.record.get("total")
    if isinstance(total, int) and plan.train.max_steps is not None and plan.train.max_steps <= total:
        return []
    return [f"{text} (and no state was kept: PARAMS_SAVE_EVERY_N_STEPS=0)" for text in found.steps]


def _named_as(run: Run, plan: Plan, runs: Sequence[Run]) -> Plan:
    """The plan of a run that goes on: under its own name, unless OUTPUT_NAME has changed."""
    name = run.name or plan.output.name
    requested = plan.output.requested
    began_as = run.requested or run.name
    if requested and began_as and requested != began_as:
        name = run_records.free_name(run.out, requested, [other for other in runs if other is not run])
    started = run.record.get("started")
    if not isinstance(started, int):
        started = run.plan.output.started if run.plan else plan.output.started
    output = dataclasses.replace(plan.output, name=name, folder=run.folder, started=started)
    return dataclasses.replace(plan, output=output)


def _new_run(plan: Plan, runs: Sequence[Run], *, folder: str) -> Plan:
    """The plan with a free name. `folder`: of the run; with a slash at its end, the name follows."""
    name = plan.output.requested or plan.output.name
    name = run_records.free_name(Path(plan.output.path), name, runs, reused=folder)
    if folder.endswith("/"):
        folder += name
    return dataclasses.replace(plan, output=dataclasses.replace(plan.output, name=name, folder=folder))


def already_trained(out: Path, name: str, *, trained: int, wanted: int) -> str:
    """For the log: a run has more steps than it was asked for."""
    text = f"Run {name} has already trained {trained} steps, more than the {wanted} that are asked for: nothing to do. "
    save = f"{name}-step{wanted:08d}.safetensors"
    if (out / save).is_file():
        return text + f"Its LoRA of step {wanted} is {out / save}."
    kept = sorted(path.name for path in out.glob(f"{glob.escape(name)}-step????????.safetensors"))
    if kept:
        text += f"No LoRA of step {wanted} was kept; there are {', '.join(kept)}. "
    return text + "To train that few from the beginning, choose another OUTPUT_PATH."
