"""What was understood from the environment, in one line of the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entrypoint.settings.row import SECRET_KINDS
from entrypoint.settings.variables import SECTIONS, Settings, section_rows
from trainer.spec.messages.secrets import address, without_secrets
from trainer.spec.values import one_line

LONGEST = 60  # characters of a value


def describe(settings: Settings) -> str:
    """Each variable that is set, with its value as it was read; those that say what the default says are marked."""
    said: list[str] = []
    count = 0
    for section in SECTIONS:
        for field, row in section_rows(section).items():
            count += 1
            if row.name not in settings.given:
                continue
            text = _shown(getattr(getattr(settings, section), field), secret=row.kind in SECRET_KINDS)
            mark = " (the default)" if row.default and text == row.default else ""
            said.append(f"{row.name}={text}{mark}")
    return without_secrets(f"Set here: {', '.join(said)}. The other {count - len(said)} variables have their defaults.")


def _shown(value: Any, *, secret: bool) -> str:
    if secret:
        return "***"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple) and all(isinstance(item, float) for item in value):
        return ",".join(f"{item:g}" for item in value)
    text = one_line(str(value)) if isinstance(value, str | int | Path) else one_line(repr(value))
    if text.startswith(("{", "[")):
        return "(a document)"
    if "://" in text:
        text = address(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
