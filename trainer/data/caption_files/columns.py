"""Which columns of a metadata file are read.

A spreadsheet, another trainer or a script wrote it, so columns go by many names. They are found by name; IMAGE_COLUMN
and CAPTION_COLUMN choose others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.caption_files.findings import Findings
from trainer.data.caption_files.formats import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    LABELS,
    LIKE_A_CAPTION,
    MORE_CAPTION_NAMES,
    NEAR_CAPTION,
    TAGS,
    Record,
    has_image_suffix,
    normal,
)
from trainer.spec.plan import Subset
from trainer.spec.values import show, some

MOST_COLUMNS = 40  # in one message: a table may have hundreds


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that are read."""

    images: tuple[str, ...]
    captions: tuple[str, ...]  # the first that a row has
    tags: str | None  # is joined to the caption


def choose_columns(
    title: str, records: Sequence[tuple[str, Record]], subset: Subset, findings: Findings
) -> Columns | None:
    """The columns of names, captions and tags; None for a file without rows. Raises ValueError."""
    names = list(dict.fromkeys(column for _, record in records for column in record))
    if not names:
        findings.warn(f"{title} has no rows.")
        return None
    by_normal: dict[str, list[str]] = {}
    for name in names:
        by_normal.setdefault(normal(name), []).append(name)
    listed = some([show(name) for name in names], most=MOST_COLUMNS)
    source = subset.source
    is_hub = source.kind == "hub"  # where the columns were chosen when the rows were written
    asked_image = _asked_column("IMAGE_COLUMN", source.image_column, names, title, is_hub=is_hub)
    asked_caption = _asked_column("CAPTION_COLUMN", source.caption_column, names, title, is_hub=is_hub)
    images = _known(by_normal, IMAGE_NAMES)
    if asked_image:
        images = (asked_image,)
    if not images:
        header = ""
        if any(has_image_suffix(name) for name in names):
            header = " Its first line must name the columns, as in file_name,text."
        raise ValueError(
            f"{title}: no column has the names of the images; the columns are {listed}.{header} "
            "Choose with IMAGE_COLUMN and CAPTION_COLUMN, or rename them to file_name and caption"
        )
    tags = by_normal.get(TAGS, [None])[0]
    captions = _known(by_normal, CAPTION_NAMES)
    if asked_caption:
        captions = (asked_caption,)
        tags = None
    elif not captions:
        captions = _other_captions(title, names, by_normal, has_tags=tags is not None, images=images)
    columns = Columns(images, tuple(name for name in captions if name not in images), tags)
    _note_unused(title, names, records, columns, findings)
    if not columns.captions and tags is None:
        findings.warn(
            f"{title}: no column has captions; the columns are {listed}. Choose one with CAPTION_COLUMN, or rename it "
            "to caption."
        )
    return columns


def _asked_column(variable: str, asked: str | None, names: Sequence[str], title: str, *, is_hub: bool) -> str | None:
    """The column that a variable, or the key of its name in dataset.json, asks for; None if it asks for none.

    Raises ValueError if the file has no such column.
    """
    if asked is None:
        return None
    if asked in names:
        return asked
    for name in names:
        if normal(name) == normal(asked):
            return name
    if is_hub:
        return None
    listed = some(names, most=MOST_COLUMNS)
    raise ValueError(f"{variable}={asked}: {title} has no such column, only {listed}")


def _known(by_normal: dict[str, list[str]], wanted: Sequence[str]) -> tuple[str, ...]:
    """The columns with the names `wanted`, in their order."""
    known: list[str] = []
    for name in wanted:
        known += by_normal.get(name, [])
    return tuple(known)


def _other_captions(
    title: str, names: Sequence[str], by_normal: dict[str, list[str]], *, has_tags: bool, images: Sequence[str]
) -> tuple[str, ...]:
    """The column of captions where none is called caption or text: by another usual name, or by a part of it.

    Raises ValueError where several could be meant.
    """
    known = _known(by_normal, MORE_CAPTION_NAMES)
    if known:
        return known[:1]
    near = []
    for name in names:
        if NEAR_CAPTION.search(name) and name not in images:
            near.append(name)
    if len(near) > 1:
        raise ValueError(f"{title} has several columns of captions. Choose CAPTION_COLUMN: {', '.join(near)}")
    if not near and not has_tags:
        near = list(_known(by_normal, LABELS))
    return tuple(near[:1])


def _note_unused(
    title: str, names: Sequence[str], records: Sequence[tuple[str, Record]], columns: Columns, findings: Findings
) -> None:
    """Name the columns that are not read. One that may be meant as a caption deserves a warning."""
    read = {*columns.captions, columns.tags, columns.images[0]}
    others = []
    for name in names:
        if name not in read and not _is_needed(name, columns, records):
            others.append(name)
    for name in others:
        findings.unused.append(f"{title}, column {show(name)}: it is not read")
    doubtful = [name for name in others if LIKE_A_CAPTION.search(name)]
    second = [name for name in columns.captions[1:] if _has_both(records, columns.captions[0], name)]
    if (doubtful or second) and (columns.captions or columns.tags):
        chosen = columns.captions[0] if columns.captions else columns.tags
        findings.warn(
            f"{title}: the captions are in {chosen!r}; not read: {some([*second, *doubtful])}. CAPTION_COLUMN chooses "
            "another."
        )
    elif others:
        findings.notes.append(f"{title}: columns without use: {some(others)}")


def _is_needed(name: str, columns: Columns, records: Sequence[tuple[str, Record]]) -> bool:
    """Whether a second column of image names is read, in rows where the first is empty."""
    if name not in columns.images:
        return False
    before = columns.images[: columns.images.index(name)]
    for _, record in records:
        earlier = [other for other in before if record.get(other)]
        if record.get(name) and not earlier:
            return True
    return False


def _has_both(records: Sequence[tuple[str, Record]], first: str, second: str) -> bool:
    return any(record.get(first) and record.get(second) for _, record in records)
