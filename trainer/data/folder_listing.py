"""The files in a subset's folder: images, masks and others. Looks at names only."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from trainer.spec.errors import DataError
from trainer.spec.plan import Subset

READABLE = re.compile(r"\.(jpe?g|jpe|jfif|mpo|a?png|webp|bmp|dib|tiff?|gif|avif)", re.IGNORECASE)
# Images in formats that are not read. They count as skipped, so that a folder of them does not look empty.
UNREADABLE = re.compile(
    r"\.(hei[cf]|jxl|jp2|psd|svg|eps|tga|ico|exr|hdr|cr[23]|nef|arw|dng|orf|rw2|raf)", re.IGNORECASE
)
LINK_OUT = "a link that leads out of its folder"
BAD_NAME = "its name is not UTF-8: rename it"
LINK_FOLDER = "a link to a folder: give that folder as a subset of its own"


@dataclass
class Folder:
    """The names below `root`, relative to it with /, sorted."""

    root: Path
    images: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    others: list[str] = field(default_factory=list)
    masks: dict[str, Path] | None = None  # by the image's name without suffix; None: the subset has no masks

    def mask(self, name: str) -> Path | None:
        """The mask of the image `name`."""
        if self.masks is None:
            return None
        return self.masks.get(without_suffix(name))

    def files_to_decode(self) -> Iterator[Path]:
        """Every image, each followed by its mask."""
        for name in self.images:
            yield self.root / name
            mask = self.mask(name)
            if mask is not None:
                yield mask

    def note_unread(self, captions: Collection[str]) -> list[str]:
        """A note that counts the files that are neither images nor among `captions`; [] if there are none."""
        suffixes = Counter[str]()
        for name in self.others:
            if name not in captions:
                suffixes[PurePosixPath(name).suffix.lower() or "without suffix"] += 1
        if not suffixes:
            return []
        counts = [f"{count} {suffix}" for suffix, count in suffixes.most_common(8)]
        return ["not read: " + ", ".join(counts)]


def list_folder(subset: Subset) -> Folder:
    """The files of a subset. Raises DataError if its folder, or the folder of its masks, does not exist."""
    root = Path(subset.source.path)
    if not root.is_dir():
        raise DataError(f"image_dir {subset.source.location}: {root} is not a folder.")
    if subset.conditioning_data_dir is None:
        return _walk(root, leave_out=None)
    mask_root = resolve(root, subset.conditioning_data_dir)
    if not mask_root.is_dir():
        raise DataError(f"conditioning_data_dir {subset.conditioning_data_dir} is not a folder.")
    folder = _walk(root, leave_out=mask_root)
    folder.masks = {}
    for name in _walk(mask_root, leave_out=None).images:
        folder.masks[without_suffix(name)] = mask_root / name
    return folder


def without_suffix(name: str) -> str:
    """`a/b.jpg` → `a/b`."""
    return str(PurePosixPath(name).with_suffix(""))


def resolve(root: Path, name: str) -> Path:
    """A path of dataset.json: relative to the images' folder if it exists there, else as written."""
    if (root / name).exists():
        return root / name
    return Path(name)


def _walk(root: Path, *, leave_out: Path | None) -> Folder:
    """All files below `root` but hidden ones and the copies that macOS puts in archives.

    `leave_out`: a folder, perhaps inside `root`, whose files do not count. Links to folders are not followed.
    """
    folder = Folder(root)
    real_root = root.resolve()
    left_out = leave_out.resolve() if leave_out is not None else None
    for here, subfolders, names in os.walk(root, onerror=_raise_unreadable):
        kept = []
        for name in subfolders:
            path = Path(here) / name
            if name.startswith(".") or name == "__MACOSX" or path.resolve() == left_out:
                continue
            if path.is_symlink():
                folder.skipped.append((path.relative_to(root).as_posix(), LINK_FOLDER))
            else:
                kept.append(name)
        subfolders[:] = kept  # os.walk visits what is left in the list
        for name in names:
            if not name.startswith("."):
                _add(Path(here) / name, folder, real_root=real_root)
    folder.images.sort()
    folder.skipped.sort()
    folder.others.sort()
    return folder


def _raise_unreadable(problem: OSError) -> None:
    raise DataError(f"The folder {problem.filename} cannot be read: {problem.strerror}.") from problem


def _add(file: Path, folder: Folder, *, real_root: Path) -> None:
    """Add `file` to the images, the skipped or the others."""
    raw_name = file.relative_to(folder.root).as_posix()
    name = raw_name.encode("utf-8", "replace").decode("utf-8")  # reports and states are UTF-8
    suffix = file.suffix
    if not (READABLE.fullmatch(suffix) or UNREADABLE.fullmatch(suffix)):
        folder.others.append(raw_name)
    elif file.is_symlink() and not file.resolve().is_relative_to(real_root):
        folder.skipped.append((name, LINK_OUT))  # a downloaded dataset must not reach other files of this machine
    elif name != raw_name:
        folder.skipped.append((name, BAD_NAME))
    elif UNREADABLE.fullmatch(suffix):
        folder.skipped.append((name, f"format {suffix} is not read: save it as PNG or JPEG"))
    else:
        folder.images.append(name)
