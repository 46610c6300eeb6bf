"""The samples of a run: what their files say, read once each, and small images of them for a page that shows many."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from entrypoint.monitor.numbers import Document
from entrypoint.report import samples as images
from trainer.data.decode import DAMAGED
from trainer.spec.log_lines import escaped
from trainer.spec.messages.secrets import without_secrets
from trainer.storage import own_files
from trainer.storage.read import open_unlinked

HEAD_BYTES = 1 << 16  # of a PNG, that hold its size and its texts
WIDTH = 384  # pixels of a small image
MOST_SMALL_BYTES = 1 << 25  # of small images, in memory


@dataclass(frozen=True)
class SampleHead:
    """What is known of a sample without its pixels."""

    width: int
    height: int
    prompt: str
    settings: str


class SampleList:
    """Reads the folder of samples. Each file is looked into once, and again when it has changed."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], SampleHead] = {}

    def read(self, folder: Path) -> Document:
        """The samples by prompt, step and strength of the LoRA.

        `prompts` (text, settings, size), and `images` (step, prompt, name, version, strength).
        """
        prompts: dict[int, Document] = {}
        found: list[list[Any]] = []
        known: dict[tuple[str, int, int], SampleHead] = {}
        for path in _sample_paths(folder):
            name = own_files.read_sample_name(path.name)
            key = _version(path)
            if name is None or key is None:
                continue
            shown = self._known.get(key) or _look_into(path)
            if shown is None:  # is being written, or damaged
                continue
            known[key] = shown
            step, number, strength = name
            found.append([step, number, path.name, key[1], strength])
            size = [shown.width, shown.height]
            prompts[number] = {"number": number, "text": shown.prompt, "settings": shown.settings, "size": size}
        self._known = known
        return {"prompts": [prompts[number] for number in sorted(prompts)], "images": sorted(found)}


def _sample_paths(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.is_symlink())
    except OSError:
        return []


def _version(path: Path) -> tuple[str, int, int] | None:
    """What changes when a file does: its name, the time of its last change in milliseconds, its size."""
    try:
        found = path.stat()
    except OSError:
        return None
    return path.name, found.st_mtime_ns // 1_000_000, found.st_size


def _look_into(path: Path) -> SampleHead | None:
    try:
        with open_unlinked(path) as file:
            image = Image.open(io.BytesIO(file.read(HEAD_BYTES)), formats=("PNG",))
    except (*DAMAGED, Image.DecompressionBombError):
        return None
    prompt = str(image.info.get("prompt_text", ""))
    settings = str(image.info.get("parameters", "")).rpartition("\n")[2]
    return SampleHead(image.width, image.height, clean(prompt), clean(settings))


def clean(text: str) -> str:
    """A text of a file for the page: nothing in it is unseen, and nothing looks like a secret."""
    return without_secrets(escaped(text))


class SmallImages:
    """Small images, kept in memory as long as there is room. For one thread at a time."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._bytes = 0

    def sample(self, path: Path) -> bytes:
        """A JPEG of the sample in `path`; b"" where it cannot be read."""
        return self.get(path, lambda: images.thumbnail(path, WIDTH))

    def get(self, path: Path, make: Callable[[], bytes], *, kind: str = "") -> bytes:
        """What `make` makes of the file `path`, or has made of it. `kind`: tells apart what is made of one file."""
        version = _version(path)
        if version is None:
            return b""
        key = (f"{kind}{path}", *version[1:])
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = make()
        self._kept[key] = made
        self._bytes += len(made)
        while self._bytes > MOST_SMALL_BYTES:
            self._bytes -= len(self._kept.popitem(last=False)[1])
        return made
