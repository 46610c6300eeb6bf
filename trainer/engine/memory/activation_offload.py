"""Tensors that autograd saves, which wait in the host's memory until the backward pass asks for them."""

from __future__ import annotations

import bisect
import math
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, cast

import torch

from trainer.engine.memory.pinned import pinned_bytes, unpin, view
from trainer.engine.memory.weight_streaming import ALIGNED, WeightStreamer
from trainer.spec.memory_model import IN_FLIGHT_SHARE


@dataclass(eq=False)
class _Stored:
    """A tensor that is in `host` once `written`; `device`: it is there as well, once `ready`."""

    buffer: torch.Tensor  # what `host` is a view of
    host: torch.Tensor
    stride: tuple[int, ...]  # that it had; of a slice, `host` and `device` have others
    written: torch.cuda.Event
    device: torch.Tensor | None
    ready: torch.cuda.Event | None = None


class ActivationOffload:
    """Around a forward pass: large tensors that autograd saves go to pinned memory of the host as they are made.

    Copies in both directions overlap with the computation, each on a CUDA stream of its own. At most
    `IN_FLIGHT_SHARE` of what a pass saves is on its way; what is saved last is needed first and stays on the device.
    Weights stay where they are, or are left to `stream`. Device memory is allocated and freed on the computing stream
    only, so that a pass can be captured as a CUDA graph (`trainer.engine.cuda_graphs`) once one of its size has run.
    Call `join` after each backward pass, also after one that failed. `limit_gib`: host memory that may be pinned.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        stream: WeightStreamer | None = None,
        smallest: int = 2**22,
        limit_gib: float | None = None,
    ) -> None:
        self.stream, self.smallest = stream, smallest
        self.limit = math.inf if limit_gib is None else limit_gib * 2**30
        self.model = model
        self.find_weights()
        self.out, self.back = torch.cuda.Stream(), torch.cuda.Stream()
        self.buffers: list[torch.Tensor] = []
        weakref.finalize(self, unpin, self.buffers).atexit = False
        self.free: list[torch.Tensor] = []  # of them, smallest first
        self.stored: list[_Stored] = []
        self.leaving: deque[_Stored] = deque()
        self.totals: dict[int, int] = {}  # bytes that a pass saves, by those of the first tensor, which tell its size
        self.first = self.saved = self.away = self.staying = 0  # bytes

    def find_weights(self) -> None:
        """Where the weights are, which are left alone; to be told again where they have moved."""
        self.weights = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}

    def __enter__(self) -> None:
        self.join()
        self.first = self.saved = self.away = self.staying = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()

    def __exit__(self, *problem: object) -> None:
        self.hooks.__exit__(*problem)
        del self.hooks  # which refers to this
        self._leave(0)
        if problem[0] is None:
            self.totals[self.first] = self.saved

    def join(self) -> None:
        """Nothing is on its way any more for what is computed from now on; what nobody asked for is given up."""
        events = [*(s.written for s in self.leaving), *(s.ready for s in self.stored if s.ready is not None)]
        for stored in self.stored:
            stored.device = None
            self._done(stored.buffer)
        self.stored.clear()
        self.leaving.clear()
        for event in events:
            torch.cuda.current_stream().wait_event(event)

    @property
    def window(self) -> int:
        """Bytes that may be on their way at once: none before it is known how many there are."""
        return int(max(self.totals.values(), default=0) * IN_FLIGHT_SHARE)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if self.stream and not isinstance(weights := self.stream.pack(tensor), torch.Tensor):
            return weights
        size = tensor.nbytes
        if not tensor.is_cuda or size < self.smallest or tensor.untyped_storage().data_ptr() in self.weights:
            return without_graph(tensor)
        self.first = self.first or size
        self.saved += size
        last = self.saved > self.totals.get(self.first, math.inf) - self.window
        buffer = None if last and self.staying + size <= self.window else self._buffer(size)
        if buffer is None:
            self.staying += size
            return without_graph(tensor)
        source, stride = tensor.detach(), tensor.stride()
        if torch.empty_like(source, device="meta").stride() != stride:  # a slice, which no single copy could read
            source = source.contiguous()
        host = view(buffer, 0, source.shape, source.stride(), source.dtype)
        self.out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.out):
            host.copy_(source, non_blocking=True)
            written = self.out.record_event()
        stored = _Stored(buffer, host, stride, written, source)
        self.stored.append(stored)
        self.leaving.append(stored)
        self.away += size
        self._leave(self.window)
        return stored

    def _leave(self, most: int) -> None:
        """Wait until no more than so many bytes are on their way out; the others are no longer on the device."""
        while self.away > most:
            stored = self.leaving.popleft()
            torch.cuda.current_stream().wait_event(stored.written)
            stored.device = None
            self.away -= stored.host.nbytes

    def _unpack(self, stored: Any) -> torch.Tensor:
        if not isinstance(stored, _Stored):
            return self.stream.unpack(stored) if self.stream else cast(torch.Tensor, stored)
        index = self.stored.index(stored)
        wanted = 0
        for each in reversed(self.stored[: index + 1]):
            self._fetch(each)
            wanted += each.host.nbytes
            if wanted > self.window:
                break
        here, stored.device = stored.device, None
        assert here is not None and stored.ready is not None
        torch.cuda.current_stream().wait_event(stored.ready)
        del self.stored[index]
        self._done(stored.buffer)
        if here.stride() == stored.stride:
            return here
        # What was compiled expects the strides that it saw.
        return torch.empty_strided(here.shape, stored.stride, dtype=here.dtype, device=here.device).copy_(here)

    def _fetch(self, stored: _Stored) -> None:
        if stored.device is not None:
            return
        host = stored.host
        stored.device = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device="cuda")
        self.back.wait_stream(torch.cuda.current_stream())  # on which that memory may still be read
        with torch.cuda.stream(self.back):
            stored.device.copy_(host, non_blocking=True)
            stored.ready = self.back.record_event()

    def _buffer(self, size: int) -> torch.Tensor | None:
        """So many bytes of pinned memory or more; None while a pass is recorded that has no more than it had before.

        Pictures of other sizes, which are smaller, take the same. Raises OutOfMemoryError beyond the limit.
        """
        place = bisect.bisect_left(self.free, size, key=len)
        if place < len(self.free):
            return self.free.pop(place)
        if torch.cuda.is_current_stream_capturing():
            return None
        wanted = math.ceil(size / ALIGNED) * ALIGNED
        if sum(map(len, self.buffers)) + wanted > self.limit:
            raise torch.OutOfMemoryError(f"{self.limit / 2**30:.1f} GiB of the host's memory may be taken, and are.")
        self.buffers.append(pinned_bytes(wanted))
        return self.buffers[-1]

    def _done(self, buffer: torch.Tensor) -> None:
        bisect.insort(self.free, buffer, key=len)


def without_graph(tensor: torch.Tensor) -> torch.Tensor:
    """Without the graph: a result that its own operation keeps would hold that, and a pass that fails stay for ever."""
    return tensor.detach() if tensor.grad_fn else tensor
