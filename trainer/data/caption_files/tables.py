"""The rows of a metadata file: .csv and .tsv with any usual delimiter, .jsonl, and .json in several shapes.

A spreadsheet, another trainer or a script wrote it, so columns go by many names. They are found by name; IMAGE_COLUMN
and CAPTION_COLUMN choose others. A row that could mean two things refuses the dataset, with the row's number.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.caption_files.findings import Findings, some
from trainer.data.captions import clean, removed_characters
from trainer.spec.plan import Subset
from trainer.spec.values import show

DELIMITERS = (",", ";", "\t", "|")
# Columns, best first, as `_normal` writes them.
IMAGE_NAMES = (
    *("file_name", "image_path", "filename", "file", "file_path", "filepath", "path", "image", "image_file"),
    *("image_file_name", "image_filename", "image_name", "img", "img_path", "img_file", "img_name", "img_filename"),
    *("name", "photo", "picture", "key"),
)
CAPTION_NAMES = ("caption", "text")  # a row may have either
MORE_CAPTION_NAMES = (
    *("captions", "texts", "prompt", "prompts", "description", "descriptions", "image_caption", "img_caption"),
    *("long_caption", "short_caption", "tag_string"),
)
TAGS = "tags"
LIKE_A_CAPTION = re.compile(r"caption|prompt|text|descr|tag|label", re.IGNORECASE)

Record = dict[str, Any]  # column → value


@dataclass(frozen=True, slots=True)
class Row:
    """A row that names an image."""

    where: str  # "row 2", "line 2", "entry 2"
    name: str
    caption: str | None


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns that are read."""

    images: tuple[str, ...]
    captions: tuple[str, ...]  # the first that a row has
    tags: str | None  # is joined to the caption


def read_table(title: str, text: str, subset: Subset, findings: Findings) -> list[Row]:
    """The rows of the metadata file `title`, with what is wrong or unused added to `findings`."""
    try:
        records = _records(title, text, subset, findings)
        columns = _choose_columns(title, records, subset, findings)
    except ValueError as problem:
        findings.problems.append(f"{problem}.")
        return []
    if columns is None:
        return []
    rows = []
    silent = []
    odd_characters = []
    for where, record in records:
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
        findings.warn(f"{title}: {len(silent)} rows have no caption: {some(silent)}.")
    if odd_characters:
        findings.warn(
            f"{title}: control or invisible characters are taken out of {len(odd_characters)} captions: "
            f"{some(odd_characters)}."
        )
    return rows


# ---- columns


def _choose_columns(
    title: str, records: Sequence[tuple[str, Record]], subset: Subset, findings: Findings
) -> _Columns | None:
    """The columns of names, captions and tags; None for a file without rows. Raises ValueError."""
    names = list(dict.fromkeys(column for _, record in records for column in record))
    if not names:
        findings.warn(f"{title} has no rows.")
        return None
    by_normal: dict[str, list[str]] = {}
    for name in names:
        by_normal.setdefault(_normal(name), []).append(name)
    listed = ", ".join(show(name) for name in names[:40])
    source = subset.source
    is_hub = source.kind == "hub"  # where the columns were chosen when the rows were written
    asked_image = _asked_column("IMAGE_COLUMN", source.image_column, by_normal, title, is_hub=is_hub)
    asked_caption = _asked_column("CAPTION_COLUMN", source.caption_column, by_normal, title, is_hub=is_hub)
    images = _known(by_normal, IMAGE_NAMES)
    if asked_image:
        images = (asked_image,)
    if not images:
        header = ""
        if any(_has_image_suffix(name) for name in names):
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
        captions = _other_captions(title, by_normal, has_tags=tags is not None, images=images)
    columns = _Columns(images, tuple(name for name in captions if name not in images), tags)
    _note_unused(title, names, records, columns, findings)
    if not columns.captions and tags is None:
        findings.warn(
            f"{title}: no column has captions; the columns are {listed}. Choose one with CAPTION_COLUMN, or rename it "
            "to caption."
        )
    return columns


def _asked_column(
    variable: str, asked: str | None, by_normal: dict[str, list[str]], title: str, *, is_hub: bool
) -> str | None:
    """The column that a variable, or the key of its name in dataset.json, asks for; None if it asks for none.

    Raises ValueError if the file has no such column.
    """
    if asked is None:
        return None
    found = by_normal.get(_normal(asked), [])
    if asked in found:
        return asked
    if found:
        return found[0]
    if is_hub:
        return None
    columns = ", ".join(name for names in by_normal.values() for name in names)
    raise ValueError(f"{variable}={asked}: {title} has no such column, only {columns}")


def _known(by_normal: dict[str, list[str]], wanted: Sequence[str]) -> tuple[str, ...]:
    """The columns with the names `wanted`, in their order."""
    known: list[str] = []
    for name in wanted:
        known += by_normal.get(name, [])
    return tuple(known)


def _other_captions(
    title: str, by_normal: dict[str, list[str]], *, has_tags: bool, images: Sequence[str]
) -> tuple[str, ...]:
    """The column of captions where none is called caption or text: by another usual name, or by a part of it.

    Raises ValueError where several could be meant.
    """
    known = _known(by_normal, MORE_CAPTION_NAMES)
    if known:
        return known[:1]
    near = []
    for name in (name for names in by_normal.values() for name in names):
        if re.search(r"caption|prompt|text|description", name, re.IGNORECASE) and name not in images:
            near.append(name)
    if len(near) > 1:
        raise ValueError(f"{title} has several columns of captions. Choose CAPTION_COLUMN: {', '.join(near)}")
    if not near and not has_tags:
        near = list(_known(by_normal, ("label", "labels")))
    return tuple(near[:1])


def _note_unused(
    title: str, names: Sequence[str], records: Sequence[tuple[str, Record]], columns: _Columns, findings: Findings
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


def _is_needed(name: str, columns: _Columns, records: Sequence[tuple[str, Record]]) -> bool:
    """Whether a second column of image names is read, in rows where the first is empty."""
    if name not in columns.images:
        return False
    before = columns.images[: columns.images.index(name)]
    return any(record.get(name) and not any(record.get(other) for other in before) for _, record in records)


def _has_both(records: Sequence[tuple[str, Record]], first: str, second: str) -> bool:
    return any(record.get(first) and record.get(second) for _, record in records)


def _normal(name: str) -> str:
    """`"Image Path "` → `image_path`."""
    return re.sub(r"[\s\-]+", "_", name.strip(" \t\r\n\ufeff\"'").casefold())


# ---- values


def _is_filled(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value is not None


def _image_name(record: Record, columns: _Columns) -> str | None:
    for column in columns.images:
        value = record.get(column)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if value and not isinstance(value, str):
            raise ValueError(f"{column} is {show(value)}, not the name of a file")
    return None


def _caption(record: Record, columns: _Columns, subset: Subset) -> str | None:
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


# ---- formats


def _records(title: str, text: str, subset: Subset, findings: Findings) -> list[tuple[str, Record]]:
    """Each row of a file, after where it is. Raises ValueError with the place."""
    suffix = title.rpartition(".")[2].lower()
    if suffix in ("csv", "tsv"):
        return list(_csv_records(title, text, subset, findings, first=DELIMITERS[2] if suffix == "tsv" else ","))
    lines = [(f"line {n}", line.strip()) for n, line in enumerate(re.split(r"\r\n|\r|\n", text), 1) if line.strip()]
    if not lines:
        return []
    start = lines[0][1]
    # Each of the two formats often has the other's suffix.
    if suffix == "jsonl":
        by_line = start not in "[{" and not start.startswith("[")
    else:
        by_line = len(lines) > 1 and start.startswith("{") and start.endswith("}")
    if not by_line:
        return list(_json_records(_parse(text, where=title), title=title, findings=findings))
    if len(lines) == 1:
        value = _parse(lines[0][1], where=f"{title}, line 1")
        if not _is_record(value):
            return list(_json_records(value, title=title, findings=findings))
    records = []
    for where, line in lines:
        place = f"{title}, {where}"
        records.append((where, _as_record(_parse(line, where=place), where=place)))
    return records


def _is_record(value: Any) -> bool:
    """Whether an object is a row by itself, and no map from names to captions."""
    if not isinstance(value, dict) or any(_has_image_suffix(key) for key in value):
        return False
    return any(_normal(key) in IMAGE_NAMES for key in value) or any(_normal(key) in CAPTION_NAMES for key in value)


def _has_image_suffix(name: str) -> bool:
    return re.search(r"\.[A-Za-z0-9]{2,4}$", name.strip()) is not None


def _parse(document: str, *, where: str) -> Any:
    try:
        return json.loads(document)
    except RecursionError:
        raise ValueError(f"{where}: it is nested too deeply") from None
    except ValueError as problem:
        raise ValueError(f"{where}: not JSON: {problem}") from problem


def _json_records(value: Any, *, title: str, findings: Findings) -> Iterator[tuple[str, Record]]:
    """The records of a whole JSON file: an object by name, a list, or a list within an object."""
    if isinstance(value, dict):
        lists = [key for key, inner in value.items() if inner and _is_list_of_objects(inner)]
        if len(lists) == 1 and not any(isinstance(inner, dict) for inner in value.values()):
            for key in value:
                if key not in lists:
                    findings.unused.append(f"{title}, key {show(key)}: it is not read")
            yield from _json_records(value[lists[0]], title=title, findings=findings)
            return
        if _is_record(value):
            yield "entry 1", value
            return
        for name, entry in value.items():
            if not isinstance(entry, dict | list | str) and not _has_image_suffix(name):
                findings.unused.append(f"{title}, key {show(name)}: it is no caption")
                continue
            record = entry if isinstance(entry, dict) else {"caption": entry}
            yield show(name), {**record, "file_name": name}
    elif isinstance(value, list):
        for number, entry in enumerate(value, 1):
            yield f"entry {number}", _as_record(entry, where=f"{title}, entry {number}")
    else:
        yield "entry 1", _as_record(value, where=title)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _as_record(value: Any, *, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not an object with file_name and caption")
    return value


# ---- CSV


def _csv_records(
    title: str, text: str, subset: Subset, findings: Findings, *, first: str
) -> Iterator[tuple[str, Record]]:
    """The rows below the header. Too many fields are one caption if there is no doubt; else a problem."""
    number = 0  # as a spreadsheet counts rows
    if said := re.match(r"sep=(.)\r?\n", text):  # a line of Excel's
        delimiter = said.group(1)
        text = text[said.end() :]
        number = 1
    else:
        delimiter = _delimiter(text, first, subset)
    header: list[str] | None = None
    joined = []
    short = []
    for fields, raw in _raw_rows(title, text, delimiter, number):
        number += 1
        if not any(field.strip() for field in fields):
            continue
        if header is None:
            header = _header(fields, title)
            continue
        while len(fields) > len(header) and not fields[-1].strip():
            fields.pop()  # a spreadsheet fills all rows up to the longest
        if len(fields) > len(header):
            if not _ends_with_caption(header, subset) or '"' in raw:
                findings.problems.append(
                    f"{title}, row {number}: it has {len(fields)} fields, the header has {len(header)}. Put a caption "
                    f'that has {show(delimiter)} in it between double quotes: "a dog, running"'
                )
                continue
            fields = [fields[0], raw.split(delimiter, 1)[1].strip().rstrip(delimiter)]
            joined.append(f"row {number}")
        elif len(fields) < len(header):
            short.append(f"row {number}")
        yield f"row {number}", dict(zip(header, fields, strict=False))
    if joined:
        findings.warn(
            f"{title}: the captions of {len(joined)} rows have {show(delimiter)} in them without double quotes: all of "
            f"the text is taken: {some(joined)}."
        )
    if short and header:
        findings.warn(f"{title}: {len(short)} rows have fewer fields than the header's {len(header)}: {some(short)}.")


def _header(fields: list[str], title: str) -> list[str]:
    """The names of the columns. Raises ValueError for a name that is there twice."""
    names = [field.strip(" \t\ufeff") for field in fields]
    while names and not names[-1]:
        names.pop()
    twice = [name for name, count in Counter(_normal(name) for name in names).items() if count > 1 and name]
    if twice:
        raise ValueError(f"{title}: two columns are called {show(twice[0])}. Rename one")
    return names


def _delimiter(text: str, first: str, subset: Subset) -> str:
    """The delimiter that splits the header into the most columns that are known; `first` among equals."""
    header = text.lstrip("\ufeff\r\n").split("\n", 1)[0]
    asked = (subset.source.image_column, subset.source.caption_column)
    known = {*IMAGE_NAMES, *CAPTION_NAMES, *MORE_CAPTION_NAMES, TAGS, *(_normal(name) for name in asked if name)}

    def worth(delimiter: str) -> tuple[int, int]:
        names = [_normal(name) for name in header.split(delimiter)]
        return sum(name in known for name in names), len(names)

    return max((first, *DELIMITERS), key=worth)


def _raw_rows(title: str, text: str, delimiter: str, number: int) -> Iterator[tuple[list[str], str]]:
    """The fields of each row, and its text. Raises ValueError with the number of the row."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            taken.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=True)
    while True:
        number += 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            raise ValueError(f"{title}, row {number}: not CSV: {problem}. Are its double quotes closed?") from problem
        raw = "".join(taken)
        taken.clear()
        yield fields, raw


def _ends_with_caption(header: Sequence[str], subset: Subset) -> bool:
    """Whether a row's first field names the image and all that follows can only be the caption."""
    if len(header) != 2:
        return False
    image, caption = (_normal(name) for name in header)
    source = subset.source
    is_image = image in IMAGE_NAMES or image == _normal(source.image_column or "")
    is_caption = bool(LIKE_A_CAPTION.search(caption)) or caption == _normal(source.caption_column or "")
    return is_image and is_caption
