"""dataset-report.txt and dataset-report.csv: what became of each image and caption, for people and spreadsheets."""

from __future__ import annotations

import csv
import functools
import io
import random
from pathlib import Path

from trainer.data.buckets import fit
from trainer.data.captions import compose_caption
from trainer.data.records import ImageRecord, Scan
from trainer.spec.plan import DataPlan
from trainer.storage import atomic

COLUMNS = (
    *("file", "subset", "status", "reason", "width", "height", "bucket", "repeats"),
    *("caption", "trained caption", "caption file", "encoding"),
)
# A spreadsheet takes a cell that begins with one of these for a formula, and runs it.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def write_report(scan: Scan, data: DataPlan, *, text: Path, seed: int) -> None:
    """Write the report to the file `text`, and as a table beside it."""
    atomic.write_text(text, _writable(scan.report(limit=None)))
    atomic.write_text(text.with_suffix(".csv"), table(scan, data, seed=seed))


def table(scan: Scan, data: DataPlan, *, seed: int) -> str:
    """One row for each image. It begins with a byte order mark, by which Excel knows that it is UTF-8."""

    @functools.cache
    def bucket(size: tuple[int, int], dataset: int) -> str:
        cut = fit(size, data.datasets[dataset])
        return f"{cut.size[0]}x{cut.size[1]}" if cut else ""

    rows: list[list[str | int]] = []
    for image in scan.images:
        subset = data.datasets[image.dataset].subsets[image.subset]
        notes = []
        if subset.is_reg:
            notes.append("regularisation image")
        if image.mask_sha256:
            notes.append("with mask")
        rows.append(
            [
                image.name,
                f"{image.dataset}.{image.subset}",
                "used",
                ", ".join(notes),
                image.width,
                image.height,
                bucket((image.width, image.height), image.dataset),
                subset.num_repeats,
                image.caption or "",
                _first_variant(image, data, seed=seed),
                image.caption_file,
                image.caption_encoding,
            ]
        )
    for skipped in scan.skipped:
        place = f"{skipped.dataset}.{skipped.subset}"
        rows.append([skipped.name, place, "skipped", skipped.reason, *[""] * (len(COLUMNS) - 4)])
    out = io.StringIO(newline="")
    out.write("\ufeff")
    writer = csv.writer(out, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_cell(value) for value in row])
    return _writable(out.getvalue())


def _first_variant(image: ImageRecord, data: DataPlan, *, seed: int) -> str:
    """The caption as it is trained; where it varies, the first of its variants."""
    subset = data.datasets[image.dataset].subsets[image.subset]
    return compose_caption(image.caption, subset, random.Random(f"{seed}/caption/{image.key}"))


def _cell(value: str | int) -> str | int:
    """The value, which a spreadsheet shows and does not run."""
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return value


def _writable(text: str) -> str:
    """Bytes of file names that are not UTF-8 become `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")
