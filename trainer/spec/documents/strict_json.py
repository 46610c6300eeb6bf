"""JSON and JSON5, strictly: a repeated key, NaN and nesting without end are errors."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import json5

from trainer.spec.values import show

MAX_JSON5_CHARACTERS = 200_000  # its reader takes some 30 microseconds for each


def load_json(text: str) -> Any:
    """JSON as its standard has it. Raises ValueError also for a repeated key, NaN, and nesting too deep for Python."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load_json5(text: str) -> Any:
    """JSON with what people add to it: comments, commas at the end, single quotes, keys without quotes (json5.org).

    Raises ValueError for anything else, also for a repeated key, and nesting too deep for Python.
    """
    if len(text) > MAX_JSON5_CHARACTERS:
        raise ValueError(f"it is not strict JSON, and longer than the {MAX_JSON5_CHARACTERS} characters of JSON5")
    try:
        return json5.loads(text, allow_duplicate_keys=False, parse_constant=_refuse_constant)
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
