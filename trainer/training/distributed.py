"""Several processes, each with a GPU of its own, train one LoRA: who does what, and the sums over all of them.

The first process prepares, samples, saves and logs; the others take what it has prepared, and wait while it does
something alone. In a step each computes its own micro-batches, and `Workers.mean_gradient` replaces each process's
gradient by that of all images, so that all take the same step and keep the same weights and optimiser state.

No time-out here matters. A process that fails ends with its own exit code, and the one that started them all
(entrypoint/processes/launch.py) ends the others, which may wait for it in a call that no signal interrupts.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.spec.errors import KilnError, PeerError, SettingsError, StopRequestedError
from trainer.spec.plan import RANK_VARIABLE, TEAM_VARIABLE
from trainer.training.stop_flag import StopFlag

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
UNLIMITED = datetime.timedelta(days=100)
POLL_S = 0.05


class Workers:
    """This process, number `process_rank` of `size`. They share `folder`, which goes with the job."""

    def __init__(
        self, process_rank: int = 0, size: int = 1, folder: Path | None = None, *, stop: StopFlag | None = None
    ) -> None:
        self.process_rank, self.size, self.folder = process_rank, size, folder or Path()
        self._stop, self._stopping = stop or StopFlag(), False
        self._turns, self._parent = 0, os.getppid()
        self._said: tuple[tuple[float, ...], torch.Tensor] | None = None

    @property
    def is_first(self) -> bool:
        return self.process_rank == 0

    @property
    def own_folder(self) -> Path:
        """Where another than the first writes what a job writes; if it fails, the entrypoint finds the reason there."""
        return self.folder / f"rank-{self.process_rank}"

    @property
    def stopping(self) -> bool:
        """Whether the first process was asked to stop; all have the same answer between two steps."""
        return self._stopping if self.size > 1 else self._stop.requested

    def connect(self, device: str) -> None:
        """Meet the others, on `device`. What talks between GPUs takes its memory now."""
        if self.size == 1:
            return
        store = dist.FileStore(str(self.folder / "store"), self.size)
        backend, rank, size = BACKENDS[device], self.process_rank, self.size
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=UNLIMITED)
            dist.all_reduce(torch.zeros(1, device=device))
        except RuntimeError as problem:
            raise SettingsError(
                f"NUM_GPUS={self.size}: the processes cannot talk to each other: {_said(problem)}. Fix: give the "
                "container shared memory (docker run --ipc=host), or set NUM_GPUS=1."
            ) from problem

    def disconnect(self) -> None:
        """All that is done together is done."""
        if self.size > 1:
            dist.destroy_process_group()

    def on_first(self, work: Callable[[], None], check_in: Callable[[], None]) -> None:
        """The first process does `work`; the others wait for it."""
        self._turns += 1
        done = self.folder / f"turn-{self._turns}"
        if self.is_first:
            work()
            if self.size > 1:
                done.touch()
        else:
            self.wait_for(done, check_in)

    def all_agree(self, good: bool) -> bool:
        """Whether it is so for every process."""
        return not any(self._largest([int(not good)]))

    def check_same(self, params: Sequence[torch.Tensor]) -> None:
        """Raises KilnError unless all processes have the same bits in `params`."""
        if self.size == 1:
            return
        sums = torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for p in params]).tolist()
        if self._largest(sums) != [-each for each in self._largest([-each for each in sums])]:
            raise KilnError(f"The {self.size} processes have come to different weights, which must not happen.")

    def mean_gradient(self, flat: torch.Tensor, losses_B: Sequence[torch.Tensor]) -> torch.Tensor:
        """What is for `heard`, which alone waits for it. `losses_B`: the losses of one's own pictures.

        `flat`, each process's mean gradient over its own pictures, becomes the mean over all. Two sums do it: of the
        gradients, and of the pictures, the wish to stop, and losses.
        """
        own = sum(len(each) for each in losses_B)
        if self.size == 1:
            loss = torch.cat(list(losses_B)).mean()
            return torch.stack([loss, torch.full_like(loss, own), torch.zeros_like(loss)])
        said = (0.0, float(own), float(self._stop.requested))
        if self._said is None or self._said[0] != said:  # the same in nearly all steps: no copy to wait for
            self._said = said, torch.tensor(said, device=flat.device)
        told = self._said[1].clone()
        if losses_B:
            told[0] = torch.cat(list(losses_B)).sum()
        flat.mul_(own)
        with _peers():
            dist.all_reduce(told)
            dist.all_reduce(flat)
        flat.div_(told[1])
        told[0] /= told[1]
        return told

    def read_totals(self, step_totals_3: torch.Tensor, norm: torch.Tensor) -> tuple[float, int, float]:
        """The mean loss over the pictures of all processes, their number, and `norm`: waits for the device."""
        loss, images, stopping, number = torch.cat([step_totals_3, norm[None]]).tolist()
        self._stopping = stopping > 0
        return loss, round(images), number

    def _largest(self, values: list[int]) -> list[int]:
        """Of each value, the largest of any process."""
        if self.size == 1:
            return values
        found = torch.tensor(values, dtype=torch.int64)
        with _peers():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()

    def wait_for(self, path: Path, check_in: Callable[[], None]) -> None:
        """Wait until `path` exists. Raises StopRequestedError when the process that started this one has ended."""
        while not path.exists():
            check_in()
            if os.getppid() != self._parent:
                raise StopRequestedError("The process that started this one is gone.", exit_code=143)
            time.sleep(POLL_S)


def workers_from_environment(size: int, environment: Mapping[str, str], stop: StopFlag) -> Workers:
    """This process's place among `size`, as the entrypoint has told it. Raises SettingsError where it has not."""
    if size == 1:
        return Workers(stop=stop)
    if TEAM_VARIABLE not in environment:
        raise SettingsError(
            f"The plan is for NUM_GPUS={size} processes, and this is one alone: start it by python -m entrypoint."
        )
    return Workers(process_rank(environment), size, Path(environment[TEAM_VARIABLE]), stop=stop)


def process_rank(environment: Mapping[str, str]) -> int:
    """Which of the processes this is; 0 where there is one."""
    return int(environment.get(RANK_VARIABLE, "0"))


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Around what is done together: where it fails, another process is the reason."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as problem:
        raise PeerError(f"Another process of this job does not answer: {_said(problem)}.") from problem


def _said(problem: RuntimeError) -> str:
    """The lines of it that are for people."""
    return "; ".join(line.partition(". This is typically")[0] for line in str(problem).splitlines()[:4])
