"""How the first of several processes hands the prepared data to the others.

It writes one JSON file with the plan, the images and the state to resume from into the folder that the processes share.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.records import ImageRecord
from trainer.spec.plan import Plan
from trainer.storage import atomic
from trainer.training.distributed import Workers

FILE_NAME = "prepared.json"
PATH_FIELDS = ("file", "mask_file")  # of ImageRecord
OTHER_FIELDS = ("state_digest", "cache_mark", "shares_cache")  # of HandedOver


@dataclass(frozen=True)
class HandedOver:
    """Everything that the other processes need to train."""

    plan: Plan
    state: Path | None  # the folder of the state to resume from
    images: tuple[ImageRecord, ...]
    state_digest: str = ""  # of its JSON file, which has the digest of the other one
    cache_mark: str = ""  # what the file CACHE_MARK in the first machine's cache says, where there are several
    shares_cache: bool = True  # whether the cache of this machine is the first one's

    def to_json(self) -> str:
        rows = []
        for image in self.images:
            row = dataclasses.asdict(image)
            rows.append({key: str(value) if isinstance(value, Path) else value for key, value in row.items()})
        state = str(self.state) if self.state else None
        others = {name: getattr(self, name) for name in OTHER_FIELDS}
        return json.dumps({"plan": self.plan.to_json(), "state": state, "images": rows, **others})

    @staticmethod
    def from_json(text: str) -> HandedOver:
        raw: dict[str, Any] = json.loads(text)
        images = []
        for row in raw["images"]:
            for field in PATH_FIELDS:
                if row[field]:
                    row[field] = Path(row[field])
            images.append(ImageRecord(**row))
        state = Path(raw["state"]) if raw["state"] else None
        others = {name: raw[name] for name in OTHER_FIELDS}
        return HandedOver(Plan.from_json(raw["plan"]), state, tuple(images), **others)


def hand_over(workers: Workers, data: HandedOver) -> None:
    """Let the other processes of `workers` begin with `data`."""
    if workers.size > 1:
        atomic.write_text(workers.folder / FILE_NAME, data.to_json())


def receive(workers: Workers, check_in: Callable[[], None]) -> HandedOver:
    """Wait until the first process hands over, and call `check_in` meanwhile; returns what it has prepared."""
    path = workers.folder / FILE_NAME
    workers.wait_for(path, check_in)
    return HandedOver.from_json(path.read_text(encoding="utf-8"))
