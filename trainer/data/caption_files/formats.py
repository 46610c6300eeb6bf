"""The formats of metadata files: .csv and .tsv with any usual delimiter, .jsonl, and .json in several shapes.

Each gives records: a dict from column to value for every row. A row that could mean two things refuses the dataset,
with the row's number.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.caption_files.findings import Findings
from trainer.spec.values import many, show, some

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
METADATA = re.compile(r"metadata\.(csv|tsv|jsonl|ndjson|json)", re.IGNORECASE)  # read without being named
DELIMITERS = (",", ";", "\t", "|")
LONGEST_HEADER = 10_000  # characters by which the delimiter is chosen
# Columns, best first, as `normal` writes them.
IMAGE_NAMES = (
    *("file_name", "image_path", "filename", "file", "file_path", "filepath", "path", "image", "image_file"),
    *("image_file_name", "image_filename", "image_name", "img", "img_path", "img_file", "img_name", "img_filename"),
    *("name", "photo", "picture", "key"),
)
CAPTION_NAMES = ("caption", "text")  # a row may have either
MORE_CAPTION_NAMES = (
    *("captions", "texts", "prompt", "prompts", "description", "descriptions", "image_caption", "img_caption"),
    "tag_string",
)
TAGS = "tags"
LABELS = ("label", "labels")  # where nothing else can be the caption
NEAR_CAPTION = re.compile(r"caption|prompt|text|description", re.IGNORECASE)  # in a column's name
LIKE_A_CAPTION = re.compile(r"caption|prompt|text|descr|tag|label", re.IGNORECASE)

Record = dict[str, Any]  # column → value


@dataclass(frozen=True, slots=True)
class AskedColumns:
    """The columns that the user chose, by IMAGE_COLUMN and CAPTION_COLUMN; None: not chosen."""

    image: str | None = None
    caption: str | None = None


def normal(name: str) -> str:
    """`"Image Path "` → `image_path`."""
    return re.sub(r"[\s\-]+", "_", name.strip(" \t\r\n\ufeff\"'").casefold())


def read_records(title: str, text: str, asked: AskedColumns, findings: Findings) -> list[tuple[str, Record]]:
    """Each row of a file, after where it is. Raises ValueError with the place."""
    suffix = title.rpartition(".")[2].lower()
    if suffix in ("csv", "tsv"):
        return list(_csv_records(title, text, asked, findings, first="\t" if suffix == "tsv" else ","))
    lines = _lines(text)
    _, start = next(lines, ("", ""))
    if not start:
        return []
    has_more = next(lines, None) is not None
    # Each of the two formats often has the other's suffix.
    if suffix in ("jsonl", "ndjson"):
        by_line = start not in "[{" and not start.startswith("[")
    else:
        by_line = has_more and start.startswith("{") and start.endswith("}")
    if not by_line:
        return list(_json_records(parse_json(text, where=title), title=title, findings=findings))
    if not has_more:
        value = parse_json(start, where=f"{title}, line 1")
        if not _is_record(value):
            return list(_json_records(value, title=title, findings=findings))
    records = []
    for where, line in _lines(text):
        place = f"{title}, {where}"
        records.append((where, _as_record(parse_json(line.removesuffix(","), where=place), where=place)))
    return records


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Each line that is not blank, stripped, and "line 7": one by one, as there may be millions."""
    begin = 0
    number = 0
    for number, end in enumerate(re.finditer(r"\r\n|\r|\n", text), 1):
        if line := text[begin : end.start()].strip():
            yield f"line {number}", line
        begin = end.end()
    if line := text[begin:].strip():
        yield f"line {number + 1}", line


def _is_record(value: Any) -> bool:
    """Whether an object is a row by itself, and no map from names to captions."""
    if not isinstance(value, dict) or any(has_image_suffix(key) for key in value):
        return False
    return any(normal(key) in IMAGE_NAMES for key in value) or any(normal(key) in CAPTION_NAMES for key in value)


def has_image_suffix(name: str) -> bool:
    return re.search(r"\.[A-Za-z0-9]{2,4}$", name.strip()) is not None


def parse_json(document: str, *, where: str) -> Any:
    """The value of a JSON text. Raises ValueError that begins with `where`."""
    try:
        return json.loads(document, object_pairs_hook=_without_repeated_keys)
    except RecursionError:
        raise ValueError(f"{where}: it is nested too deeply") from None
    except ValueError as problem:
        raise ValueError(f"{where}: not JSON: {problem}") from problem


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> Record:
    """Python would keep the last of them in silence. Raises ValueError."""
    # The keys of all rows are the same few words, and each line makes its own copies.
    record = {sys.intern(key): value for key, value in pairs}
    if len(record) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {show(twice)} is given twice")
    return record


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
            if not isinstance(entry, dict | list | str) and not has_image_suffix(name):
                findings.unused.append(f"{title}, key {show(name)}: it is not a caption")
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
    title: str, text: str, asked: AskedColumns, findings: Findings, *, first: str
) -> Iterator[tuple[str, Record]]:
    """The rows below the header. Too many fields are one caption if there is no doubt; else a problem."""
    number = 0  # as a spreadsheet counts rows
    if said := re.match(r"sep=(.)\r?\n", text):  # a line of Excel's
        delimiter = said.group(1)
        text = text[said.end() :]
        number = 1
    else:
        delimiter = _delimiter(text, first, asked)
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
            if not _ends_with_caption(header, asked) or '"' in raw:
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
            f"{title}: {show(delimiter)} without double quotes in the caption of {many(len(joined), 'row')}: the "
            f"whole text is used: {some(joined)}."
        )
    if short and header:
        findings.warn(
            f"{title}: fewer fields than the header's {len(header)} in {many(len(short), 'row')}: {some(short)}."
        )


def _header(fields: list[str], title: str) -> list[str]:
    """The names of the columns. Raises ValueError for a name that is given twice."""
    names = [field.strip(" \t\ufeff") for field in fields]
    while names and not names[-1]:
        names.pop()
    seen = set()
    for name in names:
        if name and normal(name) in seen:
            raise ValueError(f"{title}: two columns have the name {show(normal(name))}. Rename one")
        seen.add(normal(name))
    return names


def _delimiter(text: str, first: str, asked: AskedColumns) -> str:
    """The delimiter that splits the header into the most columns that are known; `first` among equals."""
    header = text[:LONGEST_HEADER].lstrip("\ufeff\r\n").split("\n", 1)[0]
    chosen = (normal(name) for name in (asked.image, asked.caption) if name)
    known = {*IMAGE_NAMES, *CAPTION_NAMES, *MORE_CAPTION_NAMES, TAGS, *chosen}

    def worth(delimiter: str) -> tuple[int, int]:
        names = [normal(name) for name in header.split(delimiter)]
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
            raise ValueError(f"{title}, row {number}: not CSV: {problem}. Check its double quotes") from problem
        raw = "".join(taken)
        taken.clear()
        yield fields, raw


def _ends_with_caption(header: Sequence[str], asked: AskedColumns) -> bool:
    """Whether a row's first field names the image and all that follows can only be the caption."""
    if len(header) != 2:
        return False
    image, caption = (normal(name) for name in header)
    is_image = image in IMAGE_NAMES or image == normal(asked.image or "")
    is_caption = bool(LIKE_A_CAPTION.search(caption)) or caption == normal(asked.caption or "")
    return is_image and is_caption
