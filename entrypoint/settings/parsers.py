"""One parser for each kind of variable: from clean text to a value, read strictly.

Empty text means that the variable is not set. The parsers raise EnvError with the rest of a sentence that begins with
the variable and its value.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environs import EnvError

from entrypoint.settings.aliases import find_value, near_value
from entrypoint.settings.checks import absolute
from entrypoint.settings.row import Row, Secret
from trainer.network.addresses import problem_of
from trainer.spec.documents.strict_json import load_json
from trainer.spec.plan import AUTO
from trainer.spec.values import as_integer, as_number, inside, nearest, show, span

TRUE = ("true", "1", "yes", "on", "y", "t", "enabled")
FALSE = ("false", "0", "no", "off", "n", "f", "disabled")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,127}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)  # the Hub allows 96 characters
_TOKEN_TEXT = re.compile(r"[\x21-\x7e]+")
_KEY = re.compile(r"(?:(?<=[\s,;\"'])|^)(?:--)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*")  # of PARAMS_OPTIMIZER_ARGS
_BETWEEN = " \t\r\n,;\"'"  # what may stand around a key and its value
MOST_ADDRESSES = 8  # in one variable
_MAX_ARGUMENT = 1e18  # number in PARAMS_OPTIMIZER_ARGS: JSON of other programs would lose digits of larger ones


def allowed_values(row: Row) -> str:
    """The words for what a variable may be, in messages and in the table in docs/variables.md."""
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
        "pairs": "key=value pairs with spaces between them",
        "sweep": "NAME=value,value with spaces between them",
        "names": "names with commas between them",
        "numbers": f"numbers with commas between them, {limits} each",
        "path": "path",
        "repo": "owner/name",
        "name": "letters, digits, space, dot, dash and underscore; 128 at most",
        "secret": "letters, digits and underscores",
        "key": "letters, digits and signs, without blanks",
        "tokens": "host=token, with commas between them",
        "addresses": "addresses (https://...) with blanks between them",
        "text": "text",
    }[row.kind]


# ---- the parsers


def _text(text: str, _: Row) -> str | None:
    return text or None


def _choice(text: str, row: Row) -> str | None:
    """The choice that `text` is a spelling of, as the row has it."""
    if not text:
        return None
    found = find_value(row.name, text)
    if found is not None:
        return found
    if advice := near_value(row.name, text):
        raise EnvError(f"is not known; {advice}")
    guess = nearest(text, row.choices() if row.choices else ())
    raise EnvError(f"is not known, {guess} is nearest" if guess else "is not known")


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
    names = tuple(name.strip("\"'") for name in re.split(r"[,\s]+", text.strip("[]")) if name.strip("\"'"))
    return names or None


def _numbers(text: str, row: Row) -> tuple[float, ...]:
    if not text:
        return ()
    return tuple(float(_in_range(as_number(part.strip()), row, "number")) for part in text.split(","))


def _secret(text: str, _: Row) -> Secret | None:
    if text and not _TOKEN_TEXT.fullmatch(text):
        raise EnvError("has spaces or characters that do not occur in tokens")
    return Secret(text) if text else None


def _tokens(text: str, _: Row) -> dict[str, Secret]:
    """host=token pairs: what is wrong with one is said without it."""
    found = {}
    for number, pair in enumerate((part.strip() for part in text.split(",") if part.strip()), 1):
        host, equals, token = pair.partition("=")
        host = host.strip().lower().removeprefix("https://").rstrip("/")
        if not equals or problem_of(f"https://{host}") or "/" in host or "@" in host:
            raise EnvError(f"has a pair, number {number}, that does not begin with the name of a host and =")
        if not _TOKEN_TEXT.fullmatch(token.strip()):
            raise EnvError(f"has no token, or one with spaces, for the host {host}")
        found[host] = Secret(token.strip())
    return found


def _addresses(text: str, _: Row) -> tuple[Secret, ...]:
    """Addresses that nobody may see: what is wrong with one is said without it."""
    found = [word.strip("\"'<>,;") for word in re.split(r"[\s,;]+(?=https?://|$)|\s+", text) if word.strip("\"'<>,;")]
    if len(found) > MOST_ADDRESSES:
        raise EnvError(f"has {len(found)} addresses, more than {MOST_ADDRESSES}")
    for number, address in enumerate(found, 1):
        which = f"has an address, number {number}, that is none" if len(found) > 1 else "is no address"
        if problem := problem_of(address):
            raise EnvError(f"{which}: {problem}")
    return tuple(Secret(address) for address in dict.fromkeys(found))


def _pairs(text: str, _: Row) -> dict[str, Any]:
    """`key=value key=value`, each value a Python literal or a word; also with commas between, or as JSON."""
    if text[:1] == "{":
        return _pairs_of_json(text)
    if text[:1] == "[" and text[-1:] == "]":
        text = text[1:-1]
    if not text:
        return {}
    for quote in ("'", '"'):
        if text.count(quote) % 2:
            raise EnvError("has a quote that is not closed")
    values: dict[str, Any] = {}
    found = [*_KEY.finditer(text)]
    before = text
    if found:
        before = text[: found[0].start()]
    if before.strip(_BETWEEN):
        raise EnvError(f"has {show(before.strip())}, which is not key=value")
    starts = [match.start() for match in found]
    for match, end in zip(found, [*starts[1:], len(text)], strict=True):
        key = match[1]
        if key in values:
            raise EnvError(f"has {key} twice")
        values[key] = _literal(key, text[match.end() : end].strip(_BETWEEN))
    return values


def _pairs_of_json(text: str) -> dict[str, Any]:
    try:
        values = load_json(text)
    except ValueError as problem:
        raise EnvError(f"is not JSON: {problem}") from None
    for key, value in values.items():
        if not _fits_json(value):
            raise EnvError(f"has {show(value)} for {key}, which is not a number, true, false, null, a word or a list")
    return {key: _literal(key, value) if isinstance(value, str) else value for key, value in values.items()}


def _literal(key: str, text: str) -> Any:
    """A number, bool, None, word, or a list of these (tuples become lists, as JSON has no others)."""
    constants: dict[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    if re.fullmatch("[A-Za-z_][A-Za-z0-9_-]*", text):
        return text
    if re.fullmatch(r"[-+.0-9eE]+(\s+[-+.0-9eE]+)+", text):  # 0.9 0.99
        text = ",".join(text.split())
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
    "key": _secret,
    "tokens": _tokens,
    "addresses": _addresses,
    "pairs": _pairs,
    "sweep": _text,
}
