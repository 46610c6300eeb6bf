"""Caption all images that want one: known captions from the store, the others by the model, batch by batch.

The model is loaded only if something is missing, and gone when the function returns: the text encoders come next.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from trainer.captioning import kinds
from trainer.captioning.beside import closed_folders, write_beside
from trainer.captioning.known import find_answers, key_of, mark_own_work, with_captions
from trainer.captioning.requests import Request, identity, request_for
from trainer.captioning.store import Made, Store
from trainer.captioning.tagger import Tagger
from trainer.captioning.vision_language import VisionLanguage
from trainer.data.decode import UnusableImageError, open_upright
from trainer.data.records import ImageRecord, Scan
from trainer.data.scan import cpu_workers
from trainer.engine.device import release
from trainer.spec.errors import DataError, SettingsError
from trainer.spec.plan import CaptionerPlan, DataPlan, EnginePlan
from trainer.spec.rules import captioners
from trainer.spec.rules.captioners import BATCH, INSTRUCTED, TAGGER
from trainer.spec.rules.quote import duration

log = logging.getLogger(__name__)
LARGEST_PIXELS = 1 << 21  # of an image that a model gets: none looks at more
MOST_STRETCHED = 150  # times as long as wide: Qwen3-VL's processor refuses 200
LOG_INTERVAL_S = 15.0
LARGEST_FILE = 1 << 30  # as in a scan


Told = Callable[[int, int, float], None]  # images captioned, images to caption, seconds that are left


def tell_nobody(_done: int, _total: int, _left_s: float) -> None:
    """Progress that nobody wants to know."""


def caption_images(
    scanned: Scan,
    data: DataPlan,
    *,
    cache: Path,
    engine: EnginePlan,
    check_in: Callable[[], None],
    told: Told = tell_nobody,
) -> Scan:
    """The scan with captions for all images that the plan leaves to the model. `data`: with the subsets of the scan.

    Captions are kept in `cache`, and written beside the images where the plan says so. `check_in` is called between
    tokens and batches and may raise: then the finished batches are kept. `told` is called after each batch. Raises
    SettingsError, StorageError, OutOfMemoryError.
    """
    captioner = data.captioner
    if captioner is None:
        return scanned
    answers = find_answers(scanned, data, cache)
    if captioner.write and (closed := closed_folders([*answers.missing], data)):
        raise SettingsError(
            f"CAPTION_WRITE=true: this process may not write to {closed[0]}. Fix: mount it writable, or remove "
            "CAPTION_WRITE: captions are kept in CACHE_PATH in any case."
        )
    if answers.missing:
        _caption_missing(answers.missing, data, captioner, cache=cache, engine=engine, check_in=check_in, told=told)
        answers = find_answers(scanned, data, cache)
        assert not answers.missing
    elif answers.made:
        log.info("All %d captions by %s are in the cache.", len(answers.made), captioner.name)
    captioned = with_captions(scanned, answers, captioner)
    notes = write_beside(scanned, captioned, data)
    return mark_own_work(_with_notes(captioned, notes), data, cache)


def _with_notes(scanned: Scan, notes: Sequence[str]) -> Scan:
    return dataclasses.replace(scanned, notes=(*scanned.notes, *notes))


def _caption_missing(
    images: Sequence[ImageRecord],
    data: DataPlan,
    captioner: CaptionerPlan,
    *,
    cache: Path,
    engine: EnginePlan,
    check_in: Callable[[], None],
    told: Told,
) -> None:
    variable = kinds.named(captioner)
    if not captioner.path:
        raise SettingsError(f"{variable}: the model is not on this machine. Start the job again.")
    model = identity(captioner)
    assert model is not None
    kind = kinds.kind_of(Path(captioner.path), variable=variable)
    by_request: dict[Request, dict[str, ImageRecord]] = {}  # each content once, by its key
    for image in images:
        request = request_for(data.datasets[image.dataset].subsets[image.subset], captioner, model)
        by_request.setdefault(request, {})[key_of(image, data, captioner, model)] = image
    for request in by_request:
        if problem := captioners.problem_of_prompt(kind, request.prompt):
            raise SettingsError(f"CAPTION_PROMPT={request.prompt!r} {problem}.")
    started = time.monotonic()
    looking = _Looking(kind, captioner, engine, variable=variable)
    store, total = Store(cache), sum(len(wanted) for wanted in by_request.values())
    log.info("Captioning %d images with %s (%s).", total, captioner.name, looking.describe())
    pace = _Pace(total, told)
    for request, wanted in by_request.items():
        # In an order that no name changes, so that a job which goes on has the same batches.
        keys = sorted(wanted)
        for start in range(0, len(keys), BATCH):
            check_in()
            batch = keys[start : start + BATCH]
            for key, made in zip(batch, looking.at([wanted[key] for key in batch], request, check_in), strict=True):
                store.write(key, made)
            pace.add(len(batch))
    looking.release()
    log.info("Captioned %d images in %.1f s.", total, time.monotonic() - started)


class _Pace:
    """How fast captions come, measured from the first batch on: for the log, and for whoever is `told`."""

    def __init__(self, total: int, told: Told) -> None:
        self._total, self._told = total, told
        self._done = 0
        self._began = time.monotonic()
        self._logged = 0.0  # never

    def add(self, count: int) -> None:
        """So many more images have a caption."""
        self._done += count
        now = time.monotonic()
        image_s = (now - self._began) / self._done
        left_s = image_s * (self._total - self._done)
        self._told(self._done, self._total, left_s)
        if self._done < self._total and now - self._logged > LOG_INTERVAL_S:
            self._logged = now
            log.info(
                "Captioned %d of %d images, at %.2g s an image, measured: %s left.",
                *(self._done, self._total, image_s, duration(left_s)),
            )


class _Looking:
    """The loaded model, whichever kind it is of."""

    def __init__(self, kind: str, captioner: CaptionerPlan, engine: EnginePlan, *, variable: str) -> None:
        self.kind, self.source = kind, captioner.name
        folder = Path(captioner.path)
        self.tagger: Tagger | None = None
        self.model: VisionLanguage | None = None
        if kind == TAGGER:
            self.tagger = Tagger(folder, threads=cpu_workers())
        else:
            self.model = VisionLanguage(folder, engine, variable=variable)

    def describe(self) -> str:
        """How it runs, for the log."""
        return self.model.way.describe() if self.model is not None else "onnxruntime, on the CPU"

    def at(self, images: Sequence[ImageRecord], request: Request, check_in: Callable[[], None]) -> list[Made]:
        """A caption of each image; one that cannot be read any more, or has an impossible shape, gets none."""
        answers: dict[int, Made] = {}
        pictures: dict[int, Image.Image] = {}
        for place, image in enumerate(images):
            try:
                pictures[place] = _open(image)
            except UnusableImageError as problem:
                answers[place] = Made("", self.source, str(problem))
        found = self._ask([*pictures.values()], request, check_in) if pictures else []
        answers |= dict(zip(pictures, found, strict=True))
        return [answers[place] for place in range(len(images))]

    def _ask(self, pictures: Sequence[Image.Image], request: Request, check_in: Callable[[], None]) -> list[Made]:
        if self.tagger is not None:
            left_out = captioners.left_out_tags(request.prompt)
            return self.tagger.captions(pictures, self.source, prompt=request.prompt, left_out=left_out)
        assert self.model is not None
        prompt = request.prompt
        if self.kind in INSTRUCTED:
            prompt = captioners.instruction(prompt, trigger=request.trigger, words=request.words)
        return self.model.captions(
            pictures, self.source, prompt=prompt, max_tokens=request.max_tokens, check_in=check_in
        )

    def release(self) -> None:
        """Free its memory for what comes next."""
        self.tagger = self.model = None
        release()


def _open(image: ImageRecord) -> Image.Image:
    """The upright image in RGB over white, made smaller where it is large. Raises UnusableImageError, DataError."""
    content = image.read(limit=LARGEST_FILE)
    if hashlib.sha256(content).hexdigest() != image.sha256:  # its caption would be kept as that of another image
        raise DataError(f"{image.file} has changed since it was read. Start the job again when nothing changes it.")
    picture, _ = open_upright(content)
    if max(picture.size) > MOST_STRETCHED * min(picture.size):
        raise UnusableImageError(
            f"{picture.width}×{picture.height} pixels: more than {MOST_STRETCHED} times as long as wide"
        )
    pixels = picture.width * picture.height
    if pixels > LARGEST_PIXELS:
        factor = (LARGEST_PIXELS / pixels) ** 0.5
        size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return picture
