"""The runs in an output folder: which there are, what each began with, and which files belong to which.

`OUTPUT_PATH` holds the LoRA files of all its runs, told apart by name. Everything else of the first run is in
`OUTPUT_PATH` itself (`state/`, `sample/`, `logs/`, `metrics.jsonl`, `plan.json` …), of every further one in
`OUTPUT_PATH/runs/<name>/`. Nothing is ever moved from one place to the other, so a kill at any moment leaves every run
where it was. Only `status.json`, `run.log`, `crashes.json` and `hang.txt` are the job's that ran last.

`run.json` in a run's folder is its record: its name, the dataset and the model that it began with, and the LoRA files
that it wrote. A name goes in before its file is written. Only files in that list are ever replaced or removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.spec.plan import Plan
from trainer.storage import atomic, digests, json_files

RECORD = "run.json"
RUNS_FOLDER = "runs"
STATE_FOLDER_NAME = re.compile(r"step-(\d{8})")
FILE_NAME = re.compile(r"[^/\0.][^/\0]*")
# What follows the name of a run in the names of its LoRA files (trainer.lora_files.convert.KEY_FORMATS).
SUFFIXES = ("", "-diffusers", "-comfyui")


@dataclass(frozen=True)
class StateHeader:
    """What `state.json` says without its tensors."""

    step: int
    folder: Path
    tree: dict[str, Any]  # "essence", "data" and what else holds no tensor


@dataclass(frozen=True)
class Run:
    """One run in an output folder. `step`: of its newest state, 0 without any."""

    out: Path
    folder: str  # below `out`: "", or runs/<name>
    name: str
    requested: str  # OUTPUT_NAME when it began; empty: not set
    essence: dict[str, Any]
    plan: Plan | None  # None: plan.json is missing or damaged
    record: dict[str, Any]
    step: int
    done: bool

    @property
    def home(self) -> Path:
        return self.out / self.folder

    @property
    def is_barren(self) -> bool:
        """Whether there is nothing to go on from, and nothing to keep: no state and no LoRA."""
        return self.step == 0 and not self.lora_files()

    def lora_files(self) -> list[Path]:
        """Its LoRA files with kohya's keys, the one of the latest step last."""
        final = f"{self.name}.safetensors"
        saves = sorted(path for path in self._files() if path.name != final and "-step" in path.name)
        return [*saves, *(path for path in self._files() if path.name == final)]

    def _files(self) -> list[Path]:
        names = own_names(self.record)
        if not names:
            names = written_names(self.out, self.name, steps=state_steps(self.home), final=self.done)
        others = tuple(f"{suffix}.safetensors" for suffix in SUFFIXES if suffix)
        return [self.out / name for name in names if (self.out / name).is_file() and not name.endswith(others)]


def own_names(record: dict[str, Any]) -> list[str]:
    """The LoRA files in a record; without what no job writes there."""
    names = record.get("files")
    if not isinstance(names, list):
        return []
    return [name for name in names if isinstance(name, str) and "/" not in name and name.endswith(".safetensors")]


def written_names(out: Path, name: str, *, steps: Iterable[int], final: bool) -> list[str]:
    """The names that a run without a record (of an older version) gave to its files, as far as they are there."""
    stems = [f"{name}-step{step:08d}" for step in steps]
    if final:
        stems.append(name)
    names = [f"{stem}{suffix}.safetensors" for stem in stems for suffix in SUFFIXES]
    return [file for file in names if (out / file).is_file()]


def state_steps(home: Path) -> list[int]:
    """The steps of the states in a run's folder, ascending."""
    steps = []
    for path in (home / "state").glob("step-*"):
        if match := STATE_FOLDER_NAME.fullmatch(path.name):
            steps.append(int(match[1]))
    return sorted(steps)


def read_state_header(folder: Path) -> StateHeader | None:
    """The step, the essence and the dataset of a state; None if it is damaged, which the trainer handles."""
    outer = json_files.read_object(folder / "state.json")
    try:
        if outer is None or digests.digest(outer["text"]) != outer["sha256"]:
            return None
        record = json.loads(outer["text"])
        tree = dict(record["tree"]["dict"])
        known = {key: _decoded(tree[key]) for key in ("essence", "data", "run", "total") if key in tree}
        return StateHeader(int(record["step"]), folder, known) if isinstance(known.get("essence"), dict) else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def _decoded(value: Any) -> Any:
    """The value that `trainer.checkpoints.state_files` encoded; here without tensors."""
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value["dict"]}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value


def newest_state(home: Path) -> StateHeader | None:
    """The newest state in a run's folder whose state.json can be read."""
    for step in reversed(state_steps(home)):
        if header := read_state_header(home / "state" / f"step-{step:08d}"):
            return header
    return None


def known_runs(out: Path) -> list[Run]:
    """The runs in `out`, the one that was used last first."""
    folders = [""]
    with contextlib.suppress(OSError):  # there is no such folder
        folders += sorted(f"{RUNS_FOLDER}/{path.name}" for path in (out / RUNS_FOLDER).iterdir() if path.is_dir())
    runs = []
    for folder in folders:
        run = _read_run(out, folder)
        if run is not None:
            runs.append(run)
    return sorted(runs, key=lambda run: -last_used(run))


def last_used(run: Run) -> int:
    """Counts up with every start in an output folder; 0 for a run of a version that kept no records."""
    used = run.record.get("used")
    return used if isinstance(used, int) else 0


def _read_run(out: Path, folder: str) -> Run | None:
    home = out / folder
    record = json_files.read_object(home / RECORD) or {}
    plan = read_plan(home / "plan.json")
    state = newest_state(home)
    if plan is None and state is None:
        return None
    name: Any = ""
    requested = ""
    essence: dict[str, Any] = {}
    if plan is not None:
        name = plan.output.name
        requested = plan.output.requested
        essence = plan.essence()
    elif state is not None:
        essence = state.tree["essence"]
        about_run = state.tree.get("run")
        if isinstance(about_run, dict):
            name = about_run.get("name", "")
    if not FILE_NAME.fullmatch(str(name)):  # a foreign or edited file: names become paths
        name = ""
    done = record.get("done") is True
    if not record and not folder:  # of a version that kept no records
        status = json_files.read_object(out / "status.json") or {}
        done = status.get("phase") == "done"
    steps = state_steps(home)
    return Run(out, folder, str(name), requested, essence, plan, record, step=steps[-1] if steps else 0, done=done)


def read_plan(path: Path) -> Plan | None:
    """The plan in a plan.json; None where it is missing, damaged, or of another version."""
    raw = json_files.read_object(path)
    if raw is None:
        return None
    try:
        return Plan.from_json(json.dumps(raw))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def is_free(out: Path, name: str, runs: Iterable[Run], *, reused: str = "") -> bool:
    """Whether no run and no file in `out` has this name. `reused`: a folder of `out` that may have content."""
    if any(run.name == name for run in runs):
        return False
    folder = f"{RUNS_FOLDER}/{name}"
    if folder != reused and _has_content(out / folder):
        return False
    if any((out / f"{name}{suffix}.safetensors").exists() for suffix in SUFFIXES):
        return False
    save = re.compile(rf"{re.escape(name)}-step\d{{8}}\D.*")
    try:
        return not any(save.fullmatch(path.name) for path in out.iterdir())
    except OSError:
        return True  # there is no such folder yet


def _has_content(folder: Path) -> bool:
    """Whether a folder holds more than what a killed process was writing."""
    try:
        return any(not path.name.startswith(".") for path in folder.iterdir())
    except OSError:
        return folder.exists()


def free_name(out: Path, name: str, runs: Collection[Run], *, reused: str = "") -> str:
    """`name`; or, where that is taken, `name-2` or the first number after it that is free."""
    found = name
    number = 1
    while not is_free(out, found, runs, reused=reused):
        number += 1
        found = f"{name}-{number}"
    return found


def listing_digest(plan: Plan) -> str:
    """A digest of the names, sizes and times of the files in the local sources of images, without the job's own.

    Equal digests spare a finished job the look into each image.
    """
    own = [Path(plan.output.path).absolute(), Path(plan.output.cache).absolute()]
    rows: list[Any] = []
    for dataset in plan.data.datasets:
        for subset in dataset.subsets:
            places = [subset.metadata_file, subset.conditioning_data_dir]
            if subset.source.kind in ("folder", "archive") and "://" not in subset.source.location:
                places.append(subset.source.location)
            for place in places:
                rows.append(_listing(Path(place).expanduser().absolute(), own) if place else None)
    return digests.digest(rows)


def _listing(place: Path, own: Collection[Path]) -> list[Any]:
    """[name, bytes, time] of the file `place`, or of every file below the folder `place` that is not in `own`."""
    rows: list[Any] = []
    for parent, folders, files in os.walk(place):
        folders[:] = [name for name in folders if Path(parent, name) not in own]
        rows += [_row(Path(parent, name), place) for name in files]
    return sorted(rows) or [_row(place, place.parent)]


def _row(path: Path, base: Path) -> list[Any]:
    try:
        found = path.stat()
    except OSError:
        return [str(path.relative_to(base)), 0, 0]
    return [str(path.relative_to(base)), found.st_size, found.st_mtime_ns]


class RunRecord:
    """run.json of one run, open for changes. Each change replaces the file at once."""

    def __init__(self, home: Path) -> None:
        self._path = home / RECORD
        json_files.set_aside_unless_object(self._path)
        self.values = json_files.read_object(self._path) or {}

    def update(self, values: dict[str, Any]) -> None:
        """Change some values; writes the file only if that changes anything."""
        changed = {**self.values, **values}
        if changed != self.values:
            self.values = changed
            atomic.write_json(self._path, changed)

    @property
    def files(self) -> list[str]:
        return own_names(self.values)

    def own(self, name: str) -> None:
        """Add a LoRA file that is about to be written."""
        if name not in self.files:
            self.update({"files": [*self.files, name]})

    def disown(self, names: Iterable[str]) -> None:
        """Drop files that were removed."""
        gone = set(names)
        self.update({"files": [name for name in self.files if name not in gone]})

    @property
    def finished(self) -> list[int]:
        """The steps at which this run was finished, before it was asked for more."""
        steps = self.values.get("finished")
        return [step for step in steps if isinstance(step, int)] if isinstance(steps, list) else []
