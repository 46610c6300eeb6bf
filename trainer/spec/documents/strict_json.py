"""JSON and JSON5, strictly: a repeated key, NaN and nesting without end are errors."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import json5

from trainer.spec.values import show

NOT_A_NUMBER = "is not a number"
MAX_JSON5_CHARACTERS = 2**16  # its reader is written in Python and reads 16 to 30 kB a second


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
