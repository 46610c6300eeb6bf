"""Whatever a message quotes, a terminal shows it and does not obey it."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.spec.log_lines import LONGEST_LINE, RAW, LineFormatter, safe_lines


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb", "a\\rb"),
        ("\ud800", "\\ud800"),
        ("\u202egnp", "\\u202egnp"),
        ("a\u2028b", "a\\u2028b"),
        ("a\u200bb\u200e\ufeff\xad", "a\\u200bb\\u200e\\ufeff\\xad"),
        ("\x9b31m\x7f\U000e0041", "\\x9b31m\\x7f\\U000e0041"),
        ("a\n\tb é 猫", "a\n\tb é 猫"),
    ],
)
def test_what_would_act_on_a_terminal_is_escaped(raw, shown):
    assert safe_lines(raw) == shown


def test_a_very_long_line_loses_its_middle_and_the_others_stay():
    first, second, third = safe_lines(f"begin{'x' * 160_000}end\nshort\n{'y' * LONGEST_LINE}").split("\n")
    assert len(first) <= LONGEST_LINE and first.startswith("beginx") and first.endswith("xend") and " … " in first
    assert (second, third) == ("short", "y" * LONGEST_LINE)


@given(st.text())
def test_any_text_becomes_lines_that_utf_8_holds(text):
    lines = safe_lines(text)
    assert not RAW.search(lines)
    assert lines.encode().decode() == lines and lines.count("\n") == text.count("\n")


def test_the_formatter_escapes_the_arguments_of_a_message():
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "%s is no name", ("\x1b[2J",), None)
    assert LineFormatter("%(levelname)s %(message)s").format(record) == "ERROR \\x1b[2J is no name"


@pytest.mark.parametrize("start", ["02:14:03 INFO Done", "2026-11-30 02:14:03,123 ERROR x"])
def test_no_line_of_a_message_passes_for_another_message(start):
    record = logging.LogRecord("a", logging.INFO, "", 0, "image %s is skipped", (f"a\n{start}",), None)
    assert LineFormatter("02:14:00 INFO %(message)s").format(record).split("\n")[1] == f"  {start} is skipped"
