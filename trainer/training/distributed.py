"""Several processes, each with one GPU, train one LoRA: who does what, and what is summed when.

The first process prepares the data, saves and logs. The others train on the data that it has prepared, and wait
(`Workers.on_first`) while it does something alone. All encode into the cache and draw samples, each its share.

The processes of one machine share a folder. Of several machines (nodes), each has such a folder, and what the first
process leaves in its own for the others comes to all of them (entrypoint/nodes/group.py).

In each step every process computes its own micro-batches; then `Workers.mean_gradient` sums over all processes:
1. a few fp32 numbers: the losses of the images, their count, whether the first process was asked to stop, and on the
   monitor page to save or to sample; and losses and counts again for each band of noise levels (`band_losses`);
2. the gradient of all adapters, one flat fp32 tensor, each process's mean weighted by the number of its images.
Afterwards all hold the same gradient and take the same optimiser step, so they keep the same weights and optimiser
state, and saving one copy is enough. `Workers.check_same` compares the weights' bits at the start and at each save.

Outside of the steps, `all_agree` and `check_same` compare a few integers on the host: the largest over all processes.

No time-out is needed here. A process that fails ends with its own exit code, and the entrypoint, which started them all
(entrypoint/processes/launch.py), ends the others: these may wait for it in a call that no signal interrupts.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.data.cache import Share
from trainer.engine.memory.sharding import Peers
from trainer.spec.errors import KilnError, PeerError, SettingsError, StopRequestedError
from trainer.spec.plan import FIRST_NODE_VARIABLE, RANK_VARIABLE, TEAM_VARIABLE
from trainer.storage import atomic
from trainer.storage.read import read_text
from trainer.training import band_losses
from trainer.training.page_requests import NOTHING, NowDue, PageRequests
from trainer.training.stop_flag import StopFlag

# With GPUs, tensors of the host (`_largest`) go through gloo, and those of the device through NCCL.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
NO_TIMEOUT = datetime.timedelta(days=100)  # torch has no word for "none"
STORE_TIMEOUT = datetime.timedelta(minutes=5)
POLL_INTERVAL_S = 0.05
BROADCAST_BYTES = 1 << 28  # at once
STOP_NOTICED = "stop-noticed"  # in the folder of the processes, once the first was asked to stop


@dataclass(frozen=True)
class StepTotals:
    """The numbers of one step, over the images of all processes."""

    loss: float  # the mean
    images: int
    norm: float  # of the gradient, before clipping
    band_losses: tuple[float | None, ...] = ()  # the mean by noise level; None: a band without images


class Workers:
    """The processes that train together, seen from number `process_rank` of `size`.

    They share `folder`, which is removed after the job. `per_node`: how many of them each machine has, where there are
    several, and `first_node`: the address of the first machine.
    """

    def __init__(
        self,
        process_rank: int = 0,
        size: int = 1,
        folder: Path | None = None,
        *,
        stop: StopFlag | None = None,
        per_node: int | None = None,
        first_node: str | None = None,
    ) -> None:
        self.process_rank = process_rank
        self.size = size
        self.per_node = per_node or size
        self._first_node = first_node
        self._has_met = False
        self.folder = folder or Path()
        self._stop = stop or StopFlag()
        self._all_stopping = False
        self.requests = PageRequests(self._stop.vitals)
        self._asked = NOTHING
        self._turns = 0  # how often the first process worked alone
        self._parent = os.getppid()
        # The totals of the last step but for the loss, and the same on the device.
        self._own_totals: tuple[tuple[float, ...], torch.Tensor] | None = None

    @property
    def is_first(self) -> bool:
        return self.process_rank == 0

    @property
    def node(self) -> int:
        """The number of this process's machine, from 0."""
        return self.node_of(self.process_rank)

    def node_of(self, process_rank: int) -> int:
        """The number of a process's machine, from 0."""
        return process_rank // self.per_node

    @property
    def leads_node(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.process_rank % self.per_node == 0

    @property
    def own_folder(self) -> Path:
        """Where a process other than the first writes its status. The entrypoint looks there for why it failed."""
        return self.folder / f"rank-{self.process_rank}"

    @property
    def stopping(self) -> bool:
        """Whether the first process was asked to stop. Between two steps all processes have the same answer."""
        return self._all_stopping if self.size > 1 else self._stop.requested

    def notices_stop(self) -> bool:
        """Whether a stop was asked for, while something is done that not every process does.

        The others learn it from the first a moment later, so it must not decide what all of them do.
        """
        noticed = self.folder / STOP_NOTICED
        if self._stop.requested and self.is_first and self.size > 1:
            noticed.touch()
        return self._stop.requested or (not self.is_first and noticed.exists())

    def asked(self) -> NowDue:
        """What was asked for on the monitor page since the last step; all processes have the same answer."""
        return self._asked if self.size > 1 else self.requests.take()

    def meet(self, device: str, check_in: Callable[[], None]) -> None:
        """Find the other processes, to sum in the host's memory and, where it is another, on `device`.

        `device`: a torch device type. `check_in` is called while the first process is waited for. Raises SettingsError
        where the processes of one machine do not reach each other, and PeerError where those of several do not.
        """
        if self.size == 1 or self._has_met:
            return
        with self._unreached():
            store = self._store(check_in)
            dist.init_process_group(
                BACKENDS[device], store=store, rank=self.process_rank, world_size=self.size, timeout=NO_TIMEOUT
            )
        self._has_met = True

    def connect(self, device: str) -> None:
        """`meet`, and sum on `device` for the first time: takes the memory that NCCL needs now."""
        self.meet(device, lambda: None)
        if self.size > 1:
            with self._unreached():
                dist.all_reduce(torch.zeros(1, device=device))

    def _store(self, check_in: Callable[[], None]) -> dist.Store:
        """Where the processes leave their addresses: in a file; of several machines, with the first process."""
        path = self.folder / "store"
        if self._first_node is None:
            return dist.FileStore(str(path), self.size)
        if self.is_first:
            store = dist.TCPStore(self._first_node, 0, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
            atomic.write_text(path, str(store.port))
            return store
        self.wait_for(path, check_in)
        return dist.TCPStore(self._first_node, int(read_text(path)), timeout=STORE_TIMEOUT)

    @contextlib.contextmanager
    def _unreached(self) -> Iterator[None]:
        """Inside, a RuntimeError means that the processes do not reach each other."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:
            if self._first_node is not None:
                raise PeerError(
                    f"NODES: the trainers of all nodes cannot talk to each other: {_first_lines(problem)}. All ports "
                    "must be open between the nodes; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the interface."
                ) from problem
            raise SettingsError(
                f"NUM_GPUS={self.size}: the processes cannot talk to each other: {_first_lines(problem)}. Fix: give "
                "the container shared memory (docker run --ipc=host), or set NUM_GPUS=1."
            ) from problem

    def disconnect(self) -> None:
        """End the connection; nothing is summed or compared any more."""
        if self.size > 1:
            dist.destroy_process_group()

    def on_first(self, task: Callable[[], None], check_in: Callable[[], None]) -> None:
        """The first process does `task`; the others wait for it, and call `check_in` meanwhile."""
        self._turns += 1
        done = self.folder / f"turn-{self._turns}"
        if not self.is_first:
            self.wait_for(done, check_in)
            return
        task()
        if self.size > 1:
            done.touch()

    def all_agree(self, answer: bool) -> bool:
        """Whether `answer` is true in every process."""
        return not any(self._largest([int(not answer)]))

    def smallest(self, value: int) -> int:
        """The smallest `value` of any process. All must call it."""
        return -self._largest([-value])[0]

    def wait_for_all(self, check_in: Callable[[], object]) -> None:
        """Return when all processes are here; `check_in` is called meanwhile, and may raise."""
        if self.size == 1:
            return
        with _peer_errors():
            arrived = dist.all_reduce(torch.zeros(1), async_op=True)
            while not arrived.is_completed():
                check_in()
                time.sleep(POLL_INTERVAL_S)
            arrived.wait()

    def peers(self) -> Peers:
        """The processes of this machine, to share out frozen weights among them."""
        number = self.process_rank % self.per_node
        # No sign of life meanwhile: a process that does not come to it hangs.
        wait_for = partial(self.wait_for, check_in=lambda: None)
        return Peers(number, self.per_node, self.folder, wait_for, self.all_agree)

    def share_cache(self, with_first: bool) -> Share:
        """This process's share of the work on its cache. All processes must call it.

        `with_first`: whether its cache is the first machine's. Other machines do all the work on theirs by themselves.
        """
        if self.size == 1:
            return Share()
        own = [0] * self.size
        own[self.process_rank] = int(with_first)
        is_with_first = self._largest(own)
        teams = [[rank for rank in range(self.size) if is_with_first[rank]]]
        for start in range(0, self.size, self.per_node):
            teams.append([rank for rank in range(start, start + self.per_node) if not is_with_first[rank]])
        share = Share()
        for ranks in teams:
            group = dist.new_group(ranks, backend="gloo", timeout=NO_TIMEOUT) if len(ranks) > 1 else None
            if self.process_rank in ranks and group is not None:
                share = Share(ranks.index(self.process_rank), len(ranks), partial(self._largest, group=group))
        return share

    def from_process(self, process_rank: int, content: bytes) -> bytes:
        """`content` of that process, in all of them."""
        if self.size == 1:
            return content
        is_giver = self.process_rank == process_rank
        size = self._largest([len(content) if is_giver else 0])[0]
        if not size:
            return b""
        received_N = torch.frombuffer(bytearray(content if is_giver else size), dtype=torch.uint8)
        with _peer_errors():
            for piece_N in received_N.split(BROADCAST_BYTES):
                dist.broadcast(piece_N, process_rank)
        return received_N.numpy().tobytes()

    def check_same(self, params: Sequence[torch.Tensor]) -> None:
        """Raises KilnError unless `params` (fp32) have the same bits in all processes, by the sums of these."""
        if self.size == 1:
            return
        sums = torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for p in params]).tolist()
        largest = self._largest(sums)
        smallest = [-value for value in self._largest([-value for value in sums])]
        if largest != smallest:
            raise KilnError(f"The {self.size} processes have different weights, which must not happen.")

    def mean_gradient(
        self, flat_grad: torch.Tensor, losses: Sequence[torch.Tensor], times: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Replace `flat_grad`, the mean over this process's images, by the mean over those of all processes.

        `losses`, `times`: (B,) for each of this process's micro-batches; times are noise levels, 0 to 1. Returns a
        tensor (T,) for `read_totals`: mean loss, number of images, how many processes were asked to stop, to save, to
        sample; and what `band_losses.sums` gives. Nothing here waits for the device.
        """
        own_images = sum(len(losses_B) for losses_B in losses)
        bands_2K = band_losses.sums(losses, times, flat_grad.device)
        if self.size == 1:
            loss = torch.cat(list(losses)).mean()
            totals_5 = torch.stack([loss, torch.full_like(loss, own_images), *3 * [torch.zeros_like(loss)]])
            return torch.cat([totals_5, bands_2K])
        asked = self.requests.take()
        own_totals = (0.0, float(own_images), float(self._stop.requested), float(asked.save), float(asked.sample))
        # They are the same in nearly all steps. A copy to the device would wait for it.
        if self._own_totals is None or self._own_totals[0] != own_totals:
            self._own_totals = own_totals, torch.tensor(own_totals, device=flat_grad.device)
        totals_T = torch.cat([self._own_totals[1], bands_2K])
        if losses:
            totals_T[0] = torch.cat(list(losses)).sum()
        flat_grad.mul_(own_images)
        with _peer_errors():
            dist.all_reduce(totals_T)
            dist.all_reduce(flat_grad)
        flat_grad.div_(totals_T[1])
        totals_T[0] /= totals_T[1]
        return totals_T

    def read_totals(self, step_totals_T: torch.Tensor, norm: torch.Tensor) -> StepTotals:
        """The step's numbers, and `norm` (a scalar) among them. Waits for the device."""
        numbers = torch.cat([norm[None], step_totals_T]).tolist()
        norm_value, loss, images, stopping, saves, samples = numbers[:6]
        self._all_stopping = stopping > 0
        self._asked = NowDue(save=saves > 0, sample=samples > 0)
        return StepTotals(loss, round(images), norm_value, band_losses.means(numbers[6:]))

    def _largest(self, values: list[int], *, group: dist.ProcessGroup | None = None) -> list[int]:
        """For each place in `values`, the largest value of any process there; of `group`, or of all."""
        if self.size == 1:
            return values
        largest = torch.tensor(values, dtype=torch.int64)
        with _peer_errors():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        return largest.tolist()

    def wait_for(self, path: Path, check_in: Callable[[], None]) -> None:
        """Wait until `path` exists. Raises StopRequestedError when the process that started this one has ended."""
        while not path.exists():
            check_in()
            if os.getppid() != self._parent:
                raise StopRequestedError("The process that started this one has ended.", exit_code=143)
            time.sleep(POLL_INTERVAL_S)


def workers_from_environment(
    size: int, environment: Mapping[str, str], stop: StopFlag, *, per_node: int | None = None
) -> Workers:
    """This process's place among `size`, from the entrypoint's variables. Raises SettingsError without them.

    `per_node`: how many of them each machine has; None: all.
    """
    if size == 1:
        return Workers(stop=stop)
    if TEAM_VARIABLE not in environment:
        raise SettingsError(
            f"The plan is for NUM_GPUS={size} processes, but this one was started alone. Start the job with "
            "python -m entrypoint."
        )
    return Workers(
        process_rank(environment),
        size,
        Path(environment[TEAM_VARIABLE]),
        stop=stop,
        per_node=per_node,
        first_node=environment.get(FIRST_NODE_VARIABLE),
    )


def process_rank(environment: Mapping[str, str]) -> int:
    """The number of this process, from 0; 0 where it is the only one."""
    return int(environment.get(RANK_VARIABLE, "0"))


@contextlib.contextmanager
def _peer_errors() -> Iterator[None]:
    """Inside, a RuntimeError is raised as PeerError: a collective fails because another process has ended."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as problem:
        raise PeerError(f"Another process of this job does not answer: {_first_lines(problem)}.") from problem


def _first_lines(problem: RuntimeError) -> str:
    """The first four lines of the message, without torch's hints: C++ stack frames follow."""
    lines = str(problem).splitlines()[:4]
    return "; ".join(line.partition(". This is typically")[0] for line in lines)
