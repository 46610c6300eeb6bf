"""The variables as a JSON schema (draft 2020-12), for programs that write jobs: what CONFIG_JSON may hold.

A value that satisfies it is read as it stands. More is allowed than it says: spellings such as "True", "1e-4" or
"1024 x 1024", which people write.
"""

from __future__ import annotations

import math
from typing import Any

from entrypoint.settings.parsers import PARSERS
from entrypoint.settings.row import SECRET_KINDS, Row
from entrypoint.settings.variables import CONFIG_JSON, SECTIONS, section_rows
from trainer.spec.values import as_number

DIALECT = "https://json-schema.org/draft/2020-12/schema"
AUTO = {"const": "auto"}
DOCUMENTS = ("DATASET_CONFIG", "SAMPLE_PROMPTS")  # of these the text itself may be given


def json_schema() -> dict[str, Any]:
    """An object with a property for each variable, in the order of the table."""
    properties: dict[str, Any] = {}
    for section in SECTIONS:
        for row in section_rows(section).values():
            properties[row.name] = _property(row, section)
    return {
        "$schema": DIALECT,
        "title": "Kiln: the variables of a job",
        "description": f"Set each by itself in the environment, as text, or all in {CONFIG_JSON}, as this object.",
        "type": "object",
        "properties": properties,
        "required": ["BASE_MODEL"],
        "anyOf": [{"required": ["DATASET_NAME"]}, {"required": ["DATASET_CONFIG"]}],
        "additionalProperties": False,
    }


def _property(row: Row, section: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"description": row.meaning, "x-section": section, **_allowed(row)}
    if row.default:
        entry["default"] = _typed(row)
    elif row.if_unset:
        entry["x-if-unset"] = row.if_unset
    return entry


def _allowed(row: Row) -> dict[str, Any]:
    """What its value may be. A new kind of variable needs an entry here (a test says so)."""
    if row.choices:
        return {"enum": [*row.choices()]}
    limits = _limits(row)
    integer = {"type": "integer", **limits}
    number = {"type": "number", **limits}
    sides = {"type": "string", "pattern": "^[0-9]+x[0-9]+$"}
    kinds: dict[str, dict[str, Any]] = {
        "integer": integer,
        "auto_integer": {"anyOf": [AUTO, integer]},
        "auto_count": {"anyOf": [AUTO, integer]},
        "number": number,
        "size": {"anyOf": [integer, sides]},
        "switch": {"type": "boolean"},
        "auto_switch": {"anyOf": [AUTO, {"type": "boolean"}]},
        "sweep": {"type": "string", "examples": ["PARAMS_NETWORK_DIM=8,32 PARAMS_D_COEF=1,2"]},
        "pairs": {"type": "string", "examples": ["key=value other=1e-4"]},
        "names": {"type": "string", "examples": ["one,two"]},
        "numbers": {"type": "string", "examples": ["0.5,1"]},
        "path": {"type": "string"},
        "repo": {"type": "string", "examples": ["owner/name"]},
        "name": {"type": "string", "maxLength": 128},
        **{kind: {"type": "string", "writeOnly": True} for kind in SECRET_KINDS},
        "text": {"type": ["string", "object", "array"] if row.name in DOCUMENTS else "string"},
    }
    assert kinds.keys() >= PARSERS.keys() - {"choice"}
    return kinds[row.kind]


def _limits(row: Row) -> dict[str, float]:
    bounds = {"minimum": row.low, "maximum": row.high, "exclusiveMinimum": row.above}
    return {name: bound for name, bound in bounds.items() if bound is not None and math.isfinite(bound)}


def _typed(row: Row) -> Any:
    """The default as JSON has it."""
    if row.kind in ("switch", "auto_switch") and row.default != "auto":
        return row.default == "true"
    number = as_number(row.default) if row.kind in ("integer", "auto_integer", "auto_count", "number", "size") else None
    if number is None:
        return row.default
    return int(number) if number == int(number) else number
