"""Shards that come while the job works, and go: of a place whose shards do not all fit the volume.

The trainer has neither network nor keys, so the entrypoint brings the shards (`entrypoint.fetch.streams`). Both talk
through the stream's folder:

| file | who writes | what |
| --- | --- | --- |
| `stream.json` | the entrypoint | all shards: name, bytes and version |
| `wanted.json` | the first trainer | those that should be here, the most urgent first; all others are deleted |
| `shards/NAME` | the entrypoint | a shard, under its name only when it is whole |
| `problems/KEY.json` | the entrypoint | why a wanted shard does not come |
| `tables/KEY.jsonl` | the trainer | what was found in a shard (`table`), so that the next start need not read it |
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.spec.errors import DataError, GatedError, KilnError, SettingsError, StorageError, UnreachableError
from trainer.storage import atomic, json_files
from trainer.storage.safe_names import is_safe

STREAM, WANTED = "stream.json", "wanted.json"
SHARDS, PROBLEMS, TABLES = "shards", "problems", "tables"
LOOK_AGAIN_S = 0.1
LONGEST_SILENCE_S = 120.0
KINDS: dict[str, type[KilnError]] = {
    kind.__name__: kind for kind in (DataError, GatedError, SettingsError, StorageError, UnreachableError)
}


@dataclass(frozen=True)
class ShardStream:
    """`shards`: name, bytes and version of each, in the order of their names."""

    folder: Path
    shards: tuple[tuple[str, int, str], ...]

    @staticmethod
    def of(folder: Path) -> ShardStream | None:
        """The stream in a folder, if it is one."""
        rows = (json_files.read_object(folder / STREAM) or {}).get("shards")
        if not isinstance(rows, list):
            return None
        shards = [(str(name), int(size), str(version)) for name, size, version in rows if is_safe(name)]
        return ShardStream(folder, tuple(shards))

    def write(self) -> None:
        atomic.write_text(self.folder / STREAM, json.dumps({"shards": self.shards}))

    def names(self) -> list[str]:
        return [name for name, _, _ in self.shards]

    @property
    def root(self) -> Path:
        """The folder that has the shards that are here."""
        return self.folder / SHARDS

    def want(self, names: Sequence[str]) -> None:
        """Ask for these shards; all others are deleted. What could not be brought before is tried again."""
        for name in names:
            self.problem_file(name).unlink(missing_ok=True)
        atomic.write_text(self.folder / WANTED, json.dumps({"names": list(names)}))

    def wanted(self) -> list[str]:
        names = (json_files.read_object(self.folder / WANTED) or {}).get("names")
        known = set(self.names())
        return [name for name in names if name in known] if isinstance(names, list) else []

    def wait(self, name: str, check_in: Callable[[], None] = lambda: None) -> Path:
        """The shard, once it is here. Raises the error with which it could not be brought, what `check_in` raises."""
        path = self.root / name
        while not path.exists():
            problem = json_files.read_object(self.problem_file(name))
            if problem is not None:
                raise KINDS.get(str(problem.get("kind")), UnreachableError)(str(problem.get("message")))
            if self._silent_s() > LONGEST_SILENCE_S:
                raise UnreachableError(
                    f"{name} is waited for, and nothing brings shards to {self.folder} any more: the log has the "
                    "reason. Start again: the job goes on from its last save."
                )
            check_in()
            time.sleep(LOOK_AGAIN_S)
        return path

    def show_life(self) -> None:
        """By whoever brings shards: that it is there. Needs no room on the volume. Raises OSError."""
        now = time.time()  # not the volume's clock, which may be another
        os.utime(self.folder / STREAM, (now, now))

    def _silent_s(self) -> float:
        return time.time() - (self.folder / STREAM).stat().st_mtime

    def tell(self, name: str, problem: KilnError) -> None:
        """Why a shard does not come."""
        text = json.dumps({"kind": type(problem).__name__, "message": str(problem)})
        atomic.write_text(self.problem_file(name), text)

    def problem_file(self, name: str) -> Path:
        return self.folder / PROBLEMS / f"{_key(name)}.json"

    def table_file(self, name: str, version: str, *asked: str | None) -> Path:
        """`asked`: all that decides what is read of a shard."""
        return self.folder / TABLES / f"{_key(name, version, *asked)}.jsonl"


def _key(*parts: str | None) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
