"""Shared by the readers of settings, manifests and plans: collected problems, misspelt names, paths.

Reading single values (numbers, ranges, keys), and the nearest known name, is in `trainer.spec.values`; reading JSON in
`trainer.spec.documents`: the trainer does both too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.spec.errors import DataError, GatedError, KilnError, SettingsError, StorageError, UnreachableError
from trainer.spec.values import Problems

# Where problems of several types are found, the first of these gives the exit code: what only the user can correct
# comes before what another start may cure.
ERRORS_BY_PRIORITY: tuple[type[KilnError], ...] = (
    SettingsError,
    GatedError,
    DataError,
    StorageError,
    UnreachableError,
)


@dataclass
class Notes(Problems):
    """What cannot be done (`lines`), why each `auto` became what it is (`reasons`), and what can be done but is
    probably not meant (`warnings`). The log shows all of them.
    """

    reasons: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)  # what only --check -v prints
    warnings: list[str] = field(default_factory=list)

    def chose(self, variable: str, value: Any, reason: str) -> None:
        shown = str(value).lower() if isinstance(value, bool) else value
        self.reasons.append(f"{variable}: {shown} ({reason})")

    def warn(self, text: str) -> None:
        """Add a warning: a sentence that names the variable, file or row, its value, and what is usual."""
        self.warnings.append(text)


def raise_together(problems: Sequence[KilnError]) -> None:
    """Raise one error with the messages of all, each once, in the order of ERRORS_BY_PRIORITY; none for no problem."""
    if not problems:
        return
    ordered = sorted(problems, key=lambda problem: ERRORS_BY_PRIORITY.index(type(problem)))
    messages = list(dict.fromkeys(str(problem) for problem in ordered))
    message = messages[0]
    if len(messages) > 1:
        message = "\n".join(f"- {line}" for line in messages)
    raise type(ordered[0])(message) from problems[0]


# ---- names


def edits_apart(a: str, b: str, *, limit: int) -> int:
    """Inserted, missing, wrong and swapped characters between `a` and `b`; `limit` + 1 for more than `limit`."""
    if abs(len(a) - len(b)) > limit or sum((Counter(a) - Counter(b)).values()) > limit:
        return limit + 1
    before_last: list[int] = []
    last = [*range(len(b) + 1)]
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            least = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                least = min(least, before_last[j - 2] + 1)
            row.append(least)
        before_last = last
        last = row
    return min(last[-1], limit + 1)


def one_edit_apart(a: str, b: str) -> bool:
    """Whether `a` and `b` are equal, or differ by one inserted, missing, wrong or swapped character."""
    if abs(len(a) - len(b)) > 1:
        return False
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    rest_a = a[start:]
    rest_b = b[start:]
    wrong = rest_a[1:] == rest_b[1:]
    extra = rest_a[1:] == rest_b
    missing = rest_a == rest_b[1:]
    swapped = rest_a[1:2] + rest_a[0:1] + rest_a[2:] == rest_b
    return wrong or extra or missing or swapped


# ---- paths


def is_folder(path: str) -> bool:
    """Whether `path` is an existing folder; False for text that cannot be a path at all."""
    return _exists_as(path, Path.is_dir)


def is_file(path: str) -> bool:
    """Whether `path` is an existing file; False for text that cannot be a path at all."""
    return _exists_as(path, Path.is_file)


def _exists_as(path: str, check: Callable[[Path], bool]) -> bool:
    try:
        return check(Path(path).expanduser())
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, ~user without such a user
        return False


def absolute(path: str) -> str:
    """`path` from the root, with `~` resolved as far as it can be."""
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:  # ~user without such a user
        return str(Path(path).absolute())
