"""Text as two runs of the same program print it: without what may differ from run to run.

Numbers that only count or measure something deterministic stay, so that a changed number shows.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping

# In this order. Each with the reason why it may differ.
ALWAYS: tuple[tuple[re.Pattern[str], str], ...] = (
    # The time of day at the start of a log line.
    (re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[.,]\d+ "), ""),
    (re.compile(r"^\d\d:\d\d:\d\d "), ""),
    # Temporary folders and files have random names.
    (re.compile(rf"{re.escape(tempfile.gettempdir())}/\S*?(?=[\s'\",:;)]|\.?$)"), "<temporary>"),
    # The place of a line in the source, in warnings and tracebacks: files move, and lines with them.
    (re.compile(r'<tree>/[\w./-]+\.py", line \d+, in \S+'), '<source>"'),
    (re.compile(r"<tree>/[\w./-]+\.py(:\d+)?"), "<source>"),
    # Process numbers and ports are what the system has free.
    (re.compile(r"(?i)\b(pid[ =:]*)\d+"), r"\1<pid>"),
    (re.compile(r"\b(localhost|127\.0\.0\.1):\d+"), r"\1:<port>"),
    # What other programs leave free on the volume.
    (re.compile(r"[\d.,]+ [KMGT]?i?B (?=free\b|are free\b|is free\b)"), "<room> "),
)
# Only where time is measured. A bad input's message has none, and there "300 s" is a limit that must not change.
TIMED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b\d+:\d\d:\d\d\b"), "<time>"),
    (re.compile(r"\b\d+(?:\.\d+)? (?:ms|s|min|h|seconds|minutes|hours)\b"), "<time>"),
    (re.compile(r"\b\d+(?:\.\d+)? (?=(?:images|pictures|steps)/s\b)"), "<speed> "),
)
# The progress line comes every few seconds, so that a slow machine prints more of them. Losses are in metrics.jsonl.
PROGRESS = re.compile(r"(?i)\bstep \d+ ?(?:/|of) ?\d+\b.*(?:images|pictures)/s")
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")
# Lines that come or not by the speed of the machine, and lines of libraries about themselves.
BY_CHANCE = (
    re.compile(r"Training waited .* for the (save before|previous save)"),
    re.compile(r"^Failed to load "),
    re.compile(r"\d+%\|.*\|.*\[\d+:\d\d<"),  # progress bars of libraries, with speeds
    re.compile(r"^[WE]\d{4} \d\d:\d\d:\d\d\.\d+ "),
)


def with_places(text: str, places: Mapping[str, str]) -> str:
    """`text` with each folder of `places` replaced by its label; the longest first, because they lie in each other."""
    for folder in sorted(places, key=len, reverse=True):
        text = text.replace(folder, places[folder])
    return text


def normal_line(line: str, *, timed: bool) -> str:
    """One line without what may differ."""
    for pattern, instead in ALWAYS:
        line = pattern.sub(instead, line)
    if timed and PROGRESS.search(line):
        return NUMBER.sub("<number>", line)
    if timed:
        for pattern, instead in TIMED:
            line = pattern.sub(instead, line)
    return line.rstrip()


def normal_lines(text: str, places: Mapping[str, str], *, timed: bool) -> list[str]:
    """The lines of what a program printed. Progress lines count once. Empty lines and lines by chance are left out."""
    found: list[str] = []
    seen: set[str] = set()
    for raw in with_places(text, places).splitlines():
        line = normal_line(raw, timed=timed)
        if not line or any(pattern.search(line) or pattern.search(raw) for pattern in BY_CHANCE):
            continue
        if PROGRESS.search(raw):
            if line in seen:
                continue
            seen.add(line)
        found.append(line)
    return found


def numbers(line: str) -> list[str]:
    """The numbers in a line, without separators of thousands."""
    return [number.replace(",", "") for number in NUMBER.findall(line)]


def words(line: str) -> str:
    """A line with all numbers replaced by one sign."""
    return NUMBER.sub("#", line)


def without(values: Mapping[str, object], names: Iterable[str]) -> dict[str, object]:
    """`values` without the keys `names`."""
    left_out = set(names)
    return {key: value for key, value in values.items() if key not in left_out}
