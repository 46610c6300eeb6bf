"""Pieces of HTML, and words for numbers. Whatever comes from outside (captions, prompts, messages) passes `text`."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from trainer.spec.log_lines import escaped
from trainer.spec.messages.secrets import without_secrets


def text(value: object) -> str:
    """For people, inside HTML: nothing in it is markup, acts on a terminal, or looks like a secret."""
    return html.escape(without_secrets(escaped(str(value))))


def is_blank(value: object) -> bool:
    """Whether a row of a table has no value, and is left out."""
    return value is None or value == ""


def pairs(rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and values, without the rows that have none; "" if all are without."""
    lines = []
    for name, value in rows:
        if not is_blank(value):
            lines.append(f"<tr><th scope=row>{text(name)}<td>{text(value)}")
    if not lines:
        return ""
    return f"<div class=wide><table class=pairs>{''.join(lines)}</table></div>"


def table(head: Sequence[str], rows: Iterable[str]) -> str:
    """A table. `head`: its cells, as HTML; `rows`: whole rows, as HTML."""
    return f"<div class=wide><table><thead><tr>{''.join(head)}<tbody>{''.join(rows)}</table></div>"


def bullets(lines: Iterable[str]) -> str:
    """A list of sentences; "" of none."""
    items = []
    for line in lines:
        items.append(f"<li>{text(line)}")
    if not items:
        return ""
    return f"<ul>{''.join(items)}</ul>"


def quiet(sentence: str) -> str:
    """A note in small letters. `sentence`: ours."""
    return f"<p class=quiet>{sentence}</p>"


def clock(seconds: float) -> str:
    """Seconds in words: "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{rest} s"


def clock_if_known(seconds: float) -> str:
    """The same; "" of none."""
    if not seconds:
        return ""
    return clock(seconds)


def number(value: float | None) -> str:
    """A loss; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.4f}"
