"""How long to train and how often to save where the user does not say so."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.spec.plan import AUTO
from trainer.spec.rules.automatic import (
    LEAST_STEPS,
    automatic_steps,
    images_per_step,
    intervals,
    reason,
    round_interval,
    with_lengths,
)


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


def test_the_reason_has_the_images_how_often_each_is_seen_and_the_images_a_step():
    assert reason(20, 4) == "each of 20 images, with repeats, is seen 100 times, 4 a step"


@pytest.mark.parametrize(("images", "per_step", "seen"), [(400, 1, 10), (1, 1, 1000), (0, 1, 1000), (2, 1, 500)])
def test_the_reason_says_how_often_each_image_is_seen(images, per_step, seen):
    assert f"each of {images} images, with repeats, is seen {seen} times, {per_step} a step" == reason(images, per_step)


@pytest.fixture
def plan(job_plan):
    """Two datasets, of which the larger batch size counts: 3 images, 2 pieces, 5 GPUs."""
    made = job_plan("flux")
    (dataset,) = made.data.datasets
    datasets = tuple(dataclasses.replace(dataset, batch_size=size) for size in (3, 1))
    return dataclasses.replace(
        made,
        data=dataclasses.replace(made.data, datasets=datasets),
        train=dataclasses.replace(made.train, gradient_accumulation=2, max_steps=None, max_epochs=AUTO),
        engine=dataclasses.replace(made.engine, num_gpus=5),
        output=dataclasses.replace(made.output, save_every=AUTO, sample_every=AUTO),
    )


def test_what_is_auto_in_a_plan_becomes_numbers_with_a_line_for_the_log(plan):
    assert images_per_step(plan) == 30
    found, lines = with_lengths(plan, images_per_epoch=900, steps_per_epoch=30)
    assert (found.train.max_steps, found.output.save_every, found.output.sample_every) == (300, 30, 30)
    (line,) = lines
    assert line.startswith("PARAMS_MAX_EPOCHS: auto, 300 steps (each of 900 images") and "30 a step" in line
    few, _ = with_lengths(plan, images_per_epoch=9000, steps_per_epoch=4500)
    assert few.train.max_steps == 3000  # ten visits of 9,000 images, 30 a step
    found, (line,) = with_lengths(plan, images_per_epoch=900, steps_per_epoch=30, chosen=1000)
    assert (found.train.max_steps, found.output.save_every) == (1000, 100) and "as this run chose" in line


def test_numbers_in_a_plan_are_kept_and_epochs_count_as_steps(plan):
    train = dataclasses.replace(plan.train, max_epochs=20)
    output = dataclasses.replace(plan.output, save_every=70)
    asked = dataclasses.replace(plan, train=train, output=output)
    found, lines = with_lengths(asked, images_per_epoch=900, steps_per_epoch=50)
    assert lines == [] and found.train == train
    assert (found.output.save_every, found.output.sample_every) == (70, 70)
    automatic, _ = with_lengths(dataclasses.replace(plan, train=train), images_per_epoch=900, steps_per_epoch=50)
    assert automatic.output.save_every == automatic.output.sample_every == 100  # of 1,000
    counted = dataclasses.replace(plan, train=dataclasses.replace(plan.train, max_steps=200))
    found, lines = with_lengths(counted, images_per_epoch=900, steps_per_epoch=50)
    assert lines == [] and found.train.max_steps == 200 and found.output.save_every == 20
