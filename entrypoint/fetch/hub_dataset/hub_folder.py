"""Rows of a dataset of image files, loose or in zips and tars, with metadata, caption files or neither.

What makes a row, in the Hub's words: a line of a metadata file (imagefolder), or files that share a name up to its
first dot (webdataset: `7.jpg`, `7.txt` and `7.json` are one row with the columns jpg, txt and json), or an image alone.
`datasets` reads the same layouts, but not those between them, which are as frequent: metadata beside a zip, captions in
some samples of a webdataset only, one metadata file above the folders of all splits.
"""

from __future__ import annotations

import posixpath
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from entrypoint.fetch import archive
from entrypoint.fetch.hub_dataset import hub_choice
from entrypoint.fetch.hub_dataset.hub_choice import IMAGE_SUFFIXES, MOST_NAMED, is_metadata
from entrypoint.fetch.hub_dataset.hub_columns import CAPTIONS
from entrypoint.fetch.hub_dataset.hub_layout import Layout
from trainer.data.caption_files.findings import Findings
from trainer.data.caption_files.formats import IMAGE_NAMES, SUFFIXES, AskedColumns, normal, parse_json, read_records
from trainer.data.caption_files.matching import ImageNames
from trainer.data.caption_files.sidecars import USUAL_EXTENSIONS
from trainer.data.caption_files.text_encoding import decode_all
from trainer.data.folder_listing import Folder
from trainer.data.folders.conventions import read_folders
from trainer.data.records import WARNING
from trainer.spec.errors import DataError
from trainer.spec.values import some

IMAGE = "image"  # the column of the images, as the Hub names it
LABEL = "label"
KEY = "__key__"
FOLDER = "__folder__"  # that the image is written into
UNPACKED = ".unpacked"  # beside the images that are made: they are moved from there
FILE_NAME = "file_name"  # the Hub's column of names; x_file_name makes a column x of images
TEXT_FIELDS = ("txt", "text", "caption", "transcript")
LARGEST_SIDECAR = 2**20  # bytes of a file about one image
LARGEST_TABLE = 2**28  # bytes of a metadata file, which is read as a whole
Row = dict[str, Any]


@dataclass
class Found:
    """The rows of a split. An image is the path of a file, or None if the dataset does not hold it."""

    rows: list[Row]
    image_columns: set[str] = field(default_factory=set)  # of images that metadata names; they may all be missing
    notes: list[str] = field(default_factory=list)


@dataclass
class _Files:
    """Every file of the split by its name in the repository; a file of an archive is below the archive's name."""

    places: dict[str, Path] = field(default_factory=dict)
    packed_in: dict[str, str] = field(default_factory=dict)  # file → the archive that it was in
    used: set[str] = field(default_factory=set)

    def images(self) -> list[str]:
        return [name for name in self.places if name.lower().endswith(IMAGE_SUFFIXES)]


def read(snapshot: Path, layout: Layout, target: Path, asked: AskedColumns) -> Found:
    """The rows of a split. Archives are unpacked into `target`/.unpacked, from where their images may be moved.

    Raises DataError for a refused archive, unreadable metadata, or metadata of which no row fits an image.
    """
    files = _unpack(snapshot, layout.files, target)
    if not files.images() and _tables(files):  # tables of a split, and images beside them that belong to none
        of_others = set().union(*layout.others.values()) - set(layout.files)
        files = _unpack(snapshot, [name for name in names(snapshot) if name not in of_others], target)
    if not files.images():
        raise DataError(f"the split {layout.split!r} has no image files")
    found = _listed(snapshot, layout, files, asked)
    if found is None:
        found = Found(_samples(files))
        has_folders = _keep_folders(files, found.rows)
        if not has_folders and not any(len(row.keys() - {IMAGE, KEY}) for row in found.rows):
            _add_labels(files, found.rows)
    unused = [name for name in files.places if name not in files.used]
    images = set(files.images())
    unlisted = [name for name in unused if name in images]
    other_files = [name for name in unused if name not in images]
    if unlisted:
        found.notes.append(f"images that its metadata does not list are not used: {some(unlisted, most=MOST_NAMED)}.")
    if other_files:
        found.notes.append(f"files that are not used: {some(other_files, most=MOST_NAMED)}.")
    return found


def write_json_captions(folder: Path) -> int:
    """Write `7.txt` with the caption that `7.json` has, for images of an unpacked webdataset without a text.

    Returns how many. The trainer reads texts beside images, and JSON only where it lists many images.
    """
    count = 0
    for path in sorted(folder.rglob("*.json")):
        beside = [path.with_suffix(suffix) for suffix in USUAL_EXTENSIONS]
        has_image = any(path.with_suffix(suffix).is_file() for suffix in IMAGE_SUFFIXES)
        if not has_image or any(text.is_file() for text in beside) or path.stat().st_size > LARGEST_SIDECAR:
            continue
        row = _json(_text(path.name, path.read_bytes()), path.name)
        for column in CAPTIONS if isinstance(row, dict) else ():
            caption = row.get(column)
            if isinstance(caption, list) and all(isinstance(line, str) for line in caption):
                caption = "\n".join(caption)
            if isinstance(caption, str) and caption.strip():
                path.with_suffix(".txt").write_text(caption, encoding="utf-8")
                count += 1
                break
    return count


def names(snapshot: Path) -> list[str]:
    """All files of a downloaded dataset."""
    return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())


# ---- files


def _unpack(snapshot: Path, wanted: Iterable[str], target: Path) -> _Files:
    files = _Files()
    for name in wanted:
        if name.lower().endswith(hub_choice.ARCHIVES):
            place = target / UNPACKED / name
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            archive.extract(snapshot / name, place)
            for path in sorted(path for path in place.rglob("*") if path.is_file()):
                member = f"{name}/{path.relative_to(place).as_posix()}"
                files.places[member] = path
                files.packed_in[member] = name
        elif PurePosixPath(name).name not in hub_choice.CARDS:
            files.places[name] = snapshot / name
    return files


def _tables(files: _Files) -> dict[str, Path]:
    """The tables that may name images. `7.json` beside `7.jpg` is about that image alone."""
    keys = {_key(image) for image in files.images()}
    tables = {}
    for name, path in files.places.items():
        if name.lower().endswith((*SUFFIXES, ".parquet")) and (is_metadata(name) or _key(name) not in keys):
            tables[name] = path
    return tables


# ---- webdatasets, and images alone


def _samples(files: _Files) -> list[Row]:
    """One row for each image; the files that share its name up to the first dot are the row's other columns."""
    beside: dict[str, list[str]] = defaultdict(list)
    for name in files.places:
        beside[_key(name)].append(name)
    rows = []
    for key, names in beside.items():
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        if not images:
            continue
        others = [name for name in names if name not in images]
        packed = files.packed_in.get(images[0])
        if packed is not None and not packed.lower().endswith(".zip"):
            rows.append(_sample(key.removeprefix(f"{packed}/"), images, others, files))
            continue
        for image in images:  # loose files and zips: 1.jpg and 1.png are two images
            row: Row = {IMAGE: files.places[image]}
            files.used.add(image)
            row |= _fields(others, files)
            rows.append(row)
    return _with_one_column(rows)


def _with_one_column(rows: list[Row]) -> list[Row]:
    """Rows whose only image is a jpg here and a png there have one column of images."""
    columns = set()
    for row in rows:
        names = [name for name, value in row.items() if isinstance(value, Path)]
        if len(names) > 1:
            return rows
        columns |= set(names)
    if len(columns) > 1:
        for row in rows:
            for name in columns & row.keys():
                if isinstance(row[name], Path):
                    row[IMAGE] = row.pop(name)
    return rows


def _sample(key: str, images: list[str], others: list[str], files: _Files) -> Row:
    """A row as in a webdataset, whose columns are called as the files end."""
    row: Row = {KEY: key}
    for image in images:
        row[_ending(image)] = files.places[image]
        files.used.add(image)
    return row | _fields(others, files)


def _fields(names: list[str], files: _Files) -> Row:
    """The columns that files beside an image make: texts, numbers of classes, JSON."""
    row: Row = {}
    for name in names:
        ending = _ending(name)
        kind = ending.rpartition(".")[2].lower()
        if kind in TEXT_FIELDS or kind in ("json", "jsn", "cls"):
            text = _text(name, files.places[name].read_bytes())
            files.used.add(name)
            if kind in ("json", "jsn"):
                row[ending] = _json(text, name)
            else:
                row[ending] = int(text) if kind == "cls" and text.strip().isdecimal() else text
    return row


def _text(name: str, data: bytes) -> str:
    """The text of a file in whichever encoding it has. Raises DataError if none fits."""
    decoded = decode_all({name: data})[name]
    if not decoded.encoding:
        raise DataError(f"{name} is not text in any known encoding")
    return decoded.text


def _json(text: str, name: str) -> Any:
    try:
        return parse_json(text, where=name)
    except ValueError as problem:
        raise DataError(str(problem)) from problem


def _key(name: str) -> str:
    """The name up to the first dot after its folder, as webdatasets group files."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}" if folder else last.partition(".")[0]


def _ending(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2]


def _keep_folders(files: _Files, rows: list[Row]) -> bool:
    """Let images stay in their folders where these mean something, as `10_ohwx woman` does; returns whether they do."""
    inside = {}  # image → its name inside of its archive, since shards may have numbers too
    for name in files.images():
        inside[name] = name.removeprefix(f"{files.packed_in.get(name, '')}/")
    if not read_folders(Folder(Path(), images=sorted(inside.values())), "").parts:
        return False
    folders = {files.places[name]: inside[name].rpartition("/")[0] for name in inside}
    for row in rows:
        for value in list(row.values()):  # a webdataset's column has the name of the image's ending
            if isinstance(value, Path) and value in folders:
                row[FOLDER] = folders[value]
    return True


def _add_labels(files: _Files, rows: list[Row]) -> None:
    """The name of each image's folder as its label, where several folders on one level hold all images."""
    folders = []
    for row in rows:
        if IMAGE not in row:
            return
    images = files.images()
    for name in images:
        folders.append(PurePosixPath(name).parent)
    names = {folder.name for folder in folders}
    if len(names) > 1 and len({len(folder.parts) for folder in folders}) == 1:
        by_place = {files.places[name]: folder.name for name, folder in zip(images, folders, strict=True)}
        for row in rows:
            row[LABEL] = by_place[row[IMAGE]]


# ---- metadata


def _listed(snapshot: Path, layout: Layout, files: _Files, asked: AskedColumns) -> Found | None:
    """The rows of the metadata files, or of other tables that name images; None if there are none.

    A metadata file above the split's files counts, though it belongs to no split by its name.
    """
    tables = {name: files.places[name] for name in files.places if is_metadata(name)}
    above = set()
    for name in layout.files:
        above |= {str(parent) for parent in PurePosixPath(name).parents}
    shared = []
    for folder in sorted(above):
        for path in sorted((snapshot / folder).glob("*")):
            name = posixpath.normpath(f"{folder}/{path.name}")
            if is_metadata(name) and name not in tables and path.is_file():
                tables[name] = path
                shared.append(name)
    if not tables:
        tables = _tables(files)
        if not tables:
            return None
    by_name = _Lookup(files)
    found = Found([])
    missing: list[str] = []
    for name, path in tables.items():
        rows = _read_table(path, asked, found)
        _add_rows(name, rows, by_name, found, missing=missing, is_shared=name in shared)
    if not any(_images(row, found) for row in found.rows):
        if not any(is_metadata(name) for name in tables):
            return None  # tables about something else: they are reported as files that take no part
        raise DataError(_no_match(tables, missing, files))
    if missing:
        found.notes.append(f"its metadata names images that are missing: {some(missing, most=MOST_NAMED)}.")
    return found


def _add_rows(
    name: str, rows: list[tuple[str, Row]], by_name: _Lookup, found: Found, *, missing: list[str], is_shared: bool
) -> None:
    """Add the rows of one table; `is_shared`: it also lists the images of other splits."""
    folder = posixpath.dirname(name)
    image_columns = _image_columns(rows, folder, by_name)
    if not image_columns:
        if is_metadata(name) and rows:
            columns = ", ".join(_columns(rows)) or "nothing"
            raise DataError(f"{name}: no column has the names of the images; the columns are {columns}")
        return
    by_name.files.used.add(name)
    for where, row in rows:
        images: Row = {}
        for column, made in image_columns.items():
            image = _image_of(row, column, folder, by_name, where=f"{name}, {where}")
            if image is None and not is_shared:
                missing.append(str(row[column]))
            if image is not None:
                by_name.files.used.add(image)
            images[made] = None if image is None else by_name.files.places[image]
        if is_shared and not any(images.values()):
            continue
        # A column of that name would choose the folder that the image is written into.
        others = {key: value for key, value in row.items() if key not in image_columns and key != FOLDER}
        found.rows.append({**images, **others})
        found.image_columns |= set(images)


def _images(row: Row, found: Found) -> list[Path]:
    """The images that a row names and the dataset holds."""
    return [row[column] for column in found.image_columns if row.get(column)]


def _image_of(row: Row, column: str, folder: str, by_name: _Lookup, *, where: str) -> str | None:
    """The image that a row names; None if the dataset does not hold it. Raises DataError."""
    entry = row.get(column)
    if isinstance(entry, int) and not isinstance(entry, bool):
        entry = str(entry)
    if not isinstance(entry, str) or not entry.strip():
        raise DataError(f"{where}: no {column}")
    if "://" in entry or entry.startswith("/") or ".." in PurePosixPath(entry.replace("\\", "/")).parts:
        raise DataError(f"{where} names an image outside of its dataset, {entry!r}")
    return by_name.find(folder, entry)


def _columns(rows: list[tuple[str, Row]]) -> list[str]:
    """The columns of the first rows, in their order."""
    columns: dict[str, None] = {}
    for _, row in rows[:100]:
        columns |= dict.fromkeys(key for key in row if key)
    return list(columns)


def _image_columns(rows: list[tuple[str, Row]], folder: str, by_name: _Lookup) -> dict[str, str]:
    """The columns that name image files, each with the name of the column of images that they make.

    As in `datasets`: file_name makes image, x_file_name makes x. Without one of these, a column with values that are
    names of images of the dataset.
    """
    columns = _columns(rows)
    named = {}
    for column in columns:
        if normal(column) == FILE_NAME:
            named[column] = IMAGE
        elif normal(column).endswith(f"_{FILE_NAME}"):
            named[column] = column[: -len(FILE_NAME) - 1]
    if named:
        return named
    usual_first = sorted(columns, key=lambda column: (*IMAGE_NAMES, normal(column)).index(normal(column)))
    for column in usual_first:
        values = [row.get(column) for _, row in rows[:50]]
        if any(isinstance(value, str) and by_name.find(folder, value) for value in values):
            return {column: column}
    return {}


class _Lookup:
    """Finds the image that a row of a metadata file names."""

    def __init__(self, files: _Files) -> None:
        self.files = files
        self._images = files.images()
        self._by_folder: dict[str, ImageNames] = {}  # folder of a metadata file → the images below it

    def find(self, folder: str, entry: str) -> str | None:
        """The image `entry` of a table in `folder`; None if there is none, or if it may be several."""
        if folder not in self._by_folder:
            self._by_folder[folder] = self._below(folder)
        found = self._by_folder[folder].find(entry)
        stems = {PurePosixPath(name).with_suffix("") for name in found}
        if len(stems) != 1:
            return None
        return posixpath.join(folder, found[0])  # of a.png and a.jpg, which `a` names, the first

    def _below(self, folder: str) -> ImageNames:
        prefix = f"{folder}/" if folder else ""
        names = []
        aliases = []
        for image in self._images:
            if not image.startswith(prefix):
                continue
            name = image.removeprefix(prefix)
            names.append(name)
            for alias in self._aliases(image):
                if alias.startswith(prefix):
                    aliases.append((alias.removeprefix(prefix), name))
        return ImageNames(names, folder=Path(folder), aliases=aliases)

    def _aliases(self, name: str) -> Iterator[str]:
        """How metadata beside an archive names a file in it: with or without the archive's name, or a folder's."""
        packed = self.files.packed_in.get(name)
        if packed is not None:
            inside = name.removeprefix(f"{packed}/")
            folder, last = posixpath.split(packed)
            yield posixpath.join(folder, inside)
            yield posixpath.join(folder, last.partition(".")[0], inside)
            yield posixpath.join(folder, inside.partition("/")[2] or inside)


def _read_table(path: Path, asked: AskedColumns, found: Found) -> list[tuple[str, Row]]:
    """The rows of a csv, tsv, jsonl, json or parquet file, each after its place. Raises DataError."""
    if path.stat().st_size > LARGEST_TABLE:
        raise DataError(f"{path.name} is larger than {LARGEST_TABLE // 2**20} MiB")
    if path.suffix.lower() == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as problem:
            raise DataError(f"{path.name} is not a parquet file, or a damaged one: {problem}") from problem
        return [(f"row {number}", row) for number, row in enumerate(rows, 1)]
    findings = Findings()
    try:
        records = read_records(path.name, _text(path.name, path.read_bytes()), asked, findings)
    except ValueError as problem:
        raise DataError(str(problem)) from problem
    if findings.problems:
        raise DataError(" ".join(findings.problems))
    found.notes += [note.removeprefix(WARNING) for note in findings.notes]
    found.notes += [f"{unused}." for unused in findings.unused]
    return records


def _no_match(tables: dict[str, Path], missing: list[str], files: _Files) -> str:
    named = missing[0] if missing else "nothing"
    return (
        f"{next(iter(tables))} names no image of the split: it names {named!r}, and the dataset holds "
        f"{files.images()[0]!r}"
    )


def has_sidecars_alone(layout: Layout) -> bool:
    """Whether the split is loose images with caption files, which the trainer reads as it reads a local folder."""
    names = [name for name in layout.files if PurePosixPath(name).name not in hub_choice.CARDS]
    if any(name.lower().endswith((*hub_choice.ARCHIVES, *SUFFIXES, *hub_choice.STREAMED)) for name in names):
        return False
    return any(name.lower().endswith(USUAL_EXTENSIONS) for name in names)


def copy_files(snapshot: Path, layout: Layout, target: Path) -> int:
    """Copy the images of a split and their caption files into `target`; returns how many images. Raises OSError."""
    count = 0
    for name in layout.files:
        if name.lower().endswith((*IMAGE_SUFFIXES, *USUAL_EXTENSIONS)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / name, target / name)
            count += name.lower().endswith(IMAGE_SUFFIXES)
    return count


def move_or_copy(place: Path, target: Path) -> None:
    """Put an image into its place: one that was unpacked is moved, one of the Hub's cache copied."""
    if UNPACKED in place.parts:
        place.replace(target)
    else:
        shutil.copyfile(place, target)
