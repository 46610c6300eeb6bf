"""The rows of a metadata file: the image that each names, and its caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.data.caption_files.columns import Columns, choose_columns
from trainer.data.caption_files.findings import Findings
from trainer.data.caption_files.formats import AskedColumns, Record, read_records
from trainer.data.captions import clean, removed_characters
from trainer.spec.plan import Subset
from trainer.spec.values import many, show, some


@dataclass(frozen=True, slots=True)
class Row:
    """A row that names an image."""

    where: str  # "row 2", "line 2", "entry 2"
    name: str
    caption: str | None


def read_table(title: str, text: str, subset: Subset, findings: Findings) -> list[Row]:
    """The rows of the metadata file `title`, with what is wrong or unused added to `findings`."""
    asked = AskedColumns(subset.source.image_column, subset.source.caption_column)
    try:
        records = read_records(title, text, asked, findings)
        columns = choose_columns(title, records, subset, findings)
    except ValueError as problem:
        findings.problems.append(f"{problem}.")
        return []
    if columns is None:
        return []
    rows = []
    silent = []
    odd_characters = []
    records.reverse()
    while records:  # each is freed once it is read: with millions of rows, both lists would be gigabytes
        where, record = records.pop()
        try:
            name = _image_name(record, columns)
            caption = _caption(record, columns, subset)
        except ValueError as problem:
            findings.problems.append(f"{title}, {where}: {problem}.")
            continue
        if name is None and not any(_is_filled(value) for value in record.values()):
            continue  # a spreadsheet's empty row
        if name is None:
            wanted = " or ".join(columns.images)
            findings.problems.append(f"{title}, {where}: no {wanted}.")
            continue
        if caption is None:
            silent.append(f"{where} ({name})")
            findings.unused.append(f"{title}, {where} ({name}): it has no caption")
        elif removed := removed_characters(caption):
            odd_characters.append(f"{where} ({', '.join(removed)})")
        rows.append(Row(where, name, None if caption is None else clean(caption)))
    if silent and columns.captions:
        findings.warn(f"{title}: no caption in {many(len(silent), 'row')}: {some(silent)}.")
    if odd_characters:
        findings.warn(
            f"{title}: control or invisible characters are taken out of {many(len(odd_characters), 'caption')}: "
            f"{some(odd_characters)}."
        )
    return rows


# ---- values


def _is_filled(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value is not None


def _image_name(record: Record, columns: Columns) -> str | None:
    for column in columns.images:
        value = record.get(column)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, dict) and isinstance(value.get("path"), str):  # an image of the Hub's `datasets`
            return value["path"] or None
        if value and not isinstance(value, str):
            raise ValueError(f"{column} is {show(value)}, not the name of a file")
    return None


def _caption(record: Record, columns: Columns, subset: Subset) -> str | None:
    """Caption and tags of a row, joined as sd-scripts does; None if it has neither. Raises ValueError."""
    caption: str | None = None
    for column in columns.captions:
        if record.get(column) is not None:
            caption = _join_lines(record[column], separator="\n")
            break
    tags = _join_lines(record.get(columns.tags) or "", separator=", ") if columns.tags else ""
    if caption is None and (columns.tags is None or record.get(columns.tags) is None):
        return None
    if not tags.strip():
        return caption or ""
    tags = "\n".join(line.strip() for line in tags.split("\n") if line.strip())
    tags = tags.replace("\n", subset.caption_separator)
    text = "\n".join(line.strip() for line in (caption or "").split("\n") if line.strip())
    lines = [text]
    if subset.enable_wildcard:  # one line is drawn later: each needs the tags
        lines = text.split("\n")
    tagged = []
    for line in lines:
        parts = [part for part in (line, tags) if part]
        tagged.append(subset.caption_separator.join(parts))
    return "\n".join(tagged)


def _join_lines(value: Any, *, separator: str) -> str:
    """A text, or a list of texts joined by `separator`. Raises ValueError for anything else."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return separator.join(value)
    if not isinstance(value, str):
        raise ValueError(f"the caption is {show(value)}, not a text")
    return value
