"""Models that caption images (CAPTION_WITH): short names, kinds, files, and what can be asked of each. No torch.

Kinds, by what the model's own files say:
- `florence2`: Florence-2 (arXiv:2311.06242). It knows three captioning tasks and follows no instruction.
- `qwen3_vl`, `llava`: language models that see, and do what CAPTION_PROMPT says. JoyCaption is a LLaVA.
- `tagger`: an ONNX file and a table of tags, as the WD taggers of SmilingWolf have them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

# CAPTION_WITH → the repository.
SHORT_NAMES = {
    "florence-2": "florence-community/Florence-2-base",
    "florence-2-large": "florence-community/Florence-2-large",
    "qwen3-vl": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
    "joycaption": "fancyfeast/llama-joycaption-beta-one-hf-llava",
    "wd": "SmilingWolf/wd-eva02-large-tagger-v3",
}
FLORENCE2, QWEN3_VL, LLAVA, TAGGER = "florence2", "qwen3_vl", "llava", "tagger"
INSTRUCTED = (QWEN3_VL, LLAVA)  # they read CAPTION_PROMPT as an instruction
# transformers' class of each kind that it loads, by which config.json names it.
CLASSES = {
    FLORENCE2: "Florence2ForConditionalGeneration",
    QWEN3_VL: "Qwen3VLForConditionalGeneration",
    LLAVA: "LlavaForConditionalGeneration",
}


class Size(NamedTuple):
    """What decides how long a model takes: its kind, its weights, and the layers that make a token one by one."""

    kind: str
    weights: int
    layers: int


# As the files of the repositories have them.
SIZES = {
    "florence-community/Florence-2-base": Size(FLORENCE2, 231_000_000, 6),
    "florence-community/Florence-2-large": Size(FLORENCE2, 776_000_000, 12),
    "Qwen/Qwen3-VL-4B-Instruct": Size(QWEN3_VL, 4_440_000_000, 36),
    "Qwen/Qwen3-VL-8B-Instruct": Size(QWEN3_VL, 8_770_000_000, 36),
    "fancyfeast/llama-joycaption-beta-one-hf-llava": Size(LLAVA, 8_480_000_000, 32),
    "SmilingWolf/wd-eva02-large-tagger-v3": Size(TAGGER, 315_000_000, 0),
}
# Activations and the keys and values of one image: a megapixel in a model of 8 billion weights takes less.
WORKING_BYTES = 2 * 2**30
WORKING_SHARE = 0.25  # of the weights; small models need little
# Repositories whose files name Python code of their own, which is never run; the same weights for transformers' class.
_WITH_CODE = re.compile(r"microsoft/(Florence-2-(?:base|large)(?:-ft)?)", re.IGNORECASE)

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"  # the second one of newer versions
ONNX, TAGS = "model.onnx", "selected_tags.csv"
# File patterns of a model for transformers; a tagger has two files, and nothing else of its repository is needed.
MODEL_FILES = (
    *(CONFIG, TOKENIZER, PREPROCESSOR, PROCESSOR),
    *("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
)
TAGGER_FILES = (ONNX, TAGS)

# CAPTION_PROMPT: words for a prompt that is written down here. {trigger}: the trigger word. {words}: how many the text
# encoder reads.
PLAIN, SUBJECT, STYLE = "plain", "subject", "style"
_FORM = (
    "Answer with the caption alone: one paragraph of plain sentences, at most {words} words, without an introduction "
    "such as 'This image shows', without guesses and without any judgement of quality."
)
PROMPTS = {
    PLAIN: f"Write a caption for this image. Name what is shown, the setting, the composition and the light. {_FORM}",
    SUBJECT: (
        "Write a caption for this image. Call its main subject {trigger}, by that name alone, and do not describe what "
        "always belongs to it: no face, hair, eyes, skin, body, age, breed, colour, shape, material or brand of "
        "{trigger}. Describe what could be otherwise: pose, expression, clothing, action, surroundings, composition "
        f"and light. {_FORM}"
    ),
    STYLE: (
        "Write a caption for this image. Describe its content alone: who and what is shown, the action and the "
        "surroundings. Do not name the style, the medium, the technique, the artist, the colours or the mood. "
        f"{_FORM}"
    ),
}
# What Florence-2 can be asked, as its own processor names the tasks.
TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")
TRIGGER = "{trigger}"
BATCH = 8  # images at once; halved where the device's memory does not suffice
WORDS_PER_TOKEN = 0.6  # of English prose, in CLIP's, T5's and Qwen's tokens, rounded down
MOST_WORDS = 120


@dataclass(frozen=True)
class Named:
    """What CAPTION_WITH says: a repository with a revision, or a folder."""

    source: str
    revision: str | None = None


def read_name(text: str) -> Named:
    """A short name, `owner/name`, `owner/name@revision` or a path. Raises ValueError, as the rest of a sentence."""
    source, _, revision = text.partition("@") if not text.startswith(("/", ".", "~")) else (text, "", "")
    source = SHORT_NAMES.get(source.lower(), source)
    if with_code := _WITH_CODE.fullmatch(source):
        raise ValueError(
            f"needs Python code of its repository, which Kiln never runs. Fix: florence-community/{with_code[1]}, the "
            "same weights for transformers' own class"
        )
    return Named(source, revision or None)


def problem_of_prompt(kind: str, prompt: str) -> str | None:
    """Why a model of this kind cannot be asked that, as the rest of a sentence; None: it can."""
    if kind == FLORENCE2 and prompt not in (*PROMPTS, *TASKS):
        return (
            f"is no task of Florence-2, which follows no instruction. Allowed: {', '.join(TASKS)}. Fix: remove it, or "
            "caption with qwen3-vl or joycaption"
        )
    return None


def instruction(prompt: str, *, trigger: str, words: int) -> str:
    """The text for a model that follows instructions. `prompt`: a key of PROMPTS, or the user's own."""
    text = PROMPTS.get(prompt, prompt)
    return text.replace(TRIGGER, trigger).replace("{words}", str(words))


def needed_bytes(weights: int, size: float) -> float:
    """Of memory, for a model with so many weights of `size` bytes, and an image."""
    return weights * size + min(WORKING_BYTES, WORKING_SHARE * weights * size)


def most_words(tokens: int) -> int:
    """How many words a caption should have, of which the text encoder reads `tokens` tokens."""
    return min(MOST_WORDS, int(tokens * WORDS_PER_TOKEN))


def task(prompt: str) -> str:
    """The task of Florence-2."""
    return prompt if prompt in TASKS else TASKS[-1]


def left_out_tags(prompt: str) -> frozenset[str]:
    """The tags that a tagger leaves out: those that CAPTION_PROMPT lists, unless it is a word for a prompt."""
    if prompt in PROMPTS:
        return frozenset()
    tags = (tag.strip().lower().replace("_", " ") for tag in prompt.split(","))
    return frozenset(tag for tag in tags if tag)
