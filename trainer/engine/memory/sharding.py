"""Sharded weights: of every region's frozen weights each process keeps one part, and reads the parts of the others.

A region's weights are one row of bytes, as they are stored (8 or 4 bits where they are quantised), cut into as many
equal parts as the machine has processes. Before a region runs, its parts are copied next to each other into a slot on
the device (`weight_streaming`): the process's own from its device, the others over NVLink, or whatever connects the
GPUs, out of the memory of the process that has them.

Why the processes read, instead of gathering together (as FSDP does): a collective waits until all call it, and in the
same order. The processes of a job do not: shapes, samples and micro-batches that were halved when memory ran out differ
between them, at an epoch's end one may have no images, and only the first one validates. Frozen weights never change,
so nobody has to be asked before they are read. A process that reads needs no other to take part, and the copy engines
do it: it takes no kernel, and fits into a CUDA graph.

On GPUs the memory of another process is mapped by CUDA IPC (HIP has the same), which needs GPUs that reach each other;
`unreachable` tries. On a CPU, parts are files that all map, in the folder that the processes share.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.engine.memory.pinned import aligned
from trainer.spec.errors import KilnError
from trainer.storage import atomic
from trainer.storage.read import read_text

log = logging.getLogger(__name__)
PROBE_BYTES = 2**26  # that each process reads of another one to see whether it can
# Sharded weights may take this many times as long to come as weights from the host: these cannot be captured in graphs,
# and everything is recomputed besides.
SLOW = 2.0
GROWING_SEGMENTS = "expandable_segments:True"


@dataclass
class Peers:
    """The processes that hold the parts, all of one machine, as number `number` of `count` sees them.

    `folder`: theirs alone. `wait_for`: returns once another one has left this file there. `all_agree`: whether
    something is true in all processes of the job, also those of other machines, which all must call it.
    """

    number: int
    count: int
    folder: Path
    wait_for: Callable[[Path], None]
    all_agree: Callable[[bool], bool]
    exchanges: int = field(default=0, init=False)

    def exchange(self, content: object) -> list[Any]:
        """The `content` (JSON values) of each process, by its number. All must call it as often."""
        self.exchanges += 1
        name = f"exchange-{self.exchanges}"
        atomic.write_text(self.folder / f"{name}-{self.number}.json", json.dumps(content))
        found: list[Any] = []
        for number in range(self.count):
            path = self.folder / f"{name}-{number}.json"
            self.wait_for(path)
            found.append(json.loads(read_text(path)))
        return found


class Shards:
    """The parts of some regions. Call `keep` with each region, then `connect`; `read` brings a whole one back."""

    def __init__(self, peers: Peers, device: str) -> None:
        self.peers = peers
        self.device = torch.device(device)
        self.prefix = f"part-{peers.exchanges}"  # of the names of files with parts, on a CPU
        self.own: list[torch.Tensor] = []  # of each region, the part of this process
        self.sums: list[torch.Tensor] = []  # of each region, of all its bytes
        self.parts: list[list[torch.Tensor]] = []  # of each region, by the process that has it
        self.gb_per_s = 0.0  # at which the others' parts are read

    def size_of(self, size: int) -> int:
        """The bytes of a region of `size` bytes, filled up so that all parts are equal."""
        return self.peers.count * aligned(max(1, math.ceil(size / self.peers.count)))

    @property
    def own_bytes(self) -> int:
        """What this process keeps."""
        return sum(part.nbytes for part in self.own)

    def keep(self, region_N: torch.Tensor) -> None:
        """Copy this process's part of a region's bytes, N of which are those of `size_of`."""
        size = len(region_N) // self.peers.count
        part = self._new_part(size)
        part.copy_(region_N[self.peers.number * size :][:size])
        self.own.append(part)
        self.sums.append(region_N.view(torch.int64).sum())

    def connect(self, slot: torch.Tensor) -> None:
        """Map the parts of the other processes; check what is read of them, and how fast.

        `slot`: bytes on the device, which are overwritten. All processes must call it. Raises RuntimeError, which
        names the process, where memory cannot be mapped, and KilnError where they have stored other weights.
        """
        of_each: list[list[Any]] = []
        for number, (handles, problem) in enumerate(self.peers.exchange(self._handles())):
            if problem:
                raise RuntimeError(f"process {number} cannot share its memory: {problem}")
            of_each.append(handles)
        try:
            self._map(of_each)
        except RuntimeError as error:
            raise RuntimeError(f"process {self.peers.number}: {_first_line(error)}") from error
        self._check(slot)

    def _map(self, of_each: list[list[Any]]) -> None:
        """Map the parts that the handles `of_each` process stand for."""
        for index, own in enumerate(self.own):
            parts: list[torch.Tensor] = []
            for number in range(self.peers.count):
                mine = number == self.peers.number
                parts.append(own if mine else self._open(of_each[number][index], own.nbytes))
            self.parts.append(parts)

    def read(self, index: int, slot: torch.Tensor) -> None:
        """Copy all parts of region `index` into `slot`, on the current stream.

        Each process begins with another part, so that not all read from one device at the same time.
        """
        for turn in range(self.peers.count):
            number = (self.peers.number + turn) % self.peers.count
            part = self.parts[index][number]
            slot[number * len(part) :][: len(part)].copy_(part, non_blocking=True)

    def _check(self, slot: torch.Tensor) -> None:
        """Read every region twice: for its sum, and for the time."""
        found: list[torch.Tensor] = []
        for index, own in enumerate(self.own):
            self.read(index, slot)
            found.append(slot[: own.nbytes * self.peers.count].view(torch.int64).sum())
        if torch.stack(found).tolist() != torch.stack(self.sums).tolist():
            raise KilnError(
                f"Process {self.peers.number} reads other weights from the other GPUs than it has stored there. "
                "Fix: set PARAMS_OFFLOAD=weights."
            )
        started = time.monotonic()
        for index in range(len(self.own)):
            self.read(index, slot)
        if self.device.type != "cpu":
            torch.cuda.synchronize()
        seconds = max(time.monotonic() - started, 1e-9)
        self.gb_per_s = self.own_bytes * (self.peers.count - 1) / seconds / 1e9

    def _new_part(self, size: int) -> torch.Tensor:
        """Memory that the other processes can map."""
        if self.device.type == "cpu":
            path = self._path(self.peers.number, len(self.own))
            return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        with _fixed_segments():
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _path(self, number: int, index: int) -> Path:
        """On a CPU, the file of a part."""
        return self.peers.folder / f"{self.prefix}-{number}-{index}"

    def _handles(self) -> tuple[list[Any], str]:
        """What another process needs to map each part; and why that cannot be, or ""."""
        handles: list[Any] = []
        try:
            if self.device.type != "cpu":
                torch.cuda.synchronize()  # what is mapped has been written
            for index, part in enumerate(self.own):
                if self.device.type == "cpu":
                    handles.append(str(self._path(self.peers.number, index)))
                else:
                    _, memory, size, offset, counter, place, _, _ = part.untyped_storage()._share_cuda_()
                    handles.append([memory.hex(), size, offset, counter.hex(), place])
        except RuntimeError as problem:
            return [], _first_line(problem)
        return handles, ""

    def _open(self, handle: Any, size: int) -> torch.Tensor:
        """The part (size,) that `handle` stands for, where the other process has it."""
        if self.device.type == "cpu":
            return torch.from_file(handle, shared=True, size=size, dtype=torch.uint8)
        memory, stored, offset, counter, place = handle
        # Every process sees one device, its own, so the storage says that it is there. Nothing needs to be waited for:
        # the owner has waited.
        storage = torch.UntypedStorage._new_shared_cuda(
            torch.cuda.current_device(),
            bytes.fromhex(memory),
            stored,
            offset,
            bytes.fromhex(counter),
            place,
            b"",
            False,
        )
        return torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)[:size]


def unreachable(peers: Peers, device: str, *, against_host: bool = False) -> str:
    """Why the processes should not read each other's memory on `device`; "" if all can. All must call it, and agree.

    `against_host`: also where that is far slower than to copy all weights from the host.
    """
    probe = Shards(peers, device)
    size = probe.size_of(PROBE_BYTES)
    slot = torch.empty(0, dtype=torch.uint8)
    problem = ""
    try:
        probe.keep(torch.arange(size // 8, device=device).view(torch.uint8))
        slot = torch.empty(size, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        problem = f"process {peers.number}: {_first_line(error)}"
    # Nobody connects, and waits there for the others, before all have come so far.
    problem = _said_by_any(peers, problem)
    if not problem:
        try:
            probe.connect(slot)
        except (RuntimeError, KilnError) as error:
            problem = _first_line(error)
        problem = _said_by_any(peers, problem)
    if problem:
        return f"the GPUs cannot read each other's memory ({problem})"
    if not against_host:
        return ""
    # Of the others' memory each reads all but its own part, and of the host's everything.
    here = f"the GPUs read each other's memory at {probe.gb_per_s:.1f} GB/s"
    host_gb_per_s = _host_gb_per_s(device)
    share_read = (peers.count - 1) / peers.count
    is_fast = share_read / probe.gb_per_s <= SLOW / host_gb_per_s
    if peers.all_agree(is_fast):
        return ""
    return f"{here}, and the host's at {host_gb_per_s:.1f} GB/s"


def _said_by_any(peers: Peers, problem: str) -> str:
    """The `problem` of the first process that has one; "" if none has. All must call it."""
    of_each = peers.exchange(problem)
    found = next(filter(None, of_each), "")
    if peers.all_agree(not found):
        return ""
    return found or "says a process of another machine"


def _first_line(problem: Exception) -> str:
    """What it says, without the advice that CUDA adds in further lines."""
    return (str(problem).splitlines() or [repr(problem)])[0]


def _host_gb_per_s(device: str) -> float:
    """How fast page-locked memory of the host comes to the device."""
    if torch.device(device).type == "cpu":
        return 1e-9  # nothing has to come
    host = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    seconds = 0.0
    for _ in range(2):  # the first one sets up
        torch.cuda.synchronize()
        started = time.monotonic()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        seconds = time.monotonic() - started
    return PROBE_BYTES / max(seconds, 1e-9) / 1e9


@contextlib.contextmanager
def _fixed_segments() -> Iterator[None]:
    """Inside, torch takes device memory from segments that another process can map.

    Segments that grow, which our programs use otherwise (entrypoint/system/environment.py), are shared by a call that
    reaches into the other process, which containers forbid (pidfd_getfd).
    """
    grow = GROWING_SEGMENTS in os.environ.get("PYTORCH_ALLOC_CONF", "")
    if grow:
        torch._C._accelerator_setAllocatorSettings(GROWING_SEGMENTS.replace("True", "False"))
    try:
        yield
    finally:
        if grow:
            torch._C._accelerator_setAllocatorSettings(GROWING_SEGMENTS)
