"""Read captions from sidecar files and from metadata files, and match them to images."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.data.captions import Caption, clean
from trainer.spec.errors import DataError
from trainer.spec.plan import Subset

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.json")  # found without being named, in any folder
MAX_SIDECAR_BYTES = 1 << 20  # 1 MiB is some 200,000 words: no caption
NAME_KEYS = ("file_name", "image_path")
CAPTION_KEYS = ("caption", "text")

Row = dict[str, Any]


# ---- sidecar files


def decode(data: bytes) -> tuple[str, bool]:
    """The text of a file, and whether it was not Unicode.

    UTF-16 if it starts with a byte order mark, else UTF-8, else Windows-1252, as old tools for tags wrote it. Bytes
    that Windows-1252 does not define are read as Latin-1, which defines all.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) and len(data) % 2 == 0:
        return data.decode("utf-16", errors="replace"), False
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding), encoding != "utf-8-sig"
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), True


def sidecar_names(stem: str, extension: str) -> tuple[str, ...]:
    """The files that may hold the caption of `stem`: the first that exists counts."""
    if not extension.startswith("."):
        extension = f".{extension}"
    extensions = dict.fromkeys([extension, ".txt", ".caption"])
    return tuple(stem + extension for extension in extensions)


def read_sidecar(path: Path) -> Caption:
    """Raises DataError for a file too long to be a caption, or one that cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SIDECAR_BYTES + 1)
    except OSError as problem:
        raise DataError(f"The caption {path} cannot be read: {problem.strerror}.") from problem
    if len(data) > MAX_SIDECAR_BYTES:
        raise DataError(f"{path} is more than 1 MiB: not a caption. Remove it, or set caption_extension.")
    text, legacy = decode(data)
    return Caption(clean(text), "sidecar", legacy)


# ---- metadata files


def read_metadata(path: Path, subset: Subset) -> dict[str, Caption]:
    """Name as the file gives it → caption, of a `.json`, `.jsonl` or `.csv` file. Rows without a caption are left out.

    JSON is `{name: {"caption": …, "tags": …}}`, `{name: caption}` or a list of rows; a row has `file_name` or
    `image_path` and `caption` or `text`, or the columns that the source names. Several rows of one name are several
    lines of one caption. Raises DataError naming the file and the row.
    """
    try:
        text, legacy = decode(path.read_bytes())
    except OSError as problem:
        raise DataError(f"metadata_file {path} cannot be read: {problem.strerror}.") from problem
    captions: dict[str, Caption] = {}
    for where, row in _rows(path, text):
        name = _first_value(row, (subset.source.image_column, *NAME_KEYS))
        if not isinstance(name, str):
            raise DataError(f"{where}: no {' or '.join(NAME_KEYS)}.")
        caption = _row_caption(row, subset, where=where)
        if caption is None:
            continue
        if name in captions:
            caption = f"{captions[name].text}\n{caption}"
        captions[name] = Caption(caption, "metadata", legacy)
    return captions


def _rows(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    """Each row, after where it is, for messages."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 2):  # row 1 is the header
            yield f"{path}, row {number}", row
    elif suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield from _json_row(_parse(line, where=where), where=where)
    else:
        yield from _json_rows(_parse(text, where=str(path)), where=str(path))


def _parse(document: str, *, where: str) -> Any:
    try:
        return json.loads(document)
    except ValueError as problem:
        raise DataError(f"{where}: not JSON: {problem}.") from problem


def _json_rows(value: Any, *, where: str) -> Iterator[tuple[str, Row]]:
    """The rows of a whole JSON file: an object by name, or a list."""
    if isinstance(value, dict):
        for name, entry in value.items():
            row = entry if isinstance(entry, dict) else {"caption": entry}
            yield f"{where}, {name!r}", {**row, NAME_KEYS[0]: name}
    elif isinstance(value, list):
        for number, entry in enumerate(value, 1):
            yield from _json_row(entry, where=f"{where}, entry {number}")
    else:
        yield from _json_row(value, where=where)


def _json_row(value: Any, *, where: str) -> Iterator[tuple[str, Row]]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: not an object with file_name and caption.")
    yield where, value


def _first_value(row: Row, keys: Iterable[str | None]) -> Any:
    """The value of the first of `keys` that is in the row and not empty."""
    for key in keys:
        if key and row.get(key):
            return row[key]
    return None


def _row_caption(row: Row, subset: Subset, *, where: str) -> str | None:
    """Caption and tags of a row, joined as sd-scripts does; None if it has neither."""
    caption: str | None = None
    for key in (subset.source.caption_column, *CAPTION_KEYS):
        if key and row.get(key) is not None:
            caption = clean(_join_lines(row[key], separator="\n", where=where))
            break
    if caption is None and row.get("tags") is None:
        return None
    tags = clean(_join_lines(row.get("tags") or "", separator=", ", where=where))
    tags = tags.replace("\n", subset.caption_separator)
    lines = [caption or ""]
    if subset.enable_wildcard:  # one line is drawn later: each needs the tags
        lines = (caption or "").split("\n")
    tagged = []
    for line in lines:
        parts = [part for part in (line, tags) if part]
        tagged.append(subset.caption_separator.join(parts))
    return "\n".join(tagged)


def _join_lines(value: Any, *, separator: str, where: str) -> str:
    """A text, or a list of texts joined by `separator`. Raises DataError for anything else."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return separator.join(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: the caption is {value!r}, not a text.")
    return value


# ---- matching


def match_names(
    entries: dict[str, Caption], names: Iterable[str], *, folder: Path
) -> tuple[dict[str, Caption], list[str]]:
    """Captions by image name (relative to `folder`, with /), and the entries that name no image.

    An entry may be the name, the name without its suffix, or an absolute path. Of a path on another machine, only the
    last part counts.
    """
    by_key: dict[str, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        for key in {name, str(path.with_suffix("")), f"/{path.name}"}:
            by_key.setdefault(key, []).append(name)
    matched: dict[str, Caption] = {}
    unknown = []
    for entry, caption in entries.items():
        images = by_key.get(_entry_key(entry, folder), [])
        for image in images:
            matched[image] = caption
        if not images:
            unknown.append(entry)
    return matched, unknown


def _entry_key(entry: str, folder: Path) -> str:
    """An entry as `match_names` looks it up: relative to `folder`, or `/name` for a path on another machine."""
    path = PurePosixPath(entry.replace("\\", "/"))
    has_drive = re.match(r"[A-Za-z]:/", str(path))
    if not (path.is_absolute() or has_drive):
        return str(path)
    if path.is_relative_to(folder):
        return str(path.relative_to(folder))
    return f"/{path.name}"
