"""`os.environ` → frozen `Settings`. The only place that reads PARAMS_*; all problems are reported in one message.

environs converts by the rows of `settings.variables` and collects what it cannot convert. Done here besides: unknown
and mistyped variables are refused, an empty value counts as not set, and CONFIG_JSON may hold any of the variables.
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

from entrypoint.settings.checks import absolute, load_json, nearest, one_edit_apart, suggestion
from entrypoint.settings.row import Row, Secret
from entrypoint.settings.variables import ALIASES, CONFIG_JSON, NAMES, ROWS, SECTIONS, Settings, section_rows
from trainer.spec.plan import AUTO
from trainer.spec.values import Problems, as_integer, as_number, inside, is_text, show, span

TRUE = ("true", "1", "yes", "on")
FALSE = ("false", "0", "no", "off")
PREFIX = "PARAMS_"
OTHER_PROGRAMS = frozenset({"CCACHE_PATH"})  # variables of other programs that look like a mistyped one of ours
HELP = "python -m entrypoint --help-env lists all variables."
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,127}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)  # the Hub allows 96 characters
_LAYER_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_TOKEN_TEXT = re.compile(r"[\x21-\x7e]+")
_MAX_TOKEN_CHARACTERS = 10_000  # of HF_TOKEN_FILE: a file that is larger holds something else
_MAX_ARGUMENT = 1e18  # number in PARAMS_OPTIMIZER_ARGS: JSON of other programs would lose digits of larger ones


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The settings in `environ` (os.environ) and in its CONFIG_JSON.

    Raises SettingsError with a line for each problem: the variable, its value, what is allowed, and what to do.
    """
    problems = Problems()
    texts = {name: value.strip() for name, value in environ.items() if value.strip()}
    _refuse_mistyped_names(texts, problems)
    values = {**_read_config_json(texts.get(CONFIG_JSON, ""), problems), **texts}
    for name in NAMES:
        if not is_text(values.get(name, "")):
            problems.add(f"{name}: it is not UTF-8 text. Fix: write it again.")
            values.pop(name)
    _resolve_token(values, problems)
    converted = _convert(values, problems)
    if "BASE_MODEL" not in values:
        allowed = allowed_values(ROWS["BASE_MODEL"])
        problems.add(f"BASE_MODEL is not set. Allowed: {allowed}. Fix: set it to one of these.")
    problems.raise_if_any("The settings cannot be used")
    sections = {}
    for section, section_type in SECTIONS.items():
        fields = {field: converted[row.name] for field, row in section_rows(section).items()}
        sections[section] = section_type(**fields)
    return Settings(**sections)


def help_env() -> str:
    """The table of all variables, as Markdown; the README has it too."""
    lines = ["| variable | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for section in SECTIONS:
        lines.append(f"| **{section}** | | | |")
        for row in section_rows(section).values():
            default = f"`{row.default}`" if row.default else row.if_unset
            lines.append(f"| `{row.name}` | {default} | {allowed_values(row)} | {row.meaning} |")
    everything = "any of the variables above in one JSON object; those that are set by themselves win"
    lines.append(f"| `{CONFIG_JSON}` | | a JSON object | {everything} |")
    return "\n".join(lines) + "\n"


# ---- names of variables


def _refuse_mistyped_names(texts: Mapping[str, str], problems: Problems) -> None:
    """Refuse PARAMS_* that do not exist, and names one edit away from one that does.

    Their values are never shown: a mistyped HF_TOKEN holds a token.
    """
    without_prefix = {}  # LEARNING_RATE → PARAMS_LEARNING_RATE; single words, like SEED, belong to other programs too
    for name in NAMES:
        bare = name.removeprefix(PREFIX)
        if bare != name and "_" in bare:
            without_prefix[bare] = name
    for name in sorted(texts.keys() - set(NAMES) - OTHER_PROGRAMS):
        upper = name.upper()
        close = [known for known in NAMES if one_edit_apart(upper, known)]
        close += [known for bare, known in without_prefix.items() if one_edit_apart(upper, bare)]
        if close:
            meant = nearest(upper, close) or close[0]
            problems.add(f"{show(name)} is no variable. Fix: did you mean {meant}? {HELP}")
        elif upper.startswith(PREFIX):
            guess = nearest(upper.removeprefix(PREFIX), [known.removeprefix(PREFIX) for known in NAMES])
            fix = f"did you mean {PREFIX}{guess}?" if f"{PREFIX}{guess}" in NAMES else "remove it."
            problems.add(f"{show(name)} is no variable. Fix: {fix} {HELP}")


def _read_config_json(text: str, problems: Problems) -> dict[str, str]:
    """The variables in CONFIG_JSON, as text. Its values are never shown: a token may be among them."""
    if not text:
        return {}
    reason = "it is something else"
    try:
        config = load_json(text)
    except ValueError as problem:
        config = None
        reason = str(problem)
    if not isinstance(config, dict):
        example = '{"PARAMS_SEED": 1, "TRIGGER_WORD": "sks"}'
        problems.add(f"{CONFIG_JSON} is not a JSON object: {reason}. Allowed: an object like {example}.")
        return {}
    texts = {}
    for name, value in config.items():
        if name not in NAMES or name == CONFIG_JSON:
            problems.add(f"{CONFIG_JSON}: {show(name)} is no variable. Fix: {suggestion(name, NAMES)} {HELP}")
        elif value is not None:
            value_text = value if isinstance(value, str) else json.dumps(value)
            if value_text.strip():
                texts[name] = value_text.strip()
    return texts


def _resolve_token(values: dict[str, str], problems: Problems) -> None:
    """Set HF_TOKEN from the first of its forms: HF_TOKEN, HUGGING_FACE_HUB_TOKEN, the file HF_TOKEN_FILE."""
    file_variable, other_variable = ALIASES
    file = values.pop(file_variable, None)
    token = values.pop(other_variable, None) or ""
    if "HF_TOKEN" in values or not (file or token):
        return
    if not token and file:
        try:
            with Path(absolute(file)).open(encoding="utf-8") as stream:
                token = stream.read(_MAX_TOKEN_CHARACTERS).strip()
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or "it is not text"
            problems.add(
                f"{file_variable}={show(file)} cannot be read: {reason}. Allowed: a file with the token alone."
            )
            return
    if token:
        values["HF_TOKEN"] = token
    else:
        problems.add(f"{file_variable}={show(file)} is empty. Fix: write the token into it.")


# ---- from text to values


class _MappingEnv(Env):
    """environs, reading from a mapping instead of os.environ."""

    def __init__(self, values: Mapping[str, str]) -> None:
        super().__init__(eager=False)
        self._texts = values

    def _get_value(self, env_key: str, default: Any) -> Any:
        return self._texts.get(env_key, default)


def _convert(values: Mapping[str, str], problems: Problems) -> dict[str, Any]:
    """The values of all variables by name. Those that do not convert are None, with a line in `problems`."""
    env = _MappingEnv(values)
    for kind, parser in PARSERS.items():
        env.add_parser(f"kiln_{kind}", _for_environs(parser))
    converted = {}
    for name, row in ROWS.items():
        converted[name] = getattr(env, f"kiln_{row.kind}")(name, row.default, row=row)
    try:
        env.seal()
    except EnvValidationError as problem:
        messages: Any = problem.error_messages
        for name, row in ROWS.items():
            for message in messages.get(name, ()):
                problems.add(_describe(row, values[name], message))
    return converted


def _describe(row: Row, text: str, message: str) -> str:
    """One line about a value that did not convert; the value of a secret is left out."""
    value = "" if row.kind == "secret" else f"={show(text)}"
    default = row.default or row.if_unset
    fix = "correct it"
    if default:
        fix += f", or leave it empty for the default ({default})"
    return f"{row.name}{value} {message}. Allowed: {allowed_values(row)}. Fix: {fix}."


def _for_environs(parser: Callable[[str, Row], Any]) -> Callable[..., Any]:
    """environs hands what it does not know itself to the parser by keyword."""

    def parse(text: str, *, row: Row) -> Any:
        return parser(text, row)

    return parse


def allowed_values(row: Row) -> str:
    """The words for what a variable may be, in messages and in the README's table."""
    if row.choices:
        return ", ".join(row.choices())
    limits = span(row.low, row.high, above=row.above)
    return {
        "integer": f"whole number, {limits}",
        "auto_integer": f"auto, or a whole number, {limits}",
        "auto_count": f"auto, or a whole number, {limits}",
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


# ---- one parser for each kind of variable. Empty text means that the variable is not set. They raise EnvError.


def _text(text: str, _: Row) -> str | None:
    return text or None


def _choice(text: str, row: Row) -> str | None:
    """The choice as it is spelled in the row: case does not matter."""
    if not text:
        return None
    choices = row.choices() if row.choices else ()
    by_lower = {choice.lower(): choice for choice in choices}
    if text.lower() not in by_lower:
        guess = nearest(text, choices)
        raise EnvError(f"is not known, {guess} is nearest" if guess else "is not known")
    return by_lower[text.lower()]


def _in_range(number: float | None, row: Row, expected: str) -> Any:
    if number is None:
        raise EnvError(f"is not a {expected}")
    if not inside(number, row.low, row.high, above=row.above):
        raise EnvError("is out of range")
    return number


def _integer(text: str, row: Row) -> int | None:
    return _in_range(as_integer(text), row, "whole number") if text else None


def _auto_integer(text: str, row: Row) -> int | None:
    """0 stands for auto, None for not set: of PARAMS_BATCH_SIZE these are not the same."""
    return 0 if text.lower() == "auto" else _integer(text, row)


def _auto_count(text: str, row: Row) -> int | None:
    """AUTO for auto: 0 means off."""
    return AUTO if text.lower() == "auto" else _integer(text, row)


def _number(text: str, row: Row) -> float | None:
    return float(_in_range(as_number(text), row, "number")) if text else None


def _switch(text: str, _: Row) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise EnvError("is neither true nor false")
    return text.lower() in TRUE


def _auto_switch(text: str, row: Row) -> bool | None:
    return None if text.lower() in ("auto", "") else _switch(text, row)


def _size(text: str, row: Row) -> tuple[int, int] | None:
    """(width, height) in pixels; one number stands for both."""
    if not text:
        return None
    sides = [_in_range(as_integer(side.strip()), row, "size") for side in re.split("[xX×]", text)]
    if len(sides) > 2:
        raise EnvError("has more than two sides")
    return sides[0], sides[-1]


def _path(text: str, _: Row) -> Path:
    return Path(absolute(text))


def _name(text: str, _: Row) -> str | None:
    if text and not _FILE_NAME.fullmatch(text):
        raise EnvError("is not the name of a file")
    return text or None


def _repo(text: str, _: Row) -> str | None:
    if text and not _REPOSITORY.fullmatch(text):
        raise EnvError("is not the name of a repository")
    return text or None


def _names(text: str, _: Row) -> tuple[str, ...] | None:
    names = tuple(name for name in re.split(r"[,\s]+", text) if name)
    for name in names:
        if not _LAYER_NAME.fullmatch(name):
            raise EnvError(f"has {show(name)}, which is not the name of a layer")
    return names or None


def _numbers(text: str, row: Row) -> tuple[float, ...]:
    return tuple(float(_in_range(as_number(part.strip()), row, "number")) for part in text.split(","))


def _secret(text: str, _: Row) -> Secret | None:
    if text and not _TOKEN_TEXT.fullmatch(text):
        raise EnvError("has spaces or characters that no token has")
    return Secret(text) if text else None


def _pairs(text: str, _: Row) -> dict[str, Any]:
    """`key=value key=value`, each value a Python literal or a word."""
    try:
        words = shlex.split(text)
    except ValueError:
        raise EnvError("has a quote that is not closed") from None
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key):
            raise EnvError(f"has {show(word)}, which is not key=value")
        if key in values:
            raise EnvError(f"has {key} twice")
        values[key] = _literal(key, value)
    return values


def _literal(key: str, text: str) -> Any:
    """A number, bool, None, word, or a list of these (tuples become lists, as JSON has no others)."""
    constants: dict[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    if re.fullmatch("[A-Za-z_][A-Za-z0-9_-]*", text):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = ...  # which JSON cannot hold either
    if not _fits_json(value):
        raise EnvError(f"has {show(text)} for {key}, which is not a number, true, false, none, a word or (a, b)")
    return [*value] if isinstance(value, tuple) else value


def _fits_json(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_fits_json(item) for item in value)
    if isinstance(value, (int, float)):
        return abs(value) <= _MAX_ARGUMENT
    return value is None or isinstance(value, str)


PARSERS: dict[str, Callable[[str, Row], Any]] = {
    "text": _text,
    "choice": _choice,
    "integer": _integer,
    "auto_integer": _auto_integer,
    "auto_count": _auto_count,
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
