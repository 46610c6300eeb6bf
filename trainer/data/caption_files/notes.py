"""What the captions of a subset amount to: counts, missing and empty ones, and options that have no effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.data.caption_files.findings import Findings
from trainer.data.captions import Caption, own_trigger
from trainer.spec.plan import CaptionerPlan, Subset
from trainer.spec.prompts import TRIGGER_PLACEHOLDER
from trainer.spec.values import many, some

CAPTION_THEM = "CAPTION_WITH has a model caption such images"


def note_captions(
    images: Sequence[str],
    captions: Mapping[str, Caption],
    subset: Subset,
    findings: Findings,
    *,
    captioner: CaptionerPlan | None = None,
) -> None:
    """Add notes about the captions of `images` to `findings`. `captioner`: makes those that are missing."""
    own = {}  # captions of their own, not class_tokens
    for image in images:
        if image in captions and captions[image].origin != "class_tokens":
            own[image] = captions[image]
    if subset.source.kind == "generated":
        findings.notes.append(f"the caption of {many(len(images), 'image')} is class_prompt {subset.class_tokens!r}")
    else:
        _note_missing(images, own, subset, findings, captioner=captioner if subset.auto_caption else None)
    empty = [image for image, caption in own.items() if not caption.text]
    if empty:
        findings.warn(f"no text in {many(len(empty), 'caption')}: trained without caption: {some(empty)}")
    several = [image for image, caption in own.items() if "\n" in caption.text and caption.origin == "sidecar"]
    if several and not subset.enable_wildcard:
        findings.warn(
            f"several lines in {many(len(several), 'caption')}: the first is used (enable_wildcard draws one): "
            f"{some(several)}"
        )
    _note_trigger(images, captions, subset, findings)
    _note_options(list(captions.values()), subset, findings)


def _note_missing(
    images: Sequence[str],
    own: Mapping[str, Caption],
    subset: Subset,
    findings: Findings,
    *,
    captioner: CaptionerPlan | None,
) -> None:
    findings.notes.insert(0, f"{many(len(images), 'image')}, {many(len(own), 'caption')}")
    missing = [image for image in images if image not in own]
    if captioner is not None and captioner.overwrite and own:
        count = many(len(own), "caption")
        findings.notes.append(f"CAPTION_OVERWRITE=true: {count} replaced by those of {captioner.name}")
    if not missing:
        return
    if captioner is not None and not (subset.is_reg and subset.class_tokens):
        findings.notes.append(f"{many(len(missing), 'caption')} missing: {captioner.name} makes them: {some(missing)}")
        return
    if subset.part_of is not None and not own and subset.class_tokens:
        return  # said with the folder's name, which gives the words
    count = many(len(missing), "caption")
    if subset.class_tokens:
        findings.notes.append(f"{count} missing: class_tokens {subset.class_tokens!r} is used: {some(missing)}")
    elif own_trigger(subset):
        text = f"{count} missing: the trigger word {own_trigger(subset)!r} alone is used: {some(missing)}. "
        text += CAPTION_THEM
        if own:
            findings.warn(text)
        else:
            findings.notes.append(text)
    elif own or subset.is_reg:
        findings.warn(f"{count} missing: trained without caption: {some(missing)}. {CAPTION_THEM}")
    else:
        findings.warn(
            "no captions at all and no class_tokens: the model learns these images without words, and no word will "
            f"call them up: {some(missing)}. Add .txt files, have a model caption them (CAPTION_WITH), or set "
            "class_tokens or TRIGGER_WORD."
        )


def _note_trigger(images: Sequence[str], captions: Mapping[str, Caption], subset: Subset, findings: Findings) -> None:
    """Warn of places for the trigger word that no word fills."""
    if own_trigger(subset):
        return
    around = f"{subset.caption_prefix or ''} {subset.caption_suffix or ''}"
    places = []
    for image in images:
        text = captions[image].text if image in captions else ""
        if TRIGGER_PLACEHOLDER.search(text) or TRIGGER_PLACEHOLDER.search(around):
            places.append(image)
    if not places:
        return
    fix = "Set TRIGGER_WORD, or trigger_word in dataset.json."
    if subset.is_reg:
        fix = "Regularisation images get no trigger word: write the word for the class there."
    findings.warn(f"[trigger] stays as it is in {many(len(places), 'caption')}: {some(places)}. {fix}")


def _note_options(captions: Sequence[Caption], subset: Subset, findings: Findings) -> None:
    """Warn of options that have no effect on any caption."""
    moves = subset.shuffle_caption or subset.caption_tag_dropout_rate > 0
    if subset.keep_tokens and not moves:
        findings.warn(
            f"keep_tokens {subset.keep_tokens} has no effect without shuffle_caption or caption_tag_dropout_rate"
        )
    if not captions:
        return
    separators = {
        "keep_tokens_separator": subset.keep_tokens_separator,
        "secondary_separator": subset.secondary_separator,
    }
    around = f"{subset.caption_prefix or ''} {subset.caption_suffix or ''}"
    for key, separator in separators.items():
        if separator and separator not in around and not any(separator in caption.text for caption in captions):
            findings.warn(f"{key} {separator!r} is in none of the captions")
    tagged = any(subset.caption_separator in caption.text for caption in captions)
    if moves and not tagged and subset.caption_separator not in around:
        findings.warn(
            f"tags are shuffled or dropped, but no caption has a caption_separator {subset.caption_separator!r}"
        )
