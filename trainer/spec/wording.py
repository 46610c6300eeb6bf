"""Names in messages: on one line, the first of many, the nearest known one. And messages as the log writes them.

Most messages shorten and escape what they quote; `LineFormatter` is the last place, which all of them pass, so that
nothing in a name or a value acts on a terminal.
"""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections.abc import Collection, Sequence

SHOWN_NAMES = 5  # in a message; the report of the dataset has all of them
LONGEST_NAME = 160  # characters of a name in a message
# Controls, surrogates and separators of lines; and marks that change the direction of what follows.
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
MIN_SIMILARITY = 0.6  # of names that are suggested; the default of difflib
MAX_COMPARED_CHARACTERS = 200  # difflib's time grows with the square of the length
LONGEST_LINE = 2_000  # characters
KEPT = LONGEST_LINE // 2 - 20  # at each end of a longer line
# Control characters but for line breaks and tabs, lone surrogates, Unicode's line breaks, and marks that turn the
# direction of the text after them.
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


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


# ---- the log


def safe_lines(text: str) -> str:
    """`text` with raw characters escaped, and without the middle of lines that are very long."""
    text = RAW.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)
    if len(text) <= LONGEST_LINE:
        return text
    return "\n".join(_shortened(line) for line in text.split("\n"))


def _shortened(line: str) -> str:
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[:KEPT]} … {line[-KEPT:]}"


class LineFormatter(logging.Formatter):
    """Formats a record as `safe_lines`."""

    def format(self, record: logging.LogRecord) -> str:
        return safe_lines(super().format(record))


def log_to(stream: logging.Handler, line_format: str, *, level: int = logging.INFO) -> None:
    """What `logging.basicConfig` does: a handler for all, unless there is one already."""
    stream.setFormatter(LineFormatter(line_format, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[stream])
