"""Differences as text for people, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from bench.same.compare import Change, Differences, ResultDifference, Sentence

EXAMPLES = 3  # changes that are printed of a result with many
LONG = 160  # characters of a value that are printed
FEW_JOBS = 4  # that are named


def text(differences: Differences) -> str:
    """Everything that differs, in two lists."""
    results, sentences = differences.results, differences.sentences
    if not results and not sentences:
        return "The same: no result and no sentence differs."
    lines = [f"RESULTS: {len(results) or 'none'}{' differ' if results else ' differs'}"]
    for number, difference in enumerate(results, 1):
        lines += _result(number, difference)
    lines += ["", f"WORDS: {len(sentences) or 'none'}{' differ' if sentences else ' differs'}"]
    for number, sentence in enumerate(sentences, 1):
        lines += _sentence(number, sentence)
    return "\n".join(lines)


def _result(number: int, difference: ResultDifference) -> list[str]:
    changes = difference.changes
    lines = [f"  {number}. {_jobs(difference.jobs)}: {difference.result}"]
    if len(changes) > EXAMPLES:
        lines[0] += f" ({len(changes)} of {max(difference.compared, len(changes))} values)"
    lines += [f"       {_change(change)}" for change in changes[:EXAMPLES]]
    if len(changes) > EXAMPLES:
        lines.append(f"       … and {len(changes) - EXAMPLES} more")
    return lines


def _change(change: Change) -> str:
    name = f"{change.key}: " if change.key else ""
    return f"{name}{_short(change.old)} → {_short(change.new)}"


def _short(value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= LONG else f"{shown[: LONG - 1]}…"


def _sentence(number: int, sentence: Sentence) -> list[str]:
    numbers = "; the numbers in it differ too" if sentence.has_other_numbers else ""
    return [
        f"  {number}. {_jobs(sentence.jobs)}{numbers}",
        f"       old: {sentence.old}",
        f"       new: {sentence.new}",
    ]


def _jobs(jobs: Sequence[str]) -> str:
    if len(jobs) <= FEW_JOBS:
        return ", ".join(jobs)
    return f"{len(jobs)} jobs ({', '.join(jobs[:FEW_JOBS])}, …)"


def as_json(differences: Differences) -> str:
    """All differences, none of them cut short."""
    return json.dumps(dataclasses.asdict(differences), indent=1, ensure_ascii=False) + "\n"
