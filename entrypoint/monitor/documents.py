"""The files of a run as documents for the page: where the job is, its LoRA files, the plan with its reasons."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from entrypoint.monitor.numbers import Document
from entrypoint.monitor.sample_list import clean
from entrypoint.report.gather import NO_STEP, lora_files
from entrypoint.report.sections import settings
from trainer.spec.plan import Plan
from trainer.storage import run_records
from trainer.storage.own_files import REPORT_NAME, RUN_LOG, SHEET_NAME
from trainer.storage.read import has_link, is_regular

BETWEEN_STEPS = ("training", "sampling")  # phases in which the trainer looks at what is asked for
ENDED = ("done", "stopped", "failed")
# Keys of status.json that the page gets, and their types.
NUMBERS = (
    *("step", "epoch", "loss", "skipped", "images_per_second", "eta_s", "started", "updated", "saved_step"),
    *("captioned", "to_caption", "captions_left_s"),
)
SAID: dict[str, type | UnionType] = {
    **dict.fromkeys(NUMBERS, int | float),
    "output": str,
    "exit_code": int,
    "message": str,
    "risen": str,
}
# What can be downloaded beside the LoRA files and the samples: those of the job, then those of the run.
JOB_FILES = (RUN_LOG, "status.json")
RUN_FILES = ("report.html", "README.md", "plan.json", "metrics.jsonl", REPORT_NAME, "dataset-report.csv")


@dataclass(frozen=True)
class Served:
    """What a server shows. `started`: of the job that it runs beside (Unix seconds); 0 for a folder alone.

    `is_own_plan`: the plan was made by this very program, which may have read images from anywhere.
    """

    out: Path
    started: float = 0.0
    price: float | None = None  # of the machine, an hour
    actions: tuple[str, ...] = ()
    is_own_plan: bool = False
    is_queued: bool = False  # the job is one of a queue


@dataclass
class ShownRun:
    """The run that is shown, as far as its files say."""

    status: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    home: Path = Path()
    total: int = 0  # steps; 0: unknown

    @property
    def phase(self) -> str:
        phase = self.status.get("phase")
        return phase if isinstance(phase, str) else "preparing"


def status_document(served: Served, shown: ShownRun, plan: Plan | None, *, last_step: int) -> Document:
    """Where the job is, how long it takes, and what it costs. Times in Unix seconds, durations in seconds."""
    found = _said(shown.status)
    found["phase"] = shown.phase
    found["ended"] = shown.phase in ENDED
    found["run"] = shown.name
    found["total"] = shown.total
    found["step"] = max(found.get("step", 0), last_step)
    found |= _subject(plan)
    began = found.get("started") or served.started
    ends = time.time()
    if found["ended"]:
        ends = found.get("updated", 0.0)
    if began and ends:
        found["seconds"] = max(0.0, ends - began)
    price = served.price
    if price is None and plan is not None:
        price = plan.quote.price_per_hour
    found |= _cost(found, price)
    found["queued"] = served.is_queued
    found["actions"] = [name for name in served.actions if not why_not(name, shown.phase, plan)]
    return found


def _said(status: Mapping[str, Any]) -> Document:
    """What status.json says, as far as it has the type that it should have."""
    found: Document = {}
    for key, kind in SAID.items():
        value = status.get(key)
        if isinstance(value, kind):
            found[key] = value
    for key in ("message", "risen"):
        if key in found:
            found[key] = clean(found[key])
    return found


def _subject(plan: Plan | None) -> Document:
    """What is trained: the base model and the trigger words."""
    if plan is None:
        return {"model": "", "triggers": []}
    words = {subset.trigger_word for subset in plan.data.subsets if subset.trigger_word}
    return {"model": plan.model.base, "triggers": sorted(words)}


def why_not(action: str, phase: str, plan: Plan | None) -> str:
    """Why the job cannot do now what the page may ask for, in a sentence; "" where it can."""
    if phase in ENDED:
        return f"The job has ended ({phase})."
    if action == "stop":
        return ""
    if phase not in BETWEEN_STEPS:
        return f"The job is not training now (phase: {clean(phase)})."
    if action == "sample" and (plan is None or not plan.prompts):
        return "The job has no prompts to sample (SAMPLE_PROMPTS)."
    return ""


def _cost(found: Mapping[str, Any], price: float | None) -> Document:
    """What this start has cost so far, and what it will have cost at its end, in the money of the price."""
    if not price or "seconds" not in found:
        return {}
    spent = price * found["seconds"] / 3600
    cost: Document = {"price": price, "cost": spent}
    if not found["ended"] and found.get("eta_s"):
        cost["cost_at_end"] = spent + price * found["eta_s"] / 3600
    return cost


def checkpoints_document(out: Path, shown: ShownRun) -> Document:
    """The LoRA files of the run that are there, and the other files that can be downloaded."""
    loras = []
    for file in lora_files(out, shown.name) if shown.name else ():
        loras.append({"name": file.path.name, "step": None if file.step == NO_STEP else file.step, "bytes": file.bytes})
    others = _other_files(out, shown)
    files = [name for name, path in others.items() if is_regular(path) and not has_link(path)]
    return {"loras": loras, "files": files}


def _other_files(out: Path, shown: ShownRun) -> dict[str, Path]:
    """Everything that can be downloaded but LoRA files and samples, whether it is there or not."""
    found = {name: out / name for name in JOB_FILES}
    if shown.name:
        found |= {name: shown.home / name for name in RUN_FILES}
        found[SHEET_NAME] = shown.home / "sample" / SHEET_NAME
    return found


def plan_document(plan: Plan | None) -> Document:
    """What was decided, and why; the settings that people compare; the whole plan."""
    if plan is None:
        return {"reasons": [], "warnings": [], "settings": []}
    rows = [[name, clean(str(value))] for name, value in settings(plan) if value not in ("", None)]
    return {
        "reasons": [clean(text) for text in plan.reasons],
        "warnings": [clean(text) for text in plan.warnings],
        "settings": rows,
    }


def downloads(out: Path, shown: ShownRun) -> dict[str, Path]:
    """Every file that may be downloaded, by its name: nothing else can be asked for."""
    found = _other_files(out, shown)
    if not shown.name:
        return found
    names = run_records.own_names(run_records.read_record(shown.home) or {})
    names += [file.path.name for file in lora_files(out, shown.name)]
    found |= {name: out / name for name in names}
    return found
