"""Shared by the readers of settings, manifests and plans: collected problems, nearest names, strict JSON, paths.

Reading single values (numbers, ranges, keys) is in `trainer.spec.values`, since the trainer does it too.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.spec.values import Problems, show

MIN_SIMILARITY = 0.6  # of names that are suggested; the default of difflib
MAX_COMPARED_CHARACTERS = 200  # difflib's time grows with the square of the length


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


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that is most similar to `name`, if any is similar. Case does not matter."""
    by_lower = {known_name.lower(): known_name for known_name in known}
    matches = difflib.get_close_matches(name.lower()[:MAX_COMPARED_CHARACTERS], by_lower, n=1, cutoff=MIN_SIMILARITY)
    return by_lower[matches[0]] if matches else None


def suggestion(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    guess = nearest(name, known)
    return f"did you mean {guess}?" if guess else f"known are {', '.join(sorted(known))}."


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


def load_json(text: str) -> Any:
    """JSON as its standard has it. Raises ValueError also for a repeated key, NaN, and nesting too deep for Python."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would silently keep the last of them."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"the key {show(key)} is given twice")
    return dict(pairs)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


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
