"""queue.json in OUTPUT_PATH: what became of each job, by which a restart goes on with those that are not done."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from entrypoint.queue.jobs import QueuedJob
from trainer.spec.errors import StorageError
from trainer.storage import json_files, own_files
from trainer.storage.folders import write_text

log = logging.getLogger(__name__)
NAME = "queue.json"
WAITING, RUNNING, DONE, FAILED, STOPPED = ("waiting", "running", "done", "failed", "stopped")


@dataclass
class Entry:
    """What became of one job. `seconds`: of all its starts. `uploads`: where to, by `QueuedJob.uploads`."""

    digest: str
    state: str = WAITING
    exit_code: int | None = None
    seconds: float = 0.0
    starts: int = 0
    message: str = ""
    uploads: str = ""


@dataclass
class QueueRecord:
    """The entries of all jobs, by name."""

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)

    @staticmethod
    def opened(out: Path, jobs: Sequence[QueuedJob]) -> QueueRecord:
        """The record of a queue, with what earlier starts wrote of the same jobs."""
        path = out / NAME
        with suppress(StorageError):
            json_files.set_aside_unless(path, own_files.has_keys("jobs"))
        known = (json_files.read_object(path) or {}).get("jobs")
        record = QueueRecord(path)
        for job in jobs:
            entry = _read(known.get(job.name) if isinstance(known, dict) else None)
            is_same = entry is not None and entry.digest == job.digest
            record.entries[job.name] = entry if entry is not None and is_same else Entry(job.digest)
        return record

    def is_done(self, job: QueuedJob) -> bool:
        """Whether it has ended with 0, its folder still says so, and its results are where they are wanted now."""
        entry = self.entries[job.name]
        if entry.state != DONE or (job.uploads and entry.uploads != job.uploads):
            return False
        return (json_files.read_object(job.out / "status.json") or {}).get("phase") == "done"

    def write(self) -> None:
        """Replace the file. A volume that does not take it is no reason to end the jobs."""
        jobs = {name: asdict(entry) for name, entry in self.entries.items()}
        try:
            write_text(self.path, json.dumps({"jobs": jobs}, indent=2) + "\n")
        except StorageError as problem:
            log.warning("The queue's record was not written: %s", problem)


def _read(found: Any) -> Entry | None:
    """An entry as JSON has it; None where it is damaged."""
    if not isinstance(found, dict):
        return None
    with suppress(TypeError):
        entry = Entry(**found)
        if isinstance(entry.digest, str) and isinstance(entry.seconds, int | float) and isinstance(entry.starts, int):
            return entry
    return None
