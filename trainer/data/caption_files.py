"""Read captions from sidecar files and from metadata files, and match them to images."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.data.captions import Caption, clean
from trainer.spec.errors import DataError
from trainer.spec.plan import Subset

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.json")  # found by themselves, in any folder
MAX_SIDECAR_BYTES = 1 << 20  # a caption is never that long: 1 MiB is some 200,000 words
NAME_KEYS = ("file_name", "image_path")
CAPTION_KEYS = ("caption", "text")


# ---- reading


def decode(data: bytes) -> tuple[str, bool]:
    """Text of a file, and whether it was not Unicode: UTF-8, UTF-16 with a mark, else Windows-1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) and len(data) % 2 == 0:
        return data.decode("utf-16", errors="replace"), False
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding), encoding != "utf-8-sig"
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), True


def sidecar_names(stem: str, extension: str) -> tuple[str, ...]:
    """The files that may hold the caption of `stem`, the first that exists counts."""
    extension = extension if extension.startswith(".") else f".{extension}"
    return tuple(dict.fromkeys(stem + e for e in (extension, ".txt", ".caption")))


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
    found: dict[str, Caption] = {}
    for where, row in _rows(path, text):
        names = (subset.source.image_column, *NAME_KEYS)
        name = next((row[k] for k in names if k and row.get(k)), None)
        if not isinstance(name, str):
            raise DataError(f"{where}: no {' or '.join(NAME_KEYS)}.")
        caption = _row_caption(row, subset, where=where)
        if caption is not None:
            before = found.get(name)
            found[name] = Caption(f"{before.text}\n{caption}" if before else caption, "metadata", legacy)
    return found


def _rows(path: Path, text: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """Each row and where it is, for messages."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 2):
            yield f"{path}, row {number}", row
        return
    documents = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for where, document in documents if suffix == ".jsonl" else [(str(path), text)]:
        try:
            value = json.loads(document)
        except ValueError as problem:
            raise DataError(f"{where}: not JSON: {problem}.") from problem
        yield from _json_rows(value, where=where, nested=suffix != ".jsonl")


def _json_rows(value: Any, *, where: str, nested: bool) -> Iterable[tuple[str, dict[str, Any]]]:
    if nested and isinstance(value, dict):
        for name, entry in value.items():
            row = entry if isinstance(entry, dict) else {"caption": entry}
            yield f"{where}, {name!r}", {**row, NAME_KEYS[0]: name}
    elif nested and isinstance(value, list):
        for number, row in enumerate(value, 1):
            yield from _json_rows(row, where=f"{where}, entry {number}", nested=False)
    elif isinstance(value, dict):
        yield where, value
    else:
        raise DataError(f"{where}: not an object with file_name and caption.")


def _row_caption(row: dict[str, Any], subset: Subset, *, where: str) -> str | None:
    """Caption and tags of a row, joined as sd-scripts does; None if it has neither."""
    keys = (subset.source.caption_column, *CAPTION_KEYS)
    key = next((k for k in keys if k and row.get(k) is not None), None)
    if key is None and row.get("tags") is None:
        return None
    caption = clean(_as_text(row[key], joint="\n", where=where)) if key else ""
    tags = clean(_as_text(row.get("tags") or "", joint=", ", where=where)).replace("\n", subset.caption_separator)
    lines = caption.split("\n") if subset.enable_wildcard else [caption]
    return "\n".join(subset.caption_separator.join(part for part in (line, tags) if part) for line in lines)


def _as_text(value: Any, *, joint: str, where: str) -> str:
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return joint.join(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: the caption is {value!r}, not a text.")
    return value


def match_names(
    entries: dict[str, Caption], names: Iterable[str], *, folder: Path
) -> tuple[dict[str, Caption], list[str]]:
    """Captions by picture name (relative to `folder`, with /), and the entries that name no picture.

    An entry may be the name, the name without its suffix, or an absolute path; one from another machine counts by its
    last part.
    """
    by_name: dict[str, list[str]] = {}
    for name in names:
        for key in {name, str(PurePosixPath(name).with_suffix("")), f"/{PurePosixPath(name).name}"}:
            by_name.setdefault(key, []).append(name)
    matched: dict[str, Caption] = {}
    unknown = []
    for entry, text in entries.items():
        path = PurePosixPath(entry.replace("\\", "/"))
        key = str(path)
        if path.is_absolute() or re.match(r"[A-Za-z]:/", key):
            key = str(path.relative_to(folder)) if path.is_relative_to(folder) else f"/{path.name}"
        images = by_name.get(key, [])
        matched.update(dict.fromkeys(images, text))
        if not images:
            unknown.append(entry)
    return matched, unknown
