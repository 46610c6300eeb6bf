"""Modules that draw samples between two training steps, in the memory of the captured steps.

`PooledCalls.of` wraps a denoiser or a VAE: while its forward pass runs, memory comes from the graphs' pool
(`trainer.engine.graph_pool`), and what it returns is copied out of there. Everything that lasts from one call to the
next, such as the latents, stays outside: the next replay would overwrite it.

An image takes 20 to 50 passes of one size through the denoiser, which the host launches more slowly than the device
runs them. So the first pass of each size is launched, the second is captured as a CUDA graph, and the others are
replayed; the graph stays for the next samples. It is used only if its first replay gives the same bits as launched.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from trainer.engine.graph_pool import GraphPool

log = logging.getLogger(__name__)
Launch = Callable[..., Any]


@dataclass(frozen=True)
class _Forward:
    """A captured pass: the graph, the tensors that it reads, and what it returns, which the next replay overwrites."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    output: Any

    def replay(self, tensors: list[torch.Tensor]) -> Any:
        for static, tensor in zip(self.inputs, tensors, strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, self.output)


class PooledCalls:
    """Calls of modules in the memory of `pool`. `around`: entered around each forward pass that may be captured."""

    def __init__(self, pool: GraphPool, around: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self.pool = pool
        self.around = around
        self.captured: dict[Hashable, _Forward] = {}
        self.launched: set[Hashable] = set()  # sizes that have run once
        self.uncapturable: set[Hashable] = set()

    @contextlib.contextmanager
    def of(self, module: torch.nn.Module, method: str, *, captures: bool) -> Iterator[None]:
        """Inside, calls of the module's `method` work like this; only where no gradient is asked for.

        `captures`: passes of one size are captured. Otherwise each is launched.
        """
        launch: Launch = getattr(module, method)
        own = module.__dict__.get(method)  # where the module itself has it, and not its class

        def call_in_pool(*args: Any, **kwargs: Any) -> Any:
            if captures:
                return self._replay_or_launch(launch, args, kwargs)
            return self._launch(launch, args, kwargs)

        setattr(module, method, call_in_pool)
        try:
            yield
        finally:
            delattr(module, method)
            if own is not None:
                setattr(module, method, own)

    def _launch(self, launch: Launch, args: Any, kwargs: Any) -> Any:
        with self.pool.allocating():
            output = launch(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, torch.clone, output)

    def _replay_or_launch(self, launch: Launch, args: Any, kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        key = _size(leaves, structure)
        if key in self.captured:
            return self.captured[key].replay(tensors)

        def launch_around(*args: Any, **kwargs: Any) -> Any:
            with self.around():
                return launch(*args, **kwargs)

        output = self._launch(launch_around, args, kwargs)
        on_device = all(tensor.is_cuda for tensor in tensors)
        if key not in self.launched:
            self.launched.add(key)
        elif on_device and key not in self.uncapturable:
            self._capture(key, launch_around, leaves, structure, wanted=output)
        return output

    def _capture(
        self, key: Hashable, launch: Launch, leaves: list[Any], structure: pytree.TreeSpec, *, wanted: Any
    ) -> None:
        """Capture the pass, unless that fails or its replay does not give `wanted`: then it is not tried again."""
        static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        inputs = [leaf for leaf in static if isinstance(leaf, torch.Tensor)]
        args, kwargs = pytree.tree_unflatten(static, structure)
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool.handle, stream=self.pool.stream, capture_error_mode="relaxed"):
                output = launch(*args, **kwargs)
        except RuntimeError as problem:
            self.pool.dropped.append(graph)
            self.pool.end_failed_capture()
            torch.cuda.set_stream(current)  # a failed capture leaves its own stream current
            self.uncapturable.add(key)
            log.debug("A forward pass cannot be captured as a CUDA graph: %s", problem)
            return
        current.wait_stream(self.pool.stream)
        forward = _Forward(graph, inputs, output)
        if same_bits(forward.replay(inputs), wanted):
            self.captured[key] = forward
        else:
            self.pool.dropped.append(graph)
            self.uncapturable.add(key)
            log.debug("A replayed forward pass differs from a launched one: passes of its size are launched.")


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees have the same tensors."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, torch.Tensor))


def _size(leaves: list[Any], structure: pytree.TreeSpec) -> Hashable:
    """What a captured pass depends on: the shapes and types of tensors, and all other arguments as they are."""
    parts: list[Hashable] = [str(structure)]
    for leaf in leaves:
        parts.append((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf))
    return tuple(parts)
