"""Tensors that autograd saves, which wait in the host's memory until the backward pass asks for them."""

from __future__ import annotations

import bisect
import math
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, cast

import torch

from trainer.memory import SHARE
from trainer.stream import ALIGNED, Stream, pinned_bytes, unpin, view


@dataclass(eq=False)
class _Stored:
    """A tensor that is in `host` once `written`; `device`: it is there as well, once `ready`."""

    buffer: torch.Tensor  # what `host` is a view of
    host: torch.Tensor
    stride: tuple[int, ...]
    written: torch.cuda.Event
    device: torch.Tensor | None
    ready: torch.cuda.Event | None = None


class Offload:
    """Around a forward pass: large tensors that autograd saves go to pinned memory of the host as they are made.

    Copies run on streams of their own, both ways at once. `SHARE` of what the pass before saved may be on its way; what
    is made last is needed first and stays. Weights stay where they are, or are left to `stream`. All memory of the
    device is taken and given back on the stream that computes, so that a pass may be recorded (`trainer.replay`) once
    one has run: it has then all the host's memory that it needs, and nothing is on its way at its end.
    """

    def __init__(self, model: torch.nn.Module, *, stream: Stream | None = None, smallest: int = 2**22) -> None:
        self.stream, self.smallest = stream, smallest
        self.weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.out, self.back = torch.cuda.Stream(), torch.cuda.Stream()
        self.buffers: list[torch.Tensor] = []
        weakref.finalize(self, unpin, self.buffers).atexit = False
        self.free: list[torch.Tensor] = []  # of them, smallest first
        self.stored: list[_Stored] = []
        self.leaving: deque[_Stored] = deque()
        self.saved = self.before = 0  # bytes, by this pass and the one before
        self.away = self.staying = 0  # bytes on their way out, and of what stays

    def __enter__(self) -> None:
        if not torch.cuda.is_current_stream_capturing():  # before which everything has come to an end
            torch.cuda.current_stream().wait_stream(self.back)
        for stored in self.stored:  # what nobody asked for
            self._done(stored.buffer)
        self.stored.clear()
        self.leaving.clear()  # of a pass that an error ended
        self.before, self.saved = self.saved, 0
        self.away = self.staying = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()

    def __exit__(self, *problem: object) -> None:
        self.hooks.__exit__(*problem)
        self._leave(0)

    @property
    def window(self) -> int:
        return int(self.before * SHARE)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if self.stream and not isinstance(weights := self.stream.pack(tensor), torch.Tensor):
            return weights
        size = tensor.nbytes
        if not tensor.is_cuda or size < self.smallest or tensor.untyped_storage().data_ptr() in self.weights:
            return tensor
        self.saved += size
        if self.saved > self.before - self.window and self.staying + size <= self.window:
            self.staying += size
            return tensor
        buffer, dense = self._buffer(size), torch.empty_like(tensor, device="meta").stride()
        host = view(buffer, 0, tensor.shape, dense, tensor.dtype)
        self.out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.out):
            host.copy_(tensor, non_blocking=True)
            written = self.out.record_event()
        stored = _Stored(buffer, host, tensor.stride(), written, tensor.detach())
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
            assert stored.device is not None
            self.away -= stored.device.nbytes
            stored.device = None

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
        return here

    def _fetch(self, stored: _Stored) -> None:
        if stored.device is not None:
            return
        # What was compiled expects the strides that it saw, of slices too.
        host = stored.host
        stored.device = torch.empty_strided(host.shape, stored.stride, dtype=host.dtype, device="cuda")
        self.back.wait_stream(torch.cuda.current_stream())  # on which that memory may still be read
        with torch.cuda.stream(self.back):
            stored.device.copy_(host, non_blocking=True)
            stored.ready = self.back.record_event()

    def _buffer(self, size: int) -> torch.Tensor:
        """So many bytes of pinned memory or more: pictures of other sizes, which are smaller, take the same."""
        place = bisect.bisect_left(self.free, size, key=len)
        if place < len(self.free):
            return self.free.pop(place)
        self.buffers.append(pinned_bytes(math.ceil(size / ALIGNED) * ALIGNED))
        return self.buffers[-1]

    def _done(self, buffer: torch.Tensor) -> None:
        bisect.insort(self.free, buffer, key=len)
