"""From cached latents and embeddings to micro-batches on the device."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from trainer.data import cache as caching
from trainer.data.cache import Cache
from trainer.data.epochs import Batch, Example

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """Pictures of one size, as the cache has them. `moments`: mean and standard deviation of the latents.

    `geometry`, in pixels: height and width of the original picture; top and left of the cut in the scaled picture;
    height and width of the cut.
    """

    moments_B2CHW: torch.Tensor
    text: dict[str, torch.Tensor]
    geometry_B6: torch.Tensor
    mask_B1HW: torch.Tensor | None
    weight_B: torch.Tensor
    names: tuple[str, ...]
    captions: tuple[str, ...] = ()  # as the text encoders get them, where some of these train

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """With every tensor changed."""
        return dataclasses.replace(
            self,
            moments_B2CHW=change(self.moments_B2CHW),
            text={k: change(v) for k, v in self.text.items()},
            geometry_B6=change(self.geometry_B6),
            mask_B1HW=None if self.mask_B1HW is None else change(self.mask_B1HW),
            weight_B=change(self.weight_B),
        )

    def to(self, device: str) -> MicroBatch:
        """Begins copies from memory that is pinned, and waits for others."""
        return self.each(lambda t: t.to(device, non_blocking=True))

    def part(self, rows: slice) -> MicroBatch:
        """Some of the pictures."""
        some = self.each(lambda t: t[rows])
        return dataclasses.replace(some, names=self.names[rows], captions=self.captions[rows])


def prefetched(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items, made by one thread up to `depth` ahead."""
    end = object()
    with ThreadPoolExecutor(1, "prefetch") as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield cast(T, item)


def micro_batch(cache: Cache, batch: Batch) -> MicroBatch:
    """Read one batch from the cache."""
    images = [caching.load(cache.image_path(e.image, e.view)) for e in batch]
    texts = [caching.load(cache.text_path(e.caption)) for e in batch]
    mask = None
    if any("mask" in i for i in images):
        ones = torch.ones(1, *images[0]["moments"].shape[-2:])
        mask = torch.stack([i.get("mask", ones) for i in images])
    return MicroBatch(
        moments_B2CHW=torch.stack([i["moments"] for i in images]),
        text={key: torch.stack([t[key] for t in texts]) for key in texts[0]},
        geometry_B6=torch.tensor([geometry(e) for e in batch], dtype=torch.float32),
        mask_B1HW=mask,
        weight_B=torch.tensor([e.weight for e in batch]),
        names=tuple(e.image.name for e in batch),
        captions=tuple(e.caption for e in batch),
    )


def geometry(example: Example) -> tuple[int, int, int, int, int, int]:
    """See `loop.MicroBatch`. A flipped picture is cut after it is flipped, as sd-scripts counts too."""
    image, view = example.image, example.view
    left = view.scaled[0] - view.size[0] - view.offset[0] if view.flip else view.offset[0]
    return image.height, image.width, view.offset[1], left, view.size[1], view.size[0]
