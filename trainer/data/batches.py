"""From cached latents and embeddings to micro-batches on the device.

Letters: B images of a micro-batch, C channels of the latents, H × W the latents' size.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from trainer.data.cache import Cache, Item
from trainer.data.order.variants import Batch, Example

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """Images of one size that go through the denoiser together, as the cache has them."""

    moments_B2CHW: torch.Tensor  # mean and standard deviation of the latents, from which each step draws anew
    text: dict[str, torch.Tensor]  # embeddings, under the family's names (see `stack_texts`); the first dimension is B
    geometry_B6: torch.Tensor  # see `geometry`
    mask_B1HW: torch.Tensor | None  # weight of the loss at each latent, 0..1
    weight_B: torch.Tensor  # weight of each image's loss
    names: tuple[str, ...]
    captions: tuple[str, ...] = ()  # for text encoders that are trained, which encode them in every step

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """A copy with every tensor changed."""
        return dataclasses.replace(
            self,
            moments_B2CHW=change(self.moments_B2CHW),
            text={name: change(tensor) for name, tensor in self.text.items()},
            geometry_B6=change(self.geometry_B6),
            mask_B1HW=None if self.mask_B1HW is None else change(self.mask_B1HW),
            weight_B=change(self.weight_B),
        )

    def to(self, device: str) -> MicroBatch:
        """On `device`. Copies from pinned memory are only started, as the stream orders them; others are awaited."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def part(self, rows: slice) -> MicroBatch:
        """Some of the images."""
        part = self.each(lambda tensor: tensor[rows])
        return dataclasses.replace(part, names=self.names[rows], captions=self.captions[rows])


def prefetched(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items, made by one thread up to `depth` ahead."""
    end = object()
    with ThreadPoolExecutor(1, "prefetch") as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield cast(T, item)


def micro_batch(cache: Cache, batch: Batch, lengths: Mapping[str, int] | None = None) -> MicroBatch:
    """Read one batch from the cache. An image without a mask, among images with one, is trained everywhere.

    `lengths`: see `stack_texts`.
    """
    images: list[Item] = []
    texts: list[Item] = []
    for example in batch:
        images.append(cache.load(cache.image_path(example.image, example.view)))
        texts.append(cache.load(cache.text_path(example.caption)))
    mask_B1HW = None
    if any("mask" in image for image in images):
        ones_1HW = torch.ones(1, *images[0]["moments"].shape[-2:])
        mask_B1HW = torch.stack([image.get("mask", ones_1HW) for image in images])
    return MicroBatch(
        moments_B2CHW=_stack(images, "moments"),
        text=stack_texts(texts, lengths),
        geometry_B6=torch.tensor([geometry(example) for example in batch], dtype=torch.float32),
        mask_B1HW=mask_B1HW,
        weight_B=torch.tensor([example.weight for example in batch]),
        names=tuple(example.image.name for example in batch),
        captions=tuple(example.caption for example in batch),
    )


def _stack(items: list[Item], name: str) -> torch.Tensor:
    """One tensor of every item, along a new first dimension B."""
    return torch.stack([item[name] for item in items])


def stack_texts(items: list[Item], lengths: Mapping[str, int] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of several captions, under their names.

    Where captions differ in length, the shorter ones get zeros at their end, and `padding` (B, L) is true there.
    Otherwise there is no `padding`: attention without a mask is faster.

    `lengths`: those of `text_lengths`. The tensors of these names become so long, and there is a `padding` in any case,
    so that all batches of one size are captured as one CUDA graph.
    """
    lengths = lengths or {}
    text = {}
    for name in items[0]:
        rows = [item[name] for item in items]
        if not rows[0].ndim:
            text[name] = torch.stack(rows)
            continue
        lengths_B = torch.tensor([len(row) for row in rows])
        longest = max(int(lengths_B.max()), lengths.get(name, 0))
        stacked = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        missing = stacked.new_zeros(len(rows), longest - stacked.shape[1], *stacked.shape[2:])
        text[name] = torch.cat([stacked, missing], dim=1)
        if name in lengths or len(lengths_B.unique()) > 1:
            text["padding"] = torch.arange(longest) >= lengths_B[:, None]
    return text


def longest_caption(captions: Iterable[str], cache: Cache) -> str | None:
    """The caption with the most tokens; None where all have as many, as in most families."""
    found = _shortest_and_longest(captions, cache)
    return found[1] if found else None


def text_lengths(captions: Iterable[str], cache: Cache) -> dict[str, int]:
    """Name of a tensor → its rows in the longest of `captions`, for the tensors that are not equally long in all."""
    found = _shortest_and_longest(captions, cache)
    if found is None:
        return {}
    short_item, long_item = (cache.load(cache.text_path(caption)) for caption in found)
    lengths = {}
    for name, tensor in long_item.items():
        if tensor.ndim and len(tensor) != len(short_item[name]):
            lengths[name] = len(tensor)
    return lengths


def _shortest_and_longest(captions: Iterable[str], cache: Cache) -> tuple[str, str] | None:
    """By the bytes of their items, which grow with the tokens; None where all have as many."""
    shortest: tuple[int, str] | None = None
    longest: tuple[int, str] | None = None
    for caption in captions:
        size = cache.size(cache.text_path(caption))
        if shortest is None or size < shortest[0]:
            shortest = (size, caption)
        if longest is None or size > longest[0]:
            longest = (size, caption)
    if shortest is None or longest is None or shortest[0] == longest[0]:
        return None
    return shortest[1], longest[1]


def geometry(example: Example) -> tuple[int, int, int, int, int, int]:
    """SDXL's size conditioning ([2307.01952](https://arxiv.org/abs/2307.01952)), in pixels.

    Height and width of the original image; top and left of the crop in the scaled image; height and width of the crop.
    The crop of a flipped image is counted after the flip, as in sd-scripts.
    """
    image = example.image
    view = example.view
    left, top = view.offset
    width, height = view.size
    if view.flip:
        left = view.scaled[0] - width - left
    return image.height, image.width, top, left, height, width
