"""What a block keeps for its backward pass, and where: recomputed, kept on the device, or kept in the host's memory."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import trainer.frozen  # noqa: F401  (its operators)
from trainer.stream import Stream

_ATTENTION = ("flash", "cudnn", "efficient")
KEPT = {getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default for name in _ATTENTION}

PRODUCTS = KEPT | {
    torch.ops.kiln.fp8_product.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._int_mm.default,
    torch.ops.aten.convolution.default,
}

# No block draws random numbers, and their generator's state cannot be read while a step is recorded.
HOW: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def _keep(kept: set[Any], _: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward pass, with its weights where they must be (`trainer.stream`); what is compiled takes them saved."""
    if not torch.compiler.is_compiling() and "load" in self.__dict__:
        with _disable_current_modes():  # its copies are none of what is recomputed
            self.__dict__["load"]()
    return type(self).forward(self, *args, **kwargs)


def _recompute_all(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(_forward, self, *args, **HOW, **kwargs)


def _recompute_but_attention(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_keep, KEPT))
    return checkpoint(_forward, self, *args, **HOW, context_fn=contexts, **kwargs)


def _recompute_but_products(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_keep, PRODUCTS))
    return checkpoint(_forward, self, *args, **HOW, context_fn=contexts, **kwargs)


# From least memory to most. Checkpoints are inside what is compiled: the compiler then plans both passes at once.
POLICIES: dict[str, Callable[..., Any] | None] = {
    "all": _recompute_all,
    "attention": _recompute_but_attention,
    "products": _recompute_but_products,
    "none": None,
}


def apply(regions: Iterable[torch.nn.Module], policies: Sequence[str], *, compiled: bool) -> None:
    """Give each region its policy; compile it: once for each kind of region and policy, and once more for other sizes.

    That second time makes sizes free, so that no third size needs another.
    """
    # The default, 8, is for one function called in one way; past it, what is called is not compiled at all.
    torch._dynamo.config.recompile_limit = 64
    for region, policy in zip(regions, policies, strict=True):
        region.__dict__.pop("forward", None)
        forward = POLICIES[policy]
        if forward is not None:
            region.forward = types.MethodType(forward, region)
        region._compiled_call_impl = None
        if compiled:
            region.compile()


@dataclass(eq=False)
class _Stored:
    """A tensor in pinned memory; `device`: back again, as soon as `ready`."""

    host: torch.Tensor
    stride: tuple[int, ...]
    ready: torch.cuda.Event
    device: torch.Tensor | None = None
    done: bool = False


class Offload:
    """Inside, large tensors that autograd saves go to pinned host memory as they are made, and come back in time.

    Copies run on streams of their own, both ways at once; what the backward pass needs next is fetched `ahead` bytes
    early. Weights stay where they are, or are left to `stream`.
    """

    def __init__(
        self, model: torch.nn.Module, *, stream: Stream | None = None, smallest: int = 2**22, ahead: int = 2**29
    ) -> None:
        self.stream, self.smallest, self.ahead = stream, smallest, ahead
        self.weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.out, self.back = torch.cuda.Stream(), torch.cuda.Stream()
        self.free: dict[tuple[Any, ...], list[tuple[torch.Tensor, torch.cuda.Event]]] = {}
        self.stored: list[_Stored] = []

    def __enter__(self) -> None:
        self.stored = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()

    def __exit__(self, *problem: object) -> None:
        self.hooks.__exit__(*problem)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if self.stream and not isinstance(weights := self.stream.pack(tensor), torch.Tensor):
            return weights
        if not tensor.is_cuda or tensor.nbytes < self.smallest or tensor.untyped_storage().data_ptr() in self.weights:
            return tensor
        key = (tensor.shape, tensor.stride(), tensor.dtype)
        self.out.wait_stream(torch.cuda.current_stream())
        if self.free.get(key):
            host, read = self.free[key].pop()
            self.out.wait_event(read)
        else:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        with torch.cuda.stream(self.out):
            host.copy_(tensor, non_blocking=True)
            written = torch.cuda.Event()
            written.record(self.out)
        tensor.record_stream(self.out)
        stored = _Stored(host, tensor.stride(), written)
        self.stored.append(stored)
        return stored

    def _unpack(self, stored: Any) -> torch.Tensor:
        if not isinstance(stored, _Stored):
            return self.stream.unpack(stored) if self.stream else cast(torch.Tensor, stored)
        index = self.stored.index(stored)
        wanted = 0
        for each in reversed(self.stored[: index + 1]):
            self._fetch(each)
            wanted += each.host.nbytes
            if wanted > self.ahead:
                break
        assert stored.device is not None
        here, stored.device, stored.done = stored.device, None, True
        torch.cuda.current_stream().wait_event(stored.ready)
        here.record_stream(torch.cuda.current_stream())
        key = (here.shape, here.stride(), here.dtype)
        self.free.setdefault(key, []).append((stored.host, stored.ready))
        del self.stored[index]
        return here

    def _fetch(self, stored: _Stored) -> None:
        if stored.device is not None or stored.done:
            return
        self.back.wait_event(stored.ready)
        with torch.cuda.stream(self.back):
            # What was compiled expects the strides that it saw, of slices too.
            stored.device = torch.empty_strided(
                stored.host.shape, stored.stride, dtype=stored.host.dtype, device="cuda"
            )
            stored.device.copy_(stored.host, non_blocking=True)
            stored.ready = torch.cuda.Event()
            stored.ready.record(self.back)
