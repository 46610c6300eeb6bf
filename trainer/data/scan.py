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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from trainer.data import decode
from trainer.data.buckets import fit
from trainer.data.captions import Caption
from trainer.data.decode import UnusableImageError
from trainer.data.folder_listing import Folder, find_captions, list_folder
from trainer.data.records import WARNING, ImageRecord, Scan, Skipped
from trainer.spec.errors import UnreachableError
from trainer.spec.plan import DataPlan, Dataset, Subset

WORKER_MEMORY = 4 << 30  # bytes that decoding may add to a worker's address space


TOO_SMALL = "smaller than one step of bucket_reso_steps, and bucket_no_upscale forbids to enlarge it"
NO_MASK = "no mask of the same stem in conditioning_data_dir"


def scan_checked(data: DataPlan, *, cpu_workers: int) -> Scan:
    """`scan`, and `Scan.check`. Raises DataError."""
    result = scan(data, cpu_workers=cpu_workers)
    result.check(strict=data.strict)
    return result


def scan(data: DataPlan, *, cpu_workers: int, progress: Callable[[int, int], None] | None = None) -> Scan:
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
    facts = dict(zip(files, _examine_all(files, cpu_workers=cpu_workers, progress=progress), strict=True))
    parts = [_combine(listing, facts) for listing in listings]
    return Scan(
        tuple(p for part in parts for p in part.images),
        tuple(s for part in parts for s in part.skipped),
        tuple(n for part in parts for n in part.notes),
    )


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
        width, height, has_alpha = decode.inspect(data)
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
    files: Sequence[Path], *, cpu_workers: int, progress: Callable[[int, int], None] | None
) -> Iterator[_Facts | str]:
    """`_examine` of each file, in order."""
    if cpu_workers <= 0 or not files:
        for done, file in enumerate(files, 1):
            yield _examine(file)
            if progress:
                progress(done, len(files))
        return
    cpu_workers = min(cpu_workers, len(files))
    done = 0
    # spawn: a fork would copy locks that threads of this process hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cpu_workers, mp_context=context, initializer=_enter_worker) as pool:
        try:
            for facts in pool.map(_examine, files):
                yield facts
                done += 1
                if progress:
                    progress(done, len(files))
        except BrokenProcessPool as problem:
            suspects = ", ".join(str(f) for f in files[done : done + 2 * cpu_workers + 1])
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


def _combine(listing: _Listing, facts: dict[Path, _Facts | str]) -> Scan:
    """Pictures with captions and masks, the skipped ones, and notes, of one subset."""
    subset, folder = listing.subset_plan, listing.folder
    place = {"dataset": listing.dataset, "subset": listing.subset}
    texts, notes = find_captions(folder, subset)
    images, skipped = [], [Skipped(name, reason, **place) for name, reason in folder.skipped]
    for name in folder.images:
        file = folder.root / name
        mask_file = folder.mask(name)
        settled = _usable(facts[file], listing, mask_file, facts[mask_file] if mask_file else None)
        if isinstance(settled, str):
            skipped.append(Skipped(name, settled, **place))
            continue
        found, mask_sha256 = settled
        text = texts.get(name)
        images.append(
            ImageRecord(
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
    lines = _notes(images, texts, subset) + notes
    return Scan(tuple(images), tuple(sorted(skipped, key=lambda s: s.name)), tuple(f"{title}: {n}" for n in lines))


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


def _notes(images: Sequence[ImageRecord], texts: dict[str, Caption], subset: Subset) -> list[str]:
    """What the user should know of a subset's captions and pictures."""
    used = [texts[p.name] for p in images if p.name in texts]
    own = [t for t in used if t.origin != "class_tokens"]
    missing = len(images) - len(own)
    empty = sum(not t.text for t in own)
    legacy = sum(t.legacy for t in own)
    several = 0 if subset.enable_wildcard else sum("\n" in t.text for t in own)
    alpha = sum(p.has_alpha for p in images)
    twins = len(images) - len({p.sha256 for p in images})
    substitute = f"class_tokens {subset.class_tokens!r} is used" if subset.class_tokens else "trained without caption"
    lines = [f"{len(images)} pictures, {len(own)} captions"]
    lines += [f"{missing} captions missing: {substitute}"] if missing else []
    if images and not own and not subset.class_tokens and not subset.trigger_word:
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
