"""What reading settings, manifests and plans has in common: strict parsing, nearest names, problems gathered."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.spec.errors import SettingsError

# Python's int() and float() also take "１２", "1_000", "nan" and "infinity", which nobody means in a setting.
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")  # in time that grows with the length
_TOKEN = re.compile(r"hf_\w{6,}", re.ASCII)
_SHOWN = 80  # characters of a value in a message


@dataclass
class Problems:
    """Everything that is wrong, to be said at once."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line)

    def raise_if_any(self, heading: str) -> None:
        """Raises SettingsError with one line for each problem."""
        if self.lines:
            raise SettingsError("\n  - ".join([f"{heading}:", *self.lines]))


@dataclass
class Notes(Problems):
    """What is refused, and why each `auto` became what it is."""

    reasons: list[str] = field(default_factory=list)

    def chose(self, variable: str, value: Any, reason: str) -> None:
        self.reasons.append(f"{variable}: {str(value).lower() if isinstance(value, bool) else value} ({reason})")


def as_integer(text: str) -> int | None:
    """A whole number in ASCII digits, or None."""
    return int(text) if _INTEGER.fullmatch(text) else None


def as_number(text: str) -> float | None:
    """A finite decimal number like 12, .5 or 1e-4, or None."""
    number = float(text) if _NUMBER.fullmatch(text) else math.inf
    return number if math.isfinite(number) else None


def span(low: float | None, high: float | None, *, above: float | None = None) -> str:
    """The words for a range: "0 to 1", "above 0, up to 10", "1 or more", or nothing."""
    start = f"above {above:g}" if above is not None else None if low is None else f"{low:.12g}"
    if high is None:
        return f"{start} or more" if above is None and start else start or ""
    if above is not None:
        return f"{start}, up to {high:.12g}"
    return f"{start} to {high:.12g}" if start else f"up to {high:.12g}"


def inside(number: float, low: float | None, high: float | None, *, above: float | None = None) -> bool:
    """Whether `number` is in the range that `span` words."""
    if above is not None and number <= above:
        return False
    return (low is None or number >= low) and (high is None or number <= high)


def show(value: Any) -> str:
    """A value as a message may carry it: quoted, short, and without an access token."""
    text = _TOKEN.sub("hf_***", repr(value))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name most like `name`, if any is like it at all. Upper and lower case count as the same."""
    folded = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower()[:200], folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def instead(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    guess = nearest(name, known)
    return f"did you mean {guess}?" if guess else f"known are {', '.join(sorted(known))}."


def load_json(text: str) -> Any:
    """JSON as its standard has it. Raises ValueError also for a key given twice, NaN, and nesting without end."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {show(next(k for k in keys if keys.count(k) > 1))} is given twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")


@dataclass(frozen=True)
class Key:
    """What a key of a JSON or TOML file may hold."""

    kind: str  # integer | number | boolean | text | size
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        limits = span(self.low, self.high)
        words = {
            "integer": f"a whole number, {limits}",
            "number": f"a number, {limits}",
            "boolean": "true or false",
            "text": "a text in quotes",
            "size": f"a whole number or [width, height], {limits} each",
        }[self.kind]
        return f"one of {', '.join(self.choices)}" if self.choices else words

    def read(self, value: Any) -> Any:
        """The value in its type: float for numbers, (width, height) for sizes. Raises ValueError if it is another."""
        sides = value if isinstance(value, list) and len(value) == 2 else [value, value]
        good = {
            "integer": self._is_integer(value),
            "number": isinstance(value, float) or self._is_integer(value),
            "boolean": isinstance(value, bool),
            "text": isinstance(value, str) and (not self.choices or value in self.choices) and is_text(value),
            "size": all(self._is_integer(side) for side in sides),
        }[self.kind]
        if good and self.kind in ("integer", "number", "size"):
            good = all(inside(n, self.low, self.high) for n in (sides if self.kind == "size" else [value]))
        if not good:
            raise ValueError(f"{show(value)} is not {self}")
        return (sides[0], sides[1]) if self.kind == "size" else float(value) if self.kind == "number" else value

    @staticmethod
    def _is_integer(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: str) -> bool:
    """Whether it can be written to a file. Undecodable bytes of the environment arrive as lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def one_edit_apart(a: str, b: str) -> bool:
    """Whether one inserted, missing, wrong or swapped character (or nothing) makes `a` into `b`."""
    if abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    x, y = a[start:], b[start:]
    swapped = x[1:2] + x[0:1] + x[2:]
    return x[1:] == y[1:] or x[1:] == y or x == y[1:] or swapped == y


def is_folder(path: str) -> bool:
    """Whether `path` is a folder that is there; False for what cannot be a path at all."""
    try:
        return Path(path).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


def is_file(path: str) -> bool:
    """Whether `path` is a file that is there; False for what cannot be a path at all."""
    try:
        return Path(path).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def absolute(path: str) -> str:
    """`path` from the root, with `~` resolved as far as it can be."""
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:  # ~user without such a user
        return str(Path(path).absolute())
