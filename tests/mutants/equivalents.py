"""The faults that no test can notice, because they change nothing that can be seen: `equivalent.txt`.

One a line: module | function | change | reason, as the report of survivors prints the first three. "f#2" is the second
fault of f with that change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.mutants.warm import Mutant

LIST = Path(__file__).with_name("equivalent.txt")


@dataclass(frozen=True)
class Equivalent:
    module: str
    place: str
    change: str
    reason: str


def equivalents() -> list[Equivalent]:
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return [Equivalent(*line.split(" | ")) for line in lines if line and not line.startswith("#")]


def is_listed(mutant: Mutant, known: list[Equivalent]) -> bool:
    names = {(one.module, one.place, one.change) for one in known}
    return (mutant.module, mutant.place, mutant.change) in names
