"""What an engine's module returns: the text of the job, and the commands that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

GRACE_S = 120  # between SIGTERM and SIGKILL: a big model's state is written within it


class Document(NamedTuple):
    """`text` is written to the file `name`, which `start` names. `before`: shell commands to give once, before it.

    `tool`: the program that must be there; `install`: how it is installed. `notes`: for people, on stderr.
    """

    name: str
    text: str
    start: tuple[str, ...]
    tool: str
    install: str
    before: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and leaves the order of keys."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(*trees: Mapping[str, Any]) -> str:
    """The trees as YAML documents."""
    texts = []
    for tree in trees:
        texts.append(yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True))
    return "---\n".join(texts)
