"""Prompt lines: `a red fox --w 768 --h 512 --d 7 --n blurry`.

prompts.txt of a job, the texts in its .json and .toml, and `python -m trainer.sample --prompts` are all read here.
The flags are those of sd-scripts' prompt files. Lines become `PromptRequest`s, in which None means that the line does
not set the field; `complete_prompts` fills these in from the model, its family, the resolution and the seed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.spec.family import BaseModel, Facts
from trainer.spec.plan import Prompt
from trainer.spec.values import Key, Problems, as_integer, as_number

# Where a caption or a prompt wants the trigger word, as ai-toolkit has it.
TRIGGER_PLACEHOLDER = re.compile(r"\[(?:trigger(?:[ _]word)?|name)\]", re.IGNORECASE)

FLAGS = {  # flag of a line → the field that it sets
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "cfg",
    "g": "guidance",
    "n": "negative",
}
_SIDE = Key("integer", 16, 8192)  # pixels
_SCALE = Key("number", 0, 100)
FIELDS = {
    "width": _SIDE,
    "height": _SIDE,
    "seed": Key("integer", 0, 2**63 - 1),  # fits a signed 64-bit integer
    "steps": Key("integer", 1, 1000),  # a scheduler has 1,000 training timesteps
    "cfg": _SCALE,
    "guidance": _SCALE,
    "negative": Key("text"),
}


@dataclass(frozen=True)
class PromptRequest:
    """One image to draw, as far as the user has specified it. Sizes in pixels; None: not specified."""

    place: str  # file and line, for messages
    text: str
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int | None = None
    cfg: float | None = None  # classifier-free guidance
    guidance: float | None = None  # embedded guidance
    negative: str | None = None


def parse_lines(text: str, *, origin: str, problems: Problems) -> tuple[PromptRequest, ...]:
    """One prompt a line; empty lines and those that begin with # do not count."""
    requests = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        request = parse_line(line, place=f"{origin}, line {number}", problems=problems)
        if request is not None:
            requests.append(request)
    return tuple(requests)


def parse_line(line: str, *, place: str, problems: Problems) -> PromptRequest | None:
    """Read `text --flag value ...`. Flags may be upper-case.

    Returns None, with a line in `problems`, if there is no text. A flag whose value is refused counts as not given.
    """
    text, *parts = re.split(r"(?:^|\s+)--", line)
    values: dict[str, Any] = {}
    for part in parts:
        flag = re.split(r"\s", part, maxsplit=1)[0]
        value = part.removeprefix(flag).strip()
        field = FLAGS.get(flag.lower())
        if field is None:
            problems.add(f"{place}: --{flag} is not a flag. Allowed: {', '.join(f'--{f}' for f in FLAGS)}.")
        elif field in values:
            problems.add(f"{place}: --{flag} is given twice.")
        else:
            key = FIELDS[field]
            values[field] = read_value(key, _converted(value, key.kind), f"{place}: --{flag}", problems)
    return make_request(text, values, place=place, problems=problems)


def _converted(text: str, kind: str) -> Any:
    """The text as a number if it is to be one and is one, else as it is."""
    number: float | None = None
    if kind == "integer":
        number = as_integer(text)
    elif kind == "number":
        number = as_number(text)
    return text if number is None else number


def read_value(key: Key, value: Any, where: str, problems: Problems) -> Any:
    """The value in the type of `key`; None, with a line in `problems`, if it is refused."""
    try:
        return key.read(value)
    except ValueError as problem:
        problems.add(f"{where}: {problem}.")
        return None


def make_request(text: str, values: dict[str, Any], *, place: str, problems: Problems) -> PromptRequest | None:
    """`values`: by the names of FIELDS."""
    if not text.strip():
        problems.add(f"{place}: there is no prompt before the flags.")
        return None
    return PromptRequest(place, text.strip(), **values)


def complete_prompts(
    requests: Sequence[PromptRequest],
    *,
    facts: Facts,
    model: BaseModel,
    resolution: tuple[int, int],
    seed: int,
    prefix: str,
    problems: Problems,
) -> tuple[Prompt, ...]:
    """Fill in what the requests do not set, from the model, its family, `resolution` (width, height) and `seed`.

    The n-th prompt (from 0) has seed `seed + n`. `prefix` is put before each text. Sides are rounded down to the
    family's multiple; one that would become 0 is a problem.
    """
    defaults = {"steps": facts.prompt_steps, "guidance": facts.prompt_guidance, "cfg": facts.prompt_cfg}
    defaults = {**defaults, **model.defaults}
    prompts = []
    for index, request in enumerate(requests):
        values: dict[str, Any] = {"width": resolution[0], "height": resolution[1], "seed": (seed + index) % 2**32}
        values |= defaults
        for field in FIELDS:
            value = getattr(request, field)
            if value is not None:
                values[field] = value
        for side in ("width", "height"):
            values[side] = values[side] // facts.multiple * facts.multiple
            if not values[side]:
                problems.add(f"{request.place}: the {side} is too small. Allowed: {facts.multiple} or more.")
        prompts.append(Prompt(text=prefix + request.text, **values))
    return tuple(prompts)
