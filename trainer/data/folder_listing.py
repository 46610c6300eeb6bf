"""The files in a subset's folder: images, masks and others. Looks at names only.

Every name in the folder is accounted for: it is an image, an image that is skipped, a file that may hold captions
(`others`), or it is left out for a named reason. `trainer.data.folders` has what the names mean.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from trainer.data.folders import formats, leftovers, own_output
from trainer.data.folders.own_output import Written
from trainer.data.shards.stream import ShardStream
from trainer.spec.errors import DataError
from trainer.spec.plan import Subset
from trainer.spec.values import printable
from trainer.storage.read import special_kind

LINK_OUT = "a link that leads out of its folder"
BAD_NAME = "its name is not UTF-8: rename it"
LINK_FOLDER = "a link to a folder: give that folder as a subset of its own"
LINK_LOST = "a link that leads nowhere, or round in a circle"
LINK_OUTPUT = "a link to what a Kiln job writes"
SHOWN_FOLDERS = 5  # in a message
SHARD = ".tar"


@dataclass(frozen=True, slots=True)
class LeftOutName:
    """A file or folder that is not used. `kind` groups the warnings: mask, video, …; "": it needs no warning."""

    name: str
    reason: str
    kind: str = ""


@dataclass
class Folder:
    """The names below `root`, relative to it with /, sorted."""

    root: Path
    images: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    others: list[str] = field(default_factory=list)
    masks: dict[str, Path] | None = None  # by the image's name without suffix; None: the subset has no masks
    left_out: list[LeftOutName] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # folder, reason

    @property
    def shards(self) -> list[str]:
        """The tar files of a folder that holds no image beside them: a dataset in shards (`trainer.data.shards`)."""
        if self.images or self.skipped:
            return []
        return [name for name in self.others if name.lower().endswith(SHARD)]

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

    def all_names(self) -> list[str]:
        """Every name but those of captions and the like, in order."""
        names = [*self.images, *(name for name, _ in self.skipped), *(item.name for item in self.left_out)]
        return sorted(names)

    def leave_out(self, prefix: str, reason: str, kind: str = "") -> None:
        """Use nothing of the folder `prefix`."""
        for names in (self.images, self.others):
            names[:] = [name for name in names if not name.startswith(f"{prefix}/")]
        self.skipped = [(name, why) for name, why in self.skipped if not name.startswith(f"{prefix}/")]
        self.left_out.append(LeftOutName(prefix, reason, kind))

    def note_unread(self, captions: Collection[str]) -> list[str]:
        """A note that counts the files that are neither images nor among `captions`; [] if there are none."""
        suffixes = Counter[str]()
        for name in self.others:
            if name not in captions:
                suffixes[PurePosixPath(name).suffix.lower() or "without suffix"] += 1
        if not suffixes:
            return []
        counts = [f"{count} {printable(suffix)}" for suffix, count in suffixes.most_common(8)]
        return ["not read: " + ", ".join(counts)]


def list_folder(subset: Subset, written: Written | None = None) -> Folder:
    """The files of a subset, without those that this job, which writes to the folders `written`, or another one wrote.

    Raises DataError if its folder, or the folder of its masks, does not exist, or if a folder below cannot be read.
    """
    written = written or Written()
    root = Path(subset.source.path)
    if stream := ShardStream.of(root):
        return Folder(stream.root, others=stream.names())
    if not root.is_dir():
        raise DataError(f"image_dir {printable(subset.source.location)}: {printable(str(root))} is not a folder.")
    inside = written.holds_output(os.path.realpath(root))
    if inside:
        raise DataError(
            f"image_dir {printable(subset.source.location)} is where this job writes ({inside}): its own files would "
            f"become training images. Copy the images to another folder, or choose another {inside.split('/')[0]}."
        )
    if subset.conditioning_data_dir is None:
        folder = _walk(root, leave_out=None, written=written)
        _leave_out_companions(folder)
        return folder
    mask_root = resolve(root, subset.conditioning_data_dir)
    if not mask_root.is_dir():
        raise DataError(f"conditioning_data_dir {printable(subset.conditioning_data_dir)} is not a folder.")
    same = os.path.realpath(mask_root) == os.path.realpath(root)
    folder = _walk(root, leave_out=None if same else mask_root, written=written)
    if same:
        masks = _leave_out_companions(folder, keep="mask")
    else:
        _leave_out_companions(folder)
        masks = _walk(mask_root, leave_out=None, written=written).images
    folder.masks = {}
    for position in range(2):  # a mask of exactly the image's name wins
        for name in masks:
            for mask_stem in leftovers.mask_stems(name)[position : position + 1]:
                folder.masks.setdefault(mask_stem, mask_root / name)
    return folder


def without_suffix(name: str) -> str:
    """`a/b.jpg` → `a/b`."""
    return leftovers.stem(name)


def resolve(root: Path, name: str) -> Path:
    """A path of dataset.json: relative to the images' folder if it exists there, else as written."""
    if (root / name).exists():
        return root / name
    return Path(name)


def leads_out(root: Path, name: str) -> bool:
    """Whether a path that is relative to a folder of images is a link out of it."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return False  # the user has named another place
    real_root = os.path.realpath(root).rstrip("/") + "/"
    return not os.path.realpath(root / name).startswith(real_root)


def _leave_out_companions(folder: Folder, keep: str = "") -> list[str]:
    """Take masks, maps, previews and samples out of the images; returns those of the kind `keep`."""
    found = leftovers.companions(folder.images, folder.others)
    folder.images = [name for name in folder.images if name not in found]
    kept = []
    for name, companion in found.items():
        if companion.kind == keep:
            kept.append(name)
        else:
            folder.left_out.append(LeftOutName(name, companion.reason, companion.kind))
    return kept


# ---- walking through a folder


def _walk(root: Path, *, leave_out: Path | None, written: Written) -> Folder:
    """All files below `root`. Links to folders are not followed. `leave_out`: a folder whose files do not count.

    Without recursion and without `Path.resolve`: folders may be nested deeper than Python's stack, and links may lead
    round in circles. Raises DataError naming the folders that cannot be read.
    """
    walker = _Walker(Folder(root), written, leave_out)
    pending = [""]
    while pending:
        pending += walker.enter(pending.pop())
    folder = walker.folder
    if folder.unreadable:
        lines = [f"{printable(name)}: {reason}" for name, reason in folder.unreadable[:SHOWN_FOLDERS]]
        more = len(folder.unreadable) - len(lines)
        lines += [f"and {more} more"] if more else []
        raise DataError(f"Folders in {printable(str(root))} cannot be read: {'; '.join(lines)}.")
    for names in (folder.images, folder.skipped, folder.others):
        names.sort()
    folder.left_out.sort(key=lambda item: item.name)
    return folder


def _special_kind(entry: os.DirEntry[str]) -> str | None:
    """`special_kind`; of a file that is gone by now None, since whoever reads it says so."""
    try:
        return special_kind(entry.stat(follow_symlinks=False).st_mode)
    except OSError:
        return None


class _Walker:
    """Puts each name into its place in `folder`."""

    def __init__(self, folder: Folder, written: Written, leave_out: Path | None) -> None:
        self.folder = folder
        self.written = written
        self.own = written.identities()
        self.root = os.path.realpath(folder.root)
        self.masks: tuple[int, int] | None = None  # device and number of the folder
        if leave_out is not None:
            with contextlib.suppress(OSError):
                status = leave_out.stat()
                self.masks = (status.st_dev, status.st_ino)

    def enter(self, here: str) -> list[str]:
        """Sort the names in the folder `here` (relative; "": the root); returns the folders to enter next."""
        try:
            with os.scandir(os.path.join(self.root, here)) as entries:  # noqa: PTH118 (a Path takes long for 1,000 parts)
                found = sorted(entries, key=lambda entry: entry.name)
            variable = self._variable(here)
        except OSError as problem:
            self.folder.unreadable.append((here or ".", problem.strerror or str(problem)))
            return []
        names = [entry.name for entry in found]
        if here:
            whole = own_output.whole_reason(here.rpartition("/")[2], names)
            kind = "other job"
            if variable not in (None, "OUTPUT_PATH"):  # there, images of the user may lie beside the job's
                whole = f"the {variable} of this job"
                kind = "own"
            if whole:
                self._leave_out(here, whole, kind)
                return []
        taken = own_output.names_written(names, variable)
        if taken and here and variable:
            self._leave_out(here, f"the {variable} of this job", "own")
        elif taken and here:
            self._leave_out(here, own_output.OTHER_JOB, "other job")
        subfolders = []
        for entry in found:
            name = f"{here}/{entry.name}" if here else entry.name
            if entry.name in taken:
                if not here:
                    self._leave_out(name, own_output.IN_ROOT, "own")
            elif self._is_folder_to_enter(entry, name):
                subfolders.append(name)
        return subfolders

    def _variable(self, here: str) -> str | None:
        """The variable of this job that names the folder `here`."""
        if not self.own:
            return None
        status = os.stat(os.path.join(self.root, here))  # noqa: PTH116, PTH118
        return self.own.get((status.st_dev, status.st_ino))

    def _is_folder_to_enter(self, entry: os.DirEntry[str], name: str) -> bool:
        """Add what is no folder to the images, the skipped, the others or what is left out."""
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_folder or entry.is_symlink():
            reason = leftovers.folder_reason(entry.name)
            if reason is None and self._is_masks(entry):
                reason = "the masks (conditioning_data_dir)"
        elif entry.name == leftovers.OWN_MARKER:
            return False
        else:
            reason = leftovers.file_reason(entry.name)
        if reason is not None:
            self._leave_out(name, reason)
        elif is_folder:
            return True
        elif entry.is_symlink():
            self._add_link(entry, name)
        else:
            self._add(name, _special_kind(entry))
        return False

    def _is_masks(self, entry: os.DirEntry[str]) -> bool:
        """Whether a folder, or a link to one, is that of the masks.

        Not by realpath, which looks at each folder above: among 1,200 nested folders that takes seconds.
        """
        if self.masks is None:
            return False
        try:
            status = entry.stat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.masks

    def _add_link(self, entry: os.DirEntry[str], name: str) -> None:
        """A link counts as the file that it leads to, if that is inside of the folder."""
        suffix = PurePosixPath(name).suffix
        is_image = formats.READABLE.fullmatch(suffix) or formats.UNREADABLE.fullmatch(suffix)
        target = os.path.realpath(entry.path)
        try:
            mode = Path(entry.path).stat().st_mode
        except OSError:
            if is_image:
                self._skip(name, LINK_LOST)
            else:
                self._leave_out(name, LINK_LOST, "unreadable")
            return
        inside = target == self.root or target.startswith(self.root.rstrip("/") + "/")
        if self.written.holds(target) or (stat.S_ISDIR(mode) and _is_output(target)):
            self._leave_out(name, LINK_OUTPUT)
        elif stat.S_ISDIR(mode):
            self._skip(name, LINK_FOLDER)
        elif not inside:  # a downloaded dataset must not reach other files of this machine
            if is_image:
                self._skip(name, LINK_OUT)
            else:
                self._leave_out(name, LINK_OUT, "unreadable")
        else:
            self._add(name, special_kind(mode))

    def _add(self, name: str, special: str | None) -> None:
        """Add a file to the images, the skipped or the others. `special`: what it is, if it is no regular file."""
        suffix = PurePosixPath(name).suffix
        bad_name = name.encode("utf-8", "replace").decode("utf-8") != name  # reports and states are UTF-8
        is_readable = formats.READABLE.fullmatch(suffix)
        if is_readable or formats.UNREADABLE.fullmatch(suffix):
            if bad_name:
                self._skip(name, BAD_NAME)
            elif special is not None:
                self._skip(name, f"{special}, not a file")
            elif not is_readable:
                self._skip(name, formats.why_unreadable(suffix))
            else:
                self.folder.images.append(name)
        elif formats.VIDEO.fullmatch(suffix):
            self._leave_out(name, formats.A_VIDEO, "video")
        elif special is not None:
            self._leave_out(name, f"{special}, not a file", "unreadable")
        elif bad_name:
            self._leave_out(name, BAD_NAME, "unreadable")
        else:
            self.folder.others.append(name)

    def _skip(self, name: str, reason: str) -> None:
        self.folder.skipped.append((name.encode("utf-8", "replace").decode("utf-8"), reason))

    def _leave_out(self, name: str, reason: str, kind: str = "") -> None:
        self.folder.left_out.append(LeftOutName(name.encode("utf-8", "replace").decode("utf-8"), reason, kind))


def _is_output(folder: str) -> bool:
    try:
        return own_output.is_output([path.name for path in Path(folder).iterdir()])
    except OSError:
        return False
