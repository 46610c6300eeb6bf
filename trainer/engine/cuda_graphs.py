"""Work on an accelerator that is recorded once for each size of its inputs, and then replayed.

A step of few tokens is bound by what the host does for each of its thousands of kernels. A recorded one is launched as
a whole: CUDA graphs, as torch.cuda.graph records them.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

log = logging.getLogger(__name__)
Tensors = dict[str, torch.Tensor]
Key = tuple[object, ...]  # names, sizes and types of inputs
PassContext = Callable[[], contextlib.AbstractContextManager[None]]
Work = Callable[[Tensors], tuple[torch.Tensor, torch.Tensor]]  # inputs → what is told of it, and a loss


@dataclass(frozen=True)
class _CapturedGraph:
    """The graph reads `inputs` and writes `told`."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    per_image_loss: torch.Tensor


@dataclass(eq=False)
class EagerStep:
    """The gradient of some work's loss is added to that of the parameters, of which `flat` has all, one after another.

    `params`: what the work computes with; `wholes`: what these are views of, if they are (`optim.joined`), in the same
    order; `around`: what is entered for each piece of work. A parameter that the loss does not depend on has a gradient
    of zero.
    """

    params: Sequence[torch.nn.Parameter]
    optimizer_params: Sequence[torch.nn.Parameter] = ()
    pass_context: PassContext = contextlib.nullcontext
    capturing: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        count = sum(p.numel() for p in self.params)
        self.flat_grad = torch.zeros(count, device=self.params[0].device, dtype=self.params[0].dtype)
        others = [] if self.params[0] is next(iter(self.optimizer_params), None) else self.optimizer_params
        self.grads = self._views(self.params)
        self.owners = [*zip(self.params, self.grads, strict=True), *zip(others, self._views(others), strict=True)]
        self.clear()

    def _views(self, params: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
        parts = self.flat_grad.split([p.numel() for p in params]) if params else ()
        return [part.view_as(p) for part, p in zip(parts, params, strict=True)]

    def __call__(self, work: Work, inputs: Tensors) -> torch.Tensor:
        with self.pass_context():
            per_image_loss, loss = work(inputs)
            loss.backward()
        return per_image_loss.detach()

    @property
    def short_of_memory(self) -> bool:
        """Whether some size of inputs could not be recorded for want of memory."""
        return False

    def clear(self) -> None:
        """The gradient is zero again."""
        self.flat_grad.zero_()
        for p, grad in self.owners:
            p.grad = grad

    def release(self) -> bool:
        """Give back the memory that is held between two pieces of work; whether there was any."""
        return False

    def disable(self) -> bool:
        """The same, and hold none from now on."""
        return self.release()

    def reset(self) -> None:
        """What was recorded was of other work: begin anew."""


class GraphStep(EagerStep):
    """The same from recordings, whose memory is one pool."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.captured: dict[Key, _CapturedGraph] = {}
        self.warm: set[Key] = set()  # have run once
        self.large: set[Key] = set()  # there is no memory to record them
        self.evicted_once = False  # not all that was recorded had room at the same time
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.capturing = True

    @property
    def short_of_memory(self) -> bool:
        return self.capturing and bool(self.large)

    def release(self) -> bool:
        held = bool(self.captured)
        self.captured.clear()
        if held:
            torch.cuda.synchronize()
            self.pool = torch.cuda.graph_pool_handle()
            gc.collect()
            torch.cuda.empty_cache()
        return held

    def disable(self) -> bool:
        self.capturing = False
        return self.release()

    def reset(self) -> None:
        self.release()
        self.warm.clear()
        self.large.clear()
        self.evicted_once = False

    def __call__(self, work: Work, inputs: Tensors) -> torch.Tensor:
        if not self.capturing:
            return super().__call__(work, inputs)
        key: Key = tuple((name, t.shape, t.dtype) for name, t in inputs.items())
        found = self.captured.get(key) or self._room(key, work, inputs)
        if found is None:
            return super().__call__(work, inputs)
        for name, tensor in inputs.items():
            found.inputs[name].copy_(tensor)
        found.graph.replay()
        return found.per_image_loss.clone()

    def _step(self, work: Work, inputs: Tensors) -> torch.Tensor:
        """The same as without a recording, in fewer pieces of work for the device."""
        with self.pass_context():
            per_image_loss, loss = work(inputs)
            found = torch.autograd.grad(loss, self.params, allow_unused=True)
        pairs = [(whole, part) for whole, part in zip(self.grads, found, strict=True) if part is not None]
        torch._foreach_add_([whole for whole, _ in pairs], [part for _, part in pairs])
        return per_image_loss.detach()

    def _room(self, key: Key, work: Work, inputs: Tensors) -> _CapturedGraph | None:
        """Record it if there is memory; for that, what is recorded of other sizes is dropped, but only once."""
        if key in self.large:
            return None
        found = self._record(key, work, inputs)
        if found is None and self.capturing and not self.evicted_once:
            self.evicted_once = self.release()
            found = self._record(key, work, inputs) if self.evicted_once else None
        if found is not None:
            self.captured[key] = found
        elif self.capturing:
            self.large.add(key)
            log.warning("There is no memory to record a step of this size: it is launched kernel by kernel.")
        return found

    def _record(self, key: Key, work: Work, inputs: Tensors) -> _CapturedGraph | None:
        """Record it, and change nothing; None where there is no memory, or where it cannot be recorded."""
        random, current = torch.cuda.get_rng_state(), torch.cuda.current_stream()
        try:
            own = {name: tensor.clone() for name, tensor in inputs.items()}
            if key not in self.warm:
                self._warm(work, own)
                self.warm.add(key)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what the first run took, the recording takes from its own pool
            return self._captured(work, own)
        except torch.OutOfMemoryError:
            return None
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves it otherwise
            current.wait_stream(self.stream)
            torch.cuda.set_rng_state(random)

    def _warm(self, work: Work, own: Tensors) -> None:
        """Run it once, for what is compiled or allocated by the first run alone."""
        before, current = self.flat_grad.clone(), torch.cuda.current_stream()
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                self._step(work, own)
        finally:
            current.wait_stream(self.stream)
            self.flat_grad.copy_(before)

    def _captured(self, work: Work, own: Tensors) -> _CapturedGraph | None:
        """Record it; None, and never again, where it waits for the device or does what no recording can hold."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, which write checkpoints, may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                per_image_loss = self._step(work, own)
        except RuntimeError as problem:
            cause = problem.__context__ or problem  # a capture that something has ended fails once more at its end
            self._ended()
            if isinstance(problem, torch.OutOfMemoryError) or isinstance(cause, torch.OutOfMemoryError):
                raise torch.OutOfMemoryError(str(cause)) from problem
            self.capturing, self.pool = False, torch.cuda.graph_pool_handle()
            why = (str(cause).splitlines() or [repr(cause)])[0]
            log.warning("Steps cannot be recorded, and are launched kernel by kernel: %s", why)
            return None
        return _CapturedGraph(graph, own, per_image_loss)

    def _ended(self) -> None:
        """Tell torch's allocator and its random generator that a capture is over: of a failed one they may not know."""
        if not self.flat_grad.is_cuda:
            return
        with contextlib.suppress(RuntimeError):  # it knows
            torch._C._cuda_endAllocateToPool(self.flat_grad.device.index, self.pool)
        # The generator learns it where one succeeds. Until then nothing can be drawn, and the compiler does that.
        graph = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local")
        with contextlib.suppress(RuntimeError), graph:  # what failed before is what has to be told
            self.flat_grad[:1].zero_()
