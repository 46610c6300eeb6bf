"""Captions as text files beside the images, where CAPTION_WRITE asks for it. No torch.

No file is replaced unless CAPTION_OVERWRITE says so, and nothing is written into an unpacked archive or a copy of a Hub
dataset: there nobody would find it, and the next start would take it for damage.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from trainer.data.caption_files.sidecars import folded
from trainer.data.records import WARNING, ImageRecord, Scan
from trainer.spec.plan import DataPlan
from trainer.spec.values import many, some
from trainer.storage import atomic


def write_beside(before: Scan, after: Scan, data: DataPlan) -> list[str]:
    """Write the captions that the model has made; returns notes. Raises StorageError, OSError.

    `before`: the images as they were found, which says where a caption came from that is replaced.
    """
    captioner = data.captioner
    if captioner is None or not captioner.write:
        return []
    stems = Counter(folded(_without_suffix(image)) for image in before.images)
    images = {folded(str(image.file)) for image in before.images}
    taken: set[str] = set()
    written = []
    kept = []
    for old, new in zip(before.images, after.images, strict=True):
        subset = data.datasets[new.dataset].subsets[new.subset]
        if not new.captioned_by or new.caption == old.caption or subset.source.kind != "folder":
            continue
        if new.span is not None:
            kept.append(f"{new.name} (it is in a shard)")
            continue
        target = _target(old, extension=subset.caption_extension, is_shared=stems[folded(_without_suffix(old))] > 1)
        if folded(str(target)) in taken:  # two images shared a file: the others get their own
            target = old.file.with_name(old.file.name + subset.caption_extension)
        taken.add(folded(str(target)))
        if folded(str(target)) in images:
            kept.append(f"{new.name} ({target.name} is an image)")
        elif ", row " in old.caption_file:
            kept.append(f"{new.name} ({old.caption_file} has its caption)")
        elif os.path.lexists(target) and not captioner.overwrite:
            kept.append(f"{new.name} ({target.name} is there)")
        else:
            atomic.write_text(target, f"{new.caption}\n")
            written.append(new.name)
    notes = []
    if written:
        notes.append(f"{many(len(written), 'caption')} written beside the images: {some(written)}")
    if kept:
        notes.append(f"{WARNING}{many(len(kept), 'caption')} not written beside the images: {some(kept)}")
    return notes


def _without_suffix(image: ImageRecord) -> str:
    return str(image.file.with_suffix(""))


def _target(image: ImageRecord, *, extension: str, is_shared: bool) -> Path:
    """The file for an image's caption: the one that was read, or `a.txt`; `a.png.txt` where `a.jpg` has the same."""
    name = image.caption_file
    root = image.file
    for _ in PurePosixPath(image.name).parts:
        root = root.parent
    if image.caption and name and (root / name).is_file():
        return root / name
    if is_shared:
        return image.file.with_name(image.file.name + extension)
    return image.file.with_suffix(extension)


def closed_folders(images: Sequence[ImageRecord], data: DataPlan) -> list[str]:
    """The folders of these images to which this process may not write."""
    folders: dict[Path, None] = {}
    for image in images:
        is_folder = data.datasets[image.dataset].subsets[image.subset].source.kind == "folder"
        if is_folder and image.span is None:
            folders[image.file.parent] = None
    return [str(folder) for folder in folders if not os.access(folder, os.W_OK)]
