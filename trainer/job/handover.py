"""The first of several processes prepares the data; this is how the others get it.

One JSON file in the folder that goes with the job holds the plan, the images and the state to resume from.
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

NAME = "prepared.json"


@dataclass(frozen=True)
class HandedOver:
    """What the first process hands to the others: all that they need to train."""

    plan: Plan
    state: Path | None  # the folder of the state to go on from
    images: tuple[ImageRecord, ...]

    def to_json(self) -> str:
        rows = [
            {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(p).items()} for p in self.images
        ]
        return json.dumps({"plan": self.plan.to_json(), "state": self.state and str(self.state), "pictures": rows})

    @staticmethod
    def from_json(text: str) -> HandedOver:
        raw = json.loads(text)
        paths = ("file", "mask_file")
        rows: list[dict[str, Any]]
        rows = [{k: Path(v) if k in paths and v else v for k, v in row.items()} for row in raw["pictures"]]
        state = Path(raw["state"]) if raw["state"] else None
        return HandedOver(Plan.from_json(raw["plan"]), state, tuple(ImageRecord(**row) for row in rows))


def hand_over(workers: Workers, prepared: HandedOver) -> None:
    """Let the other processes of `workers` begin."""
    if workers.size > 1:
        atomic.write_text(workers.folder / NAME, prepared.to_json())


def receive(workers: Workers, check_in: Callable[[], None]) -> HandedOver:
    """Wait for the first process to hand over, then return what it has prepared. Calls `tick` while it waits."""
    path = workers.folder / NAME
    workers.wait_for(path, check_in)
    return HandedOver.from_json(path.read_text(encoding="utf-8"))
