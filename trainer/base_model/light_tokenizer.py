"""A text encoder's tokenizer without transformers and torch, to count the tokens of captions before a job.

It gives the same numbers of tokens as transformers' tokenizers do (tests/trainer/base_model/test_light_tokenizer.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

# How CLIP's vocabulary was made: words, single digits, and runs of other characters (openai/CLIP, simple_tokenizer.py).
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Encoded:
    input_ids: list[int]
    offset_mapping: list[tuple[int, int]]  # characters of each token


class LightTokenizer:
    """A tokenizer by its files."""

    def __init__(self, files: Sequence[Path]) -> None:
        """`files`: tokenizer.json, or CLIP's vocab.json and merges.txt. Raises ValueError if they cannot be read."""
        by_name = {file.name: file for file in files}
        if "tokenizer.json" in by_name:
            text = by_name["tokenizer.json"].read_text(encoding="utf-8")
            if not isinstance(json.loads(text).get("model"), dict):
                raise ValueError(f"{by_name['tokenizer.json']} has no model")
            self._tokenizer = Tokenizer.from_str(text)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        else:
            self._tokenizer = _clip(by_name["vocab.json"], by_name["merges.txt"])

    def encode(self, text: str) -> Encoded:
        """The tokens of a text, with the marks around it."""
        found = self._tokenizer.encode(text)
        return Encoded(found.ids, found.offsets)


def _clip(vocabulary: Path, merges: Path) -> Tokenizer:
    """CLIP's byte pair encoding, with the marks of begin and end around a text."""
    numbers = json.loads(vocabulary.read_text(encoding="utf-8"))
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges), end_of_word_suffix="</w>", unk_token=END))
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
