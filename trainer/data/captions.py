"""The caption of an image, and the pipeline of changes before each use. Standard library only.

The order of the steps is that of sd-scripts' `process_caption`, whose dataset files users bring.
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.spec.plan import Subset
from trainer.spec.prompts import TRIGGER_PLACEHOLDER

FOLDER_NAME = "the name of its folder"  # `Caption.file` of words that kohya's folders give
# Unicode noncharacters, which `clean` keeps out of captions, stand for the escaped {{ and }}, and for the trigger word.
OPEN_BRACE = "\ufdd0"
CLOSE_BRACE = "\ufdd1"
TRIGGER_MARK = "\ufdd2"

# What a caption never means. Controls but tab and newline, the replacement character (a letter that was lost when the
# file was converted), halves of surrogate pairs and noncharacters become a blank. Characters without width are removed;
# but not the joiners, which emoji and some scripts need.
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufff9-\ufffd\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption before the pipeline. Its lines are stripped and not empty; "" if nothing remains."""

    text: str
    origin: str  # metadata | sidecar | class_tokens
    file: str = ""  # where it was read, relative to the subset's folder: "a.txt", or "metadata.csv, row 2"
    encoding: str = ""  # of that file


def clean(text: str) -> str:
    """Strip lines, leave out empty ones, and take out the characters of CONTROLS and INVISIBLE."""
    text = INVISIBLE.sub("", CONTROLS.sub(" ", text))
    # Not splitlines(), which also splits at characters that a caption may hold.
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    return "\n".join(line for line in lines if line)


def removed_characters(text: str) -> list[str]:
    """The characters that `clean` takes out of `text`, as U+0000, each once."""
    found = CONTROLS.findall(text) + INVISIBLE.findall(text)
    return [f"U+{ord(character):04X}" for character in sorted(set(found))]


# ---- the pipeline


def dropped(subset: Subset, *, rng: random.Random, epoch: int, dropout_rate: float = 0.0) -> bool:
    """Whether the whole caption is dropped. `dropout_rate` is the run's: the higher of it and the subset's counts.

    `caption_dropout_every_n_epochs` drops all captions of the n-th, 2n-th … epoch. `rng` is always used once, so that
    later draws do not depend on the rate.
    """
    by_chance = rng.random() < max(subset.caption_dropout_rate, dropout_rate)
    every = subset.caption_dropout_every_n_epochs
    return by_chance or (every > 0 and (epoch + 1) % every == 0)


def may_drop(subset: Subset, *, dropout_rate: float) -> bool:
    """Whether `dropped` can be true."""
    return max(subset.caption_dropout_rate, dropout_rate) > 0 or subset.caption_dropout_every_n_epochs > 0


def compose_caption(caption: str | None, subset: Subset, rng: random.Random) -> str:
    """The caption after every step of the pipeline but caption dropout.

    One line (a random one with `enable_wildcard`, else the first) → prefix and suffix → wildcards → kept tokens first,
    the others shuffled and dropped → secondary separator → the trigger word in front if it is not in the text. Three
    differences from sd-scripts: the line is chosen first, so that every line gets prefix and suffix; regularisation
    images never get the trigger word; and a `keep_tokens_separator` is taken out also where nothing is shuffled.

    While tags are moved, a mark stands for the trigger word, so that it is one token even if it has a separator in it.
    """
    lines = (caption or "").split("\n")
    line = rng.choice(lines) if subset.enable_wildcard else lines[0]
    text = " ".join(part for part in (subset.caption_prefix, line, subset.caption_suffix) if part)
    trigger = own_trigger(subset)
    if trigger:
        text = _find_trigger(trigger).sub(TRIGGER_MARK, TRIGGER_PLACEHOLDER.sub(TRIGGER_MARK, text))
    if subset.enable_wildcard:
        text = _expand_wildcards(text, rng)
    if subset.shuffle_caption or subset.caption_tag_dropout_rate > 0 or _has_fixed_part(text, subset):
        text = _shuffle(text, subset, rng)
    if subset.secondary_separator:
        text = text.replace(subset.secondary_separator, subset.caption_separator)
    if trigger:
        text = _with_trigger(text, trigger)
    return text


def own_trigger(subset: Subset) -> str:
    """The trigger word that this subset's captions get: "" for none."""
    if subset.is_reg:
        return ""
    return subset.trigger_word or ""


def fill_placeholders(caption: str | None, subset: Subset) -> str | None:
    """The caption with its placeholders replaced, where there is a trigger word to replace them with."""
    trigger = own_trigger(subset)
    if not caption or not trigger:
        return caption
    return trigger.join(TRIGGER_PLACEHOLDER.split(caption))


def random_parts(subset: Subset) -> tuple[str, ...]:
    """The random parts of this subset's captions, in words for the log."""
    parts = []
    if subset.enable_wildcard:
        parts.append("wildcards and lines")
    if subset.shuffle_caption:
        parts.append("order of tags")
    if subset.caption_tag_dropout_rate > 0:
        parts.append("dropped tags")
    return tuple(parts)


def tag_frequency(captions: Iterable[str | None], separator: str) -> dict[str, int]:
    """How often each tag occurs in the first lines of the captions, for the header of a LoRA file."""
    counts = Counter[str]()
    for caption in captions:
        first_line = (caption or "").split("\n")[0]
        for tag in first_line.split(separator or ","):
            if tag.strip():
                counts[tag.strip()] += 1
    return dict(counts)


def _expand_wildcards(text: str, rng: random.Random) -> str:
    """`{a|b}` → a or b; `{{` and `}}` are braces."""
    text = text.replace("{{", OPEN_BRACE).replace("}}", CLOSE_BRACE)
    text = re.sub(r"\{([^}]+)\}", lambda match: rng.choice(match.group(1).split("|")), text)
    return text.replace(OPEN_BRACE, "{").replace(CLOSE_BRACE, "}")


def _has_fixed_part(text: str, subset: Subset) -> bool:
    return bool(subset.keep_tokens_separator) and str(subset.keep_tokens_separator) in text


def _shuffle(text: str, subset: Subset, rng: random.Random) -> str:
    """Keep the first tokens (or those around `keep_tokens_separator`); shuffle and drop some of the others.

    A token that is the trigger word goes to the kept ones, and one that has it among other words is never dropped.
    """
    first: list[str] = []
    last: list[str] = []
    parts = text.split(subset.keep_tokens_separator, 2) if subset.keep_tokens_separator else [text]
    if len(parts) > 1:  # kept ||| free, or kept ||| free ||| kept
        first = _tokens(parts[0], subset, blank=False)
        free = _tokens(parts[1], subset, blank=False)
        if len(parts) > 2:
            rest = parts[2].replace(subset.keep_tokens_separator or "", subset.caption_separator)
            last = _tokens(rest, subset, blank=False)
    else:
        tokens = _tokens(text, subset, blank=True)
        first = tokens[: subset.keep_tokens]
        free = tokens[subset.keep_tokens :]
    if subset.shuffle_caption:
        first += [token for token in free if token == TRIGGER_MARK]
        free = [token for token in free if token != TRIGGER_MARK]
        rng.shuffle(free)
    if subset.caption_tag_dropout_rate > 0:
        kept = []
        for token in free:
            dropped_token = rng.random() < subset.caption_tag_dropout_rate
            if not dropped_token or TRIGGER_MARK in token:
                kept.append(token)
        free = kept
    return ", ".join(first + free + last)


def _tokens(text: str, subset: Subset, *, blank: bool) -> list[str]:
    """The text between separators, stripped. `blank`: empty ones too, as sd-scripts counts them in `keep_tokens`."""
    parts = text.strip().split(subset.caption_separator) if subset.caption_separator else [text]
    return [part.strip() for part in parts if blank or part.strip()]


@functools.cache
def _find_trigger(trigger: str) -> re.Pattern[str]:
    """Finds the trigger word as a word of its own."""
    return re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)")


def _with_trigger(text: str, trigger: str) -> str:
    """The trigger word in the place of its marks; in front, unless it is in the text."""
    if TRIGGER_MARK in text or _find_trigger(trigger).search(text):
        return text.replace(TRIGGER_MARK, trigger)
    if not text:
        return trigger
    return f"{trigger}, {text}"
