"""From which number on a setting makes no sense with the steps of a job: the last that does, and the first that does
not.
"""

import dataclasses

import pytest

from trainer.spec.rules.sanity import Length, warnings

SAVE, SAMPLE = "PARAMS_SAVE_EVERY_N_STEPS", "PARAMS_SAMPLE_EVERY_N_STEPS"


@pytest.fixture
def plan(job_plan):
    return dataclasses.replace(job_plan("flux"), given=(), warnings=())


def with_values(plan, section, **values):
    return dataclasses.replace(plan, **{section: dataclasses.replace(getattr(plan, section), **values)})


@pytest.mark.parametrize(
    ("section", "key", "sensible", "senseless", "words"),
    [
        ("optim", "warmup_steps", 50, 51, "PARAMS_WARMUP_STEPS=51: the job has 100 steps"),
        ("output", "save_every", 100, 101, "PARAMS_SAVE_EVERY_N_STEPS=101: the job has 100 steps"),
        ("output", "sample_every", 100, 101, "PARAMS_SAMPLE_EVERY_N_STEPS=101: the job has 100 steps"),
        ("output", "validate_every", 100, 101, "PARAMS_VALIDATE_EVERY_N_STEPS=101: the job has 100 steps"),
        ("optim", "num_cycles", 10, 11, "restarts every 9.09"),
        ("train", "ema_decay", 0.98, 0.995, "averages over 200 steps"),
    ],
)
def test_a_setting_is_warned_of_from_the_first_senseless_value_on(plan, section, key, sensible, senseless, words):
    plan = dataclasses.replace(plan, given=(SAVE, SAMPLE))
    plan = with_values(plan, "output", save_every=10, sample_every=10)
    length = Length(100)
    assert warnings(with_values(plan, section, **{key: sensible}), length) == []
    odd = with_values(plan, section, **{key: senseless})
    (sentence,) = warnings(odd, length)
    assert words in sentence
    assert warnings(dataclasses.replace(odd, warnings=(sentence,)), length) == []  # the plan has said it


def test_an_average_over_all_steps_of_the_job_makes_sense(plan):
    over_128 = with_values(plan, "train", ema_decay=1 - 1 / 128)
    assert warnings(over_128, Length(128)) == []
    (sentence,) = warnings(over_128, Length(127))
    assert "averages over 128 steps, and the job has 127, in which the decay rises to 0.934." in sentence


def test_intervals_that_nobody_asked_for_are_not_warned_of(plan):
    assert warnings(with_values(plan, "output", save_every=101, sample_every=101), Length(100)) == []


def test_very_many_steps_name_the_variable_that_asked_for_them(plan):
    by_steps = with_values(plan, "train", max_steps=50_001)
    assert warnings(by_steps, Length(50_000)) == []
    assert warnings(by_steps, Length(50_001))[0].startswith("PARAMS_MAX_STEPS=50001: the job has 50,001 steps.")
    by_epochs = with_values(plan, "train", max_steps=None, max_epochs=9)
    assert warnings(by_epochs, Length(50_001))[0].startswith("PARAMS_MAX_EPOCHS=9: ")


def test_a_step_larger_than_the_dataset_counts_batches_pieces_and_gpus(plan):
    (dataset,) = plan.data.datasets
    plan = with_values(plan, "data", datasets=(dataclasses.replace(dataset, batch_size=2),))
    plan = with_values(with_values(plan, "train", gradient_accumulation=3), "engine", num_gpus=4)
    assert warnings(plan, Length(100, images=24)) == [] == warnings(plan, Length(100))
    (sentence,) = warnings(plan, Length(100, images=23))
    assert sentence.startswith("A step may have 24 images (2 images a batch, PARAMS_GRADIENT_ACCUMULATION=3)")


@pytest.mark.parametrize(("batch", "pieces", "lines"), [(1, 1, 0), (2, 1, 1), (1, 2, 1)])
def test_one_image_for_each_gpu_is_the_smallest_step_that_there_is(plan, batch, pieces, lines):
    (dataset,) = plan.data.datasets
    plan = with_values(plan, "data", datasets=(dataclasses.replace(dataset, batch_size=batch),))
    plan = with_values(with_values(plan, "train", gradient_accumulation=pieces), "engine", num_gpus=4)
    assert len(warnings(plan, Length(100, images=3))) == lines
    assert len(warnings(with_values(plan, "engine", num_gpus=1), Length(100, images=0))) == lines


def test_a_weight_of_regularisation_images_needs_some(plan):
    given = dataclasses.replace(plan, given=("PARAMS_PRIOR_LOSS_WEIGHT",))
    assert warnings(given, Length(100)) == [] == warnings(plan, Length(100, images=9))
    assert "has no effect" in warnings(given, Length(100, images=9))[0]


def test_the_largest_batch_and_the_most_repeats_count_and_one_set_of_regularisation_images_is_some(plan):
    (dataset,) = plan.data.datasets
    (subset,) = dataset.subsets
    subsets = (dataclasses.replace(subset, num_repeats=2), dataclasses.replace(subset, is_reg=True))
    datasets = (dataclasses.replace(dataset, batch_size=8, subsets=subsets), dataclasses.replace(dataset, batch_size=1))
    plan = with_values(plan, "data", datasets=datasets)
    assert warnings(plan, Length(100, images=7))[0].startswith("A step may have 8 images (8 images a batch")
    assert warnings(plan, Length(100, steps_per_epoch=101))[0].startswith("num_repeats=2 ")
    assert warnings(dataclasses.replace(plan, given=("PARAMS_PRIOR_LOSS_WEIGHT",)), Length(100, images=9)) == []


@pytest.mark.parametrize(("cycles", "steps", "lines"), [(1, 9, 0), (2, 20, 0), (2, 19, 1)])
def test_a_single_cycle_may_be_short(plan, cycles, steps, lines):
    short = with_values(with_values(plan, "optim", num_cycles=cycles, warmup_steps=0), "output", validate_every=0)
    assert len(warnings(with_values(short, "train", ema_decay=0.0), Length(steps))) == lines


def test_as_many_pieces_as_images_a_batch_are_a_step_of_several(plan):
    (dataset,) = plan.data.datasets
    plan = with_values(plan, "data", datasets=(dataclasses.replace(dataset, batch_size=2),))
    assert len(warnings(with_values(plan, "train", gradient_accumulation=2), Length(100, images=3))) == 1


def test_repeats_that_make_an_epoch_longer_than_the_job_are_warned_of(plan):
    (dataset,) = plan.data.datasets
    (subset,) = dataset.subsets
    repeated = dataclasses.replace(dataset, subsets=(dataclasses.replace(subset, num_repeats=2),))
    twice = with_values(plan, "data", datasets=(repeated,))
    assert warnings(twice, Length(100, steps_per_epoch=100)) == [] == warnings(twice, Length(100))
    assert warnings(plan, Length(100, steps_per_epoch=101)) == []  # once each: the epoch is only long
    (sentence,) = warnings(twice, Length(100, steps_per_epoch=101))
    assert sentence.startswith("num_repeats=2 (") and "an epoch has 101 steps" in sentence
