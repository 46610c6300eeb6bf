"""The caption of an image, and the pipeline of changes before each use. Standard library only.

The order of the steps is that of sd-scripts' `process_caption`, whose dataset files users bring.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.spec.plan import Subset

# Unicode noncharacters, which no text holds, stand for the escaped {{ and }}.
OPEN_BRACE = "\ufdd0"
CLOSE_BRACE = "\ufdd1"


@dataclass(frozen=True)
class Caption:
    """A caption before the pipeline. Its lines are stripped and not empty; "" if nothing remains."""

    text: str
    origin: str  # metadata | sidecar | class_tokens
    legacy: bool = False  # not UTF-8: read as Windows-1252, which includes the letters of Latin-1


def clean(text: str) -> str:
    """Strip lines and leave out empty ones; halves of surrogate pairs, which tokenizers refuse, become `?`."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    # Not splitlines(), which also splits at characters that a caption may hold.
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    return "\n".join(line for line in lines if line)


# ---- the pipeline


def apply_pipeline(
    caption: str | None, subset: Subset, *, rng: random.Random, epoch: int, dropout_rate: float = 0.0
) -> str:
    """The text trained on in one occurrence of an image. Pure: all chance comes from `rng`; `epoch` counts from 0."""
    if dropped(subset, rng=rng, epoch=epoch, dropout_rate=dropout_rate):
        return ""
    return compose_caption(caption, subset, rng)


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
    the others shuffled and dropped → secondary separator → the trigger word in front if it is not in the text. Two
    differences from sd-scripts: the line is chosen first, so that every line gets prefix and suffix; and
    regularisation images never get the trigger word.
    """
    lines = (caption or "").split("\n")
    line = rng.choice(lines) if subset.enable_wildcard else lines[0]
    text = " ".join(part for part in (subset.caption_prefix, line, subset.caption_suffix) if part)
    if subset.enable_wildcard:
        text = _expand_wildcards(text, rng)
    if subset.shuffle_caption or subset.caption_tag_dropout_rate > 0:
        text = _shuffle(text, subset, rng)
    if subset.secondary_separator:
        text = text.replace(subset.secondary_separator, subset.caption_separator)
    if subset.trigger_word and not subset.is_reg:
        text = _with_trigger(text, subset.trigger_word)
    return text


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


def _shuffle(text: str, subset: Subset, rng: random.Random) -> str:
    """Keep the first tokens (or those around `keep_tokens_separator`); shuffle and drop some of the others."""
    first: list[str] = []
    last: list[str] = []
    parts = text.split(subset.keep_tokens_separator, 2) if subset.keep_tokens_separator else [text]
    if len(parts) > 1:  # kept ||| free, or kept ||| free ||| kept
        first = _tokens(parts[0], subset, blank=False)
        free = _tokens(parts[1], subset, blank=False)
        if len(parts) > 2:
            last = _tokens(parts[2], subset, blank=False)
    else:
        tokens = _tokens(text, subset, blank=True)
        first = tokens[: subset.keep_tokens]
        free = tokens[subset.keep_tokens :]
    if subset.shuffle_caption:
        rng.shuffle(free)
    if subset.caption_tag_dropout_rate > 0:
        free = [token for token in free if rng.random() >= subset.caption_tag_dropout_rate]
    return ", ".join(first + free + last)


def _tokens(text: str, subset: Subset, *, blank: bool) -> list[str]:
    """The text between separators, stripped. `blank`: empty ones too, as sd-scripts counts them in `keep_tokens`."""
    parts = text.strip().split(subset.caption_separator) if subset.caption_separator else [text]
    return [part.strip() for part in parts if blank or part.strip()]


def _with_trigger(text: str, trigger: str) -> str:
    """The trigger word in front, unless it is in the text as a word of its own."""
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text):
        return text
    if not text:
        return trigger
    return f"{trigger}, {text}"
