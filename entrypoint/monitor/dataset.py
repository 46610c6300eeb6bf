"""The dataset as it is trained: what dataset-images.jsonl says, and small images that show what the crop leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from entrypoint.monitor.numbers import Document
from entrypoint.monitor.sample_list import clean
from entrypoint.report.samples import fitted, jpeg
from trainer.data.decode import UnusableImageError, open_upright
from trainer.spec.plan import Plan
from trainer.storage import own_files
from trainer.storage.read import is_regular, read_regular

LARGEST_VIEW = 1 << 28  # bytes
PAGE_ROWS = 60
WIDTH = 280  # pixels of a small image
OUTSIDE = 0.35  # how bright the part is that the crop leaves out
FRAME = (255, 176, 102)


class TrainedImages:
    """The rows of one run."""

    def __init__(self) -> None:
        self.head: Document = {}
        self.images: list[Document] = []
        self.skipped: list[Document] = []

    def read(self, path: Path) -> None:
        """Read the file anew; nothing where it is missing or damaged."""
        self.head, self.images, self.skipped = {}, [], []
        try:
            data = read_regular(path, limit=LARGEST_VIEW, links=False)
            rows = [json.loads(line) for line in data.decode().splitlines()]
        except (OSError, ValueError, RecursionError):
            return
        if not rows or not all(isinstance(row, dict) for row in rows) or own_files.DATASET_VIEW_MARK not in rows[0]:
            return
        self.head = rows[0]
        for row in rows[1:]:
            (self.skipped if "reason" in row else self.images).append(row)

    def summary(self) -> Document:
        """How many there are, and what was skipped."""
        found = {key: self.head.get(key, 0) for key in ("images", "skipped")}
        skipped = [[clean(str(row.get("name", ""))), clean(str(row["reason"]))] for row in self.skipped]
        return {**found, "reader": self.head.get("reader", ""), "limit": self.head.get("limit", 0), "list": skipped}

    def page(self, first: int, plan: Plan | None, *, inside: Path | None = None) -> Document:
        """The rows from number `first` on, as many as a page shows. `here`: whether the image is on this machine."""
        rows = []
        for number, row in enumerate(self.images[first : first + PAGE_ROWS], first):
            shown = {key: row[key] for key in row if key in SHOWN}
            shown["name"] = clean(str(row.get("name", "")))
            shown["captions"] = [clean(str(text)) for text in row.get("captions", [])]
            if "captioned_by" in row:
                shown["captioned_by"] = clean(str(row["captioned_by"]))
            rows.append({**shown, "number": number, "here": find_image(row, plan, inside=inside) is not None})
        return {"first": first, "total": len(self.images), "rows": rows}


SHOWN = ("size", "views", "bucket", "tokens", "mask", "held_out", "regularisation")


def find_image(row: Document, plan: Plan | None, *, inside: Path | None = None) -> Path | None:
    """The image of a row on this machine, inside the folder of its source; None where it is not here.

    `inside`: where the plan has come with a folder from elsewhere, nothing but what is in that folder is shown.
    """
    try:
        dataset, subset = row["place"]
        source = plan.data.datasets[dataset].subsets[subset].source if plan is not None else None
    except (LookupError, TypeError, ValueError):
        return None
    name = row.get("file")
    if source is None or not source.path or not isinstance(name, str) or not name:
        return None
    try:
        folder = Path(source.path).resolve()
        path = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError):
        return None
    if folder == folder.parent:  # the root: somebody has changed the plan
        return None
    if inside is not None and not path.is_relative_to(inside):
        return None
    return path if path.is_relative_to(folder) and is_regular(path) else None


def picture(path: Path, row: Document) -> bytes:
    """A JPEG of the whole image, upright, darker where the crop leaves it out; b"" where it cannot be read."""
    try:
        image, _ = open_upright(path)
    except (UnusableImageError, OSError):
        return b""
    small = fitted(image, WIDTH, image.height, resampling=Image.Resampling.BOX)
    box = _crop_box(row, small.size)
    if box is not None and box != (0, 0, *small.size):
        dark = Image.eval(small, lambda value: int(value * OUTSIDE))
        dark.paste(small.crop(box), box[:2])
        left, top, right, bottom = box
        ImageDraw.Draw(dark).rectangle((left, top, right - 1, bottom - 1), outline=FRAME)
        small = dark
    return jpeg(small, optimize=False)


def _crop_box(row: Document, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The crop (left, top, right, bottom) in an image that was scaled to `size`."""
    numbers: list[Any] = [row.get("bucket"), row.get("scaled"), row.get("offset")]
    for pair in numbers:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(value, int) for value in pair):
            return None
    bucket, scaled, offset = numbers
    if min(scaled) < 1:
        return None
    ratios = size[0] / scaled[0], size[1] / scaled[1]
    left, top = (round(offset[axis] * ratios[axis]) for axis in (0, 1))
    right, bottom = (round((offset[axis] + bucket[axis]) * ratios[axis]) for axis in (0, 1))
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        return None
    return left, top, right, bottom
