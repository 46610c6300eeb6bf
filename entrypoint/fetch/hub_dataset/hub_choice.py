"""Which files of a dataset's repository are downloaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from entrypoint.dataset_config.sources import ARCHIVES, OTHER_ARCHIVES
from trainer.data.caption_files import formats
from trainer.data.caption_files.sidecars import USUAL_EXTENSIONS
from trainer.data.folders.formats import READABLE_SUFFIXES
from trainer.spec.errors import DataError, SettingsError

IMAGE_SUFFIXES = (*READABLE_SUFFIXES, ".jxl", ".heic", ".heif")  # the last are downloaded to be named as unreadable
MOST_NAMED = 10  # files or columns in one message
STREAMED = (".parquet", ".arrow")  # tables that may hold images
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
            f"{variable} needs a script of its own ({script}), and Kiln never runs code from a dataset. Set "
            "DATASET_REVISION=refs/convert/parquet if its page offers a parquet version, or convert it."
        )
    visible = [name for name in names if not name.startswith(".") and "/." not in name]
    images = _ending(visible, IMAGE_SUFFIXES)
    archives = _ending(visible, ARCHIVES)
    streamed = [name for name in _ending(visible, STREAMED) if not is_metadata(name)]
    if not images and not archives and not streamed:
        raise DataError(_without_images(variable, visible))
    wanted = [*images, *archives, *streamed]
    if images or archives:
        wanted += [name for name in visible if is_metadata(name)]
        described = {*images, *(name.rpartition(".")[0] for name in images)}  # by a.txt, or by a.png.txt
        for name in visible:
            is_sidecar = name.lower().endswith(USUAL_EXTENSIONS) and name.rpartition(".")[0] in described
            is_table = name.lower().endswith(formats.SUFFIXES) and not is_metadata(name) and not streamed
            if is_sidecar or is_table:
                wanted.append(name)
    wanted += [name for name in names if name in CARDS]
    taken = set(wanted)
    left_out = [name for name in visible if name not in taken and not NEVER_DATA.fullmatch(PurePosixPath(name).name)]
    return Choice(tuple(wanted), tuple(left_out))


def _ending(names: Iterable[str], suffixes: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.lower().endswith(suffixes)]


def is_metadata(name: str) -> bool:
    """Whether a file lists the images of its folder, by the convention of the Hub."""
    last = PurePosixPath(name).name
    return last.lower() == "metadata.parquet" or formats.METADATA.fullmatch(last) is not None


def _without_images(variable: str, visible: list[str]) -> str:
    packed = [name for name in visible if OTHER_ARCHIVES.search(name)]
    if packed:
        return (
            f"{variable} has no images that can be read: {packed[0]} is an archive of another format. Pack it again as "
            ".zip or .tar."
        )
    kinds = ", ".join(sorted({PurePosixPath(name).suffix or name for name in visible})[:12]) or "nothing"
    hint = ""
    if _ending(visible, formats.SUFFIXES):
        hint = " If it lists addresses of images, download these first: Kiln fetches nothing that a dataset names."
    return (
        f"{variable} has no images: it holds {kinds}. Needed are parquet files, image files, or zips or tars of "
        f"them.{hint}"
    )
