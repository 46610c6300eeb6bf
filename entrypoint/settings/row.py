"""One row of the table of variables (`entrypoint.settings.variables`): a field of a section, and how to read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

# Kinds of variables whose text is secret: a token of the Hub; another key; keys by their hosts; addresses, whose paths
# are keys.
SECRET_KINDS = ("secret", "key", "tokens", "addresses")
LARGEST_COUNT = 10**8  # of steps, epochs and the like: more than any job has, so that a slip of the pen is refused


class Secret:
    """Text that does not appear in logs: its repr is ***. `reveal` returns it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass(frozen=True)
class Row:
    """One variable: its name, how its text is read, and its line in the table in docs/variables.md."""

    name: str
    kind: str  # a key of settings.read.PARSERS
    default: str  # text as a user would write it; empty: not set
    meaning: str
    low: float | None = None
    high: float | None = None
    above: float | None = None  # the range begins above this number
    choices: Callable[[], Collection[str]] | None = None
    if_unset: str = ""  # what the plan does if the variable is not set


def row(
    name: str,
    kind: str,
    *,
    meaning: str,
    default: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Callable[[], Collection[str]] | None = None,
    if_unset: str = "",
) -> Any:
    """A field of a section of Settings, read from the variable `name`."""
    variable = Row(name, kind, default, meaning, low=low, high=high, above=above, choices=choices, if_unset=if_unset)
    return dataclasses.field(metadata={"row": variable})
