"""What reading settings, manifests and plans has in common: strict parsing, nearest names, problems gathered."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The trainer reads values with these too; here they are at hand with the rest.
from trainer.spec.values import Key as Key
from trainer.spec.values import Problems as Problems
from trainer.spec.values import as_integer as as_integer
from trainer.spec.values import as_number as as_number
from trainer.spec.values import inside as inside
from trainer.spec.values import is_text as is_text
from trainer.spec.values import show as show
from trainer.spec.values import span as span


@dataclass
class Notes(Problems):
    """What is refused, and why each `auto` became what it is."""

    reasons: list[str] = field(default_factory=list)

    def chose(self, variable: str, value: Any, reason: str) -> None:
        self.reasons.append(f"{variable}: {str(value).lower() if isinstance(value, bool) else value} ({reason})")


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name most like `name`, if any is like it at all. Upper and lower case count as the same."""
    folded = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower()[:200], folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def instead(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    guess = nearest(name, known)
    return f"did you mean {guess}?" if guess else f"known are {', '.join(sorted(known))}."


def load_json(text: str) -> Any:
    """JSON as its standard has it. Raises ValueError also for a key given twice, NaN, and nesting without end."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {show(next(k for k in keys if keys.count(k) > 1))} is given twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def one_edit_apart(a: str, b: str) -> bool:
    """Whether one inserted, missing, wrong or swapped character (or nothing) makes `a` into `b`."""
    if abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    x, y = a[start:], b[start:]
    swapped = x[1:2] + x[0:1] + x[2:]
    return x[1:] == y[1:] or x[1:] == y or x == y[1:] or swapped == y


def is_folder(path: str) -> bool:
    """Whether `path` is a folder that is there; False for what cannot be a path at all."""
    try:
        return Path(path).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


def is_file(path: str) -> bool:
    """Whether `path` is a file that is there; False for what cannot be a path at all."""
    try:
        return Path(path).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def absolute(path: str) -> str:
    """`path` from the root, with `~` resolved as far as it can be."""
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:  # ~user without such a user
        return str(Path(path).absolute())
