"""The records that describe images: `ImageRecord`, `View`, `Skipped`, and the `Scan` that lists them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from trainer.data.buckets import Size
from trainer.spec.errors import DataError

MAX_UNUSABLE = 0.10  # of the pictures found; more stops the job


WARNING = "WARNING: "  # begins what a note warns of


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """A usable picture of one subset. Sizes in pixels, after turning it upright."""

    name: str  # relative to its subset's folder, with /
    file: Path  # on this machine; says nothing about the content
    sha256: str  # of the file's bytes
    width: int
    height: int
    dataset: int  # index in DataPlan.datasets
    subset: int  # index in Dataset.subsets
    caption: str | None  # before the pipeline; None: there is none
    has_alpha: bool = False
    mask_file: Path | None = None  # an image that weighs the loss
    mask_sha256: str | None = None  # of that file's bytes; "alpha": the picture's own alpha is the mask

    @property
    def key(self) -> str:
        """Unique in a plan, the same on every machine."""
        return f"{self.dataset}.{self.subset}/{self.name}"


@dataclass(frozen=True, slots=True)
class View:
    """All that decides which pixels of a picture are trained on. Sizes are (width, height) in pixels."""

    size: Size  # the bucket
    scaled: Size  # the whole picture is scaled to this, covering `size`
    offset: tuple[int, int]  # left and top of the cut in the scaled picture
    flip: bool = False
    colour: int | None = None  # seed of `images.vary_colour`
    interpolation: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A picture that is not trained on."""

    name: str  # relative to its subset's folder
    reason: str
    dataset: int = 0
    subset: int = 0


@dataclass(frozen=True)
class Scan:
    """What was found: every picture is either in `pictures` or in `skipped`."""

    images: tuple[ImageRecord, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]  # what the user should know, one line each

    @property
    def num_found(self) -> int:
        return len(self.images) + len(self.skipped)

    def report(self, *, limit: int | None = 20) -> str:
        """In / used / skipped with reasons, at most `limit` skipped ones by name, and the notes."""
        lines = [f"Pictures: {self.num_found} found, {len(self.images)} used, {len(self.skipped)} skipped."]
        lines += [f"  skipped {s.name}: {s.reason}" for s in self.skipped[:limit]]
        if limit is not None and len(self.skipped) > limit:
            reasons = Counter(s.reason for s in self.skipped[limit:])
            lines += [f"  skipped {count} more: {reason}" for reason, count in reasons.most_common(limit)]
        return "\n".join([*lines, *self.notes]) + "\n"

    def check(self, *, strict: bool) -> None:
        """Raises DataError if nothing is usable, if more than a tenth is not, or with `strict` if anything is not."""
        bad = len(self.skipped)
        if not self.images:
            raise DataError(f"No usable picture in the dataset.\n{self.report()}")
        if bad and strict:
            raise DataError(
                f"STRICT_DATASET is true and {bad} of {self.num_found} pictures are unusable.\n{self.report()}"
            )
        if bad > MAX_UNUSABLE * self.num_found:
            raise DataError(f"{bad} of {self.num_found} pictures are unusable, more than 10 %.\n{self.report()}")
