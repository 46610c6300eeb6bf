"""What the search for captions has to tell the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.data.records import WARNING, printable

MOST_EXAMPLES = 5  # names in one message; the report has all of them


@dataclass
class Findings:
    """Sentences for the user. A note goes to the log and the report, an unused thing to the report alone."""

    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)  # "NAME: why", one file, row or column each
    problems: list[str] = field(default_factory=list)  # each refuses the dataset

    def warn(self, text: str) -> None:
        """A note that the log shows as a warning."""
        self.notes.append(f"{WARNING}{text}")


def many(count: int, word: str) -> str:
    """1 caption, 2 captions."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def some(names: Sequence[str]) -> str:
    """The first names of many: "a.txt, b.txt and 7 more"."""
    shown = ", ".join(printable(name) for name in names[:MOST_EXAMPLES])
    if len(names) > MOST_EXAMPLES:
        return f"{shown} and {len(names) - MOST_EXAMPLES} more"
    return shown
