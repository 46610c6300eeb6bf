"""Shared by the readers of settings, manifests and plans: collected problems, similar names, JSON, paths.

Reading single values (numbers, ranges, keys) is in `trainer.spec.values`, since the trainer does it too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import json5

from trainer.spec.values import Problems, show

NOT_A_NUMBER = "is not a number"
MAX_JSON5_CHARACTERS = 2**16  # its reader is written in Python and reads 16 to 30 kB a second


@dataclass
class Notes(Problems):
    """What cannot be done (`lines`), why each `auto` became what it is (`reasons`), and what can be done but is
    probably not meant (`warnings`). The log shows all of them.
    """

    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def chose(self, variable: str, value: Any, reason: str) -> None:
        shown = str(value).lower() if isinstance(value, bool) else value
        self.reasons.append(f"{variable}: {shown} ({reason})")

    def warn(self, text: str) -> None:
        """Add a warning: a sentence that names the variable, file or row, its value, and what is usual."""
        self.warnings.append(text)


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


# ---- JSON


class RefusedJsonError(ValueError):
    """The text is JSON by its form. It means two things, is no number, or is too deep."""


def load_json(text: str) -> Any:
    """JSON as its standard has it. Raises ValueError also for a repeated key, NaN, and nesting too deep for Python."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise RefusedJsonError("it is nested too deeply") from None


def load_json5(text: str) -> Any:
    """JSON with what people add to it: comments, commas at the end, single quotes, keys without quotes (json5.org).

    Raises ValueError for anything else, also for a repeated key, and nesting too deep for Python.
    """
    if len(text) > MAX_JSON5_CHARACTERS:
        raise ValueError(f"it is not strict JSON, and longer than the {MAX_JSON5_CHARACTERS} characters of JSON5")
    try:
        return json5.loads(text, allow_duplicate_keys=False, parse_constant=_refuse_constant)
    except RecursionError:
        raise RefusedJsonError("it is nested too deeply") from None
    except ValueError as problem:
        reason = str(problem).removeprefix("<string>:")
        if reason.startswith("Duplicate key"):
            raise RefusedJsonError(f"the key {reason.split(chr(34))[1]} is given twice") from problem
        if reason.endswith(NOT_A_NUMBER):  # json5 raises what `_refuse_constant` raised as an error of its own
            raise RefusedJsonError(reason) from problem
        raise


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would silently keep the last of them."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise RefusedJsonError(f"the key {show(key)} is given twice")
    return dict(pairs)


def _refuse_constant(text: str) -> float:
    raise RefusedJsonError(f"{text} {NOT_A_NUMBER}")


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
