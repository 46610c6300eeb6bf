"""prompts.txt, .json or .toml → records of what was asked for, and these → complete prompts of a plan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from entrypoint.settings.checks import Key, Problems, as_integer, as_number, instead, show
from trainer.spec.family import BaseModel, Facts
from trainer.spec.plan import Prompt

SIDE, SEED, STEPS, SCALE = (
    Key("integer", 16, 8192),
    Key("integer", 0, 2**63 - 1),
    Key("integer", 1, 1000),
    Key("number", 0, 100),
)
FLAGS = {  # a flag of prompts.txt → the field it sets
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "cfg",
    "g": "guidance",
    "n": "negative",
}
FIELDS = {
    "width": SIDE,
    "height": SIDE,
    "seed": SEED,
    "steps": STEPS,
    "cfg": SCALE,
    "guidance": SCALE,
    "negative": Key("text"),
}
# The keys of an object in .json and .toml: the flags, the fields, and the established long names.
KEYS = {
    **FLAGS,
    **{name: name for name in FIELDS},
    "sample_steps": "steps",
    "scale": "cfg",
    "guidance_scale": "guidance",
    "negative_prompt": "negative",
}
_SHAPE = "a list of prompts, each a text or an object with the key prompt"


@dataclass(frozen=True)
class PromptRequest:
    """One picture to draw, as far as the user has said. Sizes in pixels."""

    place: str  # for messages
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
    found = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip() and not line.strip().startswith("#"):
            found.append(_parse_line(line, place=f"{origin}, line {number}", problems=problems))
    return tuple(prompt for prompt in found if prompt)


def parse_tree(raw: Any, *, origin: str, problems: Problems) -> tuple[PromptRequest, ...]:
    """A list of texts (like a line of prompts.txt) and objects.

    Also {"prompts": [...]}, and {"prompt": {..., "subset": [...]}} with defaults for the subset around it.
    """
    common: dict[str, Any] = {}
    if isinstance(raw, dict) and raw.keys() == {"prompts"}:
        raw = raw["prompts"]
    elif isinstance(raw, dict) and raw.keys() == {"prompt"} and isinstance(raw["prompt"], dict):
        common = {key: value for key, value in raw["prompt"].items() if key != "subset"}
        raw = raw["prompt"].get("subset", [{}])
    if not isinstance(raw, list):
        problems.add(f"{origin}: it is not {_SHAPE}.")
        return ()
    found = []
    for index, item in enumerate(raw):
        place = f"{origin}, prompts[{index}]"
        if isinstance(item, str):
            found.append(_parse_line(item, place=place, problems=problems))
        elif isinstance(item, dict):
            found.append(_parse_object({**common, **item}, place=place, problems=problems))
        else:
            problems.add(f"{place}: {show(item)} is neither a text nor an object with the key prompt.")
    return tuple(prompt for prompt in found if prompt)


def _parse_line(line: str, *, place: str, problems: Problems) -> PromptRequest | None:
    """`text --flag value ...`"""
    text, *parts = re.split(r"(?:^|\s+)--", line)
    values: dict[str, Any] = {}
    for part in parts:
        flag = re.split(r"\s", part, maxsplit=1)[0]
        value = part.removeprefix(flag)
        name = FLAGS.get(flag.lower())
        if name is None:
            problems.add(f"{place}: --{flag} is no flag. Allowed: {', '.join(f'--{f}' for f in FLAGS)}.")
        elif name in values:
            problems.add(f"{place}: --{flag} is given twice.")
        else:
            key = FIELDS[name]
            values[name] = _read(key, _converted(value.strip(), key.kind), f"{place}: --{flag}", problems)
    return _made(text, values, place=place, problems=problems)


def _converted(text: str, kind: str) -> Any:
    """The text as a number if it is to be one and is one, else as it is."""
    number = as_integer(text) if kind == "integer" else as_number(text) if kind == "number" else None
    return text if number is None else number


def _parse_object(raw: dict[str, Any], *, place: str, problems: Problems) -> PromptRequest | None:
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = KEYS.get(key)
        if key == "prompt" or value is None:
            continue
        if name is None:
            problems.add(f"{place}: {show(key)} is no key of a prompt; {instead(key, ['prompt', *KEYS])}")
        elif name in values:
            problems.add(f"{place}: {key} says again what another key says.")
        else:
            values[name] = _read(FIELDS[name], value, f"{place}: {key}", problems)
    text = raw.get("prompt")
    return _made(_read(Key("text"), text, f"{place}: prompt", problems) or "", values, place=place, problems=problems)


def _read(key: Key, value: Any, where: str, problems: Problems) -> Any:
    try:
        return key.read(value)
    except ValueError as problem:
        problems.add(f"{where}: {problem}.")
        return None


def _made(text: str, values: dict[str, Any], *, place: str, problems: Problems) -> PromptRequest | None:
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
    """The prompts with what was not said from the model, its family, the training resolution and the run's seed.

    `prefix` is put before each text. Sides are rounded down to the family's multiple.
    """
    defaults = {"steps": facts.prompt_steps, "guidance": facts.prompt_guidance, "cfg": facts.prompt_cfg}
    defaults = {**defaults, **model.defaults}
    found = []
    for index, request in enumerate(requests):
        asked = {name: getattr(request, name) for name in FIELDS}
        said = {name: value for name, value in asked.items() if value is not None}
        values = {"width": resolution[0], "height": resolution[1], "seed": (seed + index) % 2**32, **defaults, **said}
        for side in ("width", "height"):
            values[side] = values[side] // facts.multiple * facts.multiple
            if not values[side]:
                problems.add(f"{request.place}: the {side} is too small. Allowed: {facts.multiple} or more.")
        found.append(Prompt(text=prefix + request.text, **values))
    return tuple(found)
