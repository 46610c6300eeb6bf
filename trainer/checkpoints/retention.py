"""Room for checkpoints: which stay, what may go, and a warning before there is no room left."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoints import state_files
from trainer.spec.errors import StorageError
from trainer.storage import atomic

log = logging.getLogger(__name__)
WARN_BELOW_SAVES = 3  # saves that there should be room for


class CheckpointRetention:
    """Knows the LoRA files and states in `out`, and keeps the newest `keep` of both."""

    def __init__(self, out: Path, name: str, keep: int) -> None:
        self.out, self.keep = out, keep
        self._ours = re.compile(rf"\.?{re.escape(name)}-step(\d{{8}})\D.*")

    def write(self, write: Callable[[], None], step: int) -> None:
        """`write` the files of `step`, and prune. Where there is no room, all but the newest state go for it first.

        Raises StorageError if that was not enough; the newest state is there and whole.
        """
        try:
            write()
        except StorageError as problem:
            for folder in (self.out / "state").glob("*.damaged"):
                shutil.rmtree(folder, ignore_errors=True)
            freed = self.prune(1)
            if not freed:
                raise
            log.warning("%s Removed %d older files and states, and try once more.", problem, freed)
            write()
        self.prune(self.keep)
        self._warn(step)

    def prune(self, keep: int) -> int:
        """Remove all but the newest `keep` states, their LoRA files, and what an interrupted save left; count them."""
        before = len(self._files()) + len([*(self.out / "state").glob("*")])
        kept = state_files.prune(self.out / "state", keep)
        for path in self._files():
            found = self._ours.fullmatch(path.name)
            if (found and int(found[1]) not in kept) or path.name.startswith("."):
                path.unlink(missing_ok=True)
        return before - len(self._files()) - len([*(self.out / "state").glob("*")])

    def _files(self) -> list[Path]:
        return [p for p in self.out.glob("*.safetensors*") if self._ours.fullmatch(p.name)]

    def _warn(self, step: int) -> None:
        """Say early when the volume fills up. While a save is written, the oldest is still there."""
        mine = [p for p in self._files() if f"-step{step:08d}" in p.name]
        mine += [*(self.out / "state" / f"step-{step:08d}").iterdir()]
        need = sum(p.stat().st_size for p in mine)
        free = shutil.disk_usage(self.out).free
        if free < WARN_BELOW_SAVES * need:
            log.warning(
                "OUTPUT_PATH: a save takes %.1f MiB, and %s are free: room for %d more. Free some, or the job will "
                "stop with exit code 74 (it resumes by itself).",
                need / 2**20, atomic.free_space(self.out), free // need,
            )  # fmt: skip
