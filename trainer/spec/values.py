"""Strict reading of single values that users write: numbers, texts and sizes, with their ranges; the nearest name.

The settings, dataset.json and prompt lines are all read with these, so that a number means the same everywhere.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.spec.errors import SettingsError
from trainer.spec.messages.secrets import without_secrets

# Python's int() and float() also accept "１２", "1_000", "nan" and "infinity", which nobody means in a setting.
# Both patterns match in time linear in the length of the text. 18 digits fit in 64 bits.
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_SHOWN_CHARACTERS = 80  # of a value in a message
MAX_READ_CHARACTERS = 4_000  # of a value, of which a message shows the beginning
SHOWN_PROBLEMS = 100  # in one message: more than a person writes, and less than a file of the wrong kind has
SHOWN_NAMES = 5  # in a message; the report of the dataset has all of them
LONGEST_NAME = 160  # characters of a name in a message
# Controls, surrogates and separators of lines; and marks that nobody sees, or that turn the direction of what follows.
UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
MIN_SIMILARITY = 0.6  # of names that are suggested; the default of difflib
MAX_COMPARED_CHARACTERS = 200  # difflib's time grows with the square of the length


@dataclass
class Problems:
    """Everything that is wrong, to be reported at once."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line)

    def raise_if_any(self, heading: str) -> None:
        """Raises SettingsError with one line for each of the first problems."""
        if not self.lines:
            return
        shown = [f"{heading}:", *self.lines[:SHOWN_PROBLEMS]]
        if len(self.lines) > SHOWN_PROBLEMS:
            shown.append(f"and {len(self.lines) - SHOWN_PROBLEMS} more")
        raise SettingsError("\n  - ".join(shown))


def as_integer(text: str) -> int | None:
    """A whole number in ASCII digits, or None."""
    if not _INTEGER.fullmatch(text):
        return None
    return int(text)


def as_number(text: str) -> float | None:
    """A finite decimal number like 12, .5 or 1e-4, or None."""
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        return None
    return float(text)


def span(low: float | None, high: float | None, *, above: float | None = None) -> str:
    """A range in words: "0 to 1", "above 0, up to 10", "1 or more", or nothing."""
    if above is not None and high is not None:
        return f"above {above:g}, up to {high:.12g}"
    if above is not None:
        return f"above {above:g}"
    if low is not None and high is not None:
        return f"{low:.12g} to {high:.12g}"
    if low is not None:
        return f"{low:.12g} or more"
    if high is not None:
        return f"up to {high:.12g}"
    return ""


def inside(number: float, low: float | None, high: float | None, *, above: float | None = None) -> bool:
    """Whether `number` is in the range that `span` puts into words."""
    if above is not None and number <= above:
        return False
    return (low is None or number >= low) and (high is None or number <= high)


def show(value: Any) -> str:
    """A value for a message: quoted, at most 80 characters, and without what looks like a secret."""
    return shorten(without_secrets(repr(value)[:MAX_READ_CHARACTERS]))


def shorten(text: str) -> str:
    """`text` for a message: at most 80 characters."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[: _SHOWN_CHARACTERS - 1]}…"


def is_text(value: str) -> bool:
    """Whether a file can hold it. Undecodable bytes of the environment arrive as lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


@dataclass(frozen=True)
class Key:
    """The type and the range of the value of a key in a JSON or TOML file, or of a flag in a prompt line."""

    kind: str  # integer | number | boolean | text | size
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        limits = span(self.low, self.high)
        words = {
            "integer": f"a whole number, {limits}",
            "number": f"a number, {limits}",
            "boolean": "true or false",
            "text": "a text in quotes",
            "size": f"a whole number or [width, height], {limits} each",
        }
        return words[self.kind]

    def read(self, value: Any) -> Any:
        """The value in its type: float for numbers, (width, height) for sizes.

        Raises ValueError for a value of another type or outside the range.
        """
        sides = value if isinstance(value, list) and len(value) == 2 else [value, value]
        good = {
            "integer": _is_integer(value),
            "number": isinstance(value, float) or _is_integer(value),
            "boolean": isinstance(value, bool),
            "text": isinstance(value, str) and (not self.choices or value in self.choices) and is_text(value),
            "size": all(_is_integer(side) for side in sides),
        }[self.kind]
        if good and self.kind in ("integer", "number"):
            good = inside(value, self.low, self.high)
        if good and self.kind == "size":
            good = all(inside(side, self.low, self.high) for side in sides)
        if not good:
            raise ValueError(f"{show(value)} is not {self}")
        if self.kind == "size":
            return sides[0], sides[1]
        if self.kind == "number":
            return float(value)
        return value


def _is_integer(value: Any) -> bool:
    """JSON's true is an instance of Python's int, but no whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


# ---- names


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that is most similar to `name`, if any is similar. Case does not matter."""
    return next(iter(similar(name, known, most=1)), None)


def suggestion(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    guess = nearest(name, known)
    return f"did you mean {guess}?" if guess else f"known are {', '.join(sorted(known))}."


# ---- names in messages


def one_line(text: str) -> str:
    """`text` with all escaped that would break the line, turn its direction, or not be seen."""
    if text.isprintable():  # mostly: and a dataset has many names
        return text
    letters = []
    for letter in text:
        if unicodedata.category(letter) in UNPRINTABLE:
            letter = letter.encode("unicode_escape", "surrogatepass").decode("ascii")
        letters.append(letter)
    return "".join(letters)


def printable(name: str) -> str:
    """A name for a message: on one line, and without its middle where it is very long."""
    text = one_line(name)
    if len(text) <= LONGEST_NAME:
        return text
    return f"{text[: LONGEST_NAME // 3]}…{text[-LONGEST_NAME // 3 * 2 :]}"


def some(names: Sequence[str], *, most: int = SHOWN_NAMES) -> str:
    """The first names of many: "a.txt, b.txt and 7 more"."""
    shown = ", ".join(printable(name) for name in names[:most])
    if len(names) > most:
        return f"{shown} and {len(names) - most} more"
    return shown


def many(count: int, word: str) -> str:
    """1 caption, 2 captions."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def similar(name: str, known: Collection[str], *, most: int) -> list[str]:
    """The known names that are most similar to `name`, the nearest first. Case does not matter."""
    by_lower = {known_name.lower(): known_name for known_name in known}
    compared = name.lower()[:MAX_COMPARED_CHARACTERS]
    matches = difflib.get_close_matches(compared, by_lower, n=most, cutoff=MIN_SIMILARITY)
    return [by_lower[match] for match in matches]
