"""How to use a finished LoRA, as the end of the log and the report say it."""

from __future__ import annotations

from collections.abc import Sequence

DIFFUSERS_SUFFIX = "-diffusers"  # of the file with diffusers' key names, where there are two


def prompting(words: Sequence[str]) -> str:
    """How to begin a prompt, and with which strength. `words`: the trigger words."""
    begin = "Write prompts like your captions"
    if words:
        begin = f"Begin the prompt with {' or '.join(map(repr, words))}"
    return f"{begin}; start with strength 1, and lower it to 0.6 where the LoRA is too strong."
