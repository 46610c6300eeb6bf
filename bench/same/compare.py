"""Two recordings → what differs: results that no refactoring may change, and words."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.same.normalise import numbers, words

NOTHING = "(nothing)"
ALIKE = 0.35  # how much of two lines must be the same, 0 to 1, to show them as one sentence that changed

Recordings = Mapping[str, Mapping[str, Any]]  # a job's name → its recording


@dataclass(frozen=True)
class Change:
    """One value that differs. `key` is "" where the result is that value."""

    key: str
    old: Any
    new: Any


@dataclass(frozen=True)
class ResultDifference:
    """One result that differs, in the jobs `jobs` in the same way. `compared`: how many values it has."""

    result: str
    changes: tuple[Change, ...]
    compared: int
    jobs: tuple[str, ...]


@dataclass(frozen=True)
class Sentence:
    """A line that was printed before, and the line in its place. `has_other_numbers`: it is not only worded anew."""

    old: str
    new: str
    has_other_numbers: bool
    jobs: tuple[str, ...]


@dataclass(frozen=True)
class Differences:
    results: tuple[ResultDifference, ...]
    sentences: tuple[Sentence, ...]


def compare(old: Recordings, new: Recordings) -> Differences:
    """What differs between the recordings of two trees; the same difference in several jobs is one."""
    results: dict[tuple[str, str], list[str]] = {}
    found: dict[tuple[str, str], ResultDifference] = {}
    sentences: dict[tuple[str, str], list[str]] = {}
    for job in sorted({*old, *new}):
        before, after = old.get(job, {}), new.get(job, {})
        here = _results(before.get("results", {}), after.get("results", {}), job)
        for old_line, new_line in _lines(before.get("words", {}), after.get("words", {})):
            if words(old_line) == words(new_line) and numbers(old_line) != numbers(new_line):
                change = Change("", old_line, new_line)
                here.append(ResultDifference("a number in a line", (change,), 1, (job,)))
            else:
                sentences.setdefault((old_line, new_line), []).append(job)
        for difference in here:
            alike = (difference.result, repr(difference.changes))
            results.setdefault(alike, []).append(job)
            found.setdefault(alike, difference)
    return Differences(
        tuple(
            ResultDifference(found[alike].result, found[alike].changes, found[alike].compared, tuple(jobs))
            for alike, jobs in results.items()
        ),
        tuple(
            Sentence(old_line, new_line, numbers(old_line) != numbers(new_line), tuple(dict.fromkeys(jobs)))
            for (old_line, new_line), jobs in sentences.items()
        ),
    )


def _results(old: Mapping[str, Any], new: Mapping[str, Any], job: str) -> list[ResultDifference]:
    found = []
    for name in sorted({*old, *new}):
        changes, compared = changed(old.get(name, NOTHING), new.get(name, NOTHING))
        if changes:
            found.append(ResultDifference(name, tuple(changes), compared, (job,)))
    return found


def changed(old: Any, new: Any) -> tuple[list[Change], int]:
    """The values that differ between two results, and how many there are. Types count: 1 is not 1.0, nor true."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        pairs = [(key, old.get(key, NOTHING), new.get(key, NOTHING)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list):
        if sorted(map(repr, old)) == sorted(map(repr, new)):
            pairs = [(f"place {i + 1}", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
        else:
            gone, come = Counter(map(repr, old)), Counter(map(repr, new))
            pairs = [("", item, NOTHING) for item in (gone - come).elements()]
            pairs += [("", NOTHING, item) for item in (come - gone).elements()]
    else:
        pairs = [("", old, new)]
    differing = [Change(key, a, b) for key, a, b in pairs if repr(a) != repr(b)]
    return differing, len(pairs)


def _lines(old: Mapping[str, Sequence[str]], new: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name in sorted({*old, *new}):
        found += paired(old.get(name, ()), new.get(name, ()))
    return found


def paired(old: Sequence[str], new: Sequence[str]) -> list[tuple[str, str]]:
    """The lines that only one side has, each old one with the new one that is most like it.

    A line without a counterpart is paired with NOTHING. Where the lines are the same and their order is not, the first
    that stands elsewhere is paired with the one in its place.
    """
    if list(old) != list(new) and Counter(old) == Counter(new):
        return [next((a, b) for a, b in zip(old, new, strict=True) if a != b)]
    gone = list((Counter(old) - Counter(new)).elements())
    come = list((Counter(new) - Counter(old)).elements())
    found: list[tuple[str, str]] = []
    for line in gone:
        best = max(come, key=lambda other: likeness(line, other), default=None)
        if best is None or likeness(line, best) < ALIKE:
            found.append((line, NOTHING))
        else:
            come.remove(best)
            found.append((line, best))
    return found + [(NOTHING, line) for line in come]


def likeness(a: str, b: str) -> float:
    """How much of two lines is the same, 0 to 1. Lines that differ in numbers alone are most alike."""
    if words(a) == words(b):
        return 1.0
    return 0.99 * difflib.SequenceMatcher(None, a.split(), b.split()).ratio()
