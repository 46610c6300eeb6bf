"""Prompt lines: `a red fox --w 768 --h 512 --d 7 --n blurry`.

prompts.txt of a job, the texts in its JSON, YAML and TOML (`trainer.spec.documents`), and `python -m trainer.sample
--prompts` are all read here. The flags are those of sd-scripts' prompt files. Lines become `PromptRequest`s, in which
None means that the line does not set the field; `complete_prompts` fills these in from the model, its family, the
resolution and the seed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.spec.family import BaseModel, Facts
from trainer.spec.plan import Prompt
from trainer.spec.values import Key, Problems, as_integer, as_number

# Where a caption or a prompt wants the trigger word, as ai-toolkit has it.
TRIGGER_PLACEHOLDER = re.compile(r"\[(?:trigger(?:[ _]word)?|name)\]", re.IGNORECASE)

HALF_A_LETTER = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are no UTF-8

FLAGS = {  # flag of a line → the field that it sets
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "cfg",
    "g": "guidance",
    "n": "negative",
}
LONG_FLAGS = {  # the same in full, as other programs write them
    "width": "width",
    "height": "height",
    "seed": "seed",
    "steps": "steps",
    "sample_steps": "steps",
    "cfg": "cfg",
    "cfg_scale": "cfg",
    "scale": "cfg",
    "guidance": "guidance",
    "guidance_scale": "guidance",
    "negative": "negative",
    "negative_prompt": "negative",
    "neg": "negative",
}
# What text editors make of `--`: one long dash, or two that look like it. A dash in a sentence is followed by a space.
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
_FLAG_START = re.compile(rf"(?:^|\s+)(?:--|(?P<dash>[{_DASHES}]{{1,2}}|-[{_DASHES}]|[{_DASHES}]-|-)(?=\w))")
_INVISIBLE = re.compile("[\u200b\u200c\u200d\u2060\ufeff]")  # spaces without a width, which web pages leave in text
_MAX_LINE = 16_384  # characters
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


def parse_lines(
    text: str, *, origin: str, problems: Problems, notes: list[str] | None = None
) -> tuple[PromptRequest, ...]:
    """One prompt a line; empty lines and those that begin with # do not count.

    `notes` gets what was read otherwise than it is written.
    """
    requests = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        line = _INVISIBLE.sub("", line)
        if not line.strip() or line.strip().startswith("#"):
            continue
        request = parse_line(line, place=f"{origin}, line {number}", problems=problems, notes=notes)
        if request is not None:
            requests.append(request)
    return tuple(requests)


def parse_line(line: str, *, place: str, problems: Problems, notes: list[str] | None = None) -> PromptRequest | None:
    """Read `text --flag value ...`. Flags may be upper-case, or written in full.

    Returns None, with a line in `problems`, if there is no text. A flag whose value is refused counts as not given.
    """
    if len(line) > _MAX_LINE:
        problems.add(f"{place}: it has {len(line):,} characters. Allowed: up to {_MAX_LINE:,}.")
        return None
    text, parts = _split_flags(line)
    values: dict[str, Any] = {}
    for written, flag, value in parts:
        field = FLAGS.get(flag.lower()) or LONG_FLAGS.get(flag.lower().replace("-", "_"))
        if field is None:
            problems.add(f"{place}: {written} is not a flag. Allowed: {', '.join(f'--{f}' for f in FLAGS)}.")
        elif field in values:
            problems.add(f"{place}: {written} is given twice.")
        else:
            short = next(name for name, other in FLAGS.items() if other == field)
            key = FIELDS[field]
            plain = value if key.kind == "text" else unicodedata.normalize("NFKC", value)
            values[field] = read_value(key, _converted(plain, key.kind), f"{place}: {written}", problems)
            if notes is not None and (written.lower() != f"--{short}" or plain != value):
                shown = value if key.kind != "text" else "…"
                notes.append(f"{place}: {written} {shown} is read as --{short} {plain if shown == value else shown}")
    return make_request(text, values, place=place, problems=problems)


def _split_flags(line: str) -> tuple[str, list[tuple[str, str, str]]]:
    """The text before the flags, and each flag as it is written, its name, and its value.

    `--w=768` and `--w768` are `--w 768`. Another dash begins a flag only before a name that is one, followed by a
    value: `a fox –w 768`, but not `a fox – walking` or `a -5 degree day`.
    """
    pieces: list[tuple[str, str]] = []  # what the piece began with, and the rest up to the next flag
    began = ""
    start = 0
    for match in _FLAG_START.finditer(line):
        if match["dash"] is None or _is_flag(line[match.end() :], dash=match["dash"]):
            pieces.append((began, line[start : match.start()]))
            began = match[0].strip()
            start = match.end()
    pieces.append((began, line[start:]))
    flags = []
    for began, piece in pieces[1:]:
        name = re.split(r"\s", piece, maxsplit=1)[0]
        value = piece.removeprefix(name).strip()
        written = began + name
        joined = re.fullmatch(r"([^\W\d]+)=(.+)|([whdslgWHDSLG])([0-9.]+)", name)
        if joined and not value:
            value = joined[2] or joined[4]
            name = joined[1] or joined[3]
        flags.append((written, unicodedata.normalize("NFKC", name), value))
    return pieces[0][1], flags


def _is_flag(rest: str, *, dash: str) -> bool:
    """Whether what follows another dash than `--` is a flag: a known name and a value, or one letter and a number."""
    match = re.match(r"(\w+)[\s=]+(\S+)", unicodedata.normalize("NFKC", rest))
    if match is None:
        return False
    name = match[1].lower()
    is_number = as_number(match[2]) is not None
    if name in ("n", "neg", "negative", "negative_prompt"):
        return dash != "-"  # what follows is text, so that a hyphen alone proves nothing
    return is_number and (name in FLAGS or name in LONG_FLAGS or (len(name) == 1 and dash != "-"))


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


def has_embedded_guidance(facts: Facts, model: BaseModel) -> bool:
    """Whether the model reads a guidance scale. Its default is 0 or 1 where it does not."""
    return model.defaults.get("guidance", facts.prompt_guidance) not in (0.0, 1.0)


def idle_guidance(requests: Sequence[PromptRequest], facts: Facts, model: BaseModel) -> list[str]:
    """A sentence for each request that sets a kind of guidance, embedded or classifier-free, which the model lacks."""
    idle = []
    if not facts.draws_with_cfg:
        for request in requests:
            if request.cfg not in (None, 0.0, 1.0) or request.negative:
                idle.append(
                    f"{request.place}: --l and --n have no effect: this model is drawn without classifier-free "
                    "guidance. Fix: --g, its embedded guidance."
                )
    if has_embedded_guidance(facts, model):
        return idle
    for request in requests:
        if request.guidance not in (None, 0.0, 1.0):
            idle.append(
                f"{request.place}: --g {request.guidance:g} has no effect: this model has no embedded guidance. "
                "Fix: --l, its classifier-free guidance."
            )
    return idle


def complete_prompts(
    requests: Sequence[PromptRequest],
    *,
    facts: Facts,
    model: BaseModel,
    resolution: tuple[int, int],
    seed: int,
    prefix: str,
    problems: Problems,
    notes: list[str] | None = None,
) -> tuple[Prompt, ...]:
    """Fill in what the requests do not set, from the model, its family, `resolution` (width, height) and `seed`.

    The n-th prompt (from 0) has seed `seed + n`. `prefix` is put before each text. Sides are rounded down to the
    family's multiple, with a line in `notes`; one that would become 0 is a problem.
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
            asked = values[side]
            values[side] = asked // facts.multiple * facts.multiple
            if not values[side]:
                problems.add(f"{request.place}: the {side} is too small. Allowed: {facts.multiple} or more.")
            elif values[side] != asked and notes is not None:
                notes.append(f"{request.place}: {side} {asked} becomes {values[side]}, a multiple of {facts.multiple}")
        if HALF_A_LETTER.search(request.text):
            problems.add(f"{request.place}: the text has bytes that are no UTF-8. Fix: save or type it as UTF-8.")
        prompts.append(Prompt(text=prefix + request.text, **values))
    return tuple(prompts)
