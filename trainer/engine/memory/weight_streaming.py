"""Weight streaming: frozen weights wait elsewhere, and each region's weights come to the device before it runs.

They wait in host memory, or in parts on the GPUs of the job (`sharding`). The package's page has a drawing. Two slots
on the device hold the weights of the running region and of the next one. Which one is next is learnt from the pass
before: regions run in the same order each time, and backwards in the backward pass. A wrong guess costs time only,
since `load` fetches what is missing.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from trainer.engine.memory.pinned import aligned, pinned_bytes, unpin, view
from trainer.engine.memory.sharding import Shards
from trainer.spec.errors import SettingsError
from trainer.spec.memory_model import RESIDENT_REGIONS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _StreamedTensor:
    """A tensor of a region, the byte of a slot where it begins, and its copy on the host, if it waits there."""

    tensor: torch.Tensor
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    host: torch.Tensor | None = None

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor in a buffer that has the bytes of its region: a slot, for example."""
        return view(buffer, self.offset, self.shape, self.stride, self.dtype)


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
    `shards`: where the weights wait, instead of the host.
    """

    def __init__(self, device: str, *, pinned: bool = True, shards: Shards | None = None) -> None:
        self.device = torch.device(device)
        self.pinned = pinned and device == "cuda"
        self.shards = shards
        self.buffers: list[torch.Tensor] = []
        weakref.finalize(self, unpin, self.buffers).atexit = False
        self.regions: list[torch.nn.Module] = []
        self.tensors: list[list[_StreamedTensor]] = []  # of each region
        self.sizes: list[int] = []  # of each region, in a slot, in bytes
        self.slots: list[torch.Tensor] = []
        self.occupants: list[int | None] = []  # of each slot: the region whose weights are there
        self.ready: dict[int, torch.cuda.Event] = {}  # region → its weights have been copied
        # The two regions that ran last → the one that ran next. One is not enough: backwards, another one follows.
        self.after: dict[tuple[int | None, int | None], int] = {}
        self.previous: int | None = None
        self.current: int | None = None
        self.copy_stream = torch.cuda.Stream() if device == "cuda" else None
        self.is_copying = False  # whether something may be left to do on that stream

    def add_region(self, region: torch.nn.Module) -> None:
        """Move the frozen tensors of `region` to where they wait."""
        streamed: list[_StreamedTensor] = []
        size = 0
        for tensor in (*region.parameters(), *region.buffers()):
            if not tensor.requires_grad:
                streamed.append(_StreamedTensor(tensor, size, tensor.shape, tensor.stride(), tensor.dtype))
                size += aligned(tensor.nbytes)
        if self.shards is not None:
            size = self.shards.size_of(size)
            self._shard(streamed, size)
        else:
            streamed = self._on_host(streamed, size)
        self.regions.append(region)
        self.tensors.append(streamed)
        self.sizes.append(size)

    def _on_host(self, streamed: list[_StreamedTensor], size: int) -> list[_StreamedTensor]:
        """The tensors, of `size` bytes together, with their copies on the host."""
        buffer: torch.Tensor | None = None
        if self.pinned:
            buffer = pinned_bytes(size)
            self.buffers.append(buffer)
        moved: list[_StreamedTensor] = []
        for each in streamed:
            if buffer is None:
                host = each.tensor.data.cpu()
            else:
                host = each.view(buffer)
                host.copy_(each.tensor.data)
            each.tensor.data = host
            moved.append(replace(each, host=host))
        return moved

    def _shard(self, streamed: list[_StreamedTensor], size: int) -> None:
        """Keep this process's part of the tensors, and free them."""
        assert self.shards is not None
        region_N = torch.zeros(size, dtype=torch.uint8, device=self.device)
        for each in streamed:
            each.view(region_N).copy_(each.tensor.data)
            each.tensor.data = torch.empty(0, dtype=each.dtype, device=self.device)
        self.shards.keep(region_N)

    def allocate_slots(self) -> None:
        """Allocate the slots, large enough for the largest region; with shards, all processes must call it.

        All weights become views of a slot at once, so that `weight.device` is the device also before a region runs.
        Raises SettingsError where the processes cannot read each other's shards.
        """
        size = max(self.sizes, default=0)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(RESIDENT_REGIONS)]
        if self.shards is not None:
            self._connect(self.shards)
            log.info(
                "The frozen weights are sharded over %d processes: %.3g of %.3g GiB are here, and the others' are read "
                "at %.0f GB/s.",
                self.shards.peers.count, self.shards.own_bytes / 2**30, sum(self.sizes) / 2**30, self.shards.gb_per_s,
            )  # fmt: skip
        self.occupants = [None] * RESIDENT_REGIONS
        for tensors in self.tensors:
            for streamed in tensors:
                streamed.tensor.data = streamed.view(self.slots[0])

    def _connect(self, shards: Shards) -> None:
        try:
            shards.connect(self.slots[0])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:
            raise SettingsError(
                f"PARAMS_OFFLOAD=shards: the GPUs cannot read each other's memory ({problem}). Fix: set "
                "PARAMS_OFFLOAD=weights."
            ) from problem

    def move_to_host(self) -> None:
        """Move sharded weights to host memory; all processes must call it."""
        assert self.shards is not None
        for index, size in enumerate(self.sizes):
            slot = self.load(index)
            buffer = pinned_bytes(size) if self.pinned else torch.empty(size, dtype=torch.uint8)
            buffer.copy_(slot[:size])
            self.tensors[index] = [replace(each, host=each.view(buffer)) for each in self.tensors[index]]
            if self.pinned:
                self.buffers.append(buffer)
        self.forget()
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # a region that was fetched ahead may still be read
        self.shards.peers.all_agree(True)  # until all have read what is here
        self.shards = None

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
        self.is_copying = True
        self.copy_stream.wait_stream(torch.cuda.current_stream())  # which may still read the slot's old weights
        with torch.cuda.stream(self.copy_stream):
            self._copy(index, number)
            self.ready[index] = torch.cuda.Event()
            self.ready[index].record(self.copy_stream)

    def _copy(self, index: int, number: int) -> None:
        if self.shards is not None:
            self.shards.read(index, self.slots[number])
            return
        for streamed in self.tensors[index]:
            assert streamed.host is not None
            streamed.view(self.slots[number]).copy_(streamed.host, non_blocking=True)

    def forget(self) -> None:
        """Wait on the device for all copies, and take the slots for empty.

        Around a pass that is captured as a CUDA graph: neither this object nor the graph knows what the other one has
        left in the slots, and no copy may reach from one into the other.
        """
        self.occupants = [None] * len(self.slots)
        self.ready.clear()
        self.previous = None
        self.current = None
        if self.is_copying and self.copy_stream is not None:
            self.is_copying = False
            torch.cuda.current_stream().wait_stream(self.copy_stream)

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
