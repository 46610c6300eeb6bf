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
from trainer.storage.read import is_regular
from trainer.storage.run_records import STATE_FILES, RunRecord, state_folders

log = logging.getLogger(__name__)
WARN_BELOW_SAVES = 3  # the log warns when fewer saves than these still fit
SAVE_NAME = re.compile(r".*-step(\d{8})(-[a-z]+)?\.safetensors")


class CheckpointRetention:
    """Keeps the newest states in `home`, and the LoRA files of the newest saves in `out`, of those that `record` lists.

    0 keeps all. What `record` calls finished stays in any case: the end of a run before it was asked for more.

    `every`: a save at a multiple of so many steps is scheduled; 0: none is. The others, which were asked for or come
    from a stop, are counted apart: they push no scheduled LoRA file out.
    """

    def __init__(
        self, out: Path, home: Path, record: RunRecord, *, keep_states: int, keep_loras: int, every: int = 0
    ) -> None:
        self.out = out
        self.home = home
        self.record = record
        self.keep_states = keep_states
        self.keep_loras = keep_loras
        self.every = every

    def write(self, write: Callable[[], None], step: int) -> None:
        """Call `write`, which saves `step`, and prune. If the disk is full, prune all but the newest state and retry.

        Raises StorageError if that was not enough; the newest state is there and complete.
        """
        try:
            write()
        except StorageError as problem:
            state_files.remove_damaged(self.home / "state", own=self.record.states)
            freed = self.prune(1, 1)
            if not freed:
                raise
            log.warning("%s Removed %d older files and states to try again.", problem, freed)
            write()
        self.prune(self.keep_states, self.keep_loras)
        self._warn_of_full_disk(step)

    def prune(self, keep_states: int, keep_loras: int) -> int:
        """Remove all but the newest states and LoRA files, and what an interrupted save left; count them."""
        before = self._count()
        self.record.disown_states(state_files.prune(self.home / "state", keep_states, own=self.record.states))
        saves = self._saves()
        outdated_steps: list[int] = []
        if keep_loras:
            steps = sorted(set(saves.values()) - set(self.record.finished))
            scheduled = [step for step in steps if self._is_scheduled(step)]
            others = [step for step in steps if not self._is_scheduled(step)]
            outdated_steps = scheduled[:-keep_loras] + others[:-keep_loras]
        outdated = [name for name, step in saves.items() if step in outdated_steps]
        for name in outdated:
            (self.out / name).unlink(missing_ok=True)
        self.record.disown(outdated)
        atomic.remove_leftovers(self.out, self.record.files.__contains__)
        return before - self._count()

    def _is_scheduled(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def saved_steps(self) -> list[int]:
        """The steps whose LoRA files are there."""
        return sorted({step for name, step in self._saves().items() if (self.out / name).is_file()})

    def _saves(self) -> dict[str, int]:
        """The LoRA files of saves → their steps."""
        saves = {}
        for name in self.record.files:
            if match := SAVE_NAME.fullmatch(name):
                saves[name] = int(match[1])
        return saves

    def _count(self) -> int:
        """LoRA files and states."""
        files = [name for name in self._saves() if (self.out / name).is_file()]
        return len(files) + len(state_folders(self.home / "state"))

    def _warn_of_full_disk(self, step: int) -> None:
        """Warn early when the volume fills up. While a save is written, the oldest is still there."""
        saved = [self.out / name for name, saved_step in self._saves().items() if saved_step == step]
        saved += (self.home / "state" / f"step-{step:08d}" / name for name in STATE_FILES)
        needed = sum(path.stat().st_size for path in saved if is_regular(path))
        free = shutil.disk_usage(self.out).free
        if free < WARN_BELOW_SAVES * needed:
            log.warning(
                "OUTPUT_PATH: a save takes %.1f MiB and %s: room for %d more. Free some space, or the job "
                "will stop with exit code 74. It resumes when it is started again.",
                needed / 2**20, atomic.free_space(self.out), free // needed,
            )  # fmt: skip
