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
import gc
from collections.abc import Iterator

import torch


class GraphPool:
    """One pool of `device`, with the stream that captures and uses it. `close` gives it back.

    `handle`: for the `pool` of torch.cuda.graph.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self.device = device.index
        self.stream = stream
        self.scratch = torch.zeros(1, device=device)
        self.is_broken = False  # a capture has failed in such a way that no other can use this pool
        # Graphs that are not used any more. With the first graph of a stream that goes, torch frees the workspaces of
        # cuBLAS that the stream's other graphs use (pytorch/pytorch#193402): so all go at once, in `close`.
        self.dropped: list[torch.cuda.CUDAGraph] = []
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
        torch.cuda.empty_cache()  # inside, the allocator does not do it before it runs out of memory
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
        """Take torch's allocator and random generator out of capture mode, where a failed capture may leave them.

        Otherwise, memory is still allocated from the pool, and random numbers cannot be drawn: the compiler, which
        draws some to measure kernels with, would end the job (torch 2.11; docs/lab-notes.md).
        """
        if not torch.cuda.is_available():
            return
        with contextlib.suppress(RuntimeError):  # it has ended
            self._end()
            self._release()
            # torch's allocator of pinned memory still takes this handle for one that is being captured into.
            self.is_broken = True
        # Only a capture that succeeds tells the generator. So capture one kernel.
        graph = torch.cuda.CUDAGraph()
        self.dropped.append(graph)
        capture = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="relaxed")
        with contextlib.suppress(RuntimeError), capture:  # the error that has been reported may be raised once more
            self.scratch.zero_()

    def close(self) -> None:
        """Free the memory, once no graph is left that was captured in it."""
        torch.cuda.synchronize()
        self.dropped.clear()
        gc.collect()  # a graph that an error's traceback holds, for example
        # They may lie in the pool, and torch frees those of a stream with the first of its graphs that goes.
        torch._C._cuda_clearCublasWorkspaces()
        self._release()
        torch.cuda.empty_cache()
