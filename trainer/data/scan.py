"""Folders of images → the usable ones, with size, hash and caption.

Nothing is dropped in silence: a `Scan` accounts for every image that was found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import resource
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trainer.data import decode
from trainer.data.buckets import fit
from trainer.data.caption_files.find import find_captions
from trainer.data.caption_files.findings import Findings
from trainer.data.caption_files.notes import note_captions
from trainer.data.captions import FOLDER_NAME, Caption
from trainer.data.compact.examined import Examined, FileInfo, Files, ScannedFiles
from trainer.data.compact.image_table import Chosen, ImageTable
from trainer.data.compact.seen import SeenFiles
from trainer.data.decode import UnusableImageError
from trainer.data.folder_listing import Folder, LeftOutName, list_folder
from trainer.data.folders import leftovers
from trainer.data.folders.conventions import Reading, derived_subset, read_folders
from trainer.data.folders.own_output import Written
from trainer.data.hygiene.remarks import remarks
from trainer.data.records import WARNING, ImageRecord, Scan, Skipped
from trainer.data.shards import listing as shards
from trainer.data.shards import streamed
from trainer.data.shards.listing import ListedShards
from trainer.data.shards.stream import ShardStream
from trainer.process import memory_kills
from trainer.process.pool import KilledWorkerError, in_processes
from trainer.spec.errors import UnreachableError
from trainer.spec.plan import CaptionerPlan, DataPlan, Dataset, Subset
from trainer.spec.values import many, printable, some
from trainer.storage.read import read_regular

# Bytes that decoding may add to a worker's address space: the largest image that `decode` admits takes 358 MB, and
# conversions and codecs need some copies of it. A hostile file then fails here, and does not get the job killed.
WORKER_MEMORY_BYTES = 4 << 30
MAX_CPU_WORKERS = 16
SHARDS_AHEAD = 2  # for each process, of shards that come while others are read

TOO_SMALL = "smaller than one step of bucket_reso_steps, and bucket_no_upscale forbids enlarging it"
NO_MASK = "no mask of the same stem in conditioning_data_dir"

# A kind of `LeftOutName` → what to do if it was meant otherwise.
ADVICE = {
    "own": "",
    "mask": 'To weigh the loss by masks, give the subset "conditioning_data_dir" in dataset.json ("." for masks that '
    f"lie beside their images). {leftovers.KEEP_IT}",
    "map": leftovers.KEEP_IT,
    "preview": leftovers.KEEP_IT,
    "sample": leftovers.KEEP_IT,
    "video": "",
    "zero": "",
    "unreadable": "",
    "kohya": "To train on them too, move them out of this folder.",
    "other job": "",
}

Thing = TypeVar("Thing")
Found = TypeVar("Found")
Progress = Callable[[int, int], None]  # called with the files done and the files in all


def cpu_workers() -> int:
    """Threads or processes that prepare images: one for each core that this process may use, at most 16."""
    return min(MAX_CPU_WORKERS, len(os.sched_getaffinity(0)))


def scan_checked(data: DataPlan, *, cpu_workers: int) -> Scan:
    """`scan`, and `Scan.check`. Raises DataError."""
    result = scan(data, cpu_workers=cpu_workers)
    result.check(strict=data.strict)
    return result


def scan(
    data: DataPlan,
    *,
    cpu_workers: int,
    progress: Progress | None = None,
    written: Written | None = None,
    seen: SeenFiles | None = None,
) -> Scan:
    """Find, hash and decode all images of the plan, in `cpu_workers` processes (0: in this one).

    `written`: the folders that this job writes to, which are no sources. `seen`: images that other scans have read, and
    this one reads again only if they have changed. Raises DataError for a folder or caption that cannot be read,
    UnreachableError if a worker is killed.
    """

    def examine(some_files: Sequence[Path]) -> Iterator[FileInfo | str]:
        return _examine_all(some_files, cpu_workers=cpu_workers, progress=progress)

    listings = []
    datasets = []
    for d, dataset in enumerate(data.datasets):
        subsets = list(dataset.subsets)
        for s, subset in enumerate(dataset.subsets):
            folder = list_folder(subset, written)
            reading = Reading()
            if folder.shards:
                shards.check(subset, folder)
            elif subset.source.kind != "generated":
                reading = read_folders(folder, _named_folder(subset))
            listing = _Listing(d, s, dataset, subset, folder, reading)
            for part in reading.parts:
                derived, notes = derived_subset(subset, part, s)
                reading.notes += notes
                listing.parts.append((len(subsets), derived))
                subsets.append(derived)
            listings.append(listing)
        datasets.append(dataclasses.replace(dataset, subsets=tuple(subsets)))
    files = Files()  # a folder may serve several datasets (resolutions): each file is read once
    for listing in listings:
        for file in listing.folder.files_to_decode():
            files.add(str(file))
    examined = Examined()
    for info in seen.examined(files, examine) if seen is not None else examine(files):
        examined.append(info)
    for listing in listings:
        if listing.folder.shards:
            _read_shards(listing, files, examined, cpu_workers=cpu_workers, progress=progress)
    images = ImageTable()
    skipped: list[Skipped] = []
    notes_of_all: list[str] = []
    unused: list[str] = []
    problems: list[str] = []
    for listing in listings:
        of_subset = _combine(listing, ScannedFiles(files, examined), data.captioner, images)
        skipped += of_subset.skipped
        notes_of_all += of_subset.notes
        unused += of_subset.unused
        problems += of_subset.problems
    expanded = dataclasses.replace(data, datasets=tuple(datasets))
    return Scan(images, tuple(skipped), tuple(notes_of_all), tuple(unused), tuple(problems), expanded)


def _named_folder(subset: Subset) -> str:
    """The folder as the user named it. Of an archive, whose one folder may be the source, the name in it."""
    return subset.source.location if subset.source.kind == "folder" else subset.source.path


# ---- reading images, in worker processes


def _examine(file: Path) -> FileInfo | str:
    """The hash and size of an image that decodes, or the reason why it is unusable."""
    try:
        data = read_regular(file, limit=decode.MAX_FILE_BYTES)
        found = decode.inspect(data)
    except OSError as problem:
        return f"cannot be read: {problem.strerror}"
    except UnusableImageError as problem:
        return str(problem)
    return FileInfo(hashlib.sha256(data).hexdigest(), found.width, found.height, found.has_alpha, found.looks)


def _enter_worker() -> None:
    """Bound the memory that a hostile file can take.

    The warnings of codecs are silenced: the reason for a skipped image goes to the report, not to the terminal.
    """
    warnings.simplefilter("ignore")
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        limit = used + WORKER_MEMORY_BYTES
        _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
        if hard_limit != resource.RLIM_INFINITY:
            limit = min(limit, hard_limit)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))


def _examine_all(files: Sequence[Path], *, cpu_workers: int, progress: Progress | None) -> Iterator[FileInfo | str]:
    """`_examine` of each file, in order."""
    return _in_workers(_examine, files, str, cpu_workers=cpu_workers, progress=progress)


def _in_workers(
    function: Callable[[Thing], Found],
    things: Sequence[Thing],
    name: Callable[[Thing], str],
    *,
    cpu_workers: int,
    progress: Progress | None,
) -> Iterator[Found]:
    """`function` of each thing, in order. `name`: of a thing, for the message where a process is killed."""
    if cpu_workers <= 0 or not things:
        for done, thing in enumerate(things, 1):
            yield function(thing)
            if progress:
                progress(done, len(things))
        return
    kills_before = memory_kills.count()
    try:
        for done, found in enumerate(in_processes(function, things, count=cpu_workers, enter=_enter_worker), 1):
            yield found
            if progress:
                progress(done, len(things))
    except KilledWorkerError as problem:
        what = printable(name(problem.thing))
        killed = memory_kills.explain(kills_before)
        raise UnreachableError(f"A process that reads images {killed} It read {what}.") from problem


def _read_shards(
    listing: _Listing, files: Files, examined: Examined, *, cpu_workers: int, progress: Progress | None
) -> None:
    """Put what the shards of a subset hold in the place of its files; each shard is read by one process."""
    common: dict[str, Any] = {"cpu_workers": cpu_workers, "progress": progress}
    if stream := ShardStream.of(Path(listing.subset_plan.source.path)):
        tables = streamed.tables(
            stream,
            shards.asked(listing.subset_plan),
            lambda tasks: _in_workers(streamed.read_streamed, tasks, lambda task: task.name, **common),
            ahead=SHARDS_AHEAD * max(1, cpu_workers),
        )
    else:
        tasks = shards.tasks(listing.subset_plan, listing.folder)
        tables = _in_workers(shards.read, tasks, lambda task: str(task.shard), **common)
    listing.listed = shards.add_tables(listing.subset_plan, listing.folder, tables, files, examined)
    listing.folder = listing.listed.folder


# ---- putting it together


@dataclass(slots=True)
class _Listing:
    """A subset of the plan, its place there, its files, and the subsets that the names of its folders make.

    `listed`: what its shards hold, where its files are shards.
    """

    dataset: int
    subset: int
    dataset_plan: Dataset
    subset_plan: Subset
    folder: Folder
    reading: Reading
    parts: list[tuple[int, Subset]] = field(default_factory=list)  # number in the dataset; as in `reading.parts`
    listed: ListedShards | None = None

    def file(self, place: int) -> tuple[Path, tuple[int, int] | None]:
        """The file of the image at a place in `folder.images`, and where in that it is, if it is a shard."""
        if self.listed is None:
            return self.folder.root / self.folder.images[place], None
        return self.listed.place(place)


def _combine(listing: _Listing, files: ScannedFiles, captioner: CaptionerPlan | None, images: ImageTable) -> Scan:
    """Adds the usable images of one subset, with captions and masks, to `images`.

    Returns the skipped ones, notes, and what is left out; its `images` are empty.
    """
    subset = listing.subset_plan
    folder = listing.folder
    found = listing.listed.found if listing.listed else find_captions(folder, subset)
    skipped = []
    for name, reason in folder.skipped:
        skipped.append(Skipped(name, reason, dataset=listing.dataset, subset=listing.subset))
    own: dict[int | None, array[int]] = {}  # part of the listing → places of its images
    for place, name in enumerate(folder.images):
        part = listing.reading.part_of(name)
        words = listing.parts[part][1].class_tokens if part is not None else None
        if words and name not in found.captions:
            found.captions[name] = Caption(words, "class_tokens", FOLDER_NAME)
        mask_file = folder.mask(name)
        mask = files.info(str(mask_file)) if mask_file else None
        usable = _check_usable(files.info(str(folder.root / name)), listing, mask_file, mask)
        if isinstance(usable, str):
            skipped.append(Skipped(name, usable, dataset=listing.dataset, subset=listing.subset))
        else:
            own.setdefault(part, array("Q")).append(len(images))
            images.append(_record(place, listing, found.captions.get(name), *usable))
    skipped.sort(key=lambda image: image.name)
    title = _title(listing, None)
    findings = found.findings
    notes = [f"{title}: {note}" for note in [*listing.reading.notes, *_left_out_notes(folder)]]
    for part in (None, *range(len(listing.parts))):
        if part in own or not listing.parts:
            plan = subset if part is None else listing.parts[part][1]
            of_part = Chosen(images, own.get(part, ()))
            said = _part_notes(of_part, found.captions, plan, captioner)
            said += remarks(of_part, files.looks(folder.root), listing.dataset_plan)
            notes += [f"{_title(listing, part)}: {note}" for note in said]
    notes += [f"{title}: {note}" for note in [*findings.notes, *folder.note_unread(found.read)]]
    unused = [*findings.unused, *(f"{printable(item.name)}: {item.reason}" for item in folder.left_out)]
    return Scan(
        (),
        tuple(skipped),
        tuple(notes),
        tuple(f"{title}: {name}" for name in unused),
        tuple(f"{title}: {problem}" for problem in findings.problems),
    )


def _part_notes(
    images: Sequence[ImageRecord], captions: dict[str, Caption], subset: Subset, captioner: CaptionerPlan | None
) -> list[str]:
    """What is to be said of the images that share the settings of `subset`."""
    findings = Findings()
    own = {image.name: captions[image.name] for image in images if image.name in captions}
    note_captions([image.name for image in images], own, subset, findings, captioner=captioner)
    return findings.notes + _notes(images, subset)


def _record(
    place: int, listing: _Listing, caption: Caption | None, info: FileInfo, mask_sha256: str | None
) -> ImageRecord:
    name = listing.folder.images[place]
    file, span = listing.file(place)
    part = listing.reading.part_of(name)
    subset = listing.subset
    convention = None
    if part is not None:
        subset, plan = listing.parts[part]
        convention = f"x{plan.num_repeats}{'-reg' if plan.is_reg else ''}"
    return ImageRecord(
        name=name,
        file=file,
        sha256=info.sha256,
        width=info.width,
        height=info.height,
        dataset=listing.dataset,
        subset=subset,
        caption=caption.text if caption else None,
        caption_file=caption.file if caption else "",
        caption_encoding=caption.encoding if caption else "",
        has_alpha=info.has_alpha,
        mask_file=listing.folder.mask(name),
        mask_sha256=mask_sha256,
        part_of=listing.subset if part is not None else None,
        convention=convention,
        span=span,
    )


def _title(listing: _Listing, part: int | None) -> str:
    """The start of a note: where the images come from, and the numbers of dataset and subset."""
    place = printable(listing.subset_plan.source.public)
    number = listing.subset
    if part is not None:
        number = listing.parts[part][0]
        folder = listing.reading.parts[part].folder
        place = f"{place}/{printable(folder)}" if folder else place
    return f"{place} ({listing.dataset}.{number})"


def _left_out_notes(folder: Folder) -> list[str]:
    """A line for each kind of files: a warning, if they might have been meant as training data."""
    lines = []
    for kind, advice in ADVICE.items():
        groups: dict[str, list[LeftOutName]] = {}
        for item in folder.left_out:
            if item.kind == kind:
                # The reasons of companions name another image each.
                groups.setdefault("" if kind in leftovers.KINDS else item.reason, []).append(item)
        for items in groups.values():
            level = "" if kind == "own" else WARNING
            names = some([item.name for item in items])
            lines.append(f"{level}left out: {names} ({items[0].reason}). {advice}".rstrip())
    return lines


def _check_usable(
    image: FileInfo | str, listing: _Listing, mask_file: Path | None, mask: FileInfo | str | None
) -> tuple[FileInfo, str | None] | str:
    """The image and the hash of its mask (see `ImageRecord`), or the reason why the image cannot be used."""
    if isinstance(image, str):
        return image
    if fit((image.width, image.height), listing.dataset_plan) is None:
        return TOO_SMALL
    if mask_file is None or mask is None:
        if listing.folder.masks is not None:
            return NO_MASK
        alpha_is_mask = listing.subset_plan.alpha_mask and image.has_alpha
        return image, "alpha" if alpha_is_mask else None
    if isinstance(mask, str):
        return f"its mask {mask_file.name}: {mask}"
    # The same shape, up to the rounding of a scaled copy.
    difference = abs(mask.width * image.height - mask.height * image.width)
    if difference > max(mask.width, mask.height) + image.width:
        return f"its mask is {mask.width}×{mask.height}, the image {image.width}×{image.height}: another shape"
    return image, mask.sha256


def _notes(images: Sequence[ImageRecord], subset: Subset) -> list[str]:
    """Oddities of a subset's images that the user may not have meant."""
    lines = []
    transparent = [image.name for image in images if image.has_alpha]
    if transparent:
        effect = "the alpha weighs the loss" if subset.alpha_mask else "laid over white"
        lines.append(f"transparency in {many(len(transparent), 'image')}, {effect}: {some(transparent)}")
    first: dict[bytes, int] = {}  # SHA-256 → place
    copies = []
    for place, image in enumerate(images):
        same = first.setdefault(bytes.fromhex(image.sha256), place)
        if same != place:
            copies.append(f"{image.name} of {images[same].name}")
    if copies:
        copy = "copy" if len(copies) == 1 else "copies"
        lines.append(f"{len(copies)} {copy}, byte for byte, all used: {some(copies)}")
    return lines
