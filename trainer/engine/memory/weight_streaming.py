"""Weight streaming: frozen weights wait in host memory, and each region's weights come to the device before it runs.

The package's page has a drawing. Two slots on the device hold the weights of the running region and of the next one.
Which one is next is learnt from the pass before: regions run in the same order each time, and backwards in the backward
pass. A wrong guess costs time only, since `load` fetches what is missing.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trainer.engine.memory.pinned import pinned_bytes, unpin, view
from trainer.spec.memory_model import RESIDENT_REGIONS

ALIGNMENT = 256  # bytes; tensors in a slot begin where torch's own allocator would let them begin


def _aligned(size: int) -> int:
    """`size` in bytes, rounded up."""
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class _StreamedTensor:
    """A tensor of a region, its copy on the host, and the byte of a slot where it begins."""

    tensor: torch.Tensor
    offset: int
    host: torch.Tensor

    def view(self, slot: torch.Tensor) -> torch.Tensor:
        return view(slot, self.offset, self.host.shape, self.host.stride(), self.host.dtype)


@dataclass(frozen=True)
class _SavedWeight:
    """A tensor that autograd wants to save, described as a part of a region's weights, from which it can be fetched."""

    region: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class WeightStreamer:
    """Streams the frozen weights of regions that run in the same order each time, forwards and backwards.

    Call `add_region` for each, then `allocate_slots`, and `attach` once the regions are compiled. `pinned`: copy the
    weights into page-locked memory, which is faster to read and worth the copy if they are read more than once.
    """

    def __init__(self, device: str, *, pinned: bool = True) -> None:
        self.device = torch.device(device)
        self.pinned = pinned and device == "cuda"
        self.buffers: list[torch.Tensor] = []
        weakref.finalize(self, unpin, self.buffers).atexit = False
        self.regions: list[torch.nn.Module] = []
        self.tensors: list[list[_StreamedTensor]] = []  # of each region
        self.slots: list[torch.Tensor] = []
        self.occupants: list[int | None] = []  # of each slot: the region whose weights are there
        self.ready: dict[int, torch.cuda.Event] = {}  # region → its weights have been copied
        # The two regions that ran last → the one that ran next. One is not enough: backwards, another one follows.
        self.after: dict[tuple[int | None, int | None], int] = {}
        self.previous: int | None = None
        self.current: int | None = None
        self.copy_stream = torch.cuda.Stream() if device == "cuda" else None

    def add_region(self, region: torch.nn.Module) -> None:
        """Move the frozen tensors of `region` to host memory."""
        frozen: list[torch.Tensor] = []
        for tensor in (*region.parameters(), *region.buffers()):
            if not tensor.requires_grad:
                frozen.append(tensor)
        offsets: list[int] = []
        size = 0
        for tensor in frozen:
            offsets.append(size)
            size += _aligned(tensor.nbytes)
        buffer: torch.Tensor | None = None
        if self.pinned:
            buffer = pinned_bytes(_aligned(size))
            self.buffers.append(buffer)
        streamed: list[_StreamedTensor] = []
        for tensor, offset in zip(frozen, offsets, strict=True):
            if buffer is None:
                host = tensor.data.cpu()
            else:
                host = view(buffer, offset, tensor.shape, tensor.stride(), tensor.dtype)
                host.copy_(tensor.data)
            tensor.data = host
            streamed.append(_StreamedTensor(tensor, offset, host))
        self.regions.append(region)
        self.tensors.append(streamed)

    def allocate_slots(self) -> None:
        """Allocate the slots, large enough for the largest region.

        All weights become views of a slot at once, so that `weight.device` is the device also before a region runs.
        """
        ends = [tensors[-1].offset + tensors[-1].host.nbytes for tensors in self.tensors if tensors]
        size = _aligned(max(ends, default=0))
        self.slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(RESIDENT_REGIONS)]
        self.occupants = [None] * RESIDENT_REGIONS
        for tensors in self.tensors:
            for streamed in tensors:
                streamed.tensor.data = streamed.view(self.slots[0])

    def attach(self) -> None:
        """Bring each region's weights before it runs, outside of what is compiled."""
        for index, region in enumerate(self.regions):
            inner = region._compiled_call_impl or region._call_impl
            region._compiled_call_impl = partial(self._load_and_call, index, inner)
            region.__dict__["load_weights"] = partial(self.load, index)  # for `checkpointing`, when it recomputes

    def _load_and_call(self, index: int, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.load(index)
        return inner(*args, **kwargs)

    def load(self, index: int) -> torch.Tensor:
        """Bring the weights of region `index` to the device and begin to fetch the next region's; returns the slot."""
        if index == self.current:
            return self.slots[self.occupants.index(index)]
        if index not in self.occupants:
            self._fetch(index)
        self.after[self.previous, self.current] = index
        self.previous = self.current
        self.current = index
        if self.copy_stream is not None:
            torch.cuda.current_stream().wait_event(self.ready[index])
        slot = self.slots[self.occupants.index(index)]
        for streamed in self.tensors[index]:
            streamed.tensor.data = streamed.view(slot)
        following = self.after.get((self.previous, index))
        if following is not None and following not in self.occupants:
            self._fetch(following)
        return slot

    def _fetch(self, index: int) -> None:
        """Copy a region's weights into a slot that the running region does not use."""
        number = next(n for n, occupant in enumerate(self.occupants) if occupant is None or occupant != self.current)
        self.occupants[number] = index
        if self.copy_stream is None:
            self._copy(index, number)
            return
        self.copy_stream.wait_stream(torch.cuda.current_stream())  # which may still read the slot's old weights
        with torch.cuda.stream(self.copy_stream):
            self._copy(index, number)
            self.ready[index] = torch.cuda.Event()
            self.ready[index].record(self.copy_stream)

    def _copy(self, index: int, number: int) -> None:
        for streamed in self.tensors[index]:
            streamed.view(self.slots[number]).copy_(streamed.host, non_blocking=True)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _SavedWeight:
        """For `saved_tensors_hooks`: describes a weight instead of saving it, since its slot will be overwritten."""
        base = tensor.untyped_storage().data_ptr()
        for slot, occupant in zip(self.slots, self.occupants, strict=True):
            if occupant is not None and slot.data_ptr() == base:
                offset = tensor.storage_offset() * tensor.element_size()
                return _SavedWeight(occupant, int(offset), tensor.shape, tensor.stride(), tensor.dtype)
        return tensor

    def unpack(self, saved: torch.Tensor | _SavedWeight) -> torch.Tensor:
        """For `saved_tensors_hooks`: the weight that was described, fetched again; any other tensor as it is."""
        if isinstance(saved, torch.Tensor):
            return saved
        return view(self.load(saved.region), saved.offset, saved.shape, saved.stride, saved.dtype)


def stream_layers(model: torch.nn.Module, device: str) -> WeightStreamer:
    """Put `model` on `device`, but stream the layers of its longest `ModuleList`. For models that run a few times."""
    layer_lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    streamer = WeightStreamer(device, pinned=False)
    for layer in max(layer_lists, key=lambda layers: sum(p.numel() for p in layers.parameters())):
        streamer.add_region(layer)
    streamer.allocate_slots()
    model.to(device)
    streamer.attach()
    return streamer
