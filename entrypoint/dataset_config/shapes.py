"""What is wrong with the outline of a dataset.json: its levels, before any value in them is read.

The examples in messages are JSON, whatever form the file has: the shape is the same.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from trainer.spec.values import show

TOP = ("general", "datasets")
EXAMPLE = '{"datasets": [{"resolution": 1024, "subsets": [{"image_dir": "/data/photos"}]}]}'


def problem_of(raw: Any, *, subset_keys: Collection[str], dataset_keys: Collection[str]) -> str | None:
    """Why `raw` has not the shape of a dataset.json, with the fix; None if it has."""
    if isinstance(raw, list):
        return _list_problem(raw, {*subset_keys, *dataset_keys, "subsets"})
    if not isinstance(raw, dict):
        return f"{show(raw)} is not an object. Fix: {EXAMPLE}."
    unknown = [name for name in raw if name not in TOP]
    if not unknown and "datasets" not in raw:
        return f"the key 'datasets' is missing. Fix: {EXAMPLE}."
    if unknown == ["dataset"] and isinstance(raw["dataset"], list | dict) and "datasets" not in raw:
        return "the key 'dataset' is not known; did you mean datasets?"
    if unknown and "datasets" not in raw:
        if "subsets" in unknown:
            return f"subsets is at the top level, and belongs in a dataset. Fix: {EXAMPLE}."
        if all(name in subset_keys or name in dataset_keys for name in unknown):
            names = ", ".join(unknown[:5])
            return f"{names}: keys of a dataset or a subset are at the top level. Fix: {EXAMPLE}."
    if unknown:
        strange = [name for name in unknown if name not in subset_keys and name not in dataset_keys]
        first = (strange or unknown)[0]
        return f'the key {show(first)} is not known; an object {{"general": {{...}}, "datasets": [...]}} is needed.'
    if isinstance(raw["datasets"], dict):
        return "datasets is one object, but must be a list. Fix: put it in [ ]; in TOML, write [[datasets]]."
    return None


def _list_problem(raw: list[Any], known: Collection[str]) -> str:
    """A list at the top: of datasets or subsets, or of another program's."""
    for item in raw:
        for name in item if isinstance(item, dict) else ():
            if name not in known:
                return (
                    f'the key {show(name)} is not known; an object {{"general": {{...}}, "datasets": [...]}} is needed.'
                )
    return f"it is a list, but must be an object. Fix: {EXAMPLE}."
