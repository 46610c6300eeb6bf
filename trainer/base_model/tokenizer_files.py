"""The files of a tokenizer: read without trust, so that its own code, patterns and sizes have no effect.

Of tokenizer.json only the vocabulary, the merges and the table of characters are taken, as transformers' classes do:
how a text is split into words is known of CLIP, T5, Qwen and Mistral (`light_tokenizer`, and transformers' own
classes). So no regular expression of a model is ever compiled. Every ValueError is a sentence about one of the files.
No torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.base_model import charsmap, configs
from trainer.spec.family import OPTIONAL, Facts
from trainer.spec.rules.config_rules import FLAG, Rule, number, only, whole
from trainer.spec.values import is_text, one_line, printable, show, some
from trainer.storage.read import read_regular

ALL_IN_ONE = "tokenizer.json"  # a fast tokenizer's file, which replaces those with the vocabulary
VOCABULARY, MERGES = "vocab.json", "merges.txt"  # CLIP's and Qwen's
TEKKEN = "PreTrainedTokenizerFast"  # the class that reads Mistral's tokenizer, which has none of its own
CONFIG = "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
NAMES = (CONFIG, ALL_IN_ONE, VOCABULARY, MERGES, SPECIAL, ADDED)
LARGEST_FILE = 2**26  # bytes
MOST_TOKENS = 2**20
MOST_ADDED = 10_000
LONGEST_TOKEN = 1_000  # characters
MOST_SCORE = 1e6
UNKNOWN = 2  # the place of the token for what is unknown in T5's vocabularies
MODELS = {"CLIPTokenizer": "BPE", "T5Tokenizer": "Unigram", "Qwen2Tokenizer": "BPE", TEKKEN: "BPE"}
# Class → what else tokenizer_config.json calls it: by other versions of transformers.
OTHER_NAMES = {TEKKEN: ("LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend")}
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
SIDE = only("left", "right")
# Keys of tokenizer_config.json that have an effect, besides the named tokens and the lists of tokens.
OPTIONS: Mapping[str, Rule] = {
    "model_max_length": number(3, 1e31),  # 1e30 means: no limit
    "padding_side": SIDE,
    "truncation_side": SIDE,
    "split_special_tokens": FLAG,
    "extra_ids": whole(0, 1000),
}
TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
DEFAULTS = {
    "CLIPTokenizer": {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},  # every byte is known
    TEKKEN: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
}
Token = str | dict[str, Any]  # its text, or a text with flags


@dataclass(frozen=True)
class TokenTable:
    """What tokens there are: with numbers and merges (byte pair encoding: CLIP, Qwen, Mistral), or with scores in order
    (T5).
    """

    numbers: dict[str, int] = field(default_factory=dict)
    merges: list[tuple[str, str]] = field(default_factory=list)
    scores: list[tuple[str, float]] = field(default_factory=list)
    charsmap: bytes | None = None  # which characters stand for which, in the form of SentencePiece
    # Tokens that are looked for before a text is split into words, by their numbers.
    added: dict[int, dict[str, Any]] = field(default_factory=dict)

    def has(self, token: str) -> bool:
        """Whether the model itself knows a token, without the added ones."""
        return token in self.numbers or any(token == known for known, _ in self.scores)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as its files describe it."""

    class_name: str
    vocabulary: TokenTable
    options: dict[str, Any]
    tokens: dict[str, Token]  # by their names: eos_token and so on
    lists: dict[str, list[Token]]
    added: dict[int, dict[str, Any]]


def problems(folder: Path, names: Collection[str], facts: Facts, *, configs_only: bool = False) -> list[str]:
    """What is wrong with the tokenizers of a model's folder, each with its file.

    `names`: the files that are needed. `configs_only`: the others are not here yet.
    """
    found = []
    for part, kind in facts.kinds.items():
        is_missing = not any(name.startswith(f"{part}/") for name in names)
        is_optional = any(pattern.startswith(f"{OPTIONAL}{part}/") for pattern in facts.files)
        if not part.startswith("tokenizer") or (is_missing and (is_optional or configs_only)):
            continue
        try:
            if configs_only:
                read_config(folder / part / CONFIG, kind.names[0])
            else:
                read(folder / part, kind.names[0])
        except ValueError as problem:
            found.append(f"{part}/{problem}")
    return found


def read(folder: Path, class_name: str) -> TokenizerFiles:
    """The tokenizer in `folder`. Raises ValueError, whose text begins with the name of a file in it."""
    config = read_config(folder / CONFIG, class_name) if (folder / CONFIG).exists() else {}
    files = {name: folder / name for name in NAMES if (folder / name).exists()}
    vocabulary = read_vocabulary(files, model=MODELS[class_name])
    tokens = {name: config[name] for name in NAMED_TOKENS if config.get(name) is not None}
    lists = {name: config[name] for name in TOKEN_LISTS if config.get(name)}
    added = {}
    if "added_tokens_decoder" in config:
        added = _added_in_config(config["added_tokens_decoder"])
    else:
        if SPECIAL in files:
            tokens |= _special_tokens(files[SPECIAL])
        if ADDED in files:
            special = {_text_of(token) for token in tokens.values()}
            added = _added_in_file(files[ADDED], special)
        added |= vocabulary.added
    options = {key: config[key] for key in OPTIONS if key in config}
    _check_known(class_name, vocabulary, tokens, added)
    return TokenizerFiles(class_name, vocabulary, options, tokens, lists, added)


def read_config(path: Path, class_name: str) -> dict[str, Any]:
    """tokenizer_config.json. Raises ValueError for code of its own, another class, and values that are not allowed."""
    config = _object(path, configs.LARGEST_CONFIG)
    try:
        configs.check_code(config)
    except ValueError as problem:
        raise ValueError(f"{path.name} {problem}") from problem
    name = config.get("tokenizer_class") or class_name
    if name not in (class_name, f"{class_name}Fast", *OTHER_NAMES.get(class_name, ())):
        raise ValueError(f"{path.name} says tokenizer_class={show(name)}; allowed is {class_name}")
    for key, rule in OPTIONS.items():
        if key in config and not rule.fits(config[key]):
            raise ValueError(f"{path.name} says {key}={show(config[key])}; allowed is {rule.text}")
    for key in NAMED_TOKENS:
        if config.get(key) is not None:
            _check_token(path, key, config[key])
    for key in TOKEN_LISTS:
        tokens = config.get(key) or []
        if not isinstance(tokens, list) or len(tokens) > MOST_ADDED:
            raise ValueError(f"{path.name} says {key}={show(tokens)}; allowed is a list of tokens")
        for token in tokens:
            _check_token(path, key, token)
    if "added_tokens_decoder" in config:
        _check_added(path, config["added_tokens_decoder"])
    return config


# ---- the vocabulary


def read_vocabulary(files: Mapping[str, Path], *, model: str | None = None) -> TokenTable:
    """The vocabulary in `files`, by their names. `model`: BPE (CLIP, Qwen) or Unigram (T5); None: either.

    Raises ValueError, whose text begins with the name of a file.
    """
    if ALL_IN_ONE in files:
        path = files[ALL_IN_ONE]
        content = _object(path, LARGEST_FILE)
        inner = content.get("model")
        if not isinstance(inner, dict):
            raise ValueError(f"{path.name} is damaged: it has no model")
        merges = inner.get("merges", [])
        kind = inner.get("type", "Unigram" if isinstance(inner.get("vocab"), list) else "BPE")
        if kind not in MODELS.values() or model not in (None, kind):
            raise ValueError(f"{path.name} says type={show(kind)}; allowed is {model or some([*MODELS.values()])}")
        added = _added_in_all(path, content.get("added_tokens") or [])
        if kind == "Unigram":
            characters = _charsmap(path, content.get("normalizer"))
            return TokenTable(scores=_scores(path, inner), charsmap=characters, added=added)
        numbers = _numbers(path, inner.get("vocab"))
        return TokenTable(numbers, _merges(path, merges, numbers), added=added)
    if VOCABULARY in files and MERGES in files and model in (None, "BPE"):
        numbers = _numbers(files[VOCABULARY], _object(files[VOCABULARY], LARGEST_FILE))
        lines = _text(files[MERGES]).split("\n")
        pairs = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
        return TokenTable(numbers, _merges(files[MERGES], pairs, numbers))
    raise ValueError(f"{ALL_IN_ONE} is missing")


def _object(path: Path, limit: int) -> dict[str, Any]:
    try:
        return configs.read_object(path, limit=limit)
    except ValueError as problem:
        raise ValueError(f"{path.name} {problem}") from problem


def _text(path: Path) -> str:
    try:
        return read_regular(path, limit=LARGEST_FILE).decode("utf-8")
    except OSError as problem:
        raise ValueError(f"{path.name} cannot be read: {problem.strerror or problem}") from problem
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path.name} is damaged: it is not text in UTF-8") from problem


def _is_token(text: Any) -> bool:
    return isinstance(text, str) and 0 < len(text) <= LONGEST_TOKEN and is_text(text)


def _numbers(path: Path, vocab: Any) -> dict[str, int]:
    """The vocabulary of BPE. Raises ValueError for tokens and numbers that cannot be."""
    if not isinstance(vocab, dict) or not 0 < len(vocab) <= MOST_TOKENS:
        raise ValueError(f"{path.name} is damaged: it has no table of tokens")
    for token, value in vocab.items():
        if not _is_token(token) or type(value) is not int or not 0 <= value < MOST_TOKENS:
            raise ValueError(f"{path.name} gives {printable(token)} the number {show(value)}, which cannot be")
    if len(set(vocab.values())) != len(vocab):
        raise ValueError(f"{path.name} gives two tokens the same number")
    return vocab


def _merges(path: Path, merges: Any, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    if not isinstance(merges, list) or len(merges) > MOST_TOKENS:
        raise ValueError(f"{path.name} is damaged: it has no list of merges")
    pairs = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{path.name} has the merge {show(merge)}; allowed are two tokens")
        left, right = parts
        for token in (left, right, left + right):
            if token not in vocab:
                raise ValueError(f"{path.name} merges {show(merge)}, and the vocabulary lacks {printable(token)}")
        pairs.append((left, right))
    return pairs


def _scores(path: Path, model: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The vocabulary of Unigram."""
    vocab = model.get("vocab")
    if not isinstance(vocab, list) or not UNKNOWN < len(vocab) <= MOST_TOKENS:
        raise ValueError(f"{path.name} is damaged: it has no list of tokens")
    if model.get("unk_id", UNKNOWN) != UNKNOWN:
        raise ValueError(f"{path.name} says unk_id={show(model.get('unk_id'))}; allowed is {UNKNOWN}")
    scores = []
    for item in vocab:
        if not isinstance(item, list) or len(item) != 2 or not _is_token(item[0]) or not _is_score(item[1]):
            raise ValueError(f"{path.name} has the token {show(item)}; allowed are a text and a score")
        scores.append((item[0], float(item[1])))
    return scores


def _is_score(value: Any) -> bool:
    return type(value) in (int, float) and -MOST_SCORE <= value <= MOST_SCORE


def _charsmap(path: Path, normalizer: Any) -> bytes | None:
    """The table of characters of SentencePiece; None if there is none."""
    inner = [normalizer]
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        inner = normalizer.get("normalizers") or []
    for step in inner if isinstance(inner, list) else []:
        if isinstance(step, dict) and step.get("type") == "Precompiled":
            try:
                return charsmap.decode(step.get("precompiled_charsmap"))
            except ValueError as problem:
                raise ValueError(f"{path.name} is damaged: precompiled_charsmap: {problem}") from problem
    return None


# ---- tokens with names, and added ones


def _text_of(token: Token) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _check_token(path: Path, key: str, token: Any) -> None:
    """Raises ValueError for what is neither a text nor a text with flags."""
    fits = _is_token(token)
    if isinstance(token, dict):
        flags = {name: value for name, value in token.items() if name not in ("content", "__type", "id")}
        fits = _is_token(token.get("content")) and all(
            name in TOKEN_FLAGS and isinstance(value, bool) for name, value in flags.items()
        )
    if not fits:
        raise ValueError(f"{path.name} says {printable(key)}={show(token)}; allowed is the text of a token")


def _flags(token: Mapping[str, Any]) -> dict[str, Any]:
    return {key: token[key] for key in ("content", *TOKEN_FLAGS) if key in token}


def _check_added(path: Path, added: Any) -> None:
    if not isinstance(added, dict) or len(added) > MOST_ADDED:
        raise ValueError(f"{path.name} says added_tokens_decoder={show(added)}; allowed is a table of tokens")
    for key, token in added.items():
        if not re.fullmatch("[0-9]{1,7}", key) or int(key) >= MOST_TOKENS or not isinstance(token, dict):
            raise ValueError(f"{path.name} says {printable(key)}={show(token)} among its added tokens")
        _check_token(path, key, token)


def _added_in_config(added: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    return {int(key): _flags(token) for key, token in added.items()}


def _added_in_all(path: Path, added: Any) -> dict[int, dict[str, Any]]:
    """The added tokens of tokenizer.json."""
    if not isinstance(added, list) or len(added) > MOST_ADDED:
        raise ValueError(f"{path.name} says added_tokens={show(added)}; allowed is a list of tokens")
    found = {}
    for token in added:
        place = token.get("id") if isinstance(token, dict) else None
        if type(place) is not int or not 0 <= place < MOST_TOKENS:
            raise ValueError(f"{path.name} has {show(token)} among its added tokens; each needs a number")
        _check_token(path, "added_tokens", token)
        found[place] = _flags(token)
    return found


def _special_tokens(path: Path) -> dict[str, Token]:
    """The named tokens in special_tokens_map.json."""
    found: dict[str, Token] = {}
    for key, token in _object(path, configs.LARGEST_CONFIG).items():
        if key in NAMED_TOKENS and token is not None:
            _check_token(path, key, token)
            found[key] = token if isinstance(token, str) else {**_flags(token), "special": True}
    return found


def _added_in_file(path: Path, special: Collection[str]) -> dict[int, dict[str, Any]]:
    """The tokens in added_tokens.json: text → number."""
    content = _object(path, LARGEST_FILE)
    if len(content) > MOST_ADDED:
        raise ValueError(f"{path.name} has {len(content)} tokens; allowed are {MOST_ADDED}")
    found = {}
    for text, place in content.items():
        if not _is_token(text) or type(place) is not int or not 0 <= place < MOST_TOKENS:
            raise ValueError(f"{path.name} gives {printable(text)} the number {show(place)}, which cannot be")
        is_special = text in special
        found[place] = {"content": text, "normalized": not is_special, "special": is_special}
    return found


def _check_known(
    class_name: str, vocabulary: TokenTable, tokens: Mapping[str, Token], added: Mapping[int, Mapping[str, Any]]
) -> None:
    """Raises ValueError for named tokens that have no number: they would get one for which there is no embedding."""
    texts = {str(token["content"]) for token in added.values()}
    for name, default in DEFAULTS[class_name].items():
        text = _text_of(tokens.get(name, default))
        # What is unknown becomes this token while a text is read, so that the model itself has to know it.
        known = vocabulary.has(text) or (name != "unk_token" and text in texts)
        if not known:
            raise ValueError(f"{CONFIG} says {name}={show(one_line(text))}, which its vocabulary lacks")
