"""Captions and prompts that are longer than the text encoder reads, by name, with the place where they are cut.

Encoders read a number of tokens and drop the rest without a word. A token is a short word, a part of a longer one, or
a comma. Where a model has several encoders, the one that reads most counts: the others give a summary of the beginning.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.base_model import without_weights
from trainer.base_model.light_tokenizer import LightTokenizer
from trainer.spec.errors import SettingsError
from trainer.spec.family import CLIP_TOKENS, Facts, facts_of
from trainer.spec.plan import ModelPlan, Prompt
from trainer.spec.values import printable

SHOWN_CAPTIONS = 5  # in the log; the report has all
# What CLIP's tokenizer splits a text into before it looks for tokens: endings like 's, words, single digits, marks.
CLIP_PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)
REMEMBERED_TEXTS = 1 << 16
SHOWN_CHARACTERS = 40  # of a caption, on each side of the cut


@dataclass(frozen=True)
class Reader:
    """The text encoder that reads the most of a caption, by its tokenizer."""

    name: str  # as in `Facts.text_readers`: T5, for example
    tokenizer: Any  # of transformers, or a LightTokenizer
    limit: int  # tokens, with those of begin and end that the tokenizer itself adds

    def count(self, text: str) -> int:
        """How many tokens `text` has, with those of begin and end."""
        return len(self._encoded(text).input_ids)

    def _encoded(self, text: str) -> Any:
        if isinstance(self.tokenizer, LightTokenizer):
            return self.tokenizer.encode(text)
        return self.tokenizer(text, return_offsets_mapping=True, verbose=False)

    def cut(self, text: str) -> Cut | None:
        """Where `text` is cut; None if it is read whole."""
        encoded = self._encoded(text)
        count = len(encoded.input_ids)
        if count <= self.limit:
            return None
        first, last = encoded.offset_mapping[-1]
        end_marks = int(first == last)  # CLIP's and T5's mark of the end keeps its place; Qwen's tokenizers add none
        end = encoded.offset_mapping[self.limit - end_marks][0]  # where the first token begins that finds no place
        return Cut(count, text[:end], text[end:])


@dataclass(frozen=True)
class Cut:
    """A text that is longer than its encoder reads."""

    tokens: int
    kept: str
    lost: str

    @property
    def lost_start(self) -> str:
        """The beginning of what is lost."""
        return self.lost if len(self.lost) <= SHOWN_CHARACTERS else f"{self.lost[:SHOWN_CHARACTERS]}…"

    def __str__(self) -> str:
        kept = self.kept if len(self.kept) <= SHOWN_CHARACTERS else f"…{self.kept[-SHOWN_CHARACTERS:]}"
        lost = printable(self.lost_start.strip())
        return f"{self.tokens} tokens, read to {printable(kept)!r} and cut before {lost!r}"


def load_reader(facts: Facts, model: Path, *, max_tokens: int = CLIP_TOKENS) -> Reader | None:
    """The reader of the model in the folder `model`. `max_tokens`: PARAMS_MAX_TOKEN_LENGTH."""
    from trainer.base_model.loading import load_tokenizer  # slow to import

    for folder, (name, tokens) in facts.text_readers.items():
        if (model / folder).is_dir():
            tokenizer = load_tokenizer(model / folder, facts.kinds[folder])
            return Reader(name, tokenizer, _limit(tokens, tokenizer.model_max_length, max_tokens))
    return None


def _limit(tokens: int, longest: int, max_tokens: int) -> int:
    """`tokens`: that the encoder reads; `longest`: that its tokenizer allows; both with those of begin and end."""
    if max_tokens != CLIP_TOKENS:
        return max_tokens + 2
    return min(tokens, longest)


def load_light_reader(model: ModelPlan, *, max_tokens: int, hub_cache: Path | None) -> Reader | None:
    """The same reader before a job, without transformers; None if its tokenizer is not on this machine."""
    facts = facts_of(model.family, model.base)
    without = {facts.parts[part].replace("text_encoder", "tokenizer") for part, path in model.parts.items() if not path}
    for folder, (name, tokens) in facts.text_readers.items():
        if folder in without:
            continue
        found = without_weights.tokenizer_of(model, folder, hub_cache=hub_cache)
        if found is None:
            return None
        files, longest = found
        try:
            tokenizer = LightTokenizer(files)
        except ValueError as problem:
            raise SettingsError(
                f"The tokenizer in {files[0].parent} cannot be used: {problem}. Fix: download it again."
            ) from problem
        return Reader(name, tokenizer, _limit(tokens, longest, max_tokens))
    return None


def least_tokens(text: str, *, reader: str) -> int:
    """How many tokens a text has at least, with those of begin and end, for when no tokenizer is here.

    CLIP's tokenizer joins nothing across its pieces, nor T5's across blanks.
    """
    if reader == "CLIP":
        return len(CLIP_PIECES.findall(text)) + 2
    return len(text.split()) + 1


def describe_surely_cut(
    facts: Facts,
    captions: Iterable[tuple[str, Sequence[str]]],
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = CLIP_TOKENS,
) -> list[str]:
    """Lines for the log: the captions and prompts that are too long in any case, as far as that is known without the
    model's tokenizer. `captions` as for `find_cuts`.
    """
    name, limit = max(facts.text_readers.values(), key=lambda reader: reader[1])
    if max_tokens != CLIP_TOKENS:
        limit = max_tokens + 2
    of_prompts = [(f"prompt {number}", (prompt.text,)) for number, prompt in enumerate(prompts)]
    long: list[str] = []
    for place, own in itertools.chain(captions, of_prompts):
        if not own:
            continue
        count = max(least_tokens(text, reader=name) for text in own)
        if count > limit:
            long.append(f"{printable(place)} ({count} tokens or more)")
    if not long:
        return []
    fix = "shorten them, or put what matters first"
    larger = [length for length in facts.max_token_lengths[1:] if length + 2 > limit]
    if larger:
        fix = f"PARAMS_MAX_TOKEN_LENGTH={larger[-1]}, or {fix}"
    count_texts = "1 text is" if len(long) == 1 else f"{len(long)} texts are"
    shown = ", ".join(long[:SHOWN_CAPTIONS])
    if len(long) > SHOWN_CAPTIONS:
        shown += f" and {len(long) - SHOWN_CAPTIONS} more"
    return [
        f"{count_texts} longer than the {limit} tokens that {name} reads, and the end has no effect: "
        f"{shown}. Fix: {fix}. The job itself says where each is cut."
    ]


def find_cuts(reader: Reader, captions: Iterable[tuple[str, Sequence[str]]]) -> dict[str, Cut]:
    """Images → the longest of their captions, if it is cut. `captions`: all that each image may be trained with."""
    cut_of = functools.lru_cache(REMEMBERED_TEXTS)(reader.cut)  # many images may have the same caption
    cuts: dict[str, Cut] = {}
    for image, texts in captions:
        for text in texts:
            cut = cut_of(text)
            if cut is not None and (image not in cuts or cut.tokens > cuts[image].tokens):
                cuts[image] = cut
    return cuts


def describe_cuts(
    reader: Reader, cuts: Mapping[str, Cut], facts: Facts, *, limit: int | None, in_report: bool = True
) -> list[str]:
    """Lines for the log or the report: how many captions are cut, which, where, and what helps.

    At most `limit` are named; None: all. `in_report`: whether the report has them all.
    """
    if not cuts:
        return []
    longest = max(cut.tokens for cut in cuts.values())
    fix = "shorten them, or put what matters first"
    larger = [length for length in facts.max_token_lengths[1:] if length + 2 > reader.limit]
    if larger:
        enough = [length for length in larger if length + 2 >= longest]
        fix = f"PARAMS_MAX_TOKEN_LENGTH={(enough or larger[-1:])[0]}, or {fix}"
    lines = [
        f"{len(cuts)} captions are longer than the {reader.limit} tokens that {reader.name} reads; their ends have no "
        f"effect. Fix: {fix}."
    ]
    for image, cut in list(cuts.items())[:limit]:
        lines.append(f"  {printable(image)}: {cut}")
    if limit is not None and len(cuts) > limit:
        lines.append(f"  and {len(cuts) - limit} more{': see dataset-report.txt' if in_report else ''}.")
    return lines


def describe_prompts(reader: Reader, prompts: Sequence[Prompt]) -> list[str]:
    """A line for each prompt, or negative prompt, that is cut."""
    lines = []
    for number, prompt in enumerate(prompts):
        for which, text in (("Prompt", prompt.text), ("Negative prompt", prompt.negative)):
            cut = reader.cut(text)
            if cut is not None:
                lines.append(
                    f"{which} {number} is longer than the {reader.limit} tokens that {reader.name} reads: {cut}."
                )
    return lines
