"""Which files of a dataset's repository are downloaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from trainer.spec.errors import DataError, SettingsError

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".avif", ".jxl", ".heic", ".heif"),
)
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
OTHER_ARCHIVES = re.compile(r"\.(7z|rar|zst|lz4|z\d\d|part\d+)$|\.(zip|tar|7z)\.\d+$")
STREAMED = (".parquet", ".arrow")  # tables that may hold images
LISTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")  # tables that name image files
METADATA = re.compile(r"metadata\.(csv|jsonl|parquet|json)")
SIDECARS = (".caption", ".txt")
CARDS = ("README.md", ".huggingface.yaml")  # say which files belong to which configuration and split
NEVER_DATA = re.compile(r"(readme|license|licence|notice|\.gitattributes|\.gitignore)(\.\w+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """The files that are needed of a dataset's repository, and those that take no part."""

    names: tuple[str, ...]
    left_out: tuple[str, ...]


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
    visible = [name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
    images = [name for name in visible if name.lower().endswith(IMAGE_SUFFIXES)]
    archives = [name for name in visible if name.lower().endswith(ARCHIVES)]
    streamed = [name for name in visible if name.lower().endswith(STREAMED) and not is_metadata(name)]
    if not images and not archives and not streamed:
        raise DataError(_without_images(variable, visible))
    wanted = [*images, *archives, *streamed]
    if images or archives:
        wanted += [name for name in visible if is_metadata(name)]
        stems = {name.rpartition(".")[0] for name in images}
        wanted += [name for name in visible if name.lower().endswith(SIDECARS) and name.rpartition(".")[0] in stems]
        if not streamed:
            wanted += [name for name in visible if name.lower().endswith(LISTS) and not is_metadata(name)]
    wanted += [name for name in names if name in CARDS]
    taken = set(wanted)
    left_out = [name for name in visible if name not in taken and not NEVER_DATA.fullmatch(PurePosixPath(name).name)]
    return Choice(tuple(wanted), tuple(left_out))


def is_metadata(name: str) -> bool:
    """Whether a file lists the images of its folder, by the convention of the Hub."""
    return METADATA.fullmatch(PurePosixPath(name).name) is not None


def some(names: Sequence[str]) -> str:
    """Names for a message: the first ten, and how many more."""
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"


def _without_images(variable: str, visible: list[str]) -> str:
    packed = [name for name in visible if OTHER_ARCHIVES.search(name.lower())]
    if packed:
        return (
            f"{variable} has no images that can be read: {packed[0]} is an archive of another format. Pack it again as "
            ".zip or .tar."
        )
    kinds = ", ".join(sorted({PurePosixPath(name).suffix or name for name in visible})[:12]) or "nothing"
    hint = ""
    if any(name.lower().endswith(LISTS) for name in visible):
        hint = " If it lists addresses of images, download these first: Kiln fetches nothing that a dataset names."
    return (
        f"{variable} has no images: it holds {kinds}. Needed are parquet files, image files, or zips or tars of "
        f"them.{hint}"
    )
