"""A scan with the captions that a model has made already, and the images that it has still to look at. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from trainer.captioning.requests import STAND_INS, identity, request_for, wanting
from trainer.captioning.store import Made, Store
from trainer.data.caption_files.find import find_captions
from trainer.data.compact.image_table import ImageTable
from trainer.data.folder_listing import list_folder
from trainer.data.folders.own_output import Written
from trainer.data.records import MADE_BY, WARNING, ImageRecord, Scan
from trainer.spec.plan import CaptionerPlan, DataPlan
from trainer.spec.values import many, some
from trainer.storage import digests


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the model has said of the images that want a caption, and those of which it has said nothing yet."""

    made: dict[str, Made] = dataclasses.field(default_factory=dict)  # by the image's key
    missing: tuple[ImageRecord, ...] = ()


def find_answers(scanned: Scan, data: DataPlan, cache: Path) -> Answers:
    """Look up the captions of all images that want one. `data`: with the subsets of the scan."""
    captioner = data.captioner
    model = identity(captioner) if captioner is not None else None
    if captioner is None:
        return Answers()
    store = Store(cache)
    made = {}
    missing = []
    for image in wanting(scanned.images, data):
        found = None
        if model is not None:
            found = store.read(key_of(image, data, captioner, model))
        if found is None:
            missing.append(image)
        else:
            made[image.key] = found
    return Answers(made, tuple(missing))


def key_of(image: ImageRecord, data: DataPlan, captioner: CaptionerPlan, model: str) -> str:
    """The key of an image's caption. `model`: its `identity`."""
    subset = data.datasets[image.dataset].subsets[image.subset]
    return request_for(subset, captioner, model).key(image.sha256)


def with_captions(scanned: Scan, answers: Answers, captioner: CaptionerPlan) -> Scan:
    """The scan with these captions in their places, and a note that says how many there are."""
    images = ImageTable()
    named = []
    unusable = []
    for image in scanned.images:
        made = answers.made.get(image.key)
        if made is not None and made.text:
            image = dataclasses.replace(
                image,
                caption=made.text,
                caption_file=f"{MADE_BY}{made.model}",
                caption_encoding="",
                captioned_by=made.model,
            )
            named.append(image.name)
        elif made is not None:
            unusable.append(f"{image.name} ({made.problem})")
        images.append(image)
    notes = [*scanned.notes]
    if named:
        notes.append(f"{many(len(named), 'caption')} made by {captioner.name}: {some(named)}")
    if unusable:
        notes.append(
            f"{WARNING}{captioner.name} has given no usable caption for {many(len(unusable), 'image')}: "
            f"{some(unusable)}. Write these yourself, or change CAPTION_PROMPT."
        )
    return dataclasses.replace(scanned, images=images, notes=tuple(notes))


def with_captions_of(images: Iterable[ImageRecord], scanned: Scan) -> Scan:
    """The scan with the captions that the model has made on another machine, for the same images (name and content).

    `images`: the finished scan of that machine.
    """
    captioner = scanned.data.captioner
    if captioner is None:
        return scanned
    known = {}
    for image in images:
        if image.captioned_by and image.caption is not None:
            known[image.key, image.sha256] = Made(image.caption, image.captioned_by)
    made = {}
    for image in wanting(scanned.images, scanned.data):
        if (image.key, image.sha256) in known:
            made[image.key] = known[image.key, image.sha256]
    return with_captions(scanned, Answers(made), captioner)


def mark_own_work(scanned: Scan, data: DataPlan, cache: Path) -> Scan:
    """The scan with `captioned_by` also where a caption was read from a file that CAPTION_WRITE has written before."""
    captioner = data.captioner
    model = identity(captioner) if captioner is not None else None
    if captioner is None or model is None or not captioner.write:
        return scanned
    store = Store(cache)
    images = ImageTable()
    for image in scanned.images:
        if image.caption and not image.captioned_by:
            made = store.read(key_of(image, data, captioner, model))
            if made is not None and made.text == image.caption:
                image = dataclasses.replace(image, captioned_by=made.model)
        images.append(image)
    return dataclasses.replace(scanned, images=images)


def may_lack_captions(data: DataPlan, cache: Path, written: Written) -> bool:
    """Whether the model may be needed: a look at names and captions that decodes no image.

    True also in doubt: a folder's name may make regularisation images of some, which are asked something else.
    """
    captioner = data.captioner
    model = identity(captioner) if captioner is not None else None
    if captioner is None:
        return False
    store = Store(cache)
    for subset in data.subsets:
        if not subset.auto_caption or subset.source.kind == "generated" or subset.part_of is not None:
            continue
        folder = list_folder(subset, written)
        captions = find_captions(folder, subset).captions
        for name in folder.images:
            own = captions.get(name)
            stands_in = own is not None and own.file in STAND_INS
            if (stands_in and subset.is_reg) or (own is not None and not stands_in and not captioner.overwrite):
                continue
            if model is None:
                return True
            try:
                sha256 = digests.sha256(folder.root / name)
            except OSError:  # the scan says why
                continue
            if store.read(request_for(subset, captioner, model).key(sha256)) is None:
                return True
    return False
