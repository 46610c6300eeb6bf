"""`os.environ` → frozen `Settings`. The only place that reads PARAMS_*; every problem is said in one message.

environs converts by the table of variables.py and gathers what does not convert. What it does not do is done here: it
does not notice an unknown variable, and takes neither empty for unset nor JSON for many variables.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from environs import Env, EnvError, EnvValidationError

from entrypoint.settings.checks import (
    Problems,
    absolute,
    as_integer,
    as_number,
    inside,
    instead,
    is_text,
    load_json,
    nearest,
    one_edit_apart,
    show,
    span,
)
from entrypoint.settings.row import Row, Secret
from entrypoint.settings.variables import ALIASES, CONFIG_JSON, NAMES, ROWS, SECTIONS, Settings, section_rows

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
PREFIX = "PARAMS_"
# Variables of other programs that look like a mistyped one of ours.
OTHERS = frozenset({"CCACHE_PATH"})
HELP = "python -m entrypoint --help-env lists all variables."
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,127}")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LAYERS = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_TOKEN_BYTES = 10_000
_LARGEST = 1e18  # number in PARAMS_OPTIMIZER_ARGS


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The settings in `environ` (os.environ) and in its CONFIG_JSON.

    Raises SettingsError with a line for each problem: the variable, its value, what is allowed, and what to do.
    """
    problems = Problems()
    given = {name: value.strip() for name, value in environ.items() if value.strip()}
    _refuse_mistyped(given, problems)
    values = {**_from_json(given.get(CONFIG_JSON, ""), problems), **given}
    for name in [n for n in NAMES if not is_text(values.get(n, ""))]:
        problems.add(f"{name}: it has characters that are not text (UTF-8). Fix: write it anew.")
        values.pop(name)
    _find_token(values, problems)
    converted = _convert(values, problems)
    if "BASE_MODEL" not in values:
        problems.add(f"BASE_MODEL is not set. Allowed: {_allowed(ROWS['BASE_MODEL'])}. Fix: set it to one of these.")
    problems.raise_if_any("The settings cannot be used")
    sections = {}
    for section, section_type in SECTIONS.items():
        fields = {field: converted[row.name] for field, row in section_rows(section).items()}
        sections[section] = section_type(**fields)
    return Settings(**sections)


def help_env() -> str:
    """The table of all variables, as Markdown."""
    lines = ["| variable | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for section in SECTIONS:
        lines.append(f"| **{section}** | | | |")
        for row in section_rows(section).values():
            default = f"`{row.default}`" if row.default else row.if_unset
            lines.append(f"| `{row.name}` | {default} | {_allowed(row)} | {row.meaning} |")
    everything = "any of the variables above in one JSON object; those that are set by themselves win"
    lines.append(f"| `{CONFIG_JSON}` | | a JSON object | {everything} |")
    return "\n".join(lines) + "\n"


# ---- which variables there are


def _refuse_mistyped(given: Mapping[str, str], problems: Problems) -> None:
    """PARAMS_* that do not exist, and names one letter away from one that does. Never says their values: who knows
    what they are."""
    short = {n.removeprefix(PREFIX): n for n in NAMES if n.startswith(PREFIX) and "_" in n.removeprefix(PREFIX)}
    for name in sorted(given.keys() - set(NAMES) - OTHERS):
        upper = name.upper()
        close = [n for n in NAMES if one_edit_apart(upper, n)]
        close += [full for bare, full in short.items() if one_edit_apart(upper, bare)]
        if close:
            problems.add(f"{show(name)} is no variable. Fix: did you mean {nearest(upper, close) or close[0]}? {HELP}")
        elif upper.startswith(PREFIX):
            guess = nearest(upper.removeprefix(PREFIX), [n.removeprefix(PREFIX) for n in NAMES])
            fix = f"did you mean {PREFIX}{guess}?" if f"{PREFIX}{guess}" in NAMES else "remove it."
            problems.add(f"{show(name)} is no variable. Fix: {fix} {HELP}")


def _from_json(text: str, problems: Problems) -> dict[str, str]:
    """The variables in CONFIG_JSON, as text. Its values are never shown: a token may be among them."""
    if not text:
        return {}
    try:
        given, reason = load_json(text), "it is something else"
    except ValueError as problem:
        given, reason = None, str(problem)
    if not isinstance(given, dict):
        example = '{"PARAMS_SEED": 1, "TRIGGER_WORD": "sks"}'
        problems.add(f"{CONFIG_JSON} is not a JSON object: {reason}. Allowed: an object like {example}.")
        return {}
    found = {}
    for name, value in given.items():
        if name not in NAMES or name == CONFIG_JSON:
            problems.add(f"{CONFIG_JSON}: {show(name)} is no variable. Fix: {instead(name, NAMES)} {HELP}")
        elif value is not None:
            words = value if isinstance(value, str) else json.dumps(value)
            if words.strip():
                found[name] = words.strip()
    return found


def _find_token(values: dict[str, str], problems: Problems) -> None:
    """Make HF_TOKEN of whichever of its forms is given; the first wins."""
    file, other = values.pop(ALIASES[0], None), values.pop(ALIASES[1], None)
    if "HF_TOKEN" in values or not (file or other):
        return
    token = other or ""
    if not token and file:
        try:
            with Path(absolute(file)).open(encoding="utf-8") as stream:
                token = stream.read(_TOKEN_BYTES).strip()
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or "it is not text"
            problems.add(f"HF_TOKEN_FILE={show(file)} cannot be read: {reason}. Allowed: a file with the token alone.")
            return
    if token:
        values["HF_TOKEN"] = token
    else:
        problems.add(f"HF_TOKEN_FILE={show(file)} is empty. Fix: write the token into it.")


# ---- from text to values


class _Given(Env):
    """environs, reading from a mapping of its own."""

    def __init__(self, values: Mapping[str, str]) -> None:
        super().__init__(eager=False)
        self._given = values

    def _get_value(self, env_key: str, default: Any) -> Any:
        return self._given.get(env_key, default)


def _convert(values: Mapping[str, str], problems: Problems) -> dict[str, Any]:
    """The values of all variables by name. Those that do not convert are None, with a problem said."""
    env = _Given(values)
    for kind, parser in PARSERS.items():
        env.add_parser(f"kiln_{kind}", _checked(parser))
    found = {}
    for name, row in ROWS.items():
        found[name] = getattr(env, f"kiln_{row.kind}")(name, row.default, row=row)
    try:
        env.seal()
    except EnvValidationError as problem:
        messages: Any = problem.error_messages
        for row in ROWS.values():
            for message in messages.get(row.name, ()):
                value = "" if row.kind == "secret" else f"={show(values[row.name])}"
                default = row.default or row.if_unset
                fix = f"correct it{f', or leave it empty for the default ({default})' if default else ''}"
                problems.add(f"{row.name}{value} {message}. Allowed: {_allowed(row)}. Fix: {fix}.")
    return found


def _checked(parser: Callable[[str, Row], Any]) -> Callable[..., Any]:
    def parse(text: str, *, row: Row) -> Any:
        return parser(text, row)

    return parse


def _allowed(row: Row) -> str:
    """The words for what a variable may be."""
    if row.choices:
        return ", ".join(row.choices())
    limits = span(row.low, row.high, above=row.above)
    return {
        "integer": f"whole number, {limits}",
        "auto_integer": f"auto, or a whole number, {limits}",
        "number": f"number, {limits}",
        "size": f"side or WIDTHxHEIGHT, {limits} each",
        "switch": "true, false",
        "auto_switch": "auto, true, false",
        "pairs": "key=value, with spaces between",
        "names": "names, with commas between",
        "numbers": f"numbers with a comma between, {limits} each",
        "path": "path",
        "repo": "owner/name",
        "name": "letters, digits, space, dot, dash and underscore; 128 at most",
        "secret": "letters, digits and underscores",
        "text": "text",
    }[row.kind]


def _text(text: str, _: Row) -> str | None:
    return text or None


def _choice(text: str, row: Row) -> str | None:
    choices = row.choices() if row.choices else ()
    folded = {c.lower(): c for c in choices}
    if text and text.lower() not in folded:
        guess = nearest(text, choices)
        raise EnvError(f"is not known{f', {guess} is nearest' if guess else ''}")
    return folded.get(text.lower())


def _limited(number: float | None, row: Row, wanted: str) -> Any:
    if number is None:
        raise EnvError(f"is not a {wanted}")
    if not inside(number, row.low, row.high, above=row.above):
        raise EnvError("is out of range")
    return number


def _integer(text: str, row: Row) -> int | None:
    return _limited(as_integer(text), row, "whole number") if text else None


def _auto_integer(text: str, row: Row) -> int | None:
    return 0 if text.lower() == "auto" else _integer(text, row)


def _number(text: str, row: Row) -> float | None:
    return float(_limited(as_number(text), row, "number")) if text else None


def _switch(text: str, _: Row) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise EnvError("is neither true nor false")
    return text.lower() in TRUE


def _auto_switch(text: str, row: Row) -> bool | None:
    return None if text.lower() in ("auto", "") else _switch(text, row)


def _size(text: str, row: Row) -> tuple[int, int] | None:
    if not text:
        return None
    sides = re.split("[xX×]", text)
    numbers = [_limited(as_integer(side.strip()), row, "size") for side in sides]
    if len(numbers) > 2:
        raise EnvError("has more than two sides")
    return numbers[0], numbers[-1]


def _path(text: str, _: Row) -> Path:
    return Path(absolute(text))


def _name(text: str, _: Row) -> str | None:
    if text and not _FILE_NAME.fullmatch(text):
        raise EnvError("is not the name of a file")
    return text or None


def _repo(text: str, _: Row) -> str | None:
    if text and not _REPO.fullmatch(text):
        raise EnvError("is not the name of a repository")
    return text or None


def _names(text: str, _: Row) -> tuple[str, ...] | None:
    names = tuple(name for name in re.split(r"[,\s]+", text) if name)
    wrong = [name for name in names if not _LAYERS.fullmatch(name)]
    if wrong:
        raise EnvError(f"has {show(wrong[0])}, which is not the name of a layer")
    return names or None


def _numbers(text: str, row: Row) -> tuple[float, ...]:
    return tuple(float(_limited(as_number(part.strip()), row, "number")) for part in text.split(","))


def _secret(text: str, _: Row) -> Secret | None:
    if text and not re.fullmatch(r"[\x21-\x7e]+", text):
        raise EnvError("has spaces or characters that no token has")
    return Secret(text) if text else None


def _pairs(text: str, _: Row) -> dict[str, Any]:
    """key=value, with the value a Python literal, or a word."""
    try:
        words = shlex.split(text)
    except ValueError:
        raise EnvError("has a quote that is not closed") from None
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key):
            raise EnvError(f"has {show(word)}, which is not key=value")
        if key in found:
            raise EnvError(f"has {key} twice")
        found[key] = _literal(key, value)
    return found


def _literal(key: str, text: str) -> Any:
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch("[A-Za-z_][A-Za-z0-9_-]*", text):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = ...
    if not _is_plain(value):
        raise EnvError(f"has {show(text)} for {key}, which is not a number, true, false, none, a word or (a, b)")
    return [*value] if isinstance(value, tuple) else value


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    if isinstance(value, (int, float)):
        return abs(value) <= _LARGEST
    return value is None or isinstance(value, str)


PARSERS: dict[str, Callable[[str, Row], Any]] = {
    "text": _text,
    "choice": _choice,
    "integer": _integer,
    "auto_integer": _auto_integer,
    "number": _number,
    "switch": _switch,
    "auto_switch": _auto_switch,
    "size": _size,
    "path": _path,
    "name": _name,
    "repo": _repo,
    "names": _names,
    "numbers": _numbers,
    "secret": _secret,
    "pairs": _pairs,
}
