"""Latents and text embeddings, encoded once and kept on the volume.

One safetensors file an item, named by the SHA-256 of all that decides its content: the picture's bytes and how it is
cut, or the caption; and the weights that encode it. Written atomically, so two runs may share a cache; an item that is
not what was written is encoded again. Memory does not grow with the number of pictures.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from trainer.data.decode import UnusableImageError
from trainer.data.records import ImageRecord, View
from trainer.data.render import render, render_mask
from trainer.storage import atomic, digests

VERSION = 1
Item = dict[str, torch.Tensor]
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Cache:
    """The items in `folder` that the weights with these digests made."""

    folder: Path
    vae: str
    encoders: str

    def image_path(self, image: ImageRecord, view: View) -> Path:
        content = {"sha256": image.sha256, "view": asdict(view), "vae": self.vae, "version": VERSION}
        if image.mask_sha256:
            content["mask"] = image.mask_sha256
        return self._path("latents", digests.digest(content))

    def text_path(self, caption: str) -> Path:
        return self._path("text", digests.digest({"caption": caption, "encoders": self.encoders, "version": VERSION}))

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.safetensors"


def encode_images(
    cache: Cache,
    items: Iterable[tuple[ImageRecord, View]],
    *,
    encode: Callable[[torch.Tensor], torch.Tensor],
    cpu_workers: int,
    at_once: float,
    check_in: Callable[[], None],
) -> tuple[int, list[tuple[ImageRecord, str]]]:
    """Encode what the cache lacks; return how many were encoded, and the pictures that turned out unusable.

    `encode`: pixels (B, 3, H, W) in [-1, 1] → moments (B, 2C, h, w), of a picture at least and of `at_once` megapixels.
    `tick` is called between batches and may raise.
    """
    done, unusable = 0, []
    with ThreadPoolExecutor(cpu_workers) as pool:
        missing = ((p, v) for (p, v), whole in _ahead(pool, lambda i: _whole(cache.image_path(*i)), items) if not whole)
        for batch in _batches(_ahead(pool, _rendered, missing), at_once):
            check_in()
            good = []
            for (image, view), drawn in batch:
                if isinstance(drawn, str):
                    unusable.append((image, drawn))
                else:
                    good.append((image, view, *drawn))
            if good:
                pixels_BHWC = torch.from_numpy(np.stack([pixels for _, _, pixels, _ in good]))
                moments = encode(pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1).cpu()
                for (image, view, _, mask), moments_DHW in zip(good, moments, strict=True):
                    _write(cache.image_path(image, view), _with_mask({"moments": moments_DHW}, mask))
            done += len(good)
    return done, unusable


def encode_texts(
    cache: Cache,
    captions: Iterable[str],
    *,
    encode: Callable[[list[str]], list[Item]],
    batch: int,
    check_in: Callable[[], None],
) -> int:
    """Encode the captions that the cache lacks; return how many."""
    missing = [c for c in dict.fromkeys(captions) if not _whole(cache.text_path(c))]
    for start in range(0, len(missing), batch):
        check_in()
        some = missing[start : start + batch]
        for caption, item in zip(some, encode(some), strict=True):
            _write(cache.text_path(caption), item)
    return len(missing)


def any_missing(paths: Iterable[Path]) -> bool:
    """Whether one of these items is not there, whole."""
    return not all(_whole(p) for p in paths)


def load(path: Path) -> Item:
    """One item's tensors."""
    item: Item = load_file(path)
    return item


def _rendered(item: tuple[ImageRecord, View]) -> tuple[np.ndarray, np.ndarray | None] | str:
    """The pixels (H, W, 3) and the mask (H, W) of a picture, or why there are none."""
    image, view = item
    try:
        return render(image.file, view, sha256=image.sha256), render_mask(image, view)
    except UnusableImageError as problem:
        return str(problem)


def _with_mask(item: Item, mask_HW: np.ndarray | None) -> Item:
    """Add the mask at the latents' size, in 0..1."""
    if mask_HW is not None:
        mask = torch.from_numpy(mask_HW.astype(np.float32) / 255)[None, None]
        item["mask"] = torch.nn.functional.interpolate(mask, item["moments"].shape[-2:], mode="area")[0]
    return item


def _batches(
    drawn: Iterable[tuple[tuple[ImageRecord, View], B]], at_once: float
) -> Iterator[list[tuple[tuple[ImageRecord, View], B]]]:
    """Runs of neighbours of the same size, until they have `at_once` megapixels together."""
    batch: list[tuple[tuple[ImageRecord, View], B]] = []
    for (image, view), value in drawn:
        if batch and (batch[0][0][1].size != view.size or len(batch) * view.size[0] * view.size[1] >= at_once * 1e6):
            yield batch
            batch = []
        batch.append(((image, view), value))
    if batch:
        yield batch


def _ahead(pool: ThreadPoolExecutor, work: Callable[[A], B], items: Iterable[A]) -> Iterator[tuple[A, B]]:
    """`map` in order that holds a bounded number of results (`ThreadPoolExecutor.map` holds them all)."""
    waiting: deque[tuple[A, Future[B]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > 2 * pool._max_workers:
            first, result = waiting.popleft()
            yield first, result.result()
    while waiting:
        first, result = waiting.popleft()
        yield first, result.result()


def _write(path: Path, item: Item) -> None:
    item = {k: v.contiguous() for k, v in item.items()}
    with atomic.replacing(path) as temporary:
        save_file(item, temporary, metadata={"sha256": _hash(item)})


def _whole(path: Path) -> bool:
    """Whether the item is there and is what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            item = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return bool((file.metadata() or {}).get("sha256") == _hash(item))
    except (OSError, SafetensorError):
        return False


def _hash(item: Item) -> str:
    total = hashlib.sha256()
    for key in sorted(item):
        total.update(key.encode())
        total.update(item[key].reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
