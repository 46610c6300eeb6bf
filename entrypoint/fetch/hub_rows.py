"""Turn a dataset of the Hub into a folder of image files with captions, row by row, with the `datasets` library.

A child process reads (`python -m entrypoint.fetch.hub_rows`), without secrets and without network: its libraries take
300 MB that would stay for the whole training, and a damaged file may crash them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from entrypoint.fetch.archive import Budget, Limits
from entrypoint.system.folders import storage_error
from trainer.spec.errors import DataError, KilnError, SettingsError, StorageError

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".avif", ".jxl", ".heic", ".heif"),
)
TABLES = (".parquet", ".arrow", ".zip", ".tar")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SIDECARS = (".caption", ".txt")
CAPTIONS = (
    *("caption", "captions", "text", "texts", "prompt", "prompts", "description", "descriptions"),
    *("tags", "tag_string", "label", "labels"),
)
READERS = ("parquet", "arrow", "imagefolder", "webdataset")  # of `datasets`; the others read no images, or pickles
MAX_IMAGE_BYTES = 2**28  # bytes
MOST_ROWS = 2_000_000
# The first bytes of a file → its suffix. Anything else gets .png, and the trainer reports that it cannot read it.
MAGIC = (
    *((rb"\xff\xd8\xff", ".jpg"), (rb"\x89PNG\r\n", ".png"), (rb"RIFF....WEBP", ".webp"), (rb"GIF8", ".gif")),
    *((rb"BM", ".bmp"), (rb"II\*\0|MM\0\*", ".tif"), (rb"....ftypavi[fs]", ".avif"), (rb"....ftyp(hei|mif)", ".heic")),
)


@dataclass(frozen=True)
class Choice:
    """The files that are needed of a dataset's repository."""

    names: tuple[str, ...]
    has_sidecars: bool  # one caption file for each image, a layout that `datasets` does not support


def choose(variable: str, repository: str, names: Collection[str]) -> Choice:
    """Which of a repository's files to download.

    Raises SettingsError for a dataset that needs its own script, DataError if it has no images.
    """
    script = f"{repository.split('/')[-1]}.py"
    if script in names:
        raise SettingsError(
            f"{variable} is read by a script of its own ({script}), and code from a dataset is never run. Set "
            "DATASET_REVISION=refs/convert/parquet if its page offers a parquet version, or convert it."
        )
    visible = [n for n in names if not any(part.startswith(".") for part in PurePosixPath(n).parts)]
    images = [n for n in visible if n.lower().endswith(IMAGE_SUFFIXES)]
    tables = [n for n in visible if n.lower().endswith(TABLES) or n.split("/")[-1] in METADATA]
    stems = {n.rpartition(".")[0] for n in images}
    sidecars = [n for n in visible if n.lower().endswith(SIDECARS) and n.rpartition(".")[0] in stems]
    if not images and not [n for n in tables if n.split("/")[-1] not in METADATA]:
        kinds = ", ".join(sorted({PurePosixPath(n).suffix or n for n in visible})[:12]) or "nothing"
        raise DataError(
            f"{variable} has no images: it holds {kinds}. Needed are parquet files, image files or zips of them."
        )
    if sidecars and not tables:
        return Choice((*images, *sidecars), True)
    return Choice((*images, *tables, *(n for n in names if n == "README.md")), False)


def copy_files(snapshot: Path, names: Collection[str], target: Path) -> dict[str, Any]:
    """Copy images and their sidecars into `target`. Raises OSError."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(snapshot / name, target / name)
    return {"images": sum(n.lower().endswith(IMAGE_SUFFIXES) for n in names)}


def unpack(
    snapshot: Path, target: Path, *, variable: str, split: str, image_column: str | None, caption_column: str | None
) -> dict[str, Any]:
    """`write_rows`, by a child process. Raises what it raises, and DataError if the child dies."""
    job: dict[str, Any] = {"snapshot": str(snapshot), "target": str(target), "variable": variable, "split": split}
    job |= {"image_column": image_column, "caption_column": caption_column}
    with tempfile.TemporaryDirectory() as scratch:
        kept = {k: os.environ[k] for k in ("PATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR") if k in os.environ}
        kept |= {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": scratch, "HF_HOME": scratch}
        kept |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "USE_TORCH": "0"}
        command = [sys.executable, "-m", "entrypoint.fetch.hub_rows", json.dumps({**job, "scratch": scratch})]
        done = subprocess.run(command, env=kept, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=False)  # noqa: S603
    answer = json.loads(done.stdout) if done.returncode == 0 else {}
    if "facts" in answer:
        return dict(answer["facts"])
    kind = {k.__name__: k for k in (SettingsError, StorageError)}.get(answer.get("error", ""), DataError)
    raise kind(answer.get("message") or f"{variable} cannot be read: its reader ended with code {done.returncode}.")


def main() -> None:
    """Do one job of `unpack` and print the outcome as JSON."""
    job = json.loads(sys.argv[1])
    snapshot, target = Path(job.pop("snapshot")), Path(job.pop("target"))
    answer: dict[str, Any]
    try:
        answer = {"facts": write_rows(snapshot, target, **job)}
    except KilnError as problem:
        answer = {"error": type(problem).__name__, "message": str(problem)}
    except OSError as problem:
        answer = {"error": "StorageError", "message": str(storage_error(problem, target))}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # a normal exit aborts if reading was interrupted, because Arrow's threads still run


def write_rows(
    snapshot: Path,
    target: Path,
    *,
    variable: str,
    split: str,
    image_column: str | None,
    caption_column: str | None,
    scratch: str,
) -> dict[str, Any]:
    """Write each row's image, bytes untouched, and metadata.jsonl (file_name, caption) into `target`.

    Memory does not grow with the number of rows. A row without an image becomes an empty file, so it is counted and
    reported like any other unusable image. Returns counts and column names. Raises SettingsError (columns,
    split, configuration), DataError (unreadable or dangerous content), OSError.
    """
    import datasets
    import pyarrow

    unreadable = (ValueError, KeyError, TypeError, NotImplementedError)
    try:
        stream, files = _stream(snapshot, scratch, variable=variable, split=split)
        images = find_image_column(variable, dict(stream.features), image_column)
        captions = find_caption_column(variable, dict(stream.features), caption_column, images)
        features = stream.features
        stream = stream.select_columns([c for c in (images, captions) if c])
        if isinstance(features[images], datasets.Image):
            stream = stream.cast_column(images, datasets.Image(decode=False))
        labels = getattr(features[captions], "names", None) if captions else None
        try:
            facts = _write(iter(stream), target, images=images, captions=captions, labels=labels, source=snapshot)
        except DataError as problem:
            raise DataError(f"{variable} is refused: {problem}.") from problem
    except (*unreadable, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as problem:
        raise DataError(f"{variable}: its rows cannot be read ({type(problem).__name__}: {problem}).") from problem
    facts["unlisted"] = max(0, sum(f.lower().endswith(IMAGE_SUFFIXES) for f in files) - facts["images"])
    if not facts["images"]:
        raise DataError(f"{variable}: the split {split!r} is empty. Choose another with DATASET_SPLIT.")
    return facts


def _stream(snapshot: Path, scratch: str, *, variable: str, split: str) -> tuple[Any, list[str]]:
    """The split as an iterable dataset over local files, and those files."""
    import datasets
    import pyarrow.dataset

    datasets.disable_progress_bars()
    configurations = datasets.get_dataset_config_names(str(snapshot))
    name = "default" if "default" in configurations else configurations[0]
    if len(configurations) > 1 and name != "default":
        raise SettingsError(
            f"{variable} has several configurations ({', '.join(configurations)}) and no default one. Copy the wanted "
            "files into a folder or a dataset of their own."
        )
    builder = datasets.load_dataset_builder(str(snapshot), name, cache_dir=scratch)
    readers = {cls.__module__.rpartition(".")[2] for cls in type(builder).__mro__}
    if not readers & set(READERS):
        raise DataError(f"{variable} is not a dataset of images: it is read as {builder.dataset_name}.")
    files = {str(key): list(value) for key, value in builder.config.data_files.items()}
    inside = str(snapshot.resolve()) + os.sep  # a dataset's README may name files anywhere
    for file in (f for some in files.values() for f in some):
        if not os.path.normpath(file).startswith(inside):
            raise DataError(f"{variable} names a file outside of itself, {file!r}, and is refused.")
    if split not in files:
        raise SettingsError(f"DATASET_SPLIT={split}: {variable} has no such split, only {', '.join(files)}.")
    # Parquet: its defaults read whole files and row groups into memory.
    if hasattr(builder.config, "fragment_scan_options"):
        options = {"pre_buffer": False, "use_buffered_stream": True}
        builder.config.fragment_scan_options = pyarrow.dataset.ParquetFragmentScanOptions(**options)
        builder.config.batch_size = 8
    stream = builder.as_streaming_dataset(split=split)
    if stream.features is None:
        raise DataError(f"{variable}: its files do not say what columns they have.")
    return stream, files[split]


def find_image_column(variable: str, features: dict[str, Any], asked: str | None) -> str:
    """The column of images: the one asked for, or the only one. Raises SettingsError that lists the columns."""
    fit = [name for name, feature in features.items() if _is_image(feature)]
    columns = ", ".join(features)
    if asked is not None:
        if asked not in features:
            raise SettingsError(f"IMAGE_COLUMN={asked}: {variable} has no such column, only {columns}.")
        if asked not in fit and getattr(features[asked], "dtype", "") not in ("binary", "large_binary"):
            raise SettingsError(
                f"IMAGE_COLUMN={asked}: that column of {variable} holds no images (columns: {columns})."
            )
        return asked
    if len(fit) != 1:
        many = f"several columns of images ({', '.join(fit)})" if fit else "no column of images"
        raise SettingsError(f"{variable} has {many}. Choose one with IMAGE_COLUMN; the columns are {columns}.")
    return fit[0]


def _is_image(feature: Any) -> bool:
    if isinstance(feature, dict):  # another library wrote it: bytes and path, without the image type
        return set(feature) == {"bytes", "path"}
    return type(feature).__name__ == "Image"


def find_caption_column(variable: str, features: dict[str, Any], asked: str | None, images: str) -> str | None:
    """The column of captions: the one asked for, or one with a common name, or None.

    Raises SettingsError with the columns if it does not exist, or if several could be meant.
    """
    columns = [name for name in features if name != images]
    if asked is not None:
        if asked not in columns:
            raise SettingsError(
                f"CAPTION_COLUMN={asked}: {variable} has no such column, only {', '.join(columns) or 'images'}."
            )
        if not _is_text(features[asked]):
            raise SettingsError(f"CAPTION_COLUMN={asked}: that column of {variable} holds no text.")
        return asked
    fit = [name for name in columns if _is_text(features[name])]
    for usual in CAPTIONS:
        for name in fit:
            if name.casefold() == usual:
                return name
    near = [name for name in fit if re.search(r"caption|prompt|text|description", name, re.IGNORECASE)]
    if len(near) > 1:
        raise SettingsError(f"{variable} has several columns of captions. Choose CAPTION_COLUMN: {', '.join(near)}.")
    return near[0] if near else None


def _is_text(feature: Any) -> bool:
    """Whether a column holds texts, lists of texts, or labels with names."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else feature)
    return hasattr(feature, "names") or getattr(inner, "dtype", "") in ("string", "large_string")


def _write(
    rows: Iterator[dict[str, Any]],
    target: Path,
    *,
    images: str,
    captions: str | None,
    labels: list[str] | None,
    source: Path,
) -> dict[str, Any]:
    count = empty = silent = 0
    size = sum(p.stat().st_size for p in source.rglob("*") if p.is_file())
    reader = _Reader(source, Budget(size, Limits(entries=MOST_ROWS)))
    with (target / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for row in rows:
            reader.budget.entry()
            data, suffix = reader.image(row[images])
            line = {"file_name": f"{count:06d}{suffix}"}
            caption = _caption(row[captions], labels) if captions else None
            if caption is not None:
                line["caption"] = caption
            (target / line["file_name"]).write_bytes(data)
            metadata.write(json.dumps(line, ensure_ascii=False) + "\n")
            count, empty, silent = count + 1, empty + (not data), silent + (caption is None)
    reader.close()
    return {"images": count, "empty": empty, "without_caption": silent, "image": images, "caption": captions}


def _caption(value: Any, labels: list[str] | None) -> str | None:
    """A caption as text: lists become lines, labels their names; None where there is none."""
    if labels is not None and isinstance(value, int):
        value = labels[value] if 0 <= value < len(labels) else None
    if isinstance(value, list):
        value = "\n".join(line for line in value if isinstance(line, str) and line.strip())
    return value if isinstance(value, str) and value.strip() else None


class _Reader:
    """Reads images from values of `datasets`: bytes, or the path of a file in the dataset or in one of its zips."""

    def __init__(self, source: Path, budget: Budget) -> None:
        self.inside, self.budget = str(source.resolve()) + os.sep, budget
        self.zip: zipfile.ZipFile | None = None  # the last one used: rows come in the order of the files

    def image(self, value: Any) -> tuple[bytes, str]:
        """The image's bytes (empty if there is none) and the suffix for their format. Raises DataError."""
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path") or ""
        else:
            data, path = value, ""
        if data is None:
            data = self._file(path) if path else b""
        self.budget.take(len(data))
        found = next((suffix for magic, suffix in MAGIC if re.match(magic, data, re.DOTALL)), None)
        named = PurePosixPath(path.split("::")[0]).suffix.lower()
        return data, found or (named if named in IMAGE_SUFFIXES else ".png")

    def _file(self, path: str) -> bytes:
        member, _, container = path.removeprefix("zip://").partition("::")
        place = os.path.normpath(container or path)
        if not place.startswith(self.inside):
            raise DataError(f"a row names an image outside of its dataset, {path!r}")
        try:
            with self._open_in_zip(place, member) if container else Path(place).open("rb") as file:
                data = file.read(MAX_IMAGE_BYTES + 1)
        except (FileNotFoundError, KeyError):
            return b""  # a row names an image that the dataset does not hold
        if len(data) > MAX_IMAGE_BYTES:
            raise DataError(f"the image {member!r} is larger than {MAX_IMAGE_BYTES // 2**20} MiB")
        return data

    def _open_in_zip(self, container: str, member: str) -> Any:
        if self.zip is None or self.zip.filename != container:
            self.close()
            self.zip = zipfile.ZipFile(container)
        return self.zip.open(member)

    def close(self) -> None:
        if self.zip is not None:
            self.zip.close()


if __name__ == "__main__":
    main()
