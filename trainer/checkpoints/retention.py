"""Which checkpoints stay on the disk, and a warning before it is full."""

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
WARN_BELOW_SAVES = 3  # the log warns when fewer saves than these still fit


class CheckpointRetention:
    """Keeps the newest `keep` states in `out` and their LoRA files, named `<name>-step00000100…`."""

    def __init__(self, out: Path, name: str, keep: int) -> None:
        self.out = out
        self.keep = keep
        self._file_name = re.compile(rf"\.?{re.escape(name)}-step(\d{{8}})\D.*")  # with a dot: a temporary one

    def write(self, write: Callable[[], None], step: int) -> None:
        """Call `write`, which saves `step`, and prune. If the disk is full, prune all but the newest state and retry.

        Raises StorageError if that was not enough; the newest state is there and complete.
        """
        try:
            write()
        except StorageError as problem:
            for folder in (self.out / "state").glob("*.damaged"):
                shutil.rmtree(folder, ignore_errors=True)
            freed = self.prune(1)
            if not freed:
                raise
            log.warning("%s Removed %d older files and states to try again.", problem, freed)
            write()
        self.prune(self.keep)
        self._warn_of_full_disk(step)

    def prune(self, keep: int) -> int:
        """Remove all but the newest `keep` states, their LoRA files, and what an interrupted save left; count them."""
        before = self._count()
        kept_steps = state_files.prune(self.out / "state", keep)
        for path in self._files():
            match = self._file_name.fullmatch(path.name)
            outdated = match is not None and int(match[1]) not in kept_steps
            if outdated or path.name.startswith("."):
                path.unlink(missing_ok=True)
        return before - self._count()

    def _count(self) -> int:
        """LoRA files and states."""
        return len(self._files()) + len([*(self.out / "state").glob("*")])

    def _files(self) -> list[Path]:
        return [path for path in self.out.glob("*.safetensors*") if self._file_name.fullmatch(path.name)]

    def _warn_of_full_disk(self, step: int) -> None:
        """Warn early when the volume fills up. While a save is written, the oldest is still there."""
        saved = [path for path in self._files() if f"-step{step:08d}" in path.name]
        saved += (self.out / "state" / f"step-{step:08d}").iterdir()
        needed = sum(path.stat().st_size for path in saved)
        free = shutil.disk_usage(self.out).free
        if free < WARN_BELOW_SAVES * needed:
            log.warning(
                "OUTPUT_PATH: a save takes %.1f MiB and %s: room for %d more. Free some space, or the job "
                "will stop with exit code 74. It resumes when it is started again.",
                needed / 2**20, atomic.free_space(self.out), free // needed,
            )  # fmt: skip
