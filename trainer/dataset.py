"""Folders of pictures → what is usable, with size, hash and caption; and the pixels of one view of a picture.

Nothing is dropped in silence: `Scan` accounts for every picture that was found.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from trainer import images
from trainer.buckets import Size, fit
from trainer.captions import Text
from trainer.errors import DataError, UnreachableError
from trainer.folders import Folder, find_captions, list_folder
from trainer.images import UnusableImageError
from trainer.plan import DataPlan, Dataset, Subset

MAX_UNUSABLE = 0.10  # of the pictures found; more stops the job
WORKER_MEMORY = 4 << 30  # bytes that decoding may add to a worker's address space
WARNING = "WARNING: "  # begins what a note warns of
TOO_SMALL = "smaller than one step of bucket_reso_steps, and bucket_no_upscale forbids to enlarge it"
NO_MASK = "no mask of the same stem in conditioning_data_dir"


@dataclass(frozen=True, slots=True)
class Picture:
    """A usable picture of one subset. Sizes in pixels, after turning it upright."""

    name: str  # relative to its subset's folder, with /
    file: Path  # on this machine; says nothing about the content
    sha256: str  # of the file's bytes
    width: int
    height: int
    dataset: int  # index in DataPlan.datasets
    subset: int  # index in Dataset.subsets
    caption: str | None  # before the pipeline; None: there is none
    has_alpha: bool = False
    mask_file: Path | None = None  # an image that weighs the loss
    mask_sha256: str | None = None  # of that file's bytes; "alpha": the picture's own alpha is the mask

    @property
    def key(self) -> str:
        """Unique in a plan, the same on every machine."""
        return f"{self.dataset}.{self.subset}/{self.name}"


@dataclass(frozen=True, slots=True)
class View:
    """All that decides which pixels of a picture are trained on. Sizes are (width, height) in pixels."""

    size: Size  # the bucket
    scaled: Size  # the whole picture is scaled to this, covering `size`
    offset: tuple[int, int]  # left and top of the cut in the scaled picture
    flip: bool = False
    colour: int | None = None  # seed of `images.vary_colour`
    interpolation: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A picture that is not trained on."""

    name: str  # relative to its subset's folder
    reason: str
    dataset: int = 0
    subset: int = 0


@dataclass(frozen=True)
class Scan:
    """What was found: every picture is either in `pictures` or in `skipped`."""

    pictures: tuple[Picture, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]  # what the user should know, one line each

    @property
    def found(self) -> int:
        return len(self.pictures) + len(self.skipped)

    def report(self, *, limit: int | None = 20) -> str:
        """In / used / skipped with reasons, at most `limit` skipped ones by name, and the notes."""
        lines = [f"Pictures: {self.found} found, {len(self.pictures)} used, {len(self.skipped)} skipped."]
        lines += [f"  skipped {s.name}: {s.reason}" for s in self.skipped[:limit]]
        if limit is not None and len(self.skipped) > limit:
            reasons = Counter(s.reason for s in self.skipped[limit:])
            lines += [f"  skipped {count} more: {reason}" for reason, count in reasons.most_common(limit)]
        return "\n".join([*lines, *self.notes]) + "\n"

    def check(self, *, strict: bool) -> None:
        """Raises DataError if nothing is usable, if more than a tenth is not, or with `strict` if anything is not."""
        bad = len(self.skipped)
        if not self.pictures:
            raise DataError(f"No usable picture in the dataset.\n{self.report()}")
        if bad and strict:
            raise DataError(f"STRICT_DATASET is true and {bad} of {self.found} pictures are unusable.\n{self.report()}")
        if bad > MAX_UNUSABLE * self.found:
            raise DataError(f"{bad} of {self.found} pictures are unusable, more than 10 %.\n{self.report()}")


def scan(data: DataPlan, *, workers: int) -> Scan:
    """`survey`, and `Scan.check`. Raises DataError."""
    result = survey(data, workers=workers)
    result.check(strict=data.strict)
    return result


def survey(data: DataPlan, *, workers: int, progress: Callable[[int, int], None] | None = None) -> Scan:
    """Find, hash and decode all pictures of the plan, in `workers` processes (0: in this one).

    `progress` is called with pictures done and in all. Raises DataError for a folder or caption that cannot be read,
    UnreachableError if a worker is killed.
    """
    listings = [
        _Listing(d, s, dataset, subset, list_folder(subset))
        for d, dataset in enumerate(data.datasets)
        for s, subset in enumerate(dataset.subsets)
    ]
    # A folder may serve several datasets (resolutions): each file is read once.
    files = list(dict.fromkeys(f for listing in listings for f in listing.folder.to_read()))
    facts = dict(zip(files, _examine_all(files, workers=workers, progress=progress), strict=True))
    parts = [_settle(listing, facts) for listing in listings]
    return Scan(
        tuple(p for part in parts for p in part.pictures),
        tuple(s for part in parts for s in part.skipped),
        tuple(n for part in parts for n in part.notes),
    )


def render(file: Path, view: View, *, sha256: str | None = None) -> np.ndarray:
    """The pixels of a view: uint8 (height, width, 3).

    Raises UnusableImageError; also where the bytes are no longer those of `sha256`.
    """
    image, _ = images.open_upright(_bytes(file, sha256))
    cut = _cut(image, view, interpolation=view.interpolation)
    return np.asarray(cut if view.colour is None else images.vary_colour(cut, view.colour))


def render_mask(picture: Picture, view: View) -> np.ndarray | None:
    """The loss mask of a view: uint8 (height, width), 255 is trained; None if the picture has none.

    Raises UnusableImageError.
    """
    if picture.mask_file is not None:
        mask = images.open_mask(_bytes(picture.mask_file, picture.mask_sha256))
        if mask.size != (picture.width, picture.height):
            mask = mask.resize((picture.width, picture.height), Image.Resampling.BOX)
    elif picture.mask_sha256:
        alpha = images.open_upright(_bytes(picture.file, picture.sha256))[1]
        if alpha is None:
            return None
        mask = alpha
    else:
        return None
    return np.asarray(_cut(mask, view, interpolation="bilinear"))


def _cut(image: Image.Image, view: View, *, interpolation: str | None) -> Image.Image:
    cut = images.resize_crop(image, scaled=view.scaled, offset=view.offset, size=view.size, interpolation=interpolation)
    return cut.transpose(images.FLIP) if view.flip else cut


def _bytes(file: Path, sha256: str | None) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as problem:
        raise UnusableImageError(f"cannot be read: {problem.strerror}") from problem
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UnusableImageError("changed while the job ran")
    return data


# ---- reading pictures, in worker processes


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a file's bytes say."""

    sha256: str
    width: int
    height: int
    has_alpha: bool


def _examine(file: Path) -> _Facts | str:
    """The facts of a picture that decodes, or why it is unusable."""
    try:
        data = file.read_bytes()
        width, height, has_alpha = images.inspect(data)
    except OSError as problem:
        return f"cannot be read: {problem.strerror}"
    except UnusableImageError as problem:
        return str(problem)
    return _Facts(hashlib.sha256(data).hexdigest(), width, height, has_alpha)


def _enter_worker() -> None:
    """Bound the memory that a malicious file can take; its reason goes to the report, not to the terminal.

    Where the trainer is killed, its workers end too: what they wait for would never come.
    """
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        wanted = used + WORKER_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _examine_all(
    files: Sequence[Path], *, workers: int, progress: Callable[[int, int], None] | None
) -> Iterator[_Facts | str]:
    """`_examine` of each file, in order."""
    if workers <= 0 or not files:
        for done, file in enumerate(files, 1):
            yield _examine(file)
            if progress:
                progress(done, len(files))
        return
    workers = min(workers, len(files))
    done = 0
    # spawn: a fork would copy locks that threads of this process hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_enter_worker) as pool:
        try:
            for facts in pool.map(_examine, files):
                yield facts
                done += 1
                if progress:
                    progress(done, len(files))
        except BrokenProcessPool as problem:
            suspects = ", ".join(str(f) for f in files[done : done + 2 * workers + 1])
            raise UnreachableError(
                f"A process that reads pictures was killed (out of memory?) at one of: {suspects}."
            ) from problem


# ---- putting it together


@dataclass(frozen=True, slots=True)
class _Listing:
    """A subset, its place in the plan, and its files."""

    dataset: int
    subset: int
    dataset_plan: Dataset
    subset_plan: Subset
    folder: Folder


def _settle(listing: _Listing, facts: dict[Path, _Facts | str]) -> Scan:
    """Pictures with captions and masks, the skipped ones, and notes, of one subset."""
    subset, folder = listing.subset_plan, listing.folder
    place = {"dataset": listing.dataset, "subset": listing.subset}
    texts, notes = find_captions(folder, subset)
    pictures, skipped = [], [Skipped(name, reason, **place) for name, reason in folder.skipped]
    for name in folder.pictures:
        file = folder.root / name
        mask_file = folder.mask(name)
        settled = _usable(facts[file], listing, mask_file, facts[mask_file] if mask_file else None)
        if isinstance(settled, str):
            skipped.append(Skipped(name, settled, **place))
            continue
        found, mask_sha256 = settled
        text = texts.get(name)
        pictures.append(
            Picture(
                name=name,
                file=file,
                sha256=found.sha256,
                width=found.width,
                height=found.height,
                caption=text.text if text else None,
                has_alpha=found.has_alpha,
                mask_file=mask_file,
                mask_sha256=mask_sha256,
                **place,
            )
        )
    title = f"{subset.source.public} ({listing.dataset}.{listing.subset})"
    lines = _notes(pictures, texts, subset) + notes
    return Scan(tuple(pictures), tuple(sorted(skipped, key=lambda s: s.name)), tuple(f"{title}: {n}" for n in lines))


def _usable(
    facts: _Facts | str, listing: _Listing, mask_file: Path | None, mask: _Facts | str | None
) -> tuple[_Facts, str | None] | str:
    """Facts and the mask's hash, or the reason why the picture cannot be used."""
    if isinstance(facts, str):
        return facts
    if fit((facts.width, facts.height), listing.dataset_plan) is None:
        return TOO_SMALL
    if mask_file is None or mask is None:
        if listing.folder.masks is not None:
            return NO_MASK
        return facts, "alpha" if listing.subset_plan.alpha_mask and facts.has_alpha else None
    if isinstance(mask, str):
        return f"its mask {mask_file.name}: {mask}"
    # The same shape, up to the rounding of a scaled copy.
    if abs(mask.width * facts.height - mask.height * facts.width) > max(mask.width, mask.height) + facts.width:
        return f"its mask is {mask.width}×{mask.height}, the picture {facts.width}×{facts.height}: another shape"
    return facts, mask.sha256


def _notes(pictures: Sequence[Picture], texts: dict[str, Text], subset: Subset) -> list[str]:
    """What the user should know of a subset's captions and pictures."""
    used = [texts[p.name] for p in pictures if p.name in texts]
    own = [t for t in used if t.origin != "class_tokens"]
    missing = len(pictures) - len(own)
    empty = sum(not t.text for t in own)
    legacy = sum(t.legacy for t in own)
    several = 0 if subset.enable_wildcard else sum("\n" in t.text for t in own)
    alpha = sum(p.has_alpha for p in pictures)
    twins = len(pictures) - len({p.sha256 for p in pictures})
    substitute = f"class_tokens {subset.class_tokens!r} is used" if subset.class_tokens else "trained without caption"
    lines = [f"{len(pictures)} pictures, {len(own)} captions"]
    lines += [f"{missing} captions missing: {substitute}"] if missing else []
    if pictures and not own and not subset.class_tokens and not subset.trigger_word:
        lines.append(
            f"{WARNING}no captions at all and no class_tokens: the model learns these pictures without words, and no "
            "word will call them up. Add .txt files, or set class_tokens or TRIGGER_WORD."
        )
    lines += [f"{empty} captions are empty files: trained without caption"] if empty else []
    lines += [f"{legacy} captions are not UTF-8: read as Windows-1252 (Latin-1)"] if legacy else []
    lines += (
        [f"{several} captions have several lines: the first is used (enable_wildcard draws one)"] if several else []
    )
    laid = "the alpha weighs the loss" if subset.alpha_mask else "laid over white"
    lines += [f"{alpha} pictures have transparency: {laid}"] if alpha else []
    lines += [f"{twins} pictures are byte for byte copies of another: all are used"] if twins else []
    return lines
