"""The shards of a folder become the images of a subset, as if each shard was a folder with its files in it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.data.caption_files.find import FoundCaptions
from trainer.data.captions import Caption
from trainer.data.compact.examined import Examined, Files
from trainer.data.folder_listing import Folder
from trainer.data.shards.table import AskedCaptions, ShardSample, ShardTable, read_table
from trainer.spec.errors import DataError
from trainer.spec.plan import Subset
from trainer.spec.values import printable, some

MOST_DAMAGED_SHARE = 0.10  # of the shards, as of single images
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
Examine = Callable[[Sequence["ShardTask"]], Iterator[ShardTable]]


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to read."""

    shard: Path
    asked: AskedCaptions


@dataclass
class ListedShards:
    """What the shards of a subset hold. `spans`: first byte and number of bytes of each of `folder.images`, in turn."""

    folder: Folder
    found: FoundCaptions = field(default_factory=FoundCaptions)
    spans: array[int] = field(default_factory=lambda: array("Q"))
    shards: list[str] = field(default_factory=list)  # their names
    numbers: array[int] = field(default_factory=lambda: array("I"))  # of the shard of each image, in `shards`

    def place(self, image: int) -> tuple[Path, tuple[int, int]]:
        """The shard of an image, by its place in `folder.images`, and its span there."""
        begin, length = self.spans[2 * image : 2 * image + 2]
        return self.folder.root / self.shards[self.numbers[image]], (begin, length)


def read(task: ShardTask) -> ShardTable:
    """For processes, which call it by its name."""
    return read_table(task.shard, task.asked)


def check(subset: Subset, folder: Folder) -> None:
    """Raises DataError for what a subset of shards cannot have."""
    packed = [name for name in folder.others if name.lower().endswith(COMPRESSED)]
    if packed:
        raise DataError(
            f"{printable(subset.source.public)} has compressed archives beside its shards: {some(packed)}. An image is "
            "read where it lies in a shard, which compression hides. Fix: make them .tar (images are compressed "
            "already), or name an archive itself, which is then unpacked."
        )
    cannot_be = {"conditioning_data_dir": subset.conditioning_data_dir, "metadata_file": subset.metadata_file}
    for key, value in cannot_be.items():
        if value is not None:
            raise DataError(
                f"{key}={printable(value)}: {printable(subset.source.public)} holds shards (.tar), whose captions are "
                f"in them, beside their images. Fix: leave {key} out, or unpack the shards and name their folder."
            )


def asked(subset: Subset) -> AskedCaptions:
    return AskedCaptions(subset.caption_extension, subset.source.caption_column)


def tasks(subset: Subset, folder: Folder) -> list[ShardTask]:
    return [ShardTask(folder.root / name, asked(subset)) for name in folder.shards]


def add_tables(
    subset: Subset, folder: Folder, tables: Iterator[ShardTable], files: Files, examined: Examined
) -> ListedShards:
    """Put what the shards hold into one listing, and what was found in their images into `files` and `examined`."""
    shards = folder.shards
    listed = ListedShards(Folder(folder.root, others=list(folder.others), left_out=list(folder.left_out)))
    listed.shards = shards
    found = listed.found
    damaged = []
    for number, (shard, table) in enumerate(zip(shards, tables, strict=True)):
        if table.damage:
            damaged.append(f"{shard} ({table.damage})")
        for name, reason in table.unused:
            found.findings.unused.append(f"{printable(f'{shard}/{name}')}: {printable(reason)}")
        for sample in table.samples:
            name = f"{shard}/{sample.member.name}"
            _add(f"{folder.root}/{name}", sample, files, examined)
            listed.folder.images.append(name)
            listed.spans.extend((sample.member.offset, sample.member.length))
            listed.numbers.append(number)
            caption = _caption(sample, shard, subset)
            if caption is not None:
                found.captions[name] = caption
    found.read.update(shards)
    found.findings.notes.append(f"{len(shards)} shards (WebDataset) are read where they are; nothing is unpacked")
    if damaged:
        text = f"damaged shards: {some(damaged)}. What follows the damage is not used. Bring them again"
        if len(damaged) > MOST_DAMAGED_SHARE * len(shards):
            found.findings.problems.append(f"{text}: {len(damaged)} of {len(shards)} shards are more than 10 %.")
        else:
            found.findings.warn(f"{text}.")
    return listed


def _add(file: str, sample: ShardSample, files: Files, examined: Examined) -> None:
    before = len(files)
    files.add(file)
    if len(files) > before:  # a folder may serve several datasets
        examined.append(sample.found)


def _caption(sample: ShardSample, shard: str, subset: Subset) -> Caption | None:
    if sample.caption is not None:
        return Caption(sample.caption, "sidecar", f"{shard}/{sample.caption_file}", sample.caption_encoding)
    if subset.class_tokens:
        return Caption(subset.class_tokens, "class_tokens", "class_tokens")
    return None
