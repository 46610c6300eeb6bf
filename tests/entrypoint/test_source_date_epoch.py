"""SOURCE_DATE_EPOCH: a second that a date in a header can hold, or an error that names it."""

import pytest

from entrypoint.job import now
from trainer.spec.errors import SettingsError


@pytest.mark.parametrize("text", ["0", "1700000000", " 1700000000 ", "253402300799"])
def test_a_second_is_the_time(text):
    assert now({"SOURCE_DATE_EPOCH": text}).timestamp() == int(text)


@pytest.mark.parametrize(
    "text", ["-1", "1e9", "1.5", "now", "٣", "1_000", "253402300800", "9" * 18, "9" * 5000, "0x10", "\x1b[2J", "+-1"]
)
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(SettingsError, match=r"SOURCE_DATE_EPOCH=.* is not a time\. Allowed: a whole number") as caught:
        now({"SOURCE_DATE_EPOCH": text})
    assert len(str(caught.value)) < 300 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("environ", [{}, {"SOURCE_DATE_EPOCH": ""}, {"SOURCE_DATE_EPOCH": "  "}])
def test_without_one_it_is_the_clock(environ):
    assert now(environ).year >= 2024
