"""What has changed in the folder since the last look, as documents with versions. One look serves all viewers."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

from entrypoint.monitor.dataset import TrainedImages
from entrypoint.monitor.documents import (
    Served,
    ShownRun,
    checkpoints_document,
    plan_document,
    status_document,
)
from entrypoint.monitor.log_tail import LogTail
from entrypoint.monitor.numbers import Document, Numbers
from entrypoint.monitor.sample_list import SampleList
from entrypoint.report.gather import run_of
from trainer.spec.plan import Plan
from trainer.storage import json_files, own_files, run_records
from trainer.storage.read import has_link

CLOCK_SKEW_S = 1.0  # between this process and the trainer, of the same machine

Stamp = tuple[int, int, int]  # of a file or a folder: inode, time of its last change, size


class Live:
    """Everything that viewers are told, and its versions. `look` reads what has changed; `lock` is held meanwhile."""

    def __init__(self, served: Served) -> None:
        # The folder itself may be named by a link; nothing in it is one.
        self.served = replace(served, out=served.out.resolve())
        self.lock = threading.Lock()
        self.shown = ShownRun(home=self.served.out)
        self.numbers = Numbers()
        self.log = LogTail()
        self.documents: dict[str, tuple[int, bytes]] = {}  # name → version, JSON
        self.plan: Plan | None = None
        self.dataset = TrainedImages()
        self._samples = SampleList()
        self._stamps: dict[str, tuple[Stamp | None, ...]] = {}
        self.versions = 0  # how often a document has changed
        self.instance = os.urandom(8).hex()

    @property
    def pictures_inside(self) -> Path | None:
        """Where images of the dataset are shown from: wherever a job's plan says; of any other, this folder alone."""
        return None if self.served.is_own_plan else self.served.out

    def look(self) -> None:
        """Read what has changed since the last look."""
        with self.lock:
            self._look()

    def _look(self) -> None:
        out = self.served.out
        if self._has_changed("status", out / "status.json"):
            self._find_run()
        home = self.shown.home
        if self._has_changed("record", home / run_records.RECORD):
            total = (json_files.read_object(_own(home / run_records.RECORD)) or {}).get("total")
            self.shown.total = total if isinstance(total, int) and self.shown.name else 0
        if self._has_changed("plan", home / "plan.json"):
            self.plan = run_records.read_plan(_own(home / "plan.json")) if self.shown.name else None
            self._publish("plan", plan_document(self.plan))
        if self.shown.name:
            self.numbers.read_on(home / "metrics.jsonl")
        self.log.read_on(out / own_files.RUN_LOG)
        if self._has_changed("samples", home / "sample"):
            folder = _own(home / "sample") if self.shown.name else Path(os.devnull)
            self._publish("samples", self._samples.read(folder))
        if self._has_changed("dataset", home / own_files.DATASET_VIEW):
            self.dataset.read(home / own_files.DATASET_VIEW if self.shown.name else Path(os.devnull))
            self._publish("dataset", self.dataset.summary())
        if self._has_changed("checkpoints", out, home):
            self._publish("checkpoints", checkpoints_document(out, self.shown))
        self._publish("status", status_document(self.served, self.shown, self.plan, last_step=self.numbers.last_step))

    def _find_run(self) -> None:
        """The run that is trained; none as long as status.json is that of an earlier start."""
        out = self.served.out
        status = json_files.read_object(_own(out / "status.json")) or {}
        began = status.get("started")
        if not isinstance(began, int | float) or began < self.served.started - CLOCK_SKEW_S:
            status = {}
        name, home = run_of(out, status)
        if _own(home) != home:
            name, home = "", out
        if not name and not self.served.started:  # a folder without its status.json
            plan = run_records.read_plan(_own(home / "plan.json"))
            name = plan.output.name if plan else ""
        if (name, home) != (self.shown.name, self.shown.home):
            for what in ("record", "plan", "samples", "dataset", "checkpoints"):
                self._stamps.pop(what, None)
            generation = self.numbers.generation + 1
            self.numbers = Numbers()
            self.numbers.generation = generation
            self.shown = ShownRun(name=name, home=home)
        self.shown.status = status

    def _has_changed(self, what: str, *paths: Path) -> bool:
        stamps = tuple(map(_stamp, paths))
        if self._stamps.get(what, ()) == stamps:
            return False
        self._stamps[what] = stamps
        return True

    def _publish(self, name: str, document: Document) -> None:
        data = json.dumps(document, separators=(",", ":")).encode()
        if name not in self.documents or self.documents[name][1] != data:
            self.versions += 1
            self.documents[name] = (self.versions, data)


def _own(path: Path) -> Path:
    """`path`; where a link leads there, what nothing can be read from."""
    return Path(os.devnull) if has_link(path) else path


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
