"""Copies of what is being trained, taken and written while training continues.

A save must not stop the training for as long as it takes to write. So it copies everything into buffers in the host's
memory, and a thread writes those. On a GPU the copy itself overlaps with training too: it runs on a side stream during
the next step's forward and backward pass. Only the optimiser's step changes the copied tensors, so that step is queued
behind the copy. Training pauses for 16 to 19 ms on full-size Flux.1 (docs/reliability.md).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

log = logging.getLogger(__name__)

# Host memory is allocated in slabs of 64 MiB: pinned memory is slow to allocate, and each allocation is rounded up.
SLAB_BYTES = 2**26
ALIGNMENT_BYTES = 64  # enough for every dtype

BufferKey = tuple[torch.Size, torch.dtype, bool]  # shape, dtype, whether it is pinned


class Snapshots:
    """Copies trees of tensors into host buffers, which are reused for the next copy.

    The rehearsal takes the first copy, so that all buffers are allocated before the first step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: str) -> None:
        self.bytes = 0  # allocated for buffers
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._copied: torch.cuda.Event | None = None  # the last copy is complete
        self._used: list[tuple[BufferKey, torch.Tensor]] = []
        self._free: dict[BufferKey, list[torch.Tensor]] = {}
        self._slab_rest: dict[bool, torch.Tensor] = {}  # unused end of the last slab, pinned or not
        if self._stream:
            optimizer.register_step_pre_hook(lambda *_: self.wait_on_device())

    @property
    def copied_bytes(self) -> int:
        """Of all that the buffers hold or held at once: less than `bytes`, which counts whole slabs."""
        idle = [buffer for buffers in self._free.values() for buffer in buffers]
        return sum(buffer.nbytes for buffer in idle) + sum(buffer.nbytes for _, buffer in self._used)

    def release(self) -> None:
        """All copies taken so far are no longer needed: their buffers may be reused."""
        for key, buffer in self._used:
            self._free.setdefault(key, []).append(buffer)
        self._used = []

    def copy(self, tree: Any) -> Any:
        """`tree` with new containers and with copies of its tensors, which are complete after `wait`."""
        stream = self._stream
        if stream is None:
            return _map_tensors(tree, lambda tensor: self._buffer(tensor).copy_(tensor.detach()))
        stream.wait_stream(torch.cuda.current_stream())

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_cuda:
                # A temporary tensor may be freed before the copy runs: its memory is not to be reused until then.
                tensor.record_stream(stream)
            return self._buffer(tensor).copy_(tensor.detach(), non_blocking=tensor.is_cuda)

        with torch.cuda.stream(stream):
            copy = _map_tensors(tree, copied)
            self._copied = stream.record_event()
        return copy

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        """A free buffer of the shape and dtype of `like`, pinned if that is on the device."""
        key = (like.shape, like.dtype, like.is_cuda)
        free = self._free.get(key)
        if free:
            buffer = free.pop()
        else:
            buffer = self._allocate(like.nbytes, pinned=like.is_cuda).view(like.dtype).view(like.shape)
        self._used.append((key, buffer))
        return buffer

    def _allocate(self, size: int, *, pinned: bool) -> torch.Tensor:
        """`size` bytes of a slab that nothing else uses."""
        rest = self._slab_rest.get(pinned)
        aligned = -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if rest is None or len(rest) < aligned:
            rest = torch.empty(max(SLAB_BYTES, aligned), dtype=torch.uint8, pin_memory=pinned)
            self.bytes += len(rest)
        self._slab_rest[pinned] = rest[aligned:]
        return rest[:size]

    def wait_on_device(self) -> None:
        """Queue everything that follows on the device behind the copy: it may change the copied tensors."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Wait until the copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor changed, inside new dicts, lists, tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: _map_tensors(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(v, change) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return type(value)(**fields)
    return value


class BackgroundWriter:
    """One thread that runs one task at a time. An error of a task is raised by the next call.

    `writes`: what it writes, for messages.
    """

    def __init__(self, writes: str = "save") -> None:
        self.writes = writes
        self._thread = ThreadPoolExecutor(1, writes)
        self._running: Future[None] | None = None

    def begin(self, task: Callable[[], None]) -> None:
        """Run `task` in the thread, after the one before. Raises what that raised."""
        self.join()
        self._running = self._thread.submit(task)

    @property
    def is_busy(self) -> bool:
        return self._running is not None and not self._running.done()

    def check(self) -> None:
        """Raise what the task has raised, if it is over. Does not wait."""
        if self._running is not None and self._running.done():
            self.join()

    def join(self) -> None:
        """Wait for the task. Raises what it raised."""
        running = self._running
        self._running = None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait for the task. An error is only logged: `close` is for a job that ends because of another one."""
        self._thread.shutdown()
        if self._running is not None and (problem := self._running.exception()) is not None:
            log.error("The last %s failed as well: %s", self.writes, problem)
