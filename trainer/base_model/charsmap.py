"""The table of characters in T5's tokenizers: SentencePiece's `precompiled_charsmap`, checked before it is searched.

Four bytes with the length of a double-array trie, its 32-bit units, then texts that each end with a zero byte. The trie
has the UTF-8 bytes of what is replaced, and the place of what replaces it among the texts. The library that searches it
checks no index and ends the program where one leads out (darts-clone, `DoubleArrayImpl::commonPrefixSearch`).
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections import defaultdict
from collections.abc import Sequence

LENGTH_BYTES = 4
BLOCK = 0xFF  # children of a node lie where its place and a byte, exclusive or, lead: in one block of 256 units


def decode(encoded: object) -> bytes:
    """The table, from its text in base64. Raises ValueError for one that leads out of itself."""
    if not isinstance(encoded, str):
        raise ValueError("it is no text")
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as problem:
        raise ValueError("it is not in base64") from problem
    size = int.from_bytes(data[:LENGTH_BYTES], "little")
    if size <= 0 or size % 4 or LENGTH_BYTES + size > len(data):
        raise ValueError("its length is wrong")
    units = struct.unpack(f"<{size // 4}I", data[LENGTH_BYTES : LENGTH_BYTES + size])
    texts = data[LENGTH_BYTES + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise ValueError("its texts are not in UTF-8") from problem
    _check(units, texts)
    return data


def _check(units: Sequence[int], texts: bytes) -> None:
    """Visit every node that a search can come to. Raises ValueError for a place that is not there."""
    children = defaultdict(list)
    for place, unit in enumerate(units):
        label = unit & (1 << 31 | BLOCK)
        if 0 < label <= BLOCK:
            children[place ^ label].append(place)
    waiting = [_offset(units[0])]
    seen = set(waiting)
    for node in waiting:
        if node | BLOCK >= len(units):
            raise ValueError("its trie leads out of itself")
        for child in children[node]:
            following = child ^ _offset(units[child])
            if units[child] >> 8 & 1:  # it has a leaf
                _check_leaf(units, following, texts)
            if following not in seen:
                seen.add(following)
                waiting.append(following)


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 1 << 9) >> 6)


def _check_leaf(units: Sequence[int], place: int, texts: bytes) -> None:
    """Raises ValueError where a leaf names no text."""
    if place >= len(units):
        raise ValueError("its trie leads out of itself")
    begin = units[place] & ((1 << 31) - 1)
    if begin >= len(texts) or texts[begin] & 0xC0 == 0x80:  # within a letter
        raise ValueError("its trie names a text that is not there")
