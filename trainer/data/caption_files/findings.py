"""What the search for captions has to tell the user."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.data.records import WARNING


@dataclass
class Findings:
    """Sentences for the user. A note goes to the log and the report, an unused thing to the report alone."""

    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)  # "NAME: why", one file, row or column each
    problems: list[str] = field(default_factory=list)  # each refuses the dataset

    def warn(self, text: str) -> None:
        """A note that the log shows as a warning."""
        self.notes.append(f"{WARNING}{text}")
