"""How long to train and how often to save where the user does not say so."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.spec.rules.automatic import LEAST_STEPS, automatic_steps, intervals, reason, round_interval


@pytest.mark.parametrize(
    ("images", "per_step", "steps"),
    [
        (1, 1, 1000),
        (10, 1, 1000),
        (20, 1, 2000),
        (37, 1, 3700),
        (100, 1, 4000),
        (5000, 1, 50_000),
        (20, 4, 500),
        (20, 64, LEAST_STEPS),
        (13, 3, 450),
    ],
)
def test_steps_follow_the_number_of_images_and_of_images_a_step(images, per_step, steps):
    assert automatic_steps(images, per_step) == steps
    assert str(images) in reason(images, per_step)


@given(st.integers(1, 10**5), st.integers(1, 256))
def test_more_images_are_never_fewer_steps_and_larger_batches_never_more(images, per_step):
    steps = automatic_steps(images, per_step)
    assert steps >= LEAST_STEPS
    assert automatic_steps(images + 1, per_step) >= steps >= automatic_steps(images, per_step + 1)
    assert steps * per_step >= 10 * images


@pytest.mark.parametrize(
    ("total", "every"),
    [(1000, 100), (2000, 200), (4000, 400), (1500, 150), (3840, 400), (450, 45), (100, 10), (12, 10), (1, 10)],
)
def test_a_run_has_about_ten_rounds_at_round_numbers(total, every):
    assert round_interval(total) == every


@given(st.integers(100, 10**6))
def test_there_are_never_many_more_or_fewer_rounds(total):
    assert 7 <= total / round_interval(total) <= 13


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ((None, None), (100, 100)),
        ((None, 250), (250, 250)),
        ((30, None), (30, 90)),
        ((None, 0), (100, 0)),
        ((0, None), (0, 100)),
        ((70, 30), (70, 30)),
    ],
)
def test_samples_meet_saves_unless_both_are_set(asked, found):
    save, sample = asked
    assert intervals(1000, save_every=save, sample_every=sample) == found
