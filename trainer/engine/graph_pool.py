"""The device memory that captured graphs share, and that other work may use between two replays.

A captured graph keeps the addresses of its tensors, so torch takes their memory from a pool of its own. Nothing in
there has to last from one replay to the next: as long as the graphs of all sizes never run at the same time, one pool
that is as large as the largest of them serves all, and the same memory serves the pass that warms up a capture, and
samples and validation, which run between two steps.

The pool's memory belongs to one stream, as all of the allocator's does, so what uses it runs on that stream. To the
allocator, memory that a graph writes is free between its replays: no tensor in the pool may outlast the next one.

torch.cuda.use_mem_pool takes the allocations of one thread only, and backward passes run in a thread of their own. The
functions of torch._C that are called here take those of a stream (they have the same names in torch 2.11 and 2.13).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class GraphPool:
    """One pool of `device`, with the stream that captures and uses it. `close` gives it back.

    `handle`: for the `pool` of torch.cuda.graph.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self.device = device.index
        self.stream = stream
        self.handle = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):
            self._begin()
        self._end()  # but it stays referenced, with or without graphs, until `close`

    def _begin(self) -> None:
        """Allocations of the current stream come from the pool, which gains a reference."""
        torch._C._cuda_beginAllocateCurrentStreamToPool(self.device, self.handle)

    def _end(self) -> None:
        torch._C._cuda_endAllocateToPool(self.device, self.handle)

    def _release(self) -> None:
        """Drop a reference. With the last one, the allocator may free the pool's memory."""
        torch._C._cuda_releasePool(self.device, self.handle)

    @contextlib.contextmanager
    def allocating(self) -> Iterator[None]:
        """Inside, everything runs on the pool's stream, and what it allocates comes from the pool."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                self._begin()
                try:
                    yield
                finally:
                    self._end()
                    self._release()
        finally:
            current.wait_stream(self.stream)

    def end_failed_capture(self) -> None:
        """Let the allocator leave the pool where a capture that failed has not, and drop that capture's reference."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._end()
            self._release()

    def close(self) -> None:
        """Free the memory, once no graph is left that was captured in it."""
        self._release()
