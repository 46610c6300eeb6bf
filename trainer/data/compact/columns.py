"""Columns of texts: one buffer of bytes instead of a Python string (49 bytes and its letters) for each."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
# A caption from JSON may hold half a letter, which UTF-8 has no bytes for.
ENCODING = ("utf-8", "surrogatepass")


class Texts:
    """Texts in the order in which they are added; None is one of them."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("Q")
        self._is_text = bytearray()

    def append(self, text: str | None) -> None:
        self._is_text.append(text is not None)
        self._bytes += (text or "").encode(*ENCODING)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: int) -> str | None:
        if not self._is_text[place]:
            return None
        begin = self._ends[place - 1] if place else 0
        return self._bytes[begin : self._ends[place]].decode(*ENCODING)


class FewValues(Generic[T]):
    """A column in which the same few values come again and again: each is kept once."""

    def __init__(self) -> None:
        self._numbers: dict[T, int] = {}
        self._values: list[T] = []
        self._column = array("I")

    def append(self, value: T) -> None:
        number = self._numbers.setdefault(value, len(self._values))
        if number == len(self._values):
            self._values.append(value)
        self._column.append(number)

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, place: int) -> T:
        return self._values[self._column[place]]

    def values(self) -> list[T]:
        """Each value once, in the order in which they came."""
        return list(self._values)


class Digests:
    """SHA-256 digests: 32 bytes each instead of 113 for their 64 letters."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def append(self, digest: str) -> None:
        """`digest`: 64 hexadecimal digits in lower case."""
        self._bytes += bytes.fromhex(digest)

    def __len__(self) -> int:
        return len(self._bytes) // 32

    def __getitem__(self, place: int) -> str:
        return self._bytes[32 * place : 32 * place + 32].hex()

    def __iter__(self) -> Iterator[str]:
        for place in range(len(self)):
            yield self[place]
