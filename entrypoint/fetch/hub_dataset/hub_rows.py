"""Turn a dataset of the Hub into a folder of image files with captions, row by row.

`datasets` reads tables that hold images; `hub_folder` reads image files and archives. A child process does it (`python
-m entrypoint.fetch.hub_dataset.hub_rows`), without secrets and without network: its libraries take 300 MB that would
stay for the whole training, and a damaged file may crash them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from entrypoint.fetch.archive import Budget, Limits
from entrypoint.fetch.hub_dataset import hub_folder, hub_layout
from entrypoint.fetch.hub_dataset.hub_choice import ARCHIVES, CARDS, IMAGE_SUFFIXES, MOST_NAMED, STREAMED, is_metadata
from entrypoint.fetch.hub_dataset.hub_columns import (
    MOST_COLUMNS,
    find_caption_column,
    find_image_column,
    label_names,
    texts,
    unused_columns,
    value_of,
)
from entrypoint.system import public_addresses
from trainer.data.caption_files.formats import AskedColumns
from trainer.spec.errors import DataError, KilnError, SettingsError, StorageError
from trainer.spec.values import show, some
from trainer.storage.folders import storage_error
from trainer.storage.safe_names import safe_path

READERS = ("parquet", "arrow")  # of `datasets`; the others read no images, or pickles
MAX_IMAGE_BYTES = 2**28  # bytes
MOST_ROWS = 2_000_000
DEEPEST = 8  # lists in lists: no column of images or captions is deeper
VERSION = 3  # of how datasets are read: folders that an older version made are made again
# The first bytes of a file → its suffix. Anything else gets .png, and the trainer reports that it cannot read it.
MAGIC = (
    *((rb"\xff\xd8\xff", ".jpg"), (rb"\x89PNG\r\n", ".png"), (rb"RIFF....WEBP", ".webp"), (rb"GIF8", ".gif")),
    *((rb"BM", ".bmp"), (rb"II\*\0|MM\0\*", ".tif"), (rb"....ftypavi[fs]", ".avif"), (rb"....ftyp(hei|mif)", ".heic")),
)
MAGIC_BYTES = 16
NOT_HELD = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What the user chose of a dataset; None: not chosen."""

    variable: str  # how the user named the dataset, for messages
    split: str
    configuration: str | None = None
    image_column: str | None = None
    caption_column: str | None = None


def unpack(snapshot: Path, target: Path, asked: Asked) -> dict[str, Any]:
    """`write_dataset`, by a child process. Raises what it raises, and DataError if the child dies."""
    job: dict[str, Any] = {"snapshot": str(snapshot), "target": str(target), "asked": asdict(asked)}
    with tempfile.TemporaryDirectory() as scratch:
        kept = {k: os.environ[k] for k in ("PATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR") if k in os.environ}
        kept |= {"PYTHONPATH": str(Path(__file__).parents[3]), "HOME": scratch, "HF_HOME": scratch}
        kept |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "USE_TORCH": "0"}
        command = [
            sys.executable,
            "-m",
            "entrypoint.fetch.hub_dataset.hub_rows",
            json.dumps({**job, "scratch": scratch}),
        ]
        done = subprocess.run(  # noqa: S603
            command,
            env=kept,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            check=False,
        )
    answer = json.loads(done.stdout) if done.returncode == 0 else {}
    if "facts" in answer:
        return dict(answer["facts"])
    kind = {k.__name__: k for k in (SettingsError, StorageError)}.get(answer.get("error", ""), DataError)
    message = f"{asked.variable} cannot be read: its reader ended with code {done.returncode}."
    raise kind(answer.get("message") or message)


def main() -> None:
    """Do one job of `unpack` and print the outcome as JSON."""
    public_addresses.forbid()  # a dataset may name an address in the place of a file
    job = json.loads(sys.argv[1])
    target = Path(job["target"])
    answer: dict[str, Any]
    try:
        answer = {"facts": write_dataset(Path(job["snapshot"]), target, Asked(**job["asked"]), scratch=job["scratch"])}
    except KilnError as problem:
        answer = {"error": type(problem).__name__, "message": str(problem)}
    except OSError as problem:
        answer = {"error": "StorageError", "message": str(storage_error(problem, target))}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # a normal exit aborts if reading was interrupted, because Arrow's threads still run


def write_dataset(snapshot: Path, target: Path, asked: Asked, *, scratch: str) -> dict[str, Any]:
    """Write each row's image, bytes untouched, and metadata.jsonl (file_name, caption) into `target`.

    A row without an image becomes an empty file, so it is counted and reported like any other unusable image. Loose
    images with caption files are copied as they are. Returns counts, names of columns, and `notes`: sentences that the
    user must see. Raises SettingsError (columns, split, configuration), DataError (unreadable or dangerous content),
    OSError.
    """
    layout = hub_layout.resolve(snapshot, variable=asked.variable, configuration=asked.configuration, split=asked.split)
    facts: dict[str, Any] = {"subset": layout.configuration, "split": layout.split, "other_splits": [*layout.others]}
    tables = [name for name in layout.files if name.lower().endswith(STREAMED) and not is_metadata(name)]
    if any(name.lower().endswith((*IMAGE_SUFFIXES, *ARCHIVES)) for name in hub_folder.names(snapshot)):
        tables = [name for name in tables if _holds_images(snapshot / name)]
    if tables:
        return facts | _from_tables(snapshot, target, asked, layout, tables=tables, scratch=scratch)
    try:
        if hub_folder.has_sidecars_alone(layout):
            return facts | {"images": hub_folder.copy_files(snapshot, layout, target), "notes": []}
        found = hub_folder.read(snapshot, layout, target, AskedColumns(asked.image_column, asked.caption_column))
        features = _features_of(found.rows, found.image_columns)
        size = sum((snapshot / name).stat().st_size for name in layout.files)
        made = _written(iter(found.rows), features, target, asked, reader=_Reader(snapshot, _budget(size)))
    except DataError as problem:
        raise DataError(f"{asked.variable} is refused: {str(problem).rstrip('.')}.") from problem
    finally:
        shutil.rmtree(target / hub_folder.UNPACKED, ignore_errors=True)
    made["notes"] += found.notes
    return facts | made


def _from_tables(
    snapshot: Path, target: Path, asked: Asked, layout: hub_layout.Layout, *, tables: list[str], scratch: str
) -> dict[str, Any]:
    """The rows of parquet or arrow files. Memory does not grow with their number."""
    import datasets
    import pyarrow

    unreadable = (ValueError, KeyError, TypeError, NotImplementedError)
    try:
        stream = _stream(snapshot, scratch, layout, tables=tables, variable=asked.variable).decode(False)
        size = sum((snapshot / name).stat().st_size for name in layout.files)
        reader = _Reader(snapshot, _budget(size))
        try:
            made = _written(stream, dict(stream.features), target, asked, reader=reader)
        except DataError as problem:
            raise DataError(f"{asked.variable} is refused: {str(problem).rstrip('.')}.") from problem
    except (*unreadable, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as problem:
        raise DataError(
            f"{asked.variable}: its rows cannot be read ({type(problem).__name__}: {problem})."
        ) from problem
    if not made["images"]:
        raise DataError(f"{asked.variable}: the split {asked.split!r} is empty. Choose another with DATASET_SPLIT.")
    inside = str(snapshot.resolve()) + os.sep
    used = {os.path.relpath(path, inside) for path in reader.read_files} | set(tables)
    unused = [name for name in layout.files if name not in used and name not in CARDS]
    if unused:
        made["notes"].append(f"files that are not used: {some(unused, most=MOST_NAMED)}.")
    return made


def _holds_images(path: Path) -> bool:
    """Whether a table has a column that can hold images; others only name them. A damaged one is read, and refused."""
    import pyarrow
    import pyarrow.parquet

    if path.suffix.lower() == ".arrow":
        return True
    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError, ValueError):
        return True
    return any(word in str(field.type) for field in schema for word in ("binary", "bytes:"))


def _stream(snapshot: Path, scratch: str, layout: hub_layout.Layout, *, tables: list[str], variable: str) -> Any:
    """The split as an iterable dataset over local files."""
    import datasets
    import pyarrow.dataset

    datasets.disable_progress_bars()
    builder = datasets.load_dataset_builder(str(snapshot), layout.configuration, cache_dir=scratch)
    readers = {cls.__module__.rpartition(".")[2] for cls in type(builder).__mro__}
    if not readers & set(READERS):  # most of its files are something else
        reader = "arrow" if tables[0].lower().endswith(".arrow") else "parquet"
        places = [str(snapshot / name) for name in tables]
        builder = datasets.load_dataset_builder(reader, data_files={layout.split: places}, cache_dir=scratch)
    # Parquet: its defaults read whole files and row groups into memory.
    if hasattr(builder.config, "fragment_scan_options"):
        options = {"pre_buffer": False, "use_buffered_stream": True}
        builder.config.fragment_scan_options = pyarrow.dataset.ParquetFragmentScanOptions(**options)
        builder.config.batch_size = 8
    stream = builder.as_streaming_dataset(split=layout.split)
    if stream.features is None:
        raise DataError(f"{variable}: its files do not say what columns they have.")
    return stream


def _features_of(rows: list[Row], image_columns: Collection[str]) -> dict[str, Any]:
    """The columns of rows as `datasets` describes them."""
    features: dict[str, Any] = {column: _feature(Path(), None) for column in sorted(image_columns)}
    for row in rows:
        for name, value in row.items():
            if features.get(name) is None or isinstance(features[name], dict):
                features[name] = _feature(value, features.get(name))
    return {name: feature for name, feature in features.items() if feature is not None}


def _feature(value: Any, known: Any, *, depth: int = 0) -> Any:
    import datasets

    if depth > DEEPEST:
        return None
    if isinstance(value, Path):
        return datasets.Image()
    if isinstance(value, str):
        return datasets.Value("string")
    if isinstance(value, list) and value:
        inner = _feature(value[0], None, depth=depth + 1)
        return None if inner is None else datasets.List(inner)
    if isinstance(value, dict):
        inside = dict(known) if isinstance(known, dict) else {}
        for key, inner in value.items():
            inside[key] = _feature(inner, inside.get(key), depth=depth + 1)
        return inside
    return known if value is None else datasets.Value("float64")


def _budget(size: int) -> Budget:
    return Budget(size, Limits(entries=MOST_ROWS))


def _written(
    rows: Iterable[Row], features: dict[str, Any], target: Path, asked: Asked, *, reader: _Reader
) -> dict[str, Any]:
    """Choose the columns, write the rows, and say what takes no part."""
    images = find_image_column(asked.variable, features, asked.image_column)
    captions = find_caption_column(asked.variable, features, asked.caption_column, images)
    if hasattr(rows, "select_columns"):
        chosen = set()
        for column in (images, captions):
            if column in features:
                chosen.add(column)
            elif column:  # one inside another
                chosen.add(column.split(".")[0])
        rows = rows.select_columns(sorted(chosen))
    labels = label_names(features, captions) if captions else None
    facts = _write(iter(rows), target, images=images, captions=captions, labels=labels, reader=reader)
    facts["unused_columns"] = unused_columns(features, (images, captions))
    facts["notes"] = _notes(facts, texts(features, images))
    return facts


def _notes(facts: dict[str, Any], columns: list[str]) -> list[str]:
    """What a user must know of how the rows were read."""
    notes = []
    if facts["caption"] is None and columns:
        listed = some(columns, most=MOST_COLUMNS)
        notes.append(f"no column looks like captions. CAPTION_COLUMN can name one of: {listed}.")
    elif facts["caption"] is None:
        notes.append("there are no captions.")
    elif facts["caption"] is not None and facts["without_caption"]:
        notes.append(f"rows without {facts['caption']}: {facts['without_caption']} of {facts['images']}.")
    if facts["several_captions"]:
        notes.append(
            f"rows with several captions: {facts['several_captions']}. The first is trained, or one at random where "
            "dataset.json sets enable_wildcard."
        )
    if facts["several_images"]:
        notes.append(f"rows with several images: {facts['several_images']}. Each is trained, with the row's caption.")
    if facts["empty"]:
        notes.append(f"rows without an image: {facts['empty']} of {facts['images']}.")
    return notes


def _write(
    rows: Iterator[Row], target: Path, *, images: str, captions: str | None, labels: list[str] | None, reader: _Reader
) -> dict[str, Any]:
    counts = dict.fromkeys(("images", "empty", "without_caption", "several_captions", "several_images"), 0)
    # A lone half of a letter has no UTF-8; the backslash form of it is JSON's own.
    with (target / "metadata.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as metadata:
        for row in rows:
            value = value_of(row, images)
            several = value if isinstance(value, list) else [value]
            said = _captions(value_of(row, captions), labels) if captions else []
            counts["several_images"] += len(several) > 1
            # As many captions as images: one for each.
            paired = len(several) > 1 and len(said) == len(several)
            counts["several_captions"] += len(said) > 1 and not paired
            counts["without_caption"] += not said
            for index, item in enumerate(several):
                reader.budget.entry()
                lines = said[index : index + 1] if paired else said
                name = f"{counts['images']:06d}"
                if row.get(hub_folder.FOLDER):
                    name = f"{safe_path(str(row[hub_folder.FOLDER]))}/{name}"
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                written, size = reader.put(item, target, name)
                line = {"file_name": written}
                if lines:
                    line["caption"] = "\n".join(lines)
                metadata.write(json.dumps(line, ensure_ascii=False) + "\n")
                counts["images"] += 1
                counts["empty"] += not size
    return {**counts, "image": images, "caption": captions}


def _captions(value: Any, labels: list[str] | None) -> list[str]:
    """The captions of a row: lists give several, labels their names."""
    said = []
    for item in value if isinstance(value, list) else [value]:
        if labels is not None and isinstance(item, int):
            item = labels[item] if 0 <= item < len(labels) else None
        if isinstance(item, str) and item.strip():
            said.append(item)
    return said


class _Reader:
    """Writes images from values of `datasets`: bytes, or the path of a file in the dataset."""

    def __init__(self, source: Path, budget: Budget) -> None:
        self.inside, self.budget = str(source.resolve()) + os.sep, budget
        self.read_files: set[str] = set()  # named by rows

    def put(self, value: Any, target: Path, name: str) -> tuple[str, int]:
        """Write the image as `name`, with the suffix of its format; returns its name and size. Raises DataError."""
        if isinstance(value, Path):
            size = value.stat().st_size
            self._check_size(size, value.name)
            with value.open("rb") as file:
                written = name + _suffix(file.read(MAGIC_BYTES), value.name)
            self.budget.take(size)
            hub_folder.move_or_copy(value, target / written)
            return written, size
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path") or ""
        else:
            data, path = value, ""
        if not isinstance(path, str) or not isinstance(data, bytes | None):
            raise DataError(f"a row has {show(value)} in the place of an image")
        if data is None:
            data = self._file(path) if path else b""
        self.budget.take(len(data))
        written = name + _suffix(data, path)
        (target / written).write_bytes(data)
        return written, len(data)

    def _file(self, path: str) -> bytes:
        place = os.path.normpath(Path(self.inside) / path)
        if "://" in path or "::" in path or not place.startswith(self.inside):
            raise DataError(f"a row names an image outside of its dataset, {path!r}")
        try:
            with Path(place).open("rb") as file:
                data = file.read(MAX_IMAGE_BYTES + 1)
        except OSError as problem:
            if problem.errno not in NOT_HELD:
                raise
            return b""  # a row names an image that the dataset does not hold
        self._check_size(len(data), path)
        self.read_files.add(place)
        return data

    def _check_size(self, size: int, name: str) -> None:
        if size > MAX_IMAGE_BYTES:
            raise DataError(f"the image {name!r} is larger than {MAX_IMAGE_BYTES // 2**20} MiB")


def _suffix(data: bytes, path: str) -> str:
    """The suffix of an image's format: what its first bytes say, else its name's, else .png."""
    found = next((suffix for magic, suffix in MAGIC if re.match(magic, data, re.DOTALL)), None)
    named = PurePosixPath(path).suffix.lower()
    return found or (named if named in IMAGE_SUFFIXES else ".png")


if __name__ == "__main__":
    main()
