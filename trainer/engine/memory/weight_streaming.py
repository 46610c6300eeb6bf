"""Layers whose frozen weights wait in the host's memory: each comes to the device when it is needed, one ahead."""

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

ALIGNED = 256  # bytes


@dataclass(frozen=True)
class _Place:
    """A tensor of a region: its bytes begin at `offset` of a slot."""

    tensor: torch.Tensor
    offset: int
    host: torch.Tensor

    def view(self, slot: torch.Tensor) -> torch.Tensor:
        return view(slot, self.offset, self.host.shape, self.host.stride(), self.host.dtype)


@dataclass(frozen=True)
class _Saved:
    """A tensor that autograd keeps, which is part of a region's weights and need not be kept."""

    region: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class WeightStreamer:
    """Regions that run one after the other in the same order each time, forwards and backwards.

    `take` each of them and `settle`; then `wrap` them once they are compiled. `pinned`: copy the weights into memory
    that the device reads by itself, which is worth it where they are read more than once.
    """

    def __init__(self, device: str, *, pinned: bool = True) -> None:
        self.device, self.pinned = torch.device(device), pinned and device == "cuda"
        self.buffers: list[torch.Tensor] = []
        weakref.finalize(self, unpin, self.buffers).atexit = False
        self.regions: list[torch.nn.Module] = []
        self.places: list[list[_Place]] = []
        self.slots: list[torch.Tensor] = []
        self.occupants: list[int | None] = []
        self.ready: dict[int, torch.cuda.Event] = {}
        self.after: dict[tuple[int | None, int | None], int] = {}  # the two regions before → the one that came then
        self.previous: int | None = None
        self.current: int | None = None
        self.copies = torch.cuda.Stream() if device == "cuda" else None

    def add_region(self, region: torch.nn.Module) -> None:
        """Let the frozen tensors of `region` wait in the host's memory."""
        frozen = [t for t in (*region.parameters(), *region.buffers()) if not t.requires_grad]
        offsets, size = [], 0
        for tensor in frozen:
            offsets.append(size)
            size += math.ceil(tensor.nbytes / ALIGNED) * ALIGNED
        places = []
        buffer = pinned_bytes(math.ceil(size / ALIGNED) * ALIGNED) if self.pinned else None
        self.buffers.extend([] if buffer is None else [buffer])
        for tensor, offset in zip(frozen, offsets, strict=True):
            if buffer is None:
                host = tensor.data.cpu()
            else:
                host = view(buffer, offset, tensor.shape, tensor.stride(), tensor.dtype)
                host.copy_(tensor.data)
            tensor.data = host
            places.append(_Place(tensor, offset, host))
        self.regions.append(region)
        self.places.append(places)

    def allocate_slots(self) -> None:
        """Make room on the device for two regions. Whoever asks for a weight's device is told this one."""
        ends = [places[-1].offset + places[-1].host.nbytes for places in self.places if places]
        size = math.ceil(max(ends, default=0) / ALIGNED) * ALIGNED
        self.slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(RESIDENT_REGIONS)]
        self.occupants = [None] * RESIDENT_REGIONS
        for places in self.places:
            for place in places:
                place.tensor.data = place.view(self.slots[0])

    def attach(self) -> None:
        """Bring each region's weights before it runs, outside of what is compiled."""
        for index, region in enumerate(self.regions):
            inner = region._compiled_call_impl or region._call_impl
            region._compiled_call_impl = partial(self._through, index, inner)
            region.__dict__["load"] = partial(self.load, index)  # for `recompute`, where nothing is compiled

    def _through(self, index: int, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.load(index)
        return inner(*args, **kwargs)

    def load(self, index: int) -> torch.Tensor:
        """Have the weights of a region on the device, and begin to fetch those that will be next; returns its slot."""
        if index == self.current:
            return self.slots[self.occupants.index(index)]
        if index not in self.occupants:
            self._bring(index)
        self.after[self.previous, self.current] = index
        self.previous, self.current = self.current, index
        if self.copies is not None:
            torch.cuda.current_stream().wait_event(self.ready[index])
        slot = self.slots[self.occupants.index(index)]
        for place in self.places[index]:
            place.tensor.data = place.view(slot)
        following = self.after.get((self.previous, index))
        if following is not None and following not in self.occupants:
            self._bring(following)
        return slot

    def _bring(self, index: int) -> None:
        """Copy a region's weights over those that are not at work."""
        number = next(n for n, occupant in enumerate(self.occupants) if occupant is None or occupant != self.current)
        self.occupants[number] = index
        if self.copies is None:
            self._copy(index, number)
            return
        self.copies.wait_stream(torch.cuda.current_stream())  # what was there may still be read
        with torch.cuda.stream(self.copies):
            self._copy(index, number)
            self.ready[index] = torch.cuda.Event()
            self.ready[index].record(self.copies)

    def _copy(self, index: int, number: int) -> None:
        for place in self.places[index]:
            place.view(self.slots[number]).copy_(place.host, non_blocking=True)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        """For `saved_tensors_hooks`: weights are not kept, but fetched again."""
        base = tensor.untyped_storage().data_ptr()
        for slot, occupant in zip(self.slots, self.occupants, strict=True):
            if occupant is not None and slot.data_ptr() == base:
                offset = tensor.storage_offset() * tensor.element_size()
                return _Saved(occupant, int(offset), tensor.shape, tensor.stride(), tensor.dtype)
        return tensor

    def unpack(self, saved: torch.Tensor | _Saved) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        return view(self.load(saved.region), saved.offset, saved.shape, saved.stride, saved.dtype)


def layers(model: torch.nn.Module, device: str) -> WeightStreamer:
    """A model on `device`, but for the longest list of layers in it, which are streamed for a pass or two."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    stream = WeightStreamer(device, pinned=False)
    for layer in max(lists, key=lambda m: sum(p.numel() for p in m.parameters())):
        stream.add_region(layer)
    stream.allocate_slots()
    model.to(device)
    stream.attach()
    return stream
