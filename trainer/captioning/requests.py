"""Which images want a caption from the model, what it is asked for each, and the key of the answer. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.captioning import kinds
from trainer.data.captions import FOLDER_NAME, own_trigger
from trainer.data.records import ImageRecord
from trainer.spec.plan import CaptionerPlan, DataPlan, Subset
from trainer.spec.rules import captioners
from trainer.spec.rules.captioners import TAGGER
from trainer.storage import digests

VERSION = 1  # of how images and texts are treated; a change of it captions everything anew
STAND_INS = ("class_tokens", FOLDER_NAME)  # of a caption: words for images that have none of their own


@dataclass(frozen=True)
class Request:
    """What decides a caption, besides the image: equal requests of one image have one answer.

    The type that a model computes in is not part of it. A run keeps its captions when it goes on on another card.
    """

    model: str  # repository and commit, or a digest of a local folder
    prompt: str  # a key of `captioners.PROMPTS`, a task, an instruction, or tags to leave out
    trigger: str
    words: int
    max_tokens: int

    def key(self, sha256: str) -> str:
        """The name of the answer for the image of which `sha256` is the hash of the file's bytes."""
        # The words for a prompt stand for a text that may be improved: that text decides.
        asked = captioners.PROMPTS.get(self.prompt, self.prompt)
        content = [VERSION, self.model, self.prompt, asked, self.trigger, self.words, self.max_tokens, sha256]
        return digests.digest(content)


def identity(captioner: CaptionerPlan) -> str | None:
    """What tells one model from another; None where it is not known yet: it has no commit and is not here.

    Raises SettingsError for a folder that holds no model.
    """
    if captioner.commit is not None:
        return f"{captioner.source}@{captioner.commit}"
    if not captioner.path:
        return None
    folder = Path(captioner.path)
    if kinds.kind_of(folder, variable=kinds.named(captioner)) == TAGGER:
        return digests.digest([digests.sha256(folder / name) for name in captioners.TAGGER_FILES])
    return digests.weights_digest(folder)


def request_for(subset: Subset, captioner: CaptionerPlan, model: str) -> Request:
    """What the images of a subset are asked."""
    trigger = own_trigger(subset)
    prompt = subset.caption_prompt
    if prompt is None:
        prompt = captioners.SUBJECT if trigger else captioners.PLAIN
    if not trigger and prompt == captioners.SUBJECT:  # of regularisation images, which have no trigger word
        prompt = captioners.PLAIN
    return Request(model, prompt, trigger, captioner.words, captioner.max_tokens)


def wanting(images: Iterable[ImageRecord], data: DataPlan) -> Iterator[ImageRecord]:
    """The images that the model captions, in their order."""
    captioner = data.captioner
    if captioner is None:
        return
    for image in images:
        subset = data.datasets[image.dataset].subsets[image.subset]
        if wants_caption(image, subset, overwrite=captioner.overwrite):
            yield image


def wants_caption(image: ImageRecord, subset: Subset, *, overwrite: bool) -> bool:
    """Whether the model captions an image: one without a caption of its own, in a subset that leaves it to the model.

    The words of a class are what regularisation images are for: they stay.
    """
    if not subset.auto_caption or subset.source.kind == "generated":
        return False
    if image.caption is None:
        return True
    if image.caption_file in STAND_INS:
        return not subset.is_reg
    return overwrite
