"""How the first of several processes hands the prepared data to the others.

It writes one file with the plan, the images and the state to resume from into the folder that the processes share.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.compact.image_table import ImageTable
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
    images: Sequence[ImageRecord]
    state_digest: str = ""  # of its JSON file, which has the digest of the other one
    cache_mark: str = ""  # what the file CACHE_MARK in the first machine's cache says, where there are several
    shares_cache: bool = True  # whether the cache of this machine is the first one's

    def write(self, path: Path) -> None:
        """Write it to the file `path`: a line of JSON, and one for each image."""
        state = str(self.state) if self.state else None
        head = {"plan": self.plan.to_json(), "state": state, **{name: getattr(self, name) for name in OTHER_FIELDS}}
        atomic.write_lines(path, itertools.chain([f"{json.dumps(head)}\n"], map(_line, self.images)))

    @staticmethod
    def read(path: Path) -> HandedOver:
        with path.open(encoding="utf-8") as file:
            head: dict[str, Any] = json.loads(next(file))
            images = ImageTable(map(_image, file))
        state = Path(head["state"]) if head["state"] else None
        others = {name: head[name] for name in OTHER_FIELDS}
        return HandedOver(Plan.from_json(head["plan"]), state, images, **others)


def _line(image: ImageRecord) -> str:
    row = {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(image).items()}
    return f"{json.dumps(row)}\n"


def _image(line: str) -> ImageRecord:
    row = json.loads(line)
    for field in PATH_FIELDS:
        if row[field]:
            row[field] = Path(row[field])
    return ImageRecord(**row)


def hand_over(workers: Workers, data: HandedOver) -> None:
    """Let the other processes of `workers` begin with `data`."""
    if workers.size > 1:
        data.write(workers.folder / FILE_NAME)


def receive(workers: Workers, check_in: Callable[[], None]) -> HandedOver:
    """Wait until the first process hands over, and call `check_in` meanwhile; returns what it has prepared."""
    path = workers.folder / FILE_NAME
    workers.wait_for(path, check_in)
    return HandedOver.read(path)
