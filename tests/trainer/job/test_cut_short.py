"""A start that was killed could not say so; the next one does."""

import pytest

from trainer.job.run import cut_short


@pytest.mark.parametrize(
    "status", [{}, {"phase": "done", "exit_code": 0}, {"phase": "failed", "exit_code": 75}, {"phase": 3}]
)
def test_an_end_that_is_known_needs_no_words(status):
    assert cut_short(status) == ""


def test_an_end_without_a_word_was_probably_a_kill_for_memory():
    said = cut_short({"phase": "training", "step": 40})
    assert "in the phase 'training', after step 40" in said and "memory ran out" in said
    assert "PARAMS_BATCH_SIZE" in said and "after step" not in cut_short({"phase": "encoding"})
