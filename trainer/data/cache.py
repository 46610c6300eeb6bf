"""Latents and text embeddings, encoded once and kept on the volume.

Each item is one safetensors file, named by the SHA-256 of everything that decides its content: the image's bytes and
its view, or the caption; and the weights of the encoder. So nothing in the cache is ever out of date, and jobs may
share a cache: files are written atomically. An item whose bytes are not what was written is encoded again. Memory does
not grow with the number of images.

Of a run with PACKED_FROM items and more, the items are in packs (`trainer.data.packs`), each with the same bytes that
its file would have. They are read from either, and checked when they are read.

Letters: B images, H × W pixels, h × w latents, C channels of the latents.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save, save_file

from trainer.data.decode import UnusableImageError
from trainer.data.packs import pack_file
from trainer.data.packs.pack_file import PackWriter
from trainer.data.packs.pack_folder import PackedItem, PackFolder
from trainer.data.records import ImageRecord, View
from trainer.data.render import render, render_mask
from trainer.spec.errors import UnreachableError
from trainer.storage import atomic, digests
from trainer.storage.read import is_regular

PACKS = "packs"  # a folder beside those of the files
PACKED_FROM = 2_000  # items of a run, images or captions: fewer are a file each
VERSION = 1  # of the files' content; a change of it encodes everything again
Item = dict[str, torch.Tensor]
Variant = tuple[ImageRecord, View]
Pixels = tuple[np.ndarray, np.ndarray | None]  # (H, W, 3), and the mask (H, W)
# What reading a damaged item raises; of OSErrors EIO: a sector that cannot be read.
DAMAGE = (ValueError, SafetensorError, OSError)
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Cache:
    """The items in `folder` that the weights with these digests encoded."""

    folder: Path
    vae: str
    encoders: str

    def image_path(self, image: ImageRecord, view: View) -> Path:
        """The file of one image's latents: moments (2C, h, w), and where it has a mask, mask (1, h, w) in 0..1."""
        content = {"sha256": image.sha256, "view": asdict(view), "vae": self.vae, "version": VERSION}
        if image.mask_sha256:
            content["mask"] = image.mask_sha256
        return self._path("latents", digests.digest(content))

    def text_path(self, caption: str) -> Path:
        """The file of one caption's embeddings, under the family's names."""
        return self._path("text", digests.digest({"caption": caption, "encoders": self.encoders, "version": VERSION}))

    @functools.cached_property
    def _packs(self) -> dict[str, PackFolder]:
        return {kind: PackFolder(self.folder / kind / PACKS) for kind in ("latents", "text")}

    def _packed(self, path: Path) -> PackedItem | None:
        """The item of this path, if it is in a pack."""
        packs = self._packs.get(path.parent.parent.name)
        return packs.find(bytes.fromhex(path.stem)) if packs else None

    def refresh(self) -> None:
        """Take in packs that other processes have written."""
        for packs in self._packs.values():
            packs.refresh()

    def reopen(self) -> None:
        """Forget the packs that were known: others are there now, or none."""
        self.__dict__.pop("_packs", None)

    def knows(self, path: Path) -> bool:
        """As `has`, without reading the item."""
        return self._packed(path) is not None or is_regular(path)

    def _found(self, path: Path) -> PackedItem | None:
        """`_packed`, also if another process has written it meanwhile."""
        packed = self._packed(path)
        if packed is None and not path.exists():
            self.refresh()
            packed = self._packed(path)
        return packed

    def has(self, path: Path) -> bool:
        """Whether the item of this path is in a pack, or is a file that is intact."""
        return self._packed(path) is not None or _is_intact(path)

    def size(self, path: Path) -> int:
        """Bytes of an item."""
        packed = self._found(path)
        return packed.length if packed else path.stat().st_size

    def load(self, path: Path) -> Item:
        """One item's tensors. Raises UnreachableError for a damaged one in a pack: the next start encodes it again."""
        packed = self._found(path)
        if packed is None:
            return load(path)
        try:
            return _unpacked(packed.read())
        except DAMAGE as problem:
            if isinstance(problem, OSError) and problem.errno != errno.EIO:
                raise
            fix = "start again, and what is damaged is encoded anew"
            try:
                _list_damaged(packed.pack)
            except OSError as unlisted:
                fix = f"delete it and start again: beside it nothing can be noted ({unlisted.strerror})"
            raise UnreachableError(
                f"The cache is damaged: {packed.pack} is not what was written ({problem}). Fix: {fix}."
            ) from problem

    @contextlib.contextmanager
    def writing(self, *, packed: bool) -> Iterator[Callable[[Path, Item], None]]:
        """Yields what stores the item of a path: as a file, or `packed`."""
        if not packed:
            yield _write
            return
        writers = {kind: PackWriter(packs.folder) for kind, packs in self._packs.items()}

        def write(path: Path, item: Item) -> None:
            writers[path.parent.parent.name].add(bytes.fromhex(path.stem), _bytes(item))

        with contextlib.ExitStack() as ended:  # one that fails keeps no other from being closed
            ended.callback(self.refresh)
            for writer in writers.values():
                ended.callback(writer.close)
            yield write

    def _path(self, subfolder: str, key: str) -> Path:
        # Two letters of the hash make 256 folders: network volumes list large folders slowly.
        return self.folder / subfolder / key[:2] / f"{key}.safetensors"


@dataclass(frozen=True)
class Share:
    """Which part of the work on a cache this process does: of `count` processes, number `index`.

    `merge`: numbers → for each place the largest that one of these processes has there; all must call it.

    All processes know the same missing items and make the same batches of them, and each encodes every `count`-th
    batch: which images are encoded together decides the last bits, so the cache gets the same bytes as from one.
    """

    index: int = 0
    count: int = 1
    merge: Callable[[list[int]], list[int]] = list


ALONE = Share()


def find_missing(
    items: Sequence[A],
    place: Callable[[A], Path],
    share: Share = ALONE,
    *,
    threads: int = 1,
    has: Callable[[Path], bool] | None = None,
) -> list[A]:
    """Those of `items` whose item, at `place`, is missing or damaged; each process of `share` looks at its part.

    `has`: whether an item is there; by default, whether there is an intact file.
    """
    has = has or _is_intact
    is_missing = [0] * len(items)
    own = range(share.index, len(items), share.count)
    with ThreadPoolExecutor(threads) as pool:
        for i, is_intact in _map_ahead(pool, lambda i: has(place(items[i])), own):
            is_missing[i] = int(not is_intact)
    return [item for item, missing in zip(items, share.merge(is_missing), strict=True) if missing]


def encode_images(
    cache: Cache,
    variants: Sequence[Variant],
    *,
    encode: Callable[[torch.Tensor], torch.Tensor],
    cpu_workers: int,
    max_megapixels: float,
    check_in: Callable[[], None],
    share: Share = ALONE,
    packed: bool = False,
) -> tuple[int, list[tuple[ImageRecord, str]]]:
    """Encode this process's part of the variants; return how many it encoded, and its unusable images with reasons.

    `encode`: pixels (B, 3, H, W) in [-1, 1] → moments (B, 2C, h, w): mean and deviation. Encodes as many images of one
    size at once as have `max_megapixels` together, at least one. `check_in` is called between batches and may raise.
    Threads render the next images meanwhile.
    """
    encoded = 0
    unusable: list[tuple[ImageRecord, str]] = []
    batches = list(_batches(variants, max_megapixels))[share.index :: share.count]
    with ThreadPoolExecutor(cpu_workers) as pool, cache.writing(packed=packed) as write:
        results = _map_ahead(pool, _render, itertools.chain.from_iterable(batches))
        for batch in batches:
            check_in()
            rendered: list[tuple[Variant, Pixels]] = []
            for variant, result in itertools.islice(results, len(batch)):
                if isinstance(result, str):
                    unusable.append((variant[0], result))
                else:
                    rendered.append((variant, result))
            if rendered:
                _encode_batch(cache, rendered, encode, write)
            encoded += len(rendered)
    return encoded, unusable


def _encode_batch(
    cache: Cache,
    rendered: Sequence[tuple[Variant, Pixels]],
    encode: Callable[[torch.Tensor], torch.Tensor],
    write: Callable[[Path, Item], None],
) -> None:
    """Encode images of one size together and write each to the cache."""
    pixels_BHWC = torch.from_numpy(np.stack([pixels for _, (pixels, _) in rendered]))
    moments_BDhw = encode(pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1).cpu()  # D = 2C
    for ((image, view), (_, mask)), moments_Dhw in zip(rendered, moments_BDhw, strict=True):
        item = {"moments": moments_Dhw}
        if mask is not None:
            item["mask"] = _shrink_mask(mask, moments_Dhw.shape[-2:])
        write(cache.image_path(image, view), item)


def encode_texts(
    cache: Cache,
    captions: Sequence[str],
    *,
    encode: Callable[[list[str]], list[Item]],
    batch_size: int,
    check_in: Callable[[], None],
    share: Share = ALONE,
    packed: bool = False,
) -> int:
    """Encode this process's part of the captions; return how many. `check_in` is called between batches, may raise."""
    encoded = 0
    with cache.writing(packed=packed) as write:
        for start in range(share.index * batch_size, len(captions), share.count * batch_size):
            check_in()
            batch = list(captions[start : start + batch_size])
            for caption, item in zip(batch, encode(batch), strict=True):
                write(cache.text_path(caption), item)
            encoded += len(batch)
    return encoded


def load(path: Path) -> Item:
    """The tensors of one item that is a file."""
    item: Item = load_file(path)
    return item


def _render(variant: Variant) -> Pixels | str:
    """The pixels and the mask of a view, or why there are none."""
    image, view = variant
    try:
        return render(image, view), render_mask(image, view)
    except UnusableImageError as problem:
        return str(problem)


def _shrink_mask(mask_HW: np.ndarray, size: torch.Size) -> torch.Tensor:
    """The mask at the latents' size (1, h, w), in 0..1: each latent counts by the share of its pixels."""
    mask_11HW = torch.from_numpy(mask_HW.astype(np.float32) / 255)[None, None]
    shrunk_11hw: torch.Tensor = torch.nn.functional.interpolate(mask_11HW, size, mode="area")
    return shrunk_11hw[0]


def _batches(variants: Iterable[Variant], max_megapixels: float) -> Iterator[list[Variant]]:
    """Neighbours of the same size together, until they have `max_megapixels`."""
    batch: list[Variant] = []
    for image, view in variants:
        if batch:
            first_view = batch[0][1]
            pixels = len(batch) * view.size[0] * view.size[1]
            if first_view.size != view.size or pixels >= max_megapixels * 1e6:
                yield batch
                batch = []
        batch.append((image, view))
    if batch:
        yield batch


def _map_ahead(pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A]) -> Iterator[tuple[A, B]]:
    """Each item with its result, in order, computed a bounded number ahead.

    `ThreadPoolExecutor.map` would start on all items at once, and hold the pixels of a whole dataset.
    """
    waiting: deque[tuple[A, Future[B]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > 2 * pool._max_workers:
            first, result = waiting.popleft()
            yield first, result.result()
    while waiting:
        first, result = waiting.popleft()
        yield first, result.result()


def _write(path: Path, item: Item) -> None:
    """Write one item, with a hash of its tensors in the file's header."""
    contiguous = {key: tensor.contiguous() for key, tensor in item.items()}
    with atomic.replacing(path, shared=True) as temporary:
        save_file(contiguous, temporary, metadata={"sha256": _hash(contiguous)})


def _bytes(item: Item) -> bytes:
    """What `_write` would write."""
    contiguous = {key: tensor.contiguous() for key, tensor in item.items()}
    return save(contiguous, metadata={"sha256": _hash(contiguous)})


def _unpacked(data: bytes) -> Item:
    """The tensors of an item. Raises ValueError and SafetensorError where they are not what was written."""
    item: Item = load_bytes(data)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    if metadata.get("sha256") != _hash(item):
        raise ValueError("its digest is another")
    return item


def _list_damaged(pack: Path) -> None:
    """Note all items of a pack that are damaged, so that one more start is enough. Raises OSError."""
    damaged = []
    for row in pack_file.read_rows(pack):
        key = row["key"].tobytes()
        try:
            _unpacked(pack_file.read_item(pack, key, int(row["offset"]), int(row["length"])))
        except DAMAGE:
            damaged.append(key)
    pack_file.list_damaged(pack, damaged)


def _is_intact(path: Path) -> bool:
    """Whether the item exists and its tensors are those that were written."""
    if not is_regular(path):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            item = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file is no dictionary)
            metadata = file.metadata() or {}
            return bool(metadata.get("sha256") == _hash(item))
    except (OSError, SafetensorError):
        return False


def _hash(item: Item) -> str:
    total = hashlib.sha256()
    for key in sorted(item):
        total.update(key.encode())
        total.update(item[key].reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
