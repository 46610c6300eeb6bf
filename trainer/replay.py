"""Work on an accelerator that is recorded once for each size of its inputs, and then replayed.

A step of few tokens is bound by what the host does for each of its thousands of kernels. A recorded one is launched as
a whole: CUDA graphs, as torch.cuda.graph records them.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)
Tensors = dict[str, torch.Tensor]
Work = Callable[[Tensors], tuple[torch.Tensor, torch.Tensor]]  # inputs → what is told of it, and a loss


@dataclass(frozen=True)
class _Recorded:
    """The graph reads `inputs` and writes `told`."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    told: torch.Tensor


class Direct:
    """The gradient of some work's loss is added to the parameters'; nothing is recorded."""

    flat: torch.Tensor | None = None  # that all gradients are views of, if they are
    recording = False

    def __init__(self, params: Sequence[torch.nn.Parameter]) -> None:
        self.params = list(params)

    def __call__(self, work: Work, inputs: Tensors) -> torch.Tensor:
        told, loss = work(inputs)
        loss.backward()
        return told.detach()

    def clear(self) -> None:
        """The gradient is none again."""
        for p in self.params:
            p.grad = None

    def drop(self) -> bool:
        """Give back the memory that is held between two pieces of work; whether there was any."""
        return False

    def give_up(self) -> bool:
        """The same, and hold none from now on."""
        return self.drop()


class Flat(Direct):
    """The same, with gradients that stay where they are, as views of one tensor: what has none has zeros."""

    flat: torch.Tensor

    def __init__(self, params: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(params)
        self.flat = torch.zeros(sum(p.numel() for p in self.params), device=self.params[0].device)
        self.grads = [
            flat.view_as(p)
            for flat, p in zip(self.flat.split([p.numel() for p in self.params]), self.params, strict=True)
        ]
        self.clear()

    def clear(self) -> None:
        self.flat.zero_()
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad

    def __call__(self, work: Work, inputs: Tensors) -> torch.Tensor:
        told, loss = work(inputs)
        found = torch.autograd.grad(loss, self.params, allow_unused=True)
        pairs = [(whole, part) for whole, part in zip(self.grads, found, strict=True) if part is not None]
        torch._foreach_add_([whole for whole, _ in pairs], [part for _, part in pairs])
        return told.detach()


class Replayed(Flat):
    """The same from recordings, whose memory is one pool."""

    def __init__(self, params: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(params)
        self.recorded: dict[tuple[object, ...], _Recorded | None] = {}  # None: does not fit in memory
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.recording = True

    def drop(self) -> bool:
        held = any(self.recorded.values())
        self.recorded.clear()
        if held:
            torch.cuda.synchronize()
            self.pool = torch.cuda.graph_pool_handle()
            gc.collect()
            torch.cuda.empty_cache()
        return held

    def give_up(self) -> bool:
        self.recording = False
        return self.drop()

    def __call__(self, work: Work, inputs: Tensors) -> torch.Tensor:
        if not self.recording:
            return super().__call__(work, inputs)
        key = tuple((name, t.shape, t.dtype) for name, t in inputs.items())
        if key not in self.recorded:
            self.recorded[key] = self._record(work, inputs)
        found = self.recorded[key]
        if found is None:
            return super().__call__(work, inputs)
        for name, tensor in inputs.items():
            found.inputs[name].copy_(tensor)
        found.graph.replay()
        return found.told.clone()

    def _record(self, work: Work, inputs: Tensors) -> _Recorded | None:
        """Run it once, for what is compiled or allocated by the first run alone, then record it; nothing is changed."""
        before, random = self.flat.clone(), torch.cuda.get_rng_state()
        own = {name: tensor.clone() for name, tensor in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                super().__call__(work, own)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what the first run took, the recording takes from its own pool
            # Other threads, which write checkpoints, may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                told = super().__call__(work, own)
        except torch.OutOfMemoryError:
            log.warning("There is no memory to record a step of this size: it is launched kernel by kernel.")
            return None
        finally:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.flat.copy_(before)
            torch.cuda.set_rng_state(random)
        return _Recorded(graph, own, told)
