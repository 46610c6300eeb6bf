"""Captions that a model has made, in CACHE_PATH/captions: one small file each, named by everything that decides it.

So a job that is killed has lost one batch at most, a renamed image keeps its caption, and jobs may share the folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.data.captions import clean
from trainer.storage import atomic, json_files

FOLDER = "captions"  # in CACHE_PATH
LONGEST = 20_000  # characters


@dataclass(frozen=True)
class Made:
    """A caption and the model that made it. `text` is "" where nothing usable came of it, and `problem` says why."""

    text: str
    model: str
    problem: str = ""


class Store:
    """The captions in a cache."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / FOLDER

    def path(self, key: str) -> Path:
        # Two letters of the hash make 256 folders: network volumes list large folders slowly.
        return self.folder / key[:2] / f"{key}.json"

    def read(self, key: str) -> Made | None:
        """The caption of that name; None where there is none, or its file is damaged."""
        values: dict[str, Any] | None = None
        if self.path(key).exists():
            values = json_files.read_sealed(self.path(key), unsealed=())
        if values is None:
            return None
        text, model, problem = values.get("text"), values.get("model"), values.get("problem", "")
        if not isinstance(text, str) or not isinstance(model, str) or not isinstance(problem, str):
            return None
        return Made(clean(text[:LONGEST]), model, problem)

    def write(self, key: str, made: Made) -> None:
        """Raises StorageError."""
        values = json_files.sealed(asdict(made))
        with atomic.replacing(self.path(key), shared=True) as temporary:
            temporary.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
