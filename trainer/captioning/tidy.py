"""A model's answer becomes a caption: one line, without what models write around it. No torch.

What people complain of in machine captions: an introduction ("This image shows"), Markdown, quotation marks, the same
sentence again and again, an end in the middle of a sentence where a limit was reached, and a refusal in place of a
caption.
"""

from __future__ import annotations

import re

from trainer.captioning.store import Made

INTRODUCTION = re.compile(
    r"^(?:(?:sure|certainly|of course)[,!.:]\s*)?"
    r"(?:here(?: is|'s) (?:a|the|your)(?: \w+){0,3} caption(?: for (?:this|the) image)?\s*:|caption\s*:"
    r"|(?:in )?(?:this|the) (?:image|photo|photograph|picture) "
    r"(?:shows|depicts|features|is of|captures|presents)\b)\s*",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"^(?:(?:i am|i'm) (?:sorry|unable|not able)|sorry,|i (?:can(?:no|')t|cannot|won't)\b|as an ai\b)", re.IGNORECASE
)
MARKUP = re.compile(r"\*\*|__|^#+\s*|^[-*]\s+|<\|[^|<>]*\|>|</?s>|<pad>", re.MULTILINE)
QUOTES = {'"': '"', "“": "”", "'": "'", "«": "»"}
SENTENCE = re.compile(r"(?<=[.!?])\s+")
MIN_LENGTH = 3  # characters that can be a caption


def tidy(answer: str, model: str, *, was_cut: bool) -> Made:
    """The caption in `answer`. `was_cut`: the model was stopped at a number of tokens, maybe in a sentence."""
    text = " ".join(MARKUP.sub("", answer.replace("’", "'")).split())
    # Before an introduction is taken off: "Sorry, I can't" is none, and has none.
    if REFUSAL.search(text):
        return Made("", model, f"it refuses: {text[:60]}")
    text = _without_quotes(text)
    shortened = INTRODUCTION.sub("", text)
    if shortened != text and shortened:
        text = shortened[0].upper() + shortened[1:]
    text = _without_quotes(text)
    sentences = SENTENCE.split(text)
    if was_cut and len(sentences) > 1 and not text.endswith((".", "!", "?")):
        sentences = sentences[:-1]
    text = " ".join(_without_repeats(sentences))
    if len(text) < MIN_LENGTH:
        return Made("", model, "it says nothing")
    return Made(text, model)


def _without_quotes(text: str) -> str:
    """The text without quotation marks around all of it."""
    for left, right in QUOTES.items():
        inside = text[1:-1]
        if len(text) > 2 and text.startswith(left) and text.endswith(right) and left not in inside:
            return inside.strip()
    return text


def _without_repeats(sentences: list[str]) -> list[str]:
    """The sentences up to the first that comes again: from there on a model goes round in a circle."""
    kept: list[str] = []
    seen: set[str] = set()
    for sentence in sentences:
        form = sentence.casefold().strip(" .!?")
        if form in seen:
            break
        seen.add(form)
        kept.append(sentence)
    return kept
