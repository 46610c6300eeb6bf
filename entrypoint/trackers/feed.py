"""What the files of a run say for a tracker, each thing once, also after a restart."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from entrypoint.report.gather import Sample, gather_run
from entrypoint.report.metric_rows import VALIDATION, metric_row
from entrypoint.report.sections import settings, without_places
from trainer.spec.errors import StorageError
from trainer.spec.log_lines import escaped
from trainer.spec.messages.secrets import without_secrets
from trainer.storage import folders, json_files
from trainer.storage.read import open_regular
from trainer.storage.safe_names import is_safe

NAME = "tracking.json"  # in the run's folder: what the tracker has
PLACE = "tracking"  # in the run's folder: what a library writes here
READY = ("training", "sampling", "exporting", "done", "stopped", "failed")  # phases in which the run has its files


class Tracker(Protocol):
    """A library that keeps runs."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step."""

    def images(self, step: int, samples: list[Sample]) -> None:
        """The samples of a step."""

    def finish(self, *, exit_code: int) -> None:
        """The run has ended; what is left is sent now."""


@dataclass(frozen=True)
class About:
    """The run, as a tracker begins it."""

    name: str
    id: str  # the same after a restart
    resumed: bool
    config: dict[str, str]
    plan: str  # Markdown
    place: Path  # where the library may write


class Feed:
    """Reads the files of the run that a job trains."""

    def __init__(self, out: Path, *, tracker: str, started: float) -> None:
        self._out, self._tracker, self._started = out, tracker, started
        self._home: Path | None = None
        self._offset, self._inode = 0, -1
        self._sent: dict[str, Any] = {"step": -1, "validation": -1, "sampled": -1}

    def begun(self) -> About | None:
        """The run; None as long as the trainer does not know it."""
        status = self._status()
        name, folder = status.get("run"), str(status.get("run_folder", "."))
        if not isinstance(name, str) or not is_safe(name) or "/" in name or status.get("phase") not in READY:
            return None
        self._home = home = self._out / folder if is_safe(folder) else self._out
        run = gather_run(self._out, home, name)
        if run.plan is None:
            return None
        kept = json_files.read_object(home / NAME) or {}
        resumed = kept.get("with") == self._tracker and isinstance(kept.get("id"), str)
        if resumed:
            self._sent |= {key: kept[key] for key in self._sent if isinstance(kept.get(key), int)}
        self._sent |= {"with": self._tracker, "id": kept["id"] if resumed else os.urandom(6).hex()}
        json_files.set_aside_unless_object(home / NAME)
        place = home / PLACE
        with contextlib.suppress(OSError):
            place.mkdir(exist_ok=True)
        sentences = [without_places(run, text) for text in (*run.plan.reasons, *run.plan.warnings)]
        rows = {row: str(value) for row, value in settings(run.plan) if value not in ("", None)}
        lines = ["# What was decided", *(f"- {text}" for text in sentences), "", "# Settings", ""]
        lines += ["| setting | value |", "| --- | --- |", *(f"| {row} | {value} |" for row, value in rows.items())]
        text = without_secrets(escaped("\n".join(lines)))
        return About(name, str(self._sent["id"]), resumed, rows, text, place)

    def send(self, tracker: Tracker) -> None:
        """Hand over what is new, and remember it."""
        before = dict(self._sent)
        for row in self._rows():
            step = int(row.pop("step"))
            key = "validation" if VALIDATION in row else "step"
            if step > self._sent[key]:
                tracker.numbers(step, {name: value for name, value in row.items() if name not in ("time", "epoch")})
                self._sent[key] = step
        for step, samples in self._samples():
            tracker.images(step, samples)
            self._sent["sampled"] = step
        if self._sent != before and self._home is not None:
            with contextlib.suppress(StorageError, OSError):
                folders.write_text(self._home / NAME, json.dumps(self._sent) + "\n")

    def _status(self) -> dict[str, Any]:
        status = json_files.read_object(self._out / "status.json") or {}
        began = status.get("started")
        return status if isinstance(began, int | float) and began >= self._started - 1 else {}

    def _rows(self) -> Iterator[dict[str, float]]:
        """The lines of metrics.jsonl since the last time; all of them where another file has the name now."""
        if self._home is None:
            return
        try:
            with open_regular(self._home / "metrics.jsonl") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            row = metric_row(line)
            if row is not None:
                yield row

    def _samples(self) -> list[tuple[int, list[Sample]]]:
        """The steps whose samples are complete, and not sent yet."""
        status = self._status()
        if self._home is None or status.get("phase") == "sampling":
            return []
        newest = max((int(path.name[5:13]) for path in (self._home / "sample").glob("step-????????-*.png")), default=-1)
        if newest <= self._sent["sampled"]:
            return []
        by_step: dict[int, list[Sample]] = {}
        for sample in gather_run(self._out, self._home, str(status.get("run", ""))).samples:
            by_step.setdefault(sample.step, []).append(sample)
        return [(step, samples) for step, samples in sorted(by_step.items()) if step > self._sent["sampled"]]


def moment() -> int:
    """Now, in milliseconds since 1970."""
    return round(time.time() * 1000)
