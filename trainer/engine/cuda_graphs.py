"""Forward and backward passes, launched kernel by kernel (`EagerStep`) or replayed as a CUDA graph (`GraphStep`).

A step with few tokens is limited by the host, which launches thousands of kernels. A CUDA graph launches them as a
whole: torch captures a pass once for each size of its inputs, and replays it.

Both add the gradient of a loss to one flat tensor, of which the gradients of all parameters are views: it is cleared,
clipped and summed over processes in one operation, and a replayed graph always finds it at the same address.

What happens when a pass cannot be captured:

- Too little memory: passes of this size run eagerly (`short_of_memory`). The rehearsal captures all sizes before the
  first step, and chooses a memory mode in which this does not happen.
- An operation that no graph can hold, such as one that waits for the device: nothing is captured any more
  (`capturing`).

torch 2.11 does not end a failed capture properly; `GraphPool.end_failed_capture` does.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from trainer.engine import device
from trainer.engine.graph_pool import GraphPool
from trainer.engine.pooled_calls import PooledCalls

log = logging.getLogger(__name__)
# Of a replayed gradient from a launched one, relative to its norm: two launched ones differ by up to some per cent.
MAX_DIFFERENCE = 0.3
Inputs = dict[str, torch.Tensor]
InputSizes = tuple[object, ...]  # names, shapes and types of inputs: one graph for each
PassContext = Callable[[], contextlib.AbstractContextManager[None]]
# Inputs → the loss of each image, (B,), and the scalar of which the gradient is taken.
StepFunction = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]


class CaptureError(RuntimeError):
    """No graph can hold what runs: it waits for the device, for example."""


@dataclass(frozen=True)
class _CapturedGraph:
    """A graph, the tensors that it reads, and the one that it writes besides the gradient."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    per_image_loss: torch.Tensor

    def replay(self, inputs: Inputs) -> torch.Tensor:
        """Run the pass on `inputs`; returns the loss of each image."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return self.per_image_loss.clone()


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
    # For the rehearsal: a pass that cannot be captured is an error; replayed passes are compared with launched ones.
    must_capture: bool = field(default=False, init=False)
    comparing: bool = field(default=False, init=False)
    has_dropped: bool = field(default=False, init=False)  # graphs of sizes that have to be captured again

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

    @contextlib.contextmanager
    def idle_memory(self) -> Iterator[None]:
        """Around other work between two passes: it may use the memory that captured passes keep.

        It must leave no tensor behind, which the next replay would overwrite, and replay nothing itself.
        """
        try:
            yield
        finally:
            device.release()

    @contextlib.contextmanager
    def sampling(self, denoiser: torch.nn.Module, vae: torch.nn.Module) -> Iterator[None]:  # noqa: ARG002
        """Around samples that are drawn between two passes: they may use the memory that captured passes keep.

        Passes of the denoiser are captured as well, if training passes are (`trainer.engine.pooled_calls`).
        """
        with self.idle_memory():
            yield

    def release(self) -> bool:
        """Free the memory that is held between passes; returns whether there was any."""
        return False

    def disable(self) -> bool:
        """Release, and hold no memory from now on."""
        return self.release()

    def reset(self) -> None:
        """Release, and forget which sizes ran or did not fit: the step function has changed."""


class GraphStep(EagerStep):
    """The same from captured graphs, which share one memory pool.

    `warms_up_each`: whether every size has to run once before it is captured, because its first run compiles it or
    learns something. Otherwise only the first size runs: the passes of the others launch the same kernels.
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        optimizer_params: Sequence[torch.nn.Parameter] = (),
        pass_context: PassContext = contextlib.nullcontext,
        *,
        warms_up_each: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(params, optimizer_params, pass_context)
        self.warms_up_each = warms_up_each
        self.captured: dict[InputSizes, _CapturedGraph] = {}
        self.warmed_up = False  # a pass has run once
        self.too_large: set[InputSizes] = set()  # sizes for which there is no memory
        self.stream = torch.cuda.Stream()
        self._new_pool()
        self.capturing = True

    def _new_pool(self) -> None:
        self.pool = GraphPool(self.flat_grad.device, self.stream)
        self.calls = PooledCalls(self.pool, self.pass_context)

    @property
    def short_of_memory(self) -> bool:
        return self.capturing and bool(self.too_large)

    def release(self) -> bool:
        held = bool(self.captured)
        self._drop_captured()
        self.pool.close()
        self._new_pool()
        return held

    def _drop_captured(self) -> None:
        """Use no graph any more that has been captured; they go when the pool does."""
        self.has_dropped = self.has_dropped or bool(self.captured)
        self.pool.dropped += [captured.graph for captured in self.captured.values()]
        self.pool.dropped += [captured.graph for captured in self.calls.captured.values()]
        self.captured.clear()
        self.calls.captured.clear()

    def disable(self) -> bool:
        self.capturing = False
        return self.release()

    def reset(self) -> None:
        self.release()
        self.warmed_up = False
        self.has_dropped = False
        self.too_large.clear()

    @contextlib.contextmanager
    def idle_memory(self) -> Iterator[None]:
        if not self.capturing:
            with super().idle_memory():
                yield
            return
        with self._watched(), self.pool.allocating():
            yield

    @contextlib.contextmanager
    def sampling(self, denoiser: torch.nn.Module, vae: torch.nn.Module) -> Iterator[None]:
        if not self.capturing:
            with super().sampling(denoiser, vae):
                yield
            return
        with (
            self._watched(),
            self.calls.of(denoiser, "forward", captures=True),
            self.calls.of(vae, "decode", captures=False),
        ):
            yield

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Release everything at the end, if the pool has grown so far that the optimiser may lack memory, or is
        broken.
        """
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved()
        try:
            yield
        finally:
            torch.cuda.empty_cache()  # what was outside of the pool
            grown = torch.cuda.memory_reserved() > reserved + device.MIN_RESERVE_BYTES
            if self.pool.is_broken or (grown and device.is_nearly_full()):
                self.release()

    def __call__(self, step_function: StepFunction, inputs: Inputs) -> torch.Tensor:
        if not self.capturing:
            return super().__call__(step_function, inputs)
        sizes: InputSizes = tuple((name, t.shape, t.dtype) for name, t in inputs.items())
        captured = self.captured.get(sizes) or self._capture_once(sizes, step_function, inputs)
        if captured is None:
            return self._launch(step_function, inputs)
        if self.comparing and not self._agrees(captured, step_function, inputs):
            self._give_up("a replayed gradient is not the launched one")
            return self._launch(step_function, inputs)
        return captured.replay(inputs)

    def _launch(self, step_function: StepFunction, inputs: Inputs) -> torch.Tensor:
        """What `EagerStep` does, in the memory of the graphs, as long as there are any."""
        if not self.capturing:
            return super().__call__(step_function, inputs)
        with self.pool.allocating():
            losses = super().__call__(step_function, inputs)
        return losses.clone()

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

    def _capture_once(self, sizes: InputSizes, step_function: StepFunction, inputs: Inputs) -> _CapturedGraph | None:
        """Capture if there is memory for it, which is tried once for each size.

        Raises torch.OutOfMemoryError if there is none and `must_capture`.
        """
        if sizes in self.too_large:
            return None
        captured = self._capture(step_function, inputs)
        if captured is not None:
            self.captured[sizes] = captured
        elif self.capturing and self.must_capture:
            raise torch.OutOfMemoryError("no memory to capture a step of this size")
        elif self.capturing:
            self.too_large.add(sizes)
            log.warning("There is no memory to capture a step of this size as a CUDA graph: it runs kernel by kernel.")
        return captured

    def _capture(self, step_function: StepFunction, inputs: Inputs) -> _CapturedGraph | None:
        """Capture, leaving gradient and random numbers as they were; None if memory runs out or it is impossible."""
        random_state = torch.cuda.get_rng_state()
        current = torch.cuda.current_stream()
        try:
            static_inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            if self.warmed_up and not self.warms_up_each():
                with contextlib.suppress(CaptureError):  # something only works once a pass of this size has run
                    return self._capture_graph(step_function, static_inputs)
                if self.pool.is_broken:
                    self.release()
            self._warm_up(step_function, static_inputs)
            self.warmed_up = True
            return self._capture_graph(step_function, static_inputs)
        except torch.OutOfMemoryError:
            return None
        except CaptureError as problem:
            self._give_up(problem)
            return None
        finally:
            torch.cuda.set_stream(current)  # a failed capture leaves its own stream current
            current.wait_stream(self.stream)
            torch.cuda.set_rng_state(random_state)

    def _give_up(self, why: object) -> None:
        self.capturing = False
        log.warning("Steps cannot be captured as a CUDA graph, and run kernel by kernel: %s", why)

    def _agrees(self, captured: _CapturedGraph, step_function: StepFunction, inputs: Inputs) -> bool:
        """Whether a replay adds the gradient that the launched pass adds. Sets the gradient to zero.

        Not to the bit: attention's backward pass sums in no fixed order. A graph that reads or writes wrong memory is
        far outside of these bounds. Where the launched gradient is no number, or memory is too short to compare, the
        graph is believed.
        """
        self.flat_grad.zero_()
        captured.replay(inputs)
        try:
            replayed = self.flat_grad.clone()
            self.flat_grad.zero_()
            with self.pool.allocating():
                self._pass(step_function, inputs)
            launched_norm = self.flat_grad.norm()
            difference = replayed.sub_(self.flat_grad).norm()
        except torch.OutOfMemoryError:
            return True
        finally:
            self.flat_grad.zero_()
        return bool(difference <= MAX_DIFFERENCE * launched_norm) or not launched_norm.isfinite()

    def _warm_up(self, step_function: StepFunction, inputs: Inputs) -> None:
        """Run the pass once: the first run compiles kernels and allocates workspaces, which a capture must not do.

        In the pool, where the capture finds the same memory again. A tensor that the pass leaves there, such as a
        constant of compiled code, may lie where graphs that were captured before write: these are captured again.
        """
        before = self.flat_grad.clone()
        allocated = torch.cuda.memory_allocated()
        try:
            with self.pool.allocating():
                self._pass(step_function, inputs)
            if torch.cuda.memory_allocated() > allocated:
                self._drop_captured()
        finally:
            self.flat_grad.copy_(before)

    def _capture_graph(self, step_function: StepFunction, inputs: Inputs) -> _CapturedGraph:
        """Capture the pass. Raises CaptureError and torch.OutOfMemoryError."""
        graph = torch.cuda.CUDAGraph()
        try:
            # "relaxed": other threads, which write checkpoints, may allocate meanwhile; and this one may load a kernel
            # that only this size needs.
            with torch.cuda.graph(graph, pool=self.pool.handle, stream=self.stream, capture_error_mode="relaxed"):
                per_image_loss = self._pass(step_function, inputs)
        except RuntimeError as problem:
            # Leaving the context after an error raises another one, "previous error during capture".
            cause = problem.__context__ or problem
            self.pool.dropped.append(graph)
            self.pool.end_failed_capture()
            if isinstance(problem, torch.OutOfMemoryError) or isinstance(cause, torch.OutOfMemoryError):
                raise torch.OutOfMemoryError(str(cause)) from problem
            raise CaptureError((str(cause).splitlines() or [repr(cause)])[0]) from problem
        return _CapturedGraph(graph, inputs, per_image_loss)
