"""The records that describe images: `ImageRecord`, `View`, `Skipped`, and the `Scan` that lists them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.data.buckets import Size
from trainer.spec.errors import DataError
from trainer.spec.plan import DataPlan
from trainer.spec.values import one_line, printable
from trainer.storage.read import read_regular, read_span

# More unusable images than this share stop the job: a few damaged files are normal in a download, many mean that the
# download failed or that the folder is the wrong one.
MAX_UNUSABLE_SHARE = 0.10

MOST_PROBLEMS = 20  # in one message

MADE_BY = "made by "  # the start of `ImageRecord.caption_file` for a caption of a model
WARNING = "WARNING: "  # the start of a note that the log shows as a warning


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """A usable image of one subset. Sizes in pixels, after the EXIF orientation is applied."""

    name: str  # relative to its subset's folder, with /
    file: Path  # on this machine; not part of the dataset's identity
    sha256: str  # of the file's bytes
    width: int
    height: int
    dataset: int  # index in DataPlan.datasets
    subset: int  # index in Dataset.subsets
    caption: str | None  # before the caption pipeline; None: the image has no caption
    has_alpha: bool = False
    mask_file: Path | None = None  # an image that weighs the loss
    mask_sha256: str | None = None  # of that file's bytes; "alpha": the image's own alpha channel is the mask
    # Where a convention made a subset of a folder (`folders.conventions`): the subset that the plan asks for, and what
    # the folder's name says. `subset` is the one that the convention made.
    part_of: int | None = None
    convention: str | None = None
    caption_file: str = ""  # where the caption was read: "a.txt", or "metadata.csv, row 2"
    caption_encoding: str = ""  # of that file
    captioned_by: str = ""  # the model that made the caption (CAPTION_WITH)
    # Of an image in a shard (`trainer.data.shards`), which `file` then is: the first of its bytes, and how many.
    span: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """Unique in a plan, the same on every machine. A folder that is added moves no other image's key."""
        subset = self.subset if self.part_of is None else self.part_of
        return f"{self.dataset}.{subset}/{self.name}"

    def read(self, *, limit: int) -> bytes:
        """The bytes of the image. Raises OSError."""
        if self.span is None:
            return read_regular(self.file, limit=limit)
        return read_span(self.file, *self.span)


@dataclass(frozen=True, slots=True)
class View:
    """One way to crop, flip and colour an image: all that decides which pixels are trained on.

    Sizes are (width, height) in pixels. Its fields are part of the names of files in the cache.
    """

    size: Size  # the bucket
    scaled: Size  # the whole image is scaled to this, which covers `size`
    offset: tuple[int, int]  # left and top of the crop in the scaled image
    flip: bool = False
    colour: int | None = None  # seed of `decode.vary_colour`; None: the colours stay
    interpolation: str | None = None  # a key of `decode.INTERPOLATIONS`; None: chosen by `decode.resize_crop`


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that is not trained on."""

    name: str  # relative to its subset's folder
    reason: str
    dataset: int = 0
    subset: int = 0


@dataclass(frozen=True)
class Scan:
    """The result of a scan: every image is either in `images` or in `skipped`.

    `data`: the plan's datasets, and at the end of each the subsets that folder conventions make. The images' numbers
    of subsets refer to it.
    """

    images: Sequence[ImageRecord]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]  # for the user, one line each
    unused: tuple[str, ...] = ()  # files, rows and columns that nothing is taken from, by name, with the reason
    problems: tuple[str, ...] = ()  # of captions; each refuses the dataset
    data: DataPlan = field(default_factory=lambda: DataPlan(()))

    @property
    def num_found(self) -> int:
        """How many images the folders hold, usable or not."""
        return len(self.images) + len(self.skipped)

    def report(self, *, limit: int | None = 20) -> str:
        """The counts, the skipped images with their reasons, the notes, and what is left out.

        At most `limit` skipped images are named, then the rest are counted by reason; None: all are named, and so are
        all images that are used, and the files, rows and columns that are not.
        """
        return "".join(self.report_lines(limit=limit))

    def report_lines(self, *, limit: int | None) -> Iterator[str]:
        """The lines of `report`, one by one."""
        for line in self._report_lines(limit):
            yield f"{one_line(line)}\n"

    def _report_lines(self, limit: int | None) -> Iterator[str]:
        used = len(self.images)
        yield f"Images: {self.num_found} found, {used} used, {len(self.skipped)} skipped."
        for image in self.skipped[:limit]:
            yield f"  skipped {printable(image.name)}: {image.reason}"
        if limit is not None:
            reasons = Counter(image.reason for image in self.skipped[limit:])
            for reason, count in reasons.most_common(limit):
                yield f"  skipped {count} more: {reason}"
        yield from self.notes
        if limit is None:
            yield from self._inventory()

    def _inventory(self) -> Iterator[str]:
        """Every image with the place of its caption, and everything that is not used, by name."""
        if self.problems:
            yield from ("", "Problems, for which the dataset is refused:", *(f"  {text}" for text in self.problems))
        if self.unused:
            yield from ("", "Files, rows and columns that are not used:", *(f"  {name}" for name in self.unused))
        yield from ("", "Images:")
        for image in self.images:
            source = "no caption"
            if image.caption is not None:
                source = f"caption from {printable(image.caption_file)}"
            if image.captioned_by and image.caption_file.startswith(MADE_BY):
                source = f"caption {printable(image.caption_file)}"
            yield f"  {printable(image.key)}: {image.width}x{image.height}, {source}"

    def is_usable(self, *, strict: bool) -> bool:
        """Whether `check` raises nothing."""
        try:
            self.check(strict=strict)
        except DataError:
            return False
        return True

    def check(self, *, strict: bool) -> None:
        """Raises DataError if captions cannot be read, or if there are too few usable images.

        That is none, or fewer than nine tenths, or with `strict` not all.
        """
        bad = len(self.skipped)
        if self.problems:
            shown = [one_line(problem) for problem in self.problems[:MOST_PROBLEMS]]
            more = len(self.problems) - len(shown)
            lines = [*shown, f"and {more} more: see dataset-report.txt"] if more else shown
            raise DataError("The captions cannot be used as they are:\n  - " + "\n  - ".join(lines))
        if not self.images:
            raise DataError(f"No usable image in the dataset.\n{self.report()}")
        counts = f"{bad} of {self.num_found} images"
        if bad and strict:
            raise DataError(f"STRICT_DATASET is true and {counts} are unusable.\n{self.report()}")
        if bad > MAX_UNUSABLE_SHARE * self.num_found:
            raise DataError(f"{counts} are unusable, more than 10 %.\n{self.report()}")
