"""Differences as text for people, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from bench.same.compare import Differences, ResultDifference, Sentence

LONG = 120  # characters of a value that are printed
FEW_JOBS = 4  # that are named
MOST = 12  # results that are printed of a job; a changed loss brings a dozen changed files with it
# What is printed first of a job: what a reader wants to know before hashes. The rest follows by name.
FIRST = ("exit code", "files", "plan.json", "metrics.jsonl", "a number in a line")


def text(differences: Differences) -> str:
    """Everything that differs, in two lists."""
    results, sentences = differences.results, differences.sentences
    if not results and not sentences:
        return "The same: no result and no sentence differs."
    lines = [f"RESULTS: {len(results)} differ" if results else "RESULTS: the same"]
    for jobs, found in _by_jobs(results).items():
        lines.append(f"  {_jobs(jobs)}")
        lines += [f"    {_result(difference)}" for difference in found[:MOST]]
        if len(found) > MOST:
            lines.append(f"    … and {len(found) - MOST} more")
    lines += ["", f"WORDS: {len(sentences)} differ" if sentences else "WORDS: the same"]
    for sentence in sentences:
        lines += _sentence(sentence)
    return "\n".join(lines)


def _by_jobs(results: Sequence[ResultDifference]) -> dict[tuple[str, ...], list[ResultDifference]]:
    """The differences of each group of jobs, the most telling first."""
    found: dict[tuple[str, ...], list[ResultDifference]] = {}
    for difference in results:
        found.setdefault(difference.jobs, []).append(difference)
    for group in found.values():
        group.sort(key=_order)
    return found


def _order(difference: ResultDifference) -> tuple[int, bool, str]:
    name = difference.result
    place = FIRST.index(name) if name in FIRST else len(FIRST)
    return place, name.endswith(", bytes"), name


def _result(difference: ResultDifference) -> str:
    """One line: the name, how many of its values differ, and the first of them."""
    count, first = len(difference.changes), difference.changes[0]
    number = f" ({count} of {max(difference.compared, count)} values)" if count > 1 else ""
    key = f"{first.key}: " if first.key else ""
    return f"{difference.result}{number}: {key}{_short(first.old)} → {_short(first.new)}"


def _short(value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= LONG else f"{shown[: LONG - 1]}…"


def _sentence(sentence: Sentence) -> list[str]:
    numbers = "; the numbers in it differ too" if sentence.has_other_numbers else ""
    return [
        f"  {_jobs(sentence.jobs)}{numbers}",
        f"    old: {sentence.old}",
        f"    new: {sentence.new}",
    ]


def _jobs(jobs: Sequence[str]) -> str:
    if len(jobs) <= FEW_JOBS:
        return ", ".join(jobs)
    return f"{len(jobs)} jobs ({', '.join(jobs[:FEW_JOBS])}, …)"


def as_json(differences: Differences) -> str:
    """All differences, none of them cut short."""
    return json.dumps(dataclasses.asdict(differences), indent=1, ensure_ascii=False) + "\n"
