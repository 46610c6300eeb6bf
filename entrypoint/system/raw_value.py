"""A variable as it was given, for those who cannot wait until all of them are read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping


def raw_value(environ: Mapping[str, str], name: str, *, is_number: bool = False) -> str:
    """A variable from the environment, or from CONFIG_JSON; not checked. `is_number`: JSON may have it as one."""
    if value := environ.get(name, "").strip():
        return value
    try:
        config = json.loads(environ.get("CONFIG_JSON", ""))
    except (ValueError, RecursionError):
        return ""
    found = config.get(name) if isinstance(config, dict) else None
    if is_number and isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    return found.strip() if isinstance(found, str) else ""
