"""Forward and backward passes, launched kernel by kernel (`EagerStep`) or replayed as a CUDA graph (`GraphStep`).

A step with few tokens is limited by the host, which launches thousands of kernels. A CUDA graph launches them as a
whole: torch captures a pass once for each size of its inputs, and replays it.

Both add the gradient of a loss to one flat tensor, of which the gradients of all parameters are views: it is cleared,
clipped and summed over processes in one operation, and a replayed graph always finds it at the same address.

What happens when a pass cannot be captured:

- Too little memory: graphs of other sizes are evicted, once, and the capture is tried again. After that, passes of this
  size run eagerly (`short_of_memory`).
- An operation that no graph can hold, such as one that waits for the device: nothing is captured any more
  (`capturing`).

torch 2.11 does not end a failed capture properly; `_end_failed_capture` does.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

log = logging.getLogger(__name__)
Inputs = dict[str, torch.Tensor]
InputSizes = tuple[object, ...]  # names, shapes and types of inputs: one graph for each
PassContext = Callable[[], contextlib.AbstractContextManager[None]]
# Inputs → the loss of each image, (B,), and the scalar of which the gradient is taken.
StepFunction = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class _CapturedGraph:
    """A graph, the tensors that it reads, and the one that it writes besides the gradient."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    per_image_loss: torch.Tensor


@dataclass(eq=False)
class EagerStep:
    """Adds the gradient of a loss to `flat_grad`, which holds the gradients of `params`, one after another.

    `params`: the parameters that the step function uses. `optimizer_params`: the flat parameters of which these are
    views (`flat_parameters.flatten_parameters`), in the same order, if there are any; they get views of the gradient
    too. `pass_context`: entered around each pass. A parameter that the loss does not depend on has a gradient of zero.
    """

    params: Sequence[torch.nn.Parameter]
    optimizer_params: Sequence[torch.nn.Parameter] = ()
    pass_context: PassContext = contextlib.nullcontext
    capturing: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        count = sum(p.numel() for p in self.params)
        self.flat_grad = torch.zeros(count, device=self.params[0].device, dtype=self.params[0].dtype)
        are_the_same = self.params[0] is next(iter(self.optimizer_params), None)
        flat_params = [] if are_the_same else self.optimizer_params
        self.grads = self._grad_views(self.params)
        self.owners = [
            *zip(self.params, self.grads, strict=True),
            *zip(flat_params, self._grad_views(flat_params), strict=True),
        ]
        self.clear()

    def _grad_views(self, params: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
        """The part of `flat_grad` that belongs to each of `params`, in its shape."""
        parts = self.flat_grad.split([p.numel() for p in params]) if params else ()
        return [part.view_as(p) for part, p in zip(parts, params, strict=True)]

    def __call__(self, step_function: StepFunction, inputs: Inputs) -> torch.Tensor:
        """Add the gradient; return the loss of each image, (B,)."""
        with self.pass_context():
            per_image_loss, loss = step_function(inputs)
            loss.backward()
        return per_image_loss.detach()

    @property
    def short_of_memory(self) -> bool:
        """Whether some size of inputs could not be captured for lack of memory."""
        return False

    def clear(self) -> None:
        """Set the gradient to zero."""
        self.flat_grad.zero_()
        for p, grad in self.owners:
            p.grad = grad

    def release(self) -> bool:
        """Free the memory that is held between passes; returns whether there was any."""
        return False

    def disable(self) -> bool:
        """Release, and hold no memory from now on."""
        return self.release()

    def reset(self) -> None:
        """Release, and forget which sizes ran or did not fit: the step function has changed."""


class GraphStep(EagerStep):
    """The same from captured graphs, which share one memory pool."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.captured: dict[InputSizes, _CapturedGraph] = {}
        self.warmed_up: set[InputSizes] = set()  # sizes that have run once
        self.too_large: set[InputSizes] = set()  # sizes for which there is no memory
        self.evicted_once = False  # the graphs of all sizes do not fit at the same time
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.capturing = True

    @property
    def short_of_memory(self) -> bool:
        return self.capturing and bool(self.too_large)

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
        self.warmed_up.clear()
        self.too_large.clear()
        self.evicted_once = False

    def __call__(self, step_function: StepFunction, inputs: Inputs) -> torch.Tensor:
        if not self.capturing:
            return super().__call__(step_function, inputs)
        sizes: InputSizes = tuple((name, t.shape, t.dtype) for name, t in inputs.items())
        captured = self.captured.get(sizes) or self._capture_or_evict(sizes, step_function, inputs)
        if captured is None:
            return super().__call__(step_function, inputs)
        for name, tensor in inputs.items():
            captured.inputs[name].copy_(tensor)
        captured.graph.replay()
        return captured.per_image_loss.clone()

    def _pass(self, step_function: StepFunction, inputs: Inputs) -> torch.Tensor:
        """What is captured: as `EagerStep.__call__`, but all gradients are added by a few kernels at the end."""
        with self.pass_context():
            per_image_loss, loss = step_function(inputs)
            grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        totals: list[torch.Tensor] = []
        addends: list[torch.Tensor] = []
        for total, grad in zip(self.grads, grads, strict=True):
            if grad is not None:
                totals.append(total)
                addends.append(grad)
        torch._foreach_add_(totals, addends)
        return per_image_loss.detach()

    def _capture_or_evict(
        self, sizes: InputSizes, step_function: StepFunction, inputs: Inputs
    ) -> _CapturedGraph | None:
        """Capture if there is memory for it. The graphs of other sizes are evicted for that, but only once: sizes that
        alternate would otherwise be captured again in each step."""
        if sizes in self.too_large:
            return None
        captured = self._capture(sizes, step_function, inputs)
        if captured is None and self.capturing and not self.evicted_once:
            self.evicted_once = self.release()
            captured = self._capture(sizes, step_function, inputs) if self.evicted_once else None
        if captured is not None:
            self.captured[sizes] = captured
        elif self.capturing:
            self.too_large.add(sizes)
            log.warning("There is no memory to capture a step of this size as a CUDA graph: it runs kernel by kernel.")
        return captured

    def _capture(self, sizes: InputSizes, step_function: StepFunction, inputs: Inputs) -> _CapturedGraph | None:
        """Capture, leaving gradient and random numbers as they were; None if memory runs out or it is impossible."""
        random_state = torch.cuda.get_rng_state()
        current = torch.cuda.current_stream()
        try:
            static_inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            if sizes not in self.warmed_up:
                self._warm_up(step_function, static_inputs)
                self.warmed_up.add(sizes)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the graph's own pool needs the memory that the warm-up took
            return self._capture_graph(step_function, static_inputs)
        except torch.OutOfMemoryError:
            return None
        finally:
            torch.cuda.set_stream(current)  # a failed capture leaves its own stream current
            current.wait_stream(self.stream)
            torch.cuda.set_rng_state(random_state)

    def _warm_up(self, step_function: StepFunction, inputs: Inputs) -> None:
        """Run the pass once: the first run compiles kernels and allocates workspaces, which a capture must not do."""
        before = self.flat_grad.clone()
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                self._pass(step_function, inputs)
        finally:
            current.wait_stream(self.stream)
            self.flat_grad.copy_(before)

    def _capture_graph(self, step_function: StepFunction, inputs: Inputs) -> _CapturedGraph | None:
        """Capture the pass. None, and nothing is captured any more, if it waits for the device or does something else
        that no graph can hold. Raises torch.OutOfMemoryError."""
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": other threads, which write checkpoints, may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                per_image_loss = self._pass(step_function, inputs)
        except RuntimeError as problem:
            # Leaving the context after an error raises another one, "previous error during capture".
            cause = problem.__context__ or problem
            self._end_failed_capture()
            if isinstance(problem, torch.OutOfMemoryError) or isinstance(cause, torch.OutOfMemoryError):
                raise torch.OutOfMemoryError(str(cause)) from problem
            self.capturing = False
            self.pool = torch.cuda.graph_pool_handle()
            why = (str(cause).splitlines() or [repr(cause)])[0]
            log.warning("Steps cannot be captured as a CUDA graph, and run kernel by kernel: %s", why)
            return None
        return _CapturedGraph(graph, inputs, per_image_loss)

    def _end_failed_capture(self) -> None:
        """Take torch's allocator and random generator out of capture mode, where a failed capture may leave them.

        Otherwise, memory is still allocated from the graph's pool, and random numbers cannot be drawn: the compiler,
        which draws some to measure kernels with, would end the job (torch 2.11; docs/lab-notes.md).
        """
        if not self.flat_grad.is_cuda:
            return
        with contextlib.suppress(RuntimeError):  # it has ended
            torch._C._cuda_endAllocateToPool(self.flat_grad.device.index, self.pool)
        # Only a capture that succeeds tells the generator. So capture one kernel.
        graph = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local")
        with contextlib.suppress(RuntimeError), graph:  # the error that has been reported may be raised once more
            self.flat_grad[:1].zero_()
