"""What lies in a subset's folder: pictures, masks, captions. Looks at names and texts; decodes no picture."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from trainer.data import caption_files
from trainer.data.captions import Caption
from trainer.spec.errors import DataError
from trainer.spec.plan import Subset

READABLE = re.compile(r"\.(jpe?g|jpe|jfif|mpo|a?png|webp|bmp|dib|tiff?|gif|avif)", re.IGNORECASE)
# Pictures in formats that are not read. They count as skipped, so that a folder of them is not "empty".
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
    masks: dict[str, Path] | None = None  # by the picture's name without suffix; None: none are asked for

    def mask(self, name: str) -> Path | None:
        """The mask of the picture `name`."""
        return self.masks.get(without_suffix(name)) if self.masks is not None else None

    def to_read(self) -> Iterator[Path]:
        """Every picture, each followed by its mask."""
        for name in self.images:
            yield self.root / name
            mask = self.mask(name)
            if mask is not None:
                yield mask

    def unread(self, read: Collection[str]) -> list[str]:
        """A note on the files that are neither pictures nor in `read`."""
        names = (PurePosixPath(name) for name in self.others if name not in read)
        kinds = Counter(name.suffix.lower() or "without suffix" for name in names)
        return ["not read: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(8))] if kinds else []


def list_folder(subset: Subset) -> Folder:
    """The files of a subset. Raises DataError if its folder or its masks' folder is not there."""
    root = Path(subset.source.path)
    if not root.is_dir():
        raise DataError(f"image_dir {subset.source.location}: {root} is not a folder.")
    if subset.conditioning_data_dir is None:
        return _walk(root, leave_out=None)
    masks = _beside(root, subset.conditioning_data_dir)
    if not masks.is_dir():
        raise DataError(f"conditioning_data_dir {subset.conditioning_data_dir} is not a folder.")
    found = _walk(root, leave_out=masks)
    found.masks = {without_suffix(name): masks / name for name in _walk(masks, leave_out=None).images}
    return found


def without_suffix(name: str) -> str:
    """`a/b.jpg` → `a/b`."""
    return str(PurePosixPath(name).with_suffix(""))


def find_captions(folder: Folder, subset: Subset) -> tuple[dict[str, Caption], list[str]]:
    """Captions by picture's name, and notes. Metadata files first, then sidecar files, then class_tokens.

    Raises DataError for a metadata file that is not there or not readable.
    """
    texts: dict[str, Caption] = {}
    if subset.class_tokens:
        texts = dict.fromkeys(folder.images, Caption(subset.class_tokens, "class_tokens"))
    there, read = set(folder.others), set[str]()
    for name in folder.images:
        sidecars = caption_files.sidecar_names(without_suffix(name), subset.caption_extension)
        sidecar = next((s for s in sidecars if s in there), None)
        if sidecar:
            texts[name] = caption_files.read_sidecar(folder.root / sidecar)
            read.add(sidecar)
    notes = []
    for file, prefix in _metadata_files(folder, subset):
        inside = [name.removeprefix(prefix) for name in folder.images if name.startswith(prefix)]
        entries = caption_files.read_metadata(file, subset)
        if file.is_relative_to(folder.root):
            read.add(file.relative_to(folder.root).as_posix())
        matched, unknown = caption_files.match_names(entries, inside, folder=folder.root / prefix)
        texts |= {prefix + name: text for name, text in matched.items()}
        if unknown:
            some = ", ".join(unknown[:5])
            notes.append(f"{len(unknown)} entries of {file.name} name no picture that is there: {some}")
    return texts, notes + folder.unread(read)


def _metadata_files(folder: Folder, subset: Subset) -> list[tuple[Path, str]]:
    """Files and the folder that their names are relative to: the one asked for, else all with the usual names."""
    if subset.metadata_file is not None:
        return [(_beside(folder.root, subset.metadata_file), "")]
    usual = [PurePosixPath(name) for name in folder.others if PurePosixPath(name).name in caption_files.METADATA_NAMES]
    return [(folder.root / name, "" if str(name.parent) == "." else f"{name.parent}/") for name in usual]


def _beside(root: Path, name: str) -> Path:
    """A path of dataset.json: relative to the pictures if it is there, else as given."""
    return root / name if (root / name).exists() else Path(name)


def _walk(root: Path, *, leave_out: Path | None) -> Folder:
    """All files below `root` but hidden ones and macOS's shadows; `leave_out` is a folder that may be inside."""
    found, real = Folder(root), root.resolve()
    left_out = leave_out.resolve() if leave_out is not None else None
    for here, folders, names in ((Path(h), f, n) for h, f, n in os.walk(root, onerror=_refuse)):
        inner = [d for d in folders if not d.startswith(".") and d != "__MACOSX" and (here / d).resolve() != left_out]
        links = [d for d in inner if (here / d).is_symlink()]
        found.skipped += [((here / d).relative_to(root).as_posix(), LINK_FOLDER) for d in links]
        folders[:] = [d for d in inner if d not in links]
        for name in names:
            if not name.startswith("."):
                _sort_in(here / name, found, real=real)
    found.images.sort()
    found.skipped.sort()
    found.others.sort()
    return found


def _refuse(problem: OSError) -> None:
    raise DataError(f"The folder {problem.filename} cannot be read: {problem.strerror}.") from problem


def _sort_in(file: Path, found: Folder, *, real: Path) -> None:
    """Add `file` to the names of its kind."""
    raw, suffix = file.relative_to(found.root).as_posix(), file.suffix
    name = raw.encode("utf-8", "replace").decode("utf-8")  # reports and states are UTF-8
    if not (READABLE.fullmatch(suffix) or UNREADABLE.fullmatch(suffix)):
        found.others.append(raw)
    elif file.is_symlink() and not file.resolve().is_relative_to(real):
        found.skipped.append((name, LINK_OUT))
    elif name != raw:
        found.skipped.append((name, BAD_NAME))
    elif UNREADABLE.fullmatch(suffix):
        found.skipped.append((name, f"format {suffix} is not read: save it as PNG or JPEG"))
    else:
        found.images.append(name)
