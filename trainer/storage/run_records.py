"""The runs in an output folder: which there are, what each began with, and which files belong to which.

`OUTPUT_PATH` holds the LoRA files of all its runs, told apart by name. Everything else of the first run is in
`OUTPUT_PATH` itself (`state/`, `sample/`, `logs/`, `metrics.jsonl`, `plan.json` …), of every further one in
`OUTPUT_PATH/runs/<name>/`. Nothing is ever moved from one place to the other, so a kill at any moment leaves every run
where it was. Only `status.json`, `run.log`, `crashes.json` and `hang.txt` are the job's that ran last.

`run.json` in a run's folder is its record: its name, the settings, the dataset and the model that it began with, and
the LoRA files and states that it wrote. A name goes in before its file is written. Only what is in these lists is ever
replaced or removed. The record is sealed (`storage.json_files`): where it is damaged, states and the names of files
tell what they can.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.spec.errors import StorageError
from trainer.spec.plan import Plan
from trainer.storage import atomic, digests, json_files

RECORD = "run.json"
# What opening a folder fails with that is not there, or is none.
NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
RUNS_FOLDER = "runs"
STATE_FOLDER_NAME = re.compile(r"step-([0-9]{8})")
STATE_FILES = ("state.safetensors", "state.json")
FILE_NAME = re.compile(r"[^/\0.][^/\0]*")
# What follows the name of a run in the names of its LoRA files (trainer.lora_files.convert.KEY_FORMATS).
SUFFIXES = ("", "-diffusers", "-comfyui")
# What records of an older version may hold, which had no seal.
UNSEALED_KEYS = (
    *("name", "requested", "started", "used", "data", "model", "listing", "files", "total", "done", "finished"),
    *("asked", "automatic_steps", "automatic_epochs", "changed"),
)


KNOWN = ("essence", "data", "run", "total", "made_by")  # parts of a state's tree without tensors


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


def unverified_names(record: dict[str, Any]) -> list[str]:
    """The names in a record of final LoRA files that are not verified yet."""
    names = record.get("unverified")
    if not isinstance(names, list):
        return []
    return [name for name in names if isinstance(name, str) and "/" not in name and name.endswith(".unverified")]


def written_names(out: Path, name: str, *, steps: Iterable[int], final: bool) -> list[str]:
    """The names that a run without a record (of an older version) gave to its files, as far as they are there."""
    stems = [f"{name}-step{step:08d}" for step in steps]
    if final:
        stems.append(name)
    names = [f"{stem}{suffix}.safetensors" for stem in stems for suffix in SUFFIXES]
    return [file for file in names if (out / file).is_file()]


def state_steps(home: Path) -> list[int]:
    """The steps of the states in a run's folder, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in state_folders(home / "state"))


def state_folders(folder: Path) -> list[Path]:
    """The states in `folder`: a user's folder of such a name, which holds no file of a state, is none.

    Raises StorageError where `folder` is there and cannot be read: a job must not begin anew because of that.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208 (names are all that is needed)
    except OSError as problem:
        if problem.errno in NO_FOLDER:
            return []
        raise StorageError(
            f"{folder} cannot be read: {problem.strerror}. The states of this job may be in it. Let this user read it, "
            "or choose another OUTPUT_PATH."
        ) from problem
    return [folder / name for name in names if STATE_FOLDER_NAME.fullmatch(name) and _holds_state(folder / name)]


def _holds_state(folder: Path) -> bool:
    """Whether a folder has one of the files of a state. One that cannot be read counts: it is damaged, perhaps."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 (names are all that is needed)
    except OSError as problem:
        return problem.errno not in NO_FOLDER
    return any(name in STATE_FILES for name in names)


def read_state_header(folder: Path) -> StateHeader | None:
    """The step, the essence and the dataset of a state; None if it is damaged, which the trainer handles."""
    outer = json_files.read_object(folder / "state.json")
    try:
        if outer is None or digests.digest(outer["text"]) != outer["sha256"]:
            return None
        record = json.loads(outer["text"])
        tree = dict(record["tree"]["dict"])
        known = {key: _decoded(tree[key]) for key in KNOWN if key in tree}
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
    record = read_record(home) or {}
    plan = read_plan(home / "plan.json")
    state = newest_state(home)
    about: dict[str, Any] = {"name": "", "requested": "", "essence": None}
    if state is not None:
        about["essence"] = state.tree["essence"]
        about |= _known(state.tree.get("run"))
    if plan is not None:
        about |= {"name": plan.output.name, "requested": plan.output.requested, "essence": plan.essence()}
    about |= _known(record)  # last, because it is sealed
    essence = about["essence"]
    if essence is None:
        return None
    name = about["name"]
    if not FILE_NAME.fullmatch(name):  # a foreign or edited file: names become paths
        name = ""
    done = record.get("done") is True
    if not record:
        done = _seems_done(out, folder, name, state)
    steps = state_steps(home)
    step = steps[-1] if steps else 0
    return Run(out, folder, name, about["requested"], essence, plan, record, step=step, done=done)


def _known(found: Any) -> dict[str, Any]:
    """What `found` says of a run's name and settings, in the right types."""
    known: dict[str, Any] = {}
    if isinstance(found, dict):
        for key, kind in (("name", str), ("requested", str), ("essence", dict)):
            if isinstance(found.get(key), kind):
                known[key] = found[key]
    return known


def _seems_done(out: Path, folder: str, name: str, state: StateHeader | None) -> bool:
    """Whether a run without a record (of an older version, or damaged) was finished."""
    status = json_files.read_object(out / "status.json") or {}
    if not folder and status.get("phase") == "done":
        return True
    return state is not None and state.step == state.tree.get("total") and (out / f"{name}.safetensors").is_file()


def read_record(home: Path) -> dict[str, Any] | None:
    """The record of the run in `home`; None where there is none, or it is not what was written."""
    return json_files.read_sealed(home / RECORD, unsealed=UNSEALED_KEYS)


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
    if any(os.path.lexists(out / f"{name}{suffix}.safetensors") for suffix in SUFFIXES):
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
        return os.path.lexists(folder)  # unlike Path.exists, it never raises


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

    And of a local training adapter. Equal digests spare a finished job the look into each image.
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
    adapter = plan.model.training_adapter
    if adapter and Path(adapter).is_absolute():
        rows.append(_listing(Path(adapter), own))
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
        json_files.set_aside_unless(self._path, lambda path: read_record(path.parent) is not None)
        self.values = read_record(home) or {}

    def update(self, values: dict[str, Any]) -> None:
        """Change some values; writes the file only if that changes anything."""
        changed = {**self.values, **values}
        if changed != self.values:
            self.values = changed
            atomic.write_json(self._path, json_files.sealed(changed))

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
    def unverified(self) -> list[str]:
        """Final LoRA files under the names that they have until they are verified."""
        return unverified_names(self.values)

    def own_unverified(self, name: str) -> None:
        """Add a final LoRA file that is about to be written, under its name until it is verified."""
        if name not in self.unverified:
            self.update({"unverified": [*self.unverified, name]})

    @property
    def states(self) -> list[str]:
        """The names of the folders of its states."""
        names = self.values.get("states")
        if not isinstance(names, list):
            return []
        return [name for name in names if isinstance(name, str) and STATE_FOLDER_NAME.fullmatch(name)]

    def own_state(self, step: int) -> None:
        """Add a state that is about to be written."""
        name = f"step-{step:08d}"
        if name not in self.states:
            self.update({"states": [*self.states, name]})

    def disown_states(self, names: Iterable[str]) -> None:
        """Drop states that were removed."""
        gone = set(names)
        self.update({"states": [name for name in self.states if name not in gone]})

    @property
    def finished(self) -> list[int]:
        """The steps at which this run was finished, before it was asked for more."""
        steps = self.values.get("finished")
        return [step for step in steps if isinstance(step, int)] if isinstance(steps, list) else []
