"""Which values the rules for configs of models allow: at each end of a range, beyond it, and in another type."""

import pytest

from trainer.spec.rules.config_rules import VERSION, each, either, number, only, optional, text, whole

RULES = [
    (lambda: whole(2, 5), "a whole number, 2 to 5", [2, 3, 5], [1, 6, 3.0, True, "3", None, [3]]),
    (lambda: number(0.5, 2), "a number, 0.5 to 2", [0.5, 1, 2, 2.0], [0.4, 2.1, True, "1", None, [1], float("nan")]),
    (lambda: only(1, "a"), "1 or 'a'", [1, "a"], [True, 1.0, "b", None, [1], {}]),
    (lambda: only(None, True, False), "null or true or false", [None, True, False], [0, 1, "null", []]),
    (
        lambda: each(whole(0, 9), 1, 3),
        "a list of 1 to 3 values, each a whole number, 0 to 9",
        [[0], [1, 9, 2]],
        [[], [1, 2, 3, 4], [10], [1, 10], 1, None, "1"],
    ),
    (lambda: each(whole(0, 9), 2, 2), "a list of 2 values, each a whole number, 0 to 9", [[1, 2]], [[1], [1, 2, 3]]),
    (lambda: either(whole(1, 2), only("a")), "a whole number, 1 to 2, or 'a'", [1, 2, "a"], [3, "b", None]),
    (lambda: optional(whole(1, 2)), "null, or a whole number, 1 to 2", [None, 1, 2], [0, 3, False]),
    (lambda: text(3), "a text of at most 3 characters", ["", "abc"], ["abcd", 1, None, ["a"]]),
    (
        lambda: VERSION,
        "a version such as 0.30.0",
        ["1", "0.30.0", "0.30.0.dev0", "1.2rc1"],
        ["", "a", "1.", "12345", 1, None],
    ),
]


@pytest.mark.parametrize(("made", "words", "good", "bad"), RULES)
def test_a_rule_allows_what_its_words_say(made, words, good, bad):
    rule = made()
    assert rule.text == words
    assert [value for value in good if not rule.fits(value)] == []
    assert [value for value in bad if rule.fits(value)] == []
