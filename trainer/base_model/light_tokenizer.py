"""A text encoder's tokenizer without transformers and torch, to count the tokens of captions before a job.

It gives the same numbers of tokens as transformers' tokenizers do (tests/trainer/base_model/test_light_tokenizer.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from trainer.base_model import tokenizer_files
from trainer.base_model.tokenizer_files import TokenTable

# How CLIP's vocabulary was made: words, single digits, and runs of other characters (openai/CLIP, simple_tokenizer.py).
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# How Qwen's was: endings, words with one character before them, single digits, runs of marks, and white space (the
# tokenizer of Qwen2, which later models kept).
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How Mistral's is: not as its vocabulary was made, but as the tokenizer.json of Mistral Small 3.1 has it, by which
# FLUX.2 was trained (huggingface.co/mistralai/Mistral-Small-3.1-24B-Instruct-2503, discussion 84).
TEKKEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_MARK = "[INST]"  # a token of Mistral's alone
WORD_END = "</w>"  # that CLIP's tokens have at the end of a word; other byte pair encodings have no such mark
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
T5_END, T5_BLANK = "</s>", "▁"


@dataclass(frozen=True)
class Encoded:
    input_ids: list[int]
    offset_mapping: list[tuple[int, int]]  # characters of each token


class LightTokenizer:
    """A tokenizer by its files."""

    def __init__(self, files: Sequence[Path]) -> None:
        """`files`: tokenizer.json, or vocab.json and merges.txt. Raises ValueError if they cannot be read."""
        vocabulary = tokenizer_files.read_vocabulary({file.name: file for file in files})
        if not vocabulary.numbers:
            self._tokenizer = _t5(vocabulary)
        elif any(token.endswith(WORD_END) for token in vocabulary.numbers):
            self._tokenizer = _clip(vocabulary)
        elif TEKKEN_MARK in vocabulary.numbers:
            self._tokenizer = tekken(vocabulary)
        else:
            self._tokenizer = _qwen(vocabulary)

    def encode(self, text: str) -> Encoded:
        """The tokens of a text, with the marks around it."""
        found = self._tokenizer.encode(text)
        return Encoded(found.ids, found.offsets)


def _clip(vocabulary: TokenTable) -> Tokenizer:
    """CLIP's byte pair encoding, with the marks of begin and end around a text."""
    numbers = vocabulary.numbers
    for token in (BEGIN, END):
        if token not in numbers:
            raise ValueError(f"the vocabulary of CLIP's tokenizer lacks {token}")
    model = models.BPE(numbers, vocabulary.merges, end_of_word_suffix=WORD_END, unk_token=END)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([BEGIN, END])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, numbers[END]), (BEGIN, numbers[BEGIN]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def _qwen(vocabulary: TokenTable) -> Tokenizer:
    """Qwen's byte pair encoding, without a mark at either end."""
    tokenizer = Tokenizer(models.BPE(vocabulary.numbers, vocabulary.merges))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.add_tokens([AddedToken(**token) for _, token in sorted(vocabulary.added.items())])
    return tokenizer


def tekken(vocabulary: TokenTable) -> Tokenizer:
    """Mistral's byte pair encoding, without a mark at either end: its template writes them."""
    tokenizer = Tokenizer(models.BPE(vocabulary.numbers, vocabulary.merges, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(TEKKEN_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.add_tokens([AddedToken(**token) for _, token in sorted(vocabulary.added.items())])
    return tokenizer


def _t5(vocabulary: TokenTable) -> Tokenizer:
    """T5's unigrams, with the mark of the end after a text."""
    if not vocabulary.has(T5_END):
        raise ValueError(f"the vocabulary of T5's tokenizer lacks {T5_END}")
    model = models.Unigram(vocabulary.scores, unk_id=tokenizer_files.UNKNOWN, byte_fallback=False)
    tokenizer = Tokenizer(model)
    if vocabulary.charsmap is not None:
        tokenizer.normalizer = normalizers.Precompiled(vocabulary.charsmap)
    words = pre_tokenizers.Metaspace(replacement=T5_BLANK, prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    tokenizer.add_tokens([AddedToken(**token) for _, token in sorted(vocabulary.added.items())])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", T5_END],
        pair=["$A", T5_END, "$B", T5_END],
        special_tokens=[(T5_END, tokenizer.token_to_id(T5_END))],
    )
    return tokenizer
