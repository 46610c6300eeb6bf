"""Names in messages: on one line, the first of many, the nearest known one."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Collection, Sequence

SHOWN_NAMES = 5  # in a message; the report of the dataset has all of them
LONGEST_NAME = 160  # characters of a name in a message
# Controls, surrogates and separators of lines; and marks that change the direction of what follows.
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
MIN_SIMILARITY = 0.6  # of names that are suggested; the default of difflib
MAX_COMPARED_CHARACTERS = 200  # difflib's time grows with the square of the length


def one_line(text: str) -> str:
    """`text` with all escaped that would break the line, or turn its direction."""
    letters = []
    for letter in text:
        if unicodedata.category(letter) in UNPRINTABLE or letter in DIRECTIONS:
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
