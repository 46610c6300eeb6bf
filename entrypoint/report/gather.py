"""Everything that the files of a run say about it, read without trust: each may be missing, damaged or half written."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrypoint.report.metric_rows import VALIDATION, metric_row
from trainer.data.decode import read_sample
from trainer.spec.family import BaseModel, Facts, base_models, facts_of
from trainer.spec.messages import trend
from trainer.spec.plan import Plan
from trainer.storage import json_files, own_files, run_records
from trainer.storage.read import read_text
from trainer.storage.safe_names import is_safe
from trainer.storage.safetensors_header import read_header

LARGEST_TABLE = 1 << 28  # bytes
NO_STEP = -1  # of a LoRA file that is no save: the finished one
PAUSE_S = 300.0  # between two steps; a longer wait was no training: the job was not running


@dataclass(frozen=True)
class Sample:
    """An image that the job drew."""

    step: int
    number: int  # of its prompt, from 0
    path: Path
    prompt: str  # its text
    settings: str  # seed, steps, size and the rest, as the file says it
    strength: float = 1.0  # of the LoRA


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file of the run, in the format that is its main one."""

    path: Path
    step: int  # NO_STEP: the finished one
    bytes: int


@dataclass(frozen=True)
class Gathered:
    """What is known of a run. Empty where nothing is."""

    out: Path
    home: Path  # of the run: `out`, or a folder below it
    name: str
    plan: Plan | None = None
    status: dict[str, Any] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)  # of the newest LoRA file
    made_by: dict[str, str] = field(default_factory=dict)  # versions and device, of the newest state
    steps: tuple[dict[str, float], ...] = ()  # a row for each step, from metrics.jsonl
    validations: tuple[tuple[int, float], ...] = ()  # step, loss
    samples: tuple[Sample, ...] = ()
    at_strengths: tuple[Sample, ...] = ()  # of the last step that has them: with other strengths than 1
    loras: tuple[LoraFile, ...] = ()  # by step; the finished one last
    images: tuple[dict[str, str], ...] = ()  # the rows of dataset-report.csv
    dataset_lines: tuple[str, ...] = ()  # the first lines of dataset-report.txt: counts and notes

    @property
    def base_name(self) -> str:
        """The value of BASE_MODEL; "" where nobody knows it."""
        return self.plan.model.base if self.plan else self.header.get("ss_sd_model_name", "")

    @property
    def base(self) -> BaseModel | None:
        known = base_models().get(self.base_name)
        return known[1] if known else None

    @property
    def facts(self) -> Facts | None:
        known = base_models().get(self.base_name)
        return facts_of(known[0], self.base_name) if known else None

    @property
    def base_repository(self) -> str:
        """The base model's repository on the Hub; "" for a miniature, or a model that nobody knows."""
        base = self.base
        return "" if base is None or base.is_miniature else base.source

    @property
    def final(self) -> LoraFile | None:
        return next((file for file in self.loras if file.step == NO_STEP), None)

    @property
    def total(self) -> int:
        """Steps that the run is to have; 0: unknown."""
        record = json_files.read_object(self.home / run_records.RECORD) or {}
        total = record.get("total")
        return total if isinstance(total, int) else 0

    @property
    def done(self) -> int:
        """Steps that it has."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def triggers(self) -> list[str]:
        if self.plan is None:
            word = self.header.get("modelspec.trigger_phrase", "")
            return [word] if word else []
        return sorted({subset.trigger_word for subset in self.plan.data.subsets if subset.trigger_word})

    def training_seconds(self) -> float:
        """How long the steps took in all starts of the job, with what was done between them, but without pauses."""
        times = [row["time"] for row in self.steps if "time" in row]
        waits = [after - before for before, after in itertools.pairwise(times)]
        return sum(wait for wait in waits if 0 < wait < PAUSE_S)

    def risen(self) -> str:
        """How the loss has risen, as the log says it: of the last start; "" where it has not.

        A run without a status.json of its own is judged by all of its losses.
        """
        said = self.status.get("risen")
        if isinstance(said, str):
            return said
        return str(trend.risen([row["loss"] for row in self.steps if "loss" in row]) or "")

    def start_seconds(self) -> float:
        """How long the last start of the job took, from the entrypoint's first moment on, as the receipt has it."""
        began, ended = self.status.get("job_started", self.status.get("started")), self.status.get("updated")
        if not isinstance(began, int | float) or not isinstance(ended, int | float):
            return 0.0
        return max(0.0, ended - began)


def gather(out: Path) -> Gathered:
    """What is known of the run that the job in `out` trained last."""
    status = json_files.read_object(out / "status.json") or {}
    name, home = run_of(out, status)
    return gather_run(out, home, name, status)


def run_of(out: Path, status: Mapping[str, Any]) -> tuple[str, Path]:
    """The run that a status.json names, "" if it names none, and its folder."""
    name, folder = status.get("run"), status.get("run_folder", ".")
    if not isinstance(name, str) or not is_safe(name) or "/" in name:
        name = ""
    if folder != "." and not is_safe(folder):
        folder = "."
    return name, out / str(folder)


def gather_run(out: Path, home: Path, name: str, status: dict[str, Any] | None = None) -> Gathered:
    """What is known of the run `name`, whose folder is `home`."""
    plan = run_records.read_plan(home / "plan.json")
    if not name and plan is not None:
        name = plan.output.name
    loras = lora_files(out, name) if name else ()
    steps, validations = _metrics(home / "metrics.jsonl")
    table = _text(home / own_files.REPORT_NAME)
    samples = _samples(home / "sample")
    others = [sample for sample in samples if sample.strength != 1]
    newest = max((sample.step for sample in others), default=0)
    return Gathered(
        out,
        home,
        name or "LoRA",
        plan=plan,
        status=status or {},
        header=_header(loras[-1].path) if loras else {},
        made_by=_made_by(home),
        steps=steps,
        validations=validations,
        samples=tuple(sample for sample in samples if sample.strength == 1),
        at_strengths=tuple(sample for sample in others if sample.step == newest),
        loras=loras,
        images=_images(home / "dataset-report.csv"),
        dataset_lines=tuple(table.partition("\n\n")[0].splitlines()),
    )


def _text(path: Path) -> str:
    """A text file; "" where it is missing, damaged, or no file."""
    try:
        return read_text(path, limit=LARGEST_TABLE)
    except (OSError, ValueError):
        return ""


def _header(path: Path) -> dict[str, str]:
    try:
        return dict(read_header(path).metadata)
    except (OSError, ValueError):
        return {}


def _made_by(home: Path) -> dict[str, str]:
    state = run_records.newest_state(home)
    found = state.tree.get("made_by") if state else None
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _metrics(path: Path) -> tuple[tuple[dict[str, float], ...], tuple[tuple[int, float], ...]]:
    steps, validations = [], []
    for line in _text(path).splitlines():
        row = metric_row(line)
        if row is None:  # the last line of a process that was killed
            continue
        if VALIDATION in row:
            validations.append((int(row["step"]), row[VALIDATION]))
        else:
            steps.append(row)
    return tuple(steps), tuple(validations)


def _samples(folder: Path) -> tuple[Sample, ...]:
    found = []
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return ()
    for path in paths:
        known = own_files.read_sample_name(path.name)
        if known is None or path.is_symlink():
            continue
        image = read_sample(path)
        if image is None:
            continue
        prompt = str(image.info.get("prompt_text", ""))
        settings = str(image.info.get("parameters", "")).rpartition("\n")[2]
        found.append(Sample(known[0], known[1], path, prompt, settings, known[2]))
    return tuple(found)


def lora_files(out: Path, name: str) -> tuple[LoraFile, ...]:
    """The files with the run's name: saves by step, then the finished one."""
    found = []
    for path in sorted(out.glob("*.safetensors")):
        rest = path.stem.removeprefix(name)
        saved_at = rest.removeprefix("-step")
        if path.stem == name:
            step = NO_STEP
        elif rest.startswith("-step") and len(saved_at) == 8 and saved_at.isdecimal():
            step = int(saved_at)
        else:
            continue
        if path.stem.startswith(name) and path.is_file() and not path.is_symlink():
            found.append(LoraFile(path, step, path.stat().st_size))
    return tuple(sorted(found, key=lambda file: (file.step == NO_STEP, file.step)))


def _images(path: Path) -> tuple[dict[str, str], ...]:
    try:
        rows = csv.DictReader(io.StringIO(_text(path).removeprefix("\ufeff"), newline=""))
        return tuple({str(key): str(value or "") for key, value in row.items()} for row in rows)
    except csv.Error:
        return ()
