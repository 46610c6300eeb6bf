"""Shards as WebDataset's writer makes them: tar files of samples, whose files share a name."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.support import drawings

Files = Iterable[tuple[str, bytes]]


def write(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            shard.addfile(header, io.BytesIO(content))
    return path


def image(seed: int, size: tuple[int, int] = (64, 48), *, suffix: str = "png") -> bytes:
    buffer = io.BytesIO()
    drawings.draw(*size, seed=seed).save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix])
    return buffer.getvalue()


def samples(first: int, count: int, size: tuple[int, int] = (64, 48)) -> Files:
    """Images with a text each, all different."""
    for i in range(first, first + count):
        yield f"{i:06}.png", image(i, size)
        yield f"{i:06}.txt", f"picture {i}, a tag".encode()


def make(folder: Path, shards: int, each: int, size: tuple[int, int] = (64, 48)) -> Path:
    """`folder` with so many shards of so many images."""
    for number in range(shards):
        write(folder / f"{number:05}.tar", samples(number * each, each, size))
    return folder
