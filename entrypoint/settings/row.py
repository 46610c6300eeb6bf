"""What a row of `entrypoint/settings/variables.py` is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any


class Secret:
    """A text that shows itself only when asked to."""

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
    """One variable."""

    name: str
    kind: str  # a key of settings.KINDS
    default: str
    means: str
    group: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None  # the range begins above this number
    choices: Callable[[], Collection[str]] | None = None
    otherwise: str = ""  # what the plan does where the variable is not set


def row(
    name: str,
    kind: str,
    *,
    means: str,
    default: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Callable[[], Collection[str]] | None = None,
    otherwise: str = "",
) -> Any:
    """A field of Settings that is read from the variable `name`."""
    variable = Row(name, kind, default, means, low=low, high=high, above=above, choices=choices, otherwise=otherwise)
    return dataclasses.field(metadata={"row": variable})
