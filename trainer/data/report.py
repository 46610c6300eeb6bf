"""dataset-report.txt and dataset-report.csv: what became of each image and caption, for people and spreadsheets."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trainer.data.buckets import fit
from trainer.data.captions import compose_caption
from trainer.data.records import ImageRecord, Scan
from trainer.spec.plan import DataPlan
from trainer.spec.values import one_line
from trainer.storage import atomic, json_files, own_files
from trainer.storage.read import open_regular

COLUMNS = (
    *("file", "subset", "status", "reason", "width", "height", "bucket", "repeats"),
    *("caption", "trained caption", "caption file", "encoding", "cut_at"),
)
# A spreadsheet takes a cell that begins with one of these for a formula, and runs it; some take the wide ones as well.
FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def write_report(scan: Scan, data: DataPlan, *, text: Path, seed: int) -> None:
    """Write the report to the file `text`, and as a table beside it."""
    json_files.set_aside_unless(text, own_files.is_report)
    json_files.set_aside_unless(text.with_suffix(".csv"), own_files.is_table)
    atomic.write_lines(text, scan.report_lines(limit=None))
    atomic.write_lines(text.with_suffix(".csv"), table(scan, data, seed=seed))


def write_cuts(
    scan: Scan, data: DataPlan, *, report: Path, seed: int, lines: Sequence[str], cuts: Mapping[str, str]
) -> None:
    """Add captions that are not read to their end: the `lines` to the report, and `cuts` to the table."""
    listed = "\n".join(one_line(line) for line in lines)
    with io.TextIOWrapper(open_regular(report), encoding="utf-8", newline="") as before:
        atomic.write_lines(report, itertools.chain(before, [f"\n{listed}\n"]))
    atomic.write_lines(report.with_suffix(".csv"), table(scan, data, seed=seed, cuts=cuts))


def table(scan: Scan, data: DataPlan, *, seed: int, cuts: Mapping[str, str] | None = None) -> Iterator[str]:
    """The text of the table, line by line: one row for each image.

    It begins with a byte order mark, by which Excel knows that it is UTF-8.

    `cuts`: the key of an image → the beginning of what the text encoder does not read of its caption.
    """

    @functools.cache
    def bucket(size: tuple[int, int], dataset: int) -> str:
        cut = fit(size, data.datasets[dataset])
        return f"{cut.size[0]}x{cut.size[1]}" if cut else ""

    fixed = random.Random(0)  # for captions in which nothing is drawn
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_NONNUMERIC)

    def line(row: Sequence[str | int]) -> str:
        out.seek(0)
        out.truncate()
        writer.writerow(row)
        return out.getvalue()

    yield "\ufeff"
    yield line(COLUMNS)
    for image in scan.images:
        subset = data.datasets[image.dataset].subsets[image.subset]
        notes = []
        if subset.is_reg:
            notes.append("regularisation image")
        if image.mask_sha256:
            notes.append("with mask")
        yield line(
            [
                _cell(image.name),
                f"{image.dataset}.{image.subset}",
                "used",
                ", ".join(notes),
                image.width,
                image.height,
                bucket((image.width, image.height), image.dataset),
                subset.num_repeats,
                _cell(image.caption or ""),
                _cell(_first_variant(image, data, seed=seed, fixed=fixed)),
                _cell(image.caption_file),
                image.caption_encoding,
                _cell((cuts or {}).get(image.key, "")),
            ]
        )
    for skipped in scan.skipped:
        place = f"{skipped.dataset}.{skipped.subset}"
        yield line([_cell(skipped.name), place, "skipped", _cell(skipped.reason), *[""] * (len(COLUMNS) - 4)])


def _first_variant(image: ImageRecord, data: DataPlan, *, seed: int, fixed: random.Random) -> str:
    """The caption as it is trained; where it varies, the first of its variants."""
    subset = data.datasets[image.dataset].subsets[image.subset]
    if subset.caption_variants == 1:  # nothing is drawn, and a generator takes longer to seed than a row to write
        return compose_caption(image.caption, subset, fixed)
    return compose_caption(image.caption, subset, random.Random(f"{seed}/caption/{image.key}"))


def _cell(text: str) -> str:
    """The text on one line, which a spreadsheet shows and does not run."""
    text = one_line(text)
    if text.lstrip().startswith(FORMULA_STARTS):
        return f"'{text}"
    return text
