"""The tokenizer of a captioning model, and the form in which its kind takes a question about an image.

Of tokenizer.json only the vocabulary, the merges and the added tokens are taken (`base_model.tokenizer_files`). How a
text is split into words is written down here for the families of tokenizers that are known, so that no pattern of a
model is compiled; and so are the forms of a chat, so that no template of a model is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from trainer.base_model import tokenizer_files
from trainer.spec.errors import SettingsError
from trainer.spec.rules.captioners import FLORENCE2, TASKS, TOKENIZER, task

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = f"{_LETTERS}{{1,3}}{_REST}"
QWEN_WORDS = f"{_LETTERS}{_REST}"
LLAMA3, CHAT_ML = "<|start_header_id|>", "<|im_start|>"  # a token that only a tokenizer of that form has
STOPS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "</s>")
# What Florence-2's own processor asks for its tasks.
QUESTIONS = dict(
    zip(
        TASKS,
        (
            "What does the image describe?",
            "Describe in detail what is shown in the image.",
            "Describe with a paragraph what is shown in the image.",
        ),
        strict=True,
    )
)
# JoyCaption was trained with these two around the tokens of an image.
JOY_IMAGE = ("<|reserved_special_token_70|>", "<|reserved_special_token_71|>")


@dataclass(frozen=True)
class TextTokens:
    """A tokenizer: texts ↔ numbers."""

    tokenizer: Tokenizer
    kind: str

    @property
    def stops(self) -> list[int]:
        """The tokens that end an answer."""
        found = [self.tokenizer.token_to_id(token) for token in STOPS]
        return [number for number in found if number is not None]

    @property
    def padding(self) -> int:
        """A token for the places that are not looked at."""
        found = self.tokenizer.token_to_id("<pad>")
        return self.stops[-1] if found is None else int(found)

    def question(self, prompt: str, *, image_token: int, count: int) -> list[int]:
        """The tokens of a question about an image that takes `count` tokens. `prompt`: an instruction, or a task."""
        before, after = self._around_image(prompt, image_token)
        return [*self._numbers(before), *[image_token] * count, *self._numbers(after)]

    def text(self, numbers: list[int]) -> str:
        """An answer in words."""
        decoded: str = self.tokenizer.decode(numbers, skip_special_tokens=True)
        return decoded

    def _numbers(self, text: str) -> list[int]:
        numbers: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return numbers

    def _around_image(self, prompt: str, image_token: int) -> tuple[str, str]:
        """The texts before and after the tokens of the image."""
        if self.kind == FLORENCE2:
            return "", f"<s>{QUESTIONS[task(prompt)]}</s>"
        if self.tokenizer.token_to_id(CHAT_ML) is not None:
            start, end = "<|vision_start|>", "<|vision_end|>"
            if self.tokenizer.token_to_id(start) is None:
                start = end = ""
            return f"<|im_start|>user\n{start}", f"{end}{prompt}<|im_end|>\n<|im_start|>assistant\n"
        name = self.tokenizer.id_to_token(image_token)
        start, end = JOY_IMAGE if name == "<|reserved_special_token_69|>" else ("", "")
        system = "Cutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\nYou are a helpful image captioner."
        return (
            f"<|begin_of_text|>{_header('system')}{system}<|eot_id|>{_header('user')}{start}",
            f"{end}{prompt.strip()}<|eot_id|>{_header('assistant')}",
        )


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def load_text_tokens(folder: Path, kind: str) -> TextTokens:
    """The tokenizer of a model of that kind. Raises SettingsError for one that is not known."""
    try:
        table = tokenizer_files.read_vocabulary({TOKENIZER: folder / TOKENIZER}, model="BPE")
    except ValueError as problem:
        raise SettingsError(f"{folder} cannot be used: {problem}. Fix: take another model.") from problem
    numbers = dict(table.numbers)
    for number, token in table.added.items():
        numbers[str(token["content"])] = number
    is_llama3 = LLAMA3 in numbers
    if kind != FLORENCE2 and not is_llama3 and CHAT_ML not in numbers:
        raise SettingsError(
            f"{folder} cannot be used: its tokenizer is neither Llama 3's nor Qwen's, and the form of its chat is not "
            "known. Fix: CAPTION_WITH=joycaption or qwen3-vl."
        )
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=table.merges, ignore_merges=is_llama3))
    if kind == FLORENCE2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        words = pre_tokenizers.Split(Regex(LLAMA3_WORDS if is_llama3 else QWEN_WORDS), "isolated")
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
        if not is_llama3:
            tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    for number, token in sorted(table.added.items()):
        flags = {key: value for key, value in token.items() if key not in ("content", "special")}
        added = AddedToken(str(token["content"]), special=bool(token.get("special")), **flags)
        if token.get("special"):
            tokenizer.add_special_tokens([added])
        else:
            tokenizer.add_tokens([added])
        assert tokenizer.token_to_id(str(token["content"])) == number
    if not TextTokens(tokenizer, kind).stops:
        raise SettingsError(f"{folder} cannot be used: its tokenizer has no token that ends a text.")
    return TextTokens(tokenizer, kind)
