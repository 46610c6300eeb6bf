"""Activation offload: tensors that autograd saves wait in host memory until the backward pass needs them.

As torchtune's `OffloadActivations`, with these differences: the amount in flight is bounded, so that a pass that is
faster than the bus waits instead of filling the device; and all device memory is allocated on the computing stream, so
that the pass can be captured as a CUDA graph. docs/lab-notes.md has the measurements ("Activation offload in CUDA
graphs").
"""

from __future__ import annotations

import bisect
import math
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, cast

import torch

from trainer.engine.memory.pinned import aligned, pinned_bytes, unpin, view
from trainer.engine.memory.weight_streaming import WeightStreamer
from trainer.spec.memory_model import IN_FLIGHT_SHARE

MIN_OFFLOADED_BYTES = 2**22  # a smaller tensor is not worth a copy of its own


@dataclass(eq=False)
class _Offloaded:
    """A saved tensor: on the host once `written`, and on the device again once `ready`."""

    buffer: torch.Tensor  # of which `host` is a view
    host: torch.Tensor
    stride: tuple[int, ...]  # of the tensor that was saved; a slice is copied contiguously
    written: torch.cuda.Event
    device: torch.Tensor | None  # None: only the host has it
    ready: torch.cuda.Event | None = None


class ActivationOffload:
    """A context around a forward pass: large tensors that autograd saves are copied to pinned host memory at once.

    Copies in both directions overlap with the computation, each on a CUDA stream of its own. At most
    `IN_FLIGHT_SHARE` of what a pass saves is on its way; what is saved last is needed first and stays on the device.
    Weights stay where they are, or are left to `weight_streamer`. Device memory is allocated and freed on the computing
    stream only, so that a pass can be captured as a CUDA graph (`trainer.engine.cuda_graphs`) once one of its size has
    run. Call `join` after each backward pass, also after one that failed.

    `smallest`: bytes of the smallest tensor that is offloaded. `limit_gib`: host memory that may be pinned; beyond it,
    torch.OutOfMemoryError is raised.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        weight_streamer: WeightStreamer | None = None,
        smallest: int = MIN_OFFLOADED_BYTES,
        limit_gib: float | None = None,
    ) -> None:
        self.weight_streamer = weight_streamer
        self.smallest = smallest
        self.limit = math.inf if limit_gib is None else limit_gib * 2**30
        self.model = model
        self.find_weights()
        self.out_stream = torch.cuda.Stream()
        self.in_stream = torch.cuda.Stream()
        self.buffers: list[torch.Tensor] = []  # all pinned memory
        weakref.finalize(self, unpin, self.buffers).atexit = False
        self.free: list[torch.Tensor] = []  # buffers not in use, smallest first
        self.offloaded: list[_Offloaded] = []  # of this pass, in the order in which they were saved
        self.leaving: deque[_Offloaded] = deque()  # of these: still on the device, with a copy to the host begun
        # Bytes that a whole pass saves, by the bytes of the first tensor that it saves, which tell the input's size.
        self.pass_bytes: dict[int, int] = {}
        # Bytes of this pass: of the first tensor; saved so far; of `leaving`; kept on the device.
        self.first_bytes = 0
        self.saved_bytes = 0
        self.leaving_bytes = 0
        self.kept_bytes = 0

    def find_weights(self) -> None:
        """Find the storages of the weights, which are not offloaded. Call it again when weights have moved."""
        self.weights = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}

    def __enter__(self) -> None:
        self.join()
        self.first_bytes = 0
        self.saved_bytes = 0
        self.leaving_bytes = 0
        self.kept_bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()

    def __exit__(self, *problem: object) -> None:
        self.hooks.__exit__(*problem)
        del self.hooks  # it refers to this object: a cycle
        self._free_written(0)
        if problem[0] is None:
            self.pass_bytes[self.first_bytes] = self.saved_bytes

    def join(self) -> None:
        """Make later computation wait for all copies, and drop what no backward pass has asked for.

        A capture cannot end while copies on other streams are in flight, and a failed pass leaves some.
        """
        events: list[torch.cuda.Event] = []
        for offloaded in self.leaving:
            events.append(offloaded.written)
        for offloaded in self.offloaded:
            if offloaded.ready is not None:
                events.append(offloaded.ready)
        for offloaded in self.offloaded:
            offloaded.device = None
            self._return_buffer(offloaded.buffer)
        self.offloaded.clear()
        self.leaving.clear()
        for event in events:
            torch.cuda.current_stream().wait_event(event)

    @property
    def window(self) -> int:
        """Bytes that may be in flight in one direction. 0 in the first pass, which shows how many bytes there are."""
        return int(max(self.pass_bytes.values(), default=0) * IN_FLIGHT_SHARE)

    def _pack(self, tensor: torch.Tensor) -> Any:
        """Called by autograd with each tensor that it saves; what is returned comes to `_unpack`."""
        if self.weight_streamer and not isinstance(weights := self.weight_streamer.pack(tensor), torch.Tensor):
            return weights
        size = tensor.nbytes
        if not tensor.is_cuda or size < self.smallest or tensor.untyped_storage().data_ptr() in self.weights:
            return without_graph(tensor)
        self.first_bytes = self.first_bytes or size
        self.saved_bytes += size
        # The last tensors are needed first: as many of them as fit into the window stay on the device.
        is_last = self.saved_bytes > self.pass_bytes.get(self.first_bytes, math.inf) - self.window
        buffer = None if is_last and self.kept_bytes + size <= self.window else self._take_buffer(size)
        if buffer is None:
            self.kept_bytes += size
            return without_graph(tensor)
        source = tensor.detach()
        stride = tensor.stride()
        if torch.empty_like(source, device="meta").stride() != stride:  # a slice, which no single copy could read
            source = source.contiguous()
        host = view(buffer, 0, source.shape, source.stride(), source.dtype)
        self.out_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.out_stream):
            host.copy_(source, non_blocking=True)
            written = self.out_stream.record_event()
        offloaded = _Offloaded(buffer, host, stride, written, source)
        self.offloaded.append(offloaded)
        self.leaving.append(offloaded)
        self.leaving_bytes += size
        self._free_written(self.window)
        return offloaded

    def _free_written(self, limit: int) -> None:
        """Let the computation wait until at most `limit` bytes are on their way out, and free the others on the device.

        The computing stream waits, not the host: the memory can be reused by what is computed next.
        """
        while self.leaving_bytes > limit:
            offloaded = self.leaving.popleft()
            torch.cuda.current_stream().wait_event(offloaded.written)
            offloaded.device = None
            self.leaving_bytes -= offloaded.host.nbytes

    def _unpack(self, saved: Any) -> torch.Tensor:
        """The saved tensor, with the strides that it had. Also fetches those that the backward pass needs next."""
        if not isinstance(saved, _Offloaded):
            return self.weight_streamer.unpack(saved) if self.weight_streamer else cast(torch.Tensor, saved)
        index = self.offloaded.index(saved)
        wanted = 0
        for offloaded in reversed(self.offloaded[: index + 1]):
            self._fetch(offloaded)
            wanted += offloaded.host.nbytes
            if wanted > self.window:
                break
        on_device = saved.device
        saved.device = None
        assert on_device is not None and saved.ready is not None
        torch.cuda.current_stream().wait_event(saved.ready)
        del self.offloaded[index]
        self._return_buffer(saved.buffer)
        if on_device.stride() == saved.stride:
            return on_device
        # Compiled code expects the strides that it saw when it was compiled.
        restored = torch.empty_strided(on_device.shape, saved.stride, dtype=on_device.dtype, device=on_device.device)
        return restored.copy_(on_device)

    def _fetch(self, offloaded: _Offloaded) -> None:
        """Begin to copy a tensor back to the device, unless that has begun."""
        if offloaded.device is not None:
            return
        host = offloaded.host
        offloaded.device = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device="cuda")
        self.in_stream.wait_stream(torch.cuda.current_stream())  # which may still read what was in that memory
        with torch.cuda.stream(self.in_stream):
            offloaded.device.copy_(host, non_blocking=True)
            offloaded.ready = self.in_stream.record_event()

    def _take_buffer(self, size: int) -> torch.Tensor | None:
        """The smallest free buffer of at least `size` bytes, or a new one.

        None during a capture that finds no free buffer: the tensor then stays on the device. Smaller images use the
        buffers of larger ones. Raises torch.OutOfMemoryError beyond the limit.
        """
        place = bisect.bisect_left(self.free, size, key=len)
        if place < len(self.free):
            return self.free.pop(place)
        if torch.cuda.is_current_stream_capturing():
            return None
        wanted = aligned(size)
        if sum(map(len, self.buffers)) + wanted > self.limit:
            raise torch.OutOfMemoryError(
                f"Activation offload has used all {self.limit / 2**30:.1f} GiB of host memory it may pin."
            )
        self.buffers.append(pinned_bytes(wanted))
        return self.buffers[-1]

    def _return_buffer(self, buffer: torch.Tensor) -> None:
        bisect.insort(self.free, buffer, key=len)


def without_graph(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without its place in the graph, for hooks that return it unchanged.

    A result that its own operation saves (GroupNorm its means, attention its output) would otherwise hold that
    operation, and it the result: a cycle that Python's collector cannot see. A failed pass would stay on the device.
    """
    return tensor.detach() if tensor.grad_fn else tensor
