"""Small tokenizers of the real classes, learnt from the scenes' captions.

CLIP's and Qwen's are byte-level: every byte is a token, so any caption can be written. T5's is a unigram model over
printable ASCII; any other character becomes `<unk>`.
"""

import json
import random
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer, T5Tokenizer

from trainer.families import qwen_image
from trainer.families.miniatures.scenes import caption, random_scene

CLIP_LENGTH = 77
T5_LENGTH = 64
QWEN_LENGTH = 64  # tokens that the miniature is trained with; the pipeline reads as many as a caption has
DEEP_QWEN_LENGTH = 96  # of FLUX.2's, which reads as many tokens of every caption; its template alone takes 31 here
# What Qwen3's own template makes of one message, where the model may think before it answers.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Qwen-Image's, whose tokenizer has no template of its own here.
DESCRIPTION = (qwen_image.BEFORE, qwen_image.AFTER)
DESCRIPTION_LENGTH = 96  # tokens that its miniature is trained with, of which 34 are dropped
CHAT_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
START = "<|startoftext|>"
END = "<|endoftext|>"


def corpus(size: int = 6000, *, seed: int = 0) -> list[str]:
    """Captions with many invented words in them, so that the vocabulary holds syllables as well as our nouns."""
    rng = random.Random(seed)
    return [caption(random_scene(rng), rng, unknown=0.3) for _ in range(size)]


def clip_tokenizer(texts: list[str], *, merges: int = 380, pad: str = END) -> CLIPTokenizer:
    """A `CLIPTokenizer` in the real one's order: bytes, word-final bytes, at most `merges` merges, start, end."""
    draft = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    like = CLIPTokenizer().backend_tokenizer
    draft.normalizer = like.normalizer
    draft.pre_tokenizer = like.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=10**6, min_frequency=40, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    draft.train_from_iterator(texts, trainer)
    pairs = [tuple(pair) for pair in json.loads(draft.to_str())["model"]["merges"][:merges]]
    words = alphabet + [char + "</w>" for char in alphabet] + ["".join(pair) for pair in pairs] + [START, END]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=pairs, pad_token=pad, model_max_length=CLIP_LENGTH)


def t5_tokenizer(texts: list[str], *, size: int = 700) -> T5Tokenizer:
    """A `T5Tokenizer` of about `size` tokens: `<pad>` 0, `</s>` 1, `<unk>` 2 as in the real one, without sentinels."""
    draft = Tokenizer(models.Unigram())
    draft.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always", split=True)]
    )
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = list(string.printable[:94])
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, unk_token=special[2], initial_alphabet=alphabet, show_progress=False
    )
    draft.train_from_iterator(texts, trainer)
    pieces = [(piece, score) for piece, score in json.loads(draft.to_str())["model"]["vocab"] if piece not in special]
    known = {piece for piece, _ in pieces}
    rare = min(score for _, score in pieces) - 1.0
    pieces += [(char, rare) for char in [*alphabet, "▁"] if char not in known]
    vocab = [(token, 0.0) for token in special] + pieces
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


def qwen_tokenizer(
    texts: list[str], *, merges: int = 380, length: int = 131072, template: str | None = CHAT_TEMPLATE
) -> Qwen2Tokenizer:
    """A `Qwen2Tokenizer` in the real one's order: bytes, at most `merges` merges, and the marks of a conversation."""
    like = Qwen2Tokenizer().backend_tokenizer
    draft = Tokenizer(models.BPE())
    draft.normalizer = like.normalizer
    draft.pre_tokenizer = like.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=10**6, min_frequency=40, initial_alphabet=alphabet, show_progress=False)
    draft.train_from_iterator(texts, trainer)
    pairs = [tuple(pair) for pair in json.loads(draft.to_str())["model"]["merges"][:merges]]
    words = alphabet + ["".join(pair) for pair in pairs]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    marks = {
        len(vocab) + index: AddedToken(mark, special=True, normalized=False) for index, mark in enumerate(CHAT_MARKS)
    }
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=pairs,
        added_tokens_decoder=marks,
        eos_token=CHAT_MARKS[2],
        pad_token=CHAT_MARKS[0],
        chat_template=template,
        model_max_length=length,
    )


def description_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """One that knows the words of Qwen-Image's template: they are as many tokens as in the real one."""
    return qwen_tokenizer([*texts, *DESCRIPTION * len(texts)], merges=560, template=None)


def in_template(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """Captions as the pipelines give them to Qwen: FLUX.2's, whose tokenizer has a length, with an empty thought."""
    before, after = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    if tokenizer.chat_template is None:
        before, after = DESCRIPTION
    elif tokenizer.model_max_length == DEEP_QWEN_LENGTH:
        after += "<think>\n\n</think>\n\n"
    return [f"{before}{text}{after}" for text in texts]


def new_tokenizers(kinds: Sequence[str]) -> list[PreTrainedTokenizerBase]:
    """Tokenizers of these kinds: "clip" is CLIP-L's, "clip!" is CLIP-G's, which pads with "!"; "t5".

    "qwen" is Z-Image's; "qwen!" is FLUX.2's, which fills captions up to its length; "qwen, described" is Qwen-Image's,
    which knows its template.
    """
    texts = corpus()
    makers = {"clip": clip_tokenizer, "clip!": lambda texts: clip_tokenizer(texts, pad="!"), "t5": t5_tokenizer}
    makers |= {"qwen": qwen_tokenizer, "qwen!": lambda texts: qwen_tokenizer(texts, length=DEEP_QWEN_LENGTH)}
    makers["qwen, described"] = description_tokenizer
    return [makers[kind](texts) for kind in kinds]


def load_tokenizers(folder: Path, kinds: Sequence[str]) -> list[PreTrainedTokenizerBase]:
    """The tokenizers that a pipeline's folder holds: tokenizer, tokenizer_2, and so on."""
    tokenizers: list[PreTrainedTokenizerBase] = []
    for number, kind in enumerate(kinds, start=1):
        place = folder / ("tokenizer" if number == 1 else f"tokenizer_{number}")
        tokenizer_class = {"t5": T5Tokenizer, "clip": CLIPTokenizer, "clip!": CLIPTokenizer}.get(kind, Qwen2Tokenizer)
        tokenizers.append(tokenizer_class.from_pretrained(place))
    return tokenizers


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """Ids (B, L) as int16, cut or padded to the tokenizer's length: as calling it does, but several times as fast.

    Of Qwen's tokenizers: the captions in their template, padded to what their miniature is trained with.
    """
    length = tokenizer.model_max_length
    if isinstance(tokenizer, Qwen2Tokenizer):
        texts = in_template(tokenizer, texts)
        if tokenizer.chat_template is None:
            length = DESCRIPTION_LENGTH
        elif length != DEEP_QWEN_LENGTH:
            length = QWEN_LENGTH
    end = tokenizer.eos_token_id
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    out = np.full((len(texts), length), tokenizer.pad_token_id, dtype=np.int16)
    for row, encoding in enumerate(backend.encode_batch_fast(list(texts))):
        ids = encoding.ids if len(encoding.ids) <= length else [*encoding.ids[: length - 1], end]
        out[row, : len(ids)] = ids
    return torch.from_numpy(out)


def compact(folder: Path) -> None:
    """Rewrites the tokenizers' JSON files under `folder` without white space: half the size."""
    for file in folder.glob("tokenizer*/tokenizer.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
