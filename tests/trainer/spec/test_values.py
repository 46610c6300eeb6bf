"""Single values that users write: what is a number, which range holds it, and how it is shown."""

import math

import pytest

from trainer.spec.errors import SettingsError
from trainer.spec.values import (
    Key,
    Problems,
    as_integer,
    as_number,
    inside,
    is_text,
    one_line,
    printable,
    shorten,
    show,
    similar,
    span,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0), ("12", 12), ("+3", 3), ("-4", -4), ("007", 7), ("9" * 18, 10**18 - 1), ("9" * 19, None),
        ("", None), ("1.0", None), ("1e3", None), ("1_000", None), ("\uff11", None), (" 1", None),
        ("1\n", None), ("--1", None),
    ],
)  # fmt: skip
def test_whole_numbers(text, number):
    assert as_integer(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12.0), (".5", 0.5), ("5.", 5.0), ("1e-4", 1e-4), ("1E+4", 1e4), ("-2.5", -2.5), ("+.5e1", 5.0),
        ("0", 0.0),         ("1e308", 1e308), ("1e309", None), ("-1e309", None), ("1e10000", None), ("1e00001", None),
        (".", None), ("", None), ("nan", None), ("inf", None), ("infinity", None), ("1_0", None), ("1e", None),
        ("0x1", None),         ("\u0661", None), ("1.2.3", None), ("1 ", None),
    ],
)  # fmt: skip
def test_decimal_numbers(text, number):
    found = as_number(text)
    assert found == number and (found is None or isinstance(found, float))


RANGES = [
    ((0, 1, None), "0 to 1", [0, 0.5, 1], [-0.1, 1.1]),
    ((1, None, None), "1 or more", [1, 1e9], [0.9, -1]),
    ((None, 5, None), "up to 5", [5, -9], [5.1]),
    ((None, None, None), "", [0, -1e9, 1e9], []),
    ((None, 10, 0), "above 0, up to 10", [1e-9, 10], [0, -1, 10.1]),
    ((None, None, 0), "above 0", [1e-9, 1e9], [0, -1]),
    ((64, 123456789012, None), "64 to 123456789012", [64, 123456789012], [63]),
]


@pytest.mark.parametrize(("limits", "words", "good", "bad"), RANGES)
def test_a_range_in_words_is_the_range_that_is_checked(limits, words, good, bad):
    low, high, above = limits
    assert span(low, high, above=above) == words
    assert all(inside(number, low, high, above=above) for number in good)
    assert not any(inside(number, low, high, above=above) for number in bad)


KEYS = [
    (Key("integer", 1, 8), "a whole number, 1 to 8", [(1, 1), (8, 8)], [0, 9, True, 1.0, "1", None, [1]]),
    (Key("number", 0, 1), "a number, 0 to 1", [(0, 0.0), (1, 1.0), (0.5, 0.5)], [-0.1, 1.1, True, "1", None, math.nan]),
    (Key("boolean"), "true or false", [(True, True), (False, False)], [0, 1, "true", None]),
    (Key("text"), "a text in quotes", [("a", "a"), ("", "")], [1, None, "\0", "\ud800", ["a"]]),
    (Key("text", choices=("a", "b")), "one of a, b", [("a", "a"), ("b", "b")], ["c", "", 1]),
    (
        Key("size", 64, 128),
        "a whole number or [width, height], 64 to 128 each",
        [(64, (64, 64)), ([64, 128], (64, 128)), ([128, 64], (128, 64))],
        [63, 129, [64], [64, 63], [129, 64], [64, 64, 64], True, [True, 64], 64.0, "64", []],
    ),
]


@pytest.mark.parametrize(("key", "words", "good", "bad"), KEYS)
def test_a_key_takes_its_type_and_its_range_alone(key, words, good, bad):
    assert str(key) == words
    for value, expected in good:
        found = key.read(value)
        assert found == expected and type(found) is type(expected)
    for value in bad:
        with pytest.raises(ValueError) as problem:
            key.read(value)
        assert str(problem.value) == f"{show(value)} is not {words}"


def test_a_number_that_is_whole_becomes_a_float_for_a_key_of_numbers():
    assert isinstance(Key("number", 0, 9).read(3), float) and isinstance(Key("integer", 0, 9).read(3), int)


def test_all_problems_are_told_at_once():
    problems = Problems()
    problems.raise_if_any("Settings")
    problems.add("a is wrong")
    problems.add("b is wrong")
    with pytest.raises(SettingsError) as raised:
        problems.raise_if_any("Settings")
    assert str(raised.value) == "Settings:\n  - a is wrong\n  - b is wrong"
    assert Problems().lines == []


def test_of_a_file_with_thousands_of_problems_the_first_are_told():
    problems = Problems([f"line {number}" for number in range(1, 4001)])
    with pytest.raises(SettingsError) as raised:
        problems.raise_if_any("JOBS")
    lines = str(raised.value).split("\n")
    assert (lines[0], lines[1], lines[100], lines[101]) == ("JOBS:", "  - line 1", "  - line 100", "  - and 3900 more")
    assert len(lines) == 102


def test_a_value_is_shown_in_eighty_characters_and_without_a_token():
    assert shorten("a" * 80) == "a" * 80 and shorten("a" * 81) == "a" * 79 + "…"
    assert show("x" * 78) == repr("x" * 78) and len(show("x" * 200)) == 80 and show("x" * 200).endswith("…")
    assert "hf_abcdef" not in show("hf_abcdefGHI") and "hf_***" in show("a hf_abcdefGHI b")
    assert show("hf_abcde") == "'hf_abcde'"  # too short for a token


def test_what_a_file_can_hold():
    assert is_text("é") and is_text("") and not is_text("a\0") and not is_text("\udc80")


def test_what_breaks_a_line_or_turns_it_is_escaped():
    for letter in ("\n", "\r", "\x1b", "\x85", "\u2028", "\u2029", "\ud800", "\u202e", "\u2066", "\x00"):
        shown = one_line(f"a{letter}b")
        assert shown == f"a{letter.encode('unicode_escape', 'surrogatepass').decode()}b" and letter not in shown
    for plain in ("é", "日本", "a b", "\u00a0", "😀"):
        assert one_line(plain) == plain


def test_a_long_name_loses_its_middle():
    name = "a" * 100 + "b" * 100
    assert printable("n" * 160) == "n" * 160
    shown = printable(name)
    assert shown.startswith("a" * 53 + "…") and shown.endswith("b" * 100) and len(shown) <= 162


def test_very_long_names_are_compared_by_their_beginning_and_strangers_are_not_suggested():
    assert similar("PARAMS_" + "x" * 10_000, ["PARAMS_" + "x" * 193], most=1) == ["PARAMS_" + "x" * 193]
    assert similar("abcd", ["abce", "abzz", "zzzz"], most=3) == ["abce"]
    assert similar("abcde", ["abcxx", "abxxx"], most=3) == ["abcxx"]  # six tenths alike, and not less
    assert similar("a", [], most=1) == []
