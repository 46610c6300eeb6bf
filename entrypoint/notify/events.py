"""What is told of a job. `Watch` finds it in the files of the run, each thing once, also after a restart."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.storage import json_files, own_files, run_records
from trainer.storage.safe_names import is_safe

STARTED, SAMPLED, CHECKPOINT = "training.started", "training.sampled", "training.checkpoint"
FINISHED, FAILED, STOPPED = "training.finished", "training.failed", "training.stopped"
TRAINING = ("training", "sampling", "exporting", "done")  # phases in which all is prepared


@dataclass(frozen=True)
class Event:
    """Something to tell. `data`: what the JSON says of it. `images`: samples for those who show them."""

    type: str
    time: float  # Unix seconds
    data: dict[str, Any]
    images: tuple[str, ...] = ()  # paths
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")


class Watch:
    """Looks at the folder of a job. `told`: what earlier starts have told, by the name of the run."""

    def __init__(self, out: Path, *, base: str, started: float, price: float | None, told: dict[str, Any]) -> None:
        self._out, self._base, self._started, self._price = out, base, started, price
        self.told = told
        self._has_begun = False

    def look(self, now: float) -> list[Event]:
        """What is new since the last look."""
        status = self._status()
        name = status.get("run")
        if not isinstance(name, str) or not is_safe(name) or "/" in name:
            return []
        folder = str(status.get("run_folder", "."))
        home = self._out / folder if is_safe(folder) else self._out
        if self.told.get("run") != name:
            self.told.clear()
            self.told.update({"run": name, "sampled": -1, "saved": -1})
        found = []
        if not self._has_begun and status.get("phase") in TRAINING:
            self._has_begun = True
            resumed = int(status.get("step") or 0)
            found.append(Event(STARTED, now, {**self._common(status, home), "resumed_from_step": resumed or None}))
        found += self._saves(status, home, name, now)
        found += self._samples(status, home, now)
        return found

    def ending(self, now: float, *, exit_code: int, message: str) -> Event:
        """How the job has ended."""
        status = self._status()
        folder = str(status.get("run_folder", "."))
        data = self._common(status, self._out / folder if is_safe(folder) else self._out)
        data |= {"seconds": round(now - self._started), "exit_code": exit_code}
        if self._price:
            data["cost"] = round(self._price * (now - self._started) / 3600, 2)
        if exit_code == 0:
            output = status.get("output")
            data["file"] = _file(self._out / output) if isinstance(output, str) and is_safe(output) else None
            return Event(FINISHED, now, data, self._newest_images())
        data |= {"message": message or str(status.get("message", "")), "saved_step": status.get("saved_step")}
        kind = STOPPED if exit_code in (130, 143) else FAILED
        return Event(kind, now, data)

    def _status(self) -> dict[str, Any]:
        """status.json, if this start of the job has written it."""
        status = json_files.read_object(self._out / "status.json") or {}
        began = status.get("started")
        return status if isinstance(began, int | float) and began >= self._started - 1 else {}

    def _common(self, status: Mapping[str, Any], home: Path) -> dict[str, Any]:
        total = (json_files.read_object(home / run_records.RECORD) or {}).get("total")
        data = {"run": status.get("run"), "base_model": self._base, "step": status.get("step"), "total_steps": total}
        return data | {key: status.get(key) for key in ("epoch", "loss", "eta_s")}

    def _saves(self, status: Mapping[str, Any], home: Path, name: str, now: float) -> list[Event]:
        new: dict[int, list[Path]] = {}
        for path in sorted(self._out.glob("*.safetensors")):
            rest = path.stem.removeprefix(f"{name}-step")
            step = int(rest[:8]) if path.stem.startswith(f"{name}-step") and rest[:8].isdecimal() else -1
            if step > self.told["saved"] and not path.is_symlink():
                new.setdefault(step, []).append(path)
        found = []
        for step, paths in sorted(new.items()):
            if not any(len(path.stem) == len(f"{name}-step") + 8 for path in paths):
                continue  # the main file comes last
            self.told["saved"] = step
            data = {**self._common(status, home), "step": step, "files": [_file(path) for path in paths]}
            found.append(Event(CHECKPOINT, now, data))
        return found

    def _samples(self, status: Mapping[str, Any], home: Path, now: float) -> list[Event]:
        """The newest step whose samples are complete: the job does something else by now."""
        by_step = _samples_by_step(home / "sample")
        if status.get("phase") == "sampling" or not by_step:
            return []
        step = max(by_step)
        if step <= self.told["sampled"]:
            return []
        self.told["sampled"] = step
        paths = by_step[step]
        data = {**self._common(status, home), "step": step, "files": [path.name for path in paths]}
        return [Event(SAMPLED, now, data, tuple(map(str, paths)))]

    def _newest_images(self) -> tuple[str, ...]:
        folder = str(self._status().get("run_folder", "."))
        by_step = _samples_by_step((self._out / folder if is_safe(folder) else self._out) / "sample")
        return tuple(map(str, by_step[max(by_step)])) if by_step else ()


def _samples_by_step(folder: Path) -> dict[int, list[Path]]:
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("step-*.png")):
        match = own_files.SAMPLE_NAME.fullmatch(path.name)
        if match and not path.is_symlink():
            found.setdefault(int(match[1]), []).append(path)
    return found


def _file(path: Path) -> dict[str, Any] | None:
    try:
        return {"name": path.name, "bytes": path.stat().st_size}
    except OSError:  # an older save was removed
        return None
