"""Where captions come from and what is done to them. Standard library only.

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
OPEN, CLOSE = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class Caption:
    """A caption before the pipeline. Lines are stripped, empty ones left out; "" if nothing remains."""

    text: str
    origin: str  # metadata | sidecar | class_tokens
    legacy: bool = False  # not UTF-8: read as Windows-1252 (of which Latin-1's letters are part)


def clean(text: str) -> str:
    """Lines stripped, empty lines left out; halves of surrogate pairs, which no encoder takes, become `?`."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    # Not splitlines(), which also parts at characters that a caption may hold.
    return "\n".join(line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip())


# ---- the pipeline


def apply_pipeline(
    caption: str | None, subset: Subset, *, rng: random.Random, epoch: int, dropout_rate: float = 0.0
) -> str:
    """The text trained on in one occurrence of a picture. Pure: all chance comes from `rng`; `epoch` counts from 0."""
    if dropped(subset, rng=rng, epoch=epoch, dropout_rate=dropout_rate):
        return ""
    return compose_caption(caption, subset, rng)


def dropped(subset: Subset, *, rng: random.Random, epoch: int, dropout_rate: float = 0.0) -> bool:
    """Whether the whole caption is dropped. `dropout_rate` is the run's: the higher of it and the subset's counts.

    Every n epochs means that the n-th, 2n-th … go without captions.
    """
    chance = rng.random() < max(subset.caption_dropout_rate, dropout_rate)
    every = subset.caption_dropout_every_n_epochs
    return chance or (every > 0 and (epoch + 1) % every == 0)


def may_drop(subset: Subset, *, dropout_rate: float) -> bool:
    """Whether `dropped` can be true."""
    return max(subset.caption_dropout_rate, dropout_rate) > 0 or subset.caption_dropout_every_n_epochs > 0


def compose_caption(caption: str | None, subset: Subset, rng: random.Random) -> str:
    """The caption with everything done to it but dropping the whole.

    One line (a random one with `enable_wildcard`, else the first) → prefix and suffix → wildcards → kept tokens, the
    rest shuffled and dropped → secondary separator → the trigger word in front if it is not there. Two differences
    from sd-scripts: the line is chosen first, so that no line misses prefix or suffix; and regularisation pictures
    never get the trigger word.
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


def varying(subset: Subset) -> tuple[str, ...]:
    """What in this subset's captions is drawn by lot, in words."""
    parts = {
        "wildcards and lines": subset.enable_wildcard,
        "order of tags": subset.shuffle_caption,
        "dropped tags": subset.caption_tag_dropout_rate > 0,
    }
    return tuple(name for name, used in parts.items() if used)


def tag_frequency(captions: Iterable[str | None], separator: str) -> dict[str, int]:
    """How often each tag occurs in the captions, as the header of a LoRA file tells it."""
    tags = (tag.strip() for caption in captions for tag in (caption or "").split("\n")[0].split(separator or ","))
    return dict(Counter(tag for tag in tags if tag))


def _expand_wildcards(text: str, rng: random.Random) -> str:
    """`{a|b}` → a or b; `{{` and `}}` are braces."""
    text = text.replace("{{", OPEN).replace("}}", CLOSE)
    text = re.sub(r"\{([^}]+)\}", lambda match: rng.choice(match.group(1).split("|")), text)
    return text.replace(OPEN, "{").replace(CLOSE, "}")


def _shuffle(text: str, subset: Subset, rng: random.Random) -> str:
    """Keep the first tokens (or those around `keep_tokens_separator`), shuffle and thin out the others."""
    first: list[str] = []
    last: list[str] = []
    parts = text.split(subset.keep_tokens_separator, 2) if subset.keep_tokens_separator else [text]
    if len(parts) > 1:
        first, free, last = (_tokens(part, subset, blank=False) for part in (*parts, "")[:3])
    else:
        tokens = _tokens(text, subset, blank=True)
        first, free = tokens[: subset.keep_tokens], tokens[subset.keep_tokens :]
    if subset.shuffle_caption:
        rng.shuffle(free)
    if subset.caption_tag_dropout_rate > 0:
        free = [token for token in free if rng.random() >= subset.caption_tag_dropout_rate]
    return ", ".join(first + free + last)


def _tokens(text: str, subset: Subset, *, blank: bool) -> list[str]:
    parts = text.strip().split(subset.caption_separator) if subset.caption_separator else [text]
    return [part.strip() for part in parts if blank or part.strip()]


def _with_trigger(text: str, trigger: str) -> str:
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text):
        return text
    return f"{trigger}, {text}" if text else trigger
