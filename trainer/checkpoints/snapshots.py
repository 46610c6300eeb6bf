"""Copies of what is being trained, taken and written while training goes on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

log = logging.getLogger(__name__)
SLAB = 2**26  # bytes of the host's memory that are asked for at once: the pinned kind is slow to get, and rounded up


Kind = tuple[torch.Size, torch.dtype, bool]  # of a buffer; whether it is pinned


class Snapshots:
    """Copies trees of tensors into buffers of the host, which are kept for the next time.

    On an accelerator the buffers are pinned, and a side stream copies while the next step's forward and backward pass
    run; the optimiser's step, which would change the tensors, is queued behind the copies.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: str) -> None:
        self.bytes = 0  # of the host's memory that was taken for buffers
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._used: list[tuple[Kind, torch.Tensor]] = []
        self._free: dict[Kind, list[torch.Tensor]] = {}
        self._rest: dict[bool, torch.Tensor] = {}  # of the last slab, pinned or not
        if self._stream:
            optimizer.register_step_pre_hook(lambda *_: self.wait_on_device())

    def release(self) -> None:
        """All copies taken so far are no longer needed."""
        for kind, buffer in self._used:
            self._free.setdefault(kind, []).append(buffer)
        self._used = []

    def copy(self, tree: Any) -> Any:
        """`tree` with new containers and with copies of its tensors, which are there after `wait`."""
        stream = self._stream
        if stream is None:
            return _mapped(tree, lambda t: self._buffer(t).copy_(t.detach()))
        stream.wait_stream(torch.cuda.current_stream())

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_cuda:
                tensor.record_stream(stream)  # one that was made for this alone may be freed meanwhile
            return self._buffer(tensor).copy_(tensor.detach(), non_blocking=tensor.is_cuda)

        with torch.cuda.stream(stream):
            found = _mapped(tree, copied)
            self._copied = stream.record_event()
        return found

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        kind = (like.shape, like.dtype, like.is_cuda)
        free = self._free.get(kind)
        buffer = free.pop() if free else self._room(like.nbytes, pinned=like.is_cuda).view(like.dtype).view(like.shape)
        self._used.append((kind, buffer))
        return buffer

    def _room(self, size: int, *, pinned: bool) -> torch.Tensor:
        """So many bytes that nothing else uses."""
        rest, whole = self._rest.get(pinned), -(-size // 64) * 64  # aligned for every type
        if rest is None or len(rest) < whole:
            rest = torch.empty(max(SLAB, whole), dtype=torch.uint8, pin_memory=pinned)
            self.bytes += len(rest)
        self._rest[pinned] = rest[whole:]
        return rest[:size]

    def wait_on_device(self) -> None:
        """What is queued from now on may change the tensors that were taken."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Until the copies are whole."""
        if self._copied is not None:
            self._copied.synchronize()


def _mapped(value: Any, copy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return copy(value)
    if isinstance(value, dict):
        return {k: _mapped(v, copy) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(v, copy) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _mapped(getattr(value, f.name), copy) for f in dataclasses.fields(value)})
    return value


class BackgroundWriter:
    """One thread that does one thing at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "save")
        self._running: Future[None] | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Do `work` there, after what is being done. Raises what that raised."""
        self.join()
        self._running = self._thread.submit(work)

    def check(self) -> None:
        """Raise what the work has raised, if it is over."""
        if self._running is not None and self._running.done():
            self.join()

    def join(self) -> None:
        """Wait for the work. Raises what it raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait for the work; what it raises is only said, because something else ends the job already."""
        self._thread.shutdown()
        if self._running is not None and (problem := self._running.exception()) is not None:
            log.error("The last save failed as well: %s", problem)
