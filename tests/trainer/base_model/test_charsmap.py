"""Tables of characters: those that the check lets through never end the library that searches them."""

from __future__ import annotations

import base64
import random
import struct

import pytest
from tokenizers import normalizers

from trainer.base_model import charsmap

LETTERS = "a１é猫\u0301ﬁ"


def table(units: list[int], texts: bytes) -> str:
    return base64.b64encode(struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts).decode()


def replacing(letter: str, replacement: str) -> str:
    """A table that replaces one letter: a path of its bytes through blocks of their own."""
    path = letter.encode()
    units = [0] * (256 * (len(path) + 2))
    units[0] = 256 << 10  # the root's children are in the second block
    node = 256
    for number, byte in enumerate(path):
        child = node ^ byte
        is_last = number == len(path) - 1
        following = 256 * (number + 2)
        units[child] = byte | (child ^ following) << 10 | is_last << 8
        node = following
    units[node] = 1 << 31 | 1  # a leaf: the text that begins at byte 1
    return table(units, b"\0" + replacement.encode() + b"\0")


@pytest.mark.parametrize(("letter", "replacement"), [("a", "b"), ("１", "1"), ("é", "e"), ("ﬁ", "fi")])
def test_a_sound_table_is_read_as_the_library_reads_it(letter: str, replacement: str) -> None:
    normalizer = normalizers.Precompiled(charsmap.decode(replacing(letter, replacement)))
    assert normalizer.normalize_str(f"x{letter}y") == f"x{replacement}y"


@pytest.mark.parametrize(
    ("encoded", "words"),
    [
        (None, "no text"),
        ("ä", "base64"),
        ("", "length"),
        (table([], b""), "length"),
        (base64.b64encode(struct.pack("<I", 400)).decode(), "length"),
        (table([0] * 4, b""), "leads out"),
        (table([10**6 << 10] + [0] * 255, b""), "leads out"),
        (table([0] * 256, b"\xff"), "UTF-8"),
    ],
)
def test_a_table_that_leads_out_of_itself_is_refused(encoded: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        charsmap.decode(encoded)


def test_what_is_let_through_never_ends_the_library() -> None:
    rng = random.Random(0)
    passed = 0
    for _ in range(500):
        data = bytearray(base64.b64decode(replacing(rng.choice(LETTERS), rng.choice(LETTERS))))
        for _ in range(rng.randint(0, 4)):
            at = rng.choice((rng.randrange(4, len(data)), rng.randrange(4, 8), rng.randrange(len(data) - 8, len(data))))
            data[at] = rng.randrange(256)
        try:
            known = charsmap.decode(base64.b64encode(data).decode())
        except ValueError:
            continue
        passed += 1
        for letter in LETTERS:
            normalizers.Precompiled(known).normalize_str(letter)
    assert 50 < passed < 500
