"""Names in messages stay on one line, and the first of many stand for all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainer.spec.values import LONGEST_NAME, many, nearest, printable, similar, some, suggestion


def test_the_first_of_many_names_are_shown():
    names = [f"{number}.png" for number in range(7)]
    assert some(names[:2]) == "0.png, 1.png"
    assert some(names) == "0.png, 1.png, 2.png, 3.png, 4.png and 2 more"
    assert some(names, most=7) == ", ".join(names)
    assert some([]) == ""


def test_one_has_no_plural():
    assert [many(count, "row") for count in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]


@given(st.text(max_size=400))
def test_a_name_is_one_line_of_limited_length(name):
    shown = printable(name)
    assert len(shown.splitlines()) <= 1 and len(shown) <= LONGEST_NAME + 1
    shown.encode()


def test_similar_names_ignore_case_and_the_nearest_comes_first():
    known = ["Photos", "photo", "model", "phones"]
    assert similar("PHOTOS", known, most=2) == ["Photos", "photo"]
    assert nearest("modell", known) == "model" and nearest("xyz", known) is None
    assert suggestion("xyz", known) == "known are Photos, model, phones, photo."
