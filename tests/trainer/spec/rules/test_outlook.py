"""What the log says that a job will do."""

import dataclasses

import pytest

from tests.support.plans import job_plan
from trainer.spec.plan import AUTO, Source, Subset
from trainer.spec.rules.outlook import count_sample_rounds, count_saves, describe_length, describe_shapes, headline


@pytest.fixture
def plan(tmp_path):
    return job_plan(tmp_path, "flux", TRIGGER_WORD="ohwx", PARAMS_NETWORK_DIM="4")


def test_the_headline_has_the_base_rank_word_source_and_file(plan):
    (source,) = [subset.source for dataset in plan.data.datasets for subset in dataset.subsets]
    expected = f"A LoRA of {plan.model.base} at rank 4 with the trigger word 'ohwx', from {source.public}, "
    assert headline(plan) == f"{expected}to {plan.output.path}/{plan.output.name}.safetensors."


@pytest.mark.parametrize(
    ("total", "save_every", "sample_every", "saves", "samples"),
    [
        (12, 5, 5, "Saves: 3, every 5 steps", "4 rounds of 1 image, at step 0, every 5 steps, and at the end."),
        (10, 5, 10, "Saves: 2, every 5 steps", "2 rounds of 1 image, at step 0 and at the end."),
        (10, 10, 0, "Saves: at step 10, with", "Samples: none."),
        (10, 5, 5, "Saves: 2, every 5 steps", "3 rounds of 1 image, at step 0, every 5 steps, and at the end."),
        (10, 0, 4, "Saves: only the finished LoRA.", "4 rounds of 1 image, at step 0, every 4 steps, and at the end."),
    ],
)
def test_saves_and_samples_are_counted_as_the_session_does(plan, total, save_every, sample_every, saves, samples):
    train = dataclasses.replace(plan.train, max_steps=total)
    output = dataclasses.replace(plan.output, save_every=save_every, sample_every=sample_every)
    made = dataclasses.replace(plan, train=train, output=output, prompts=plan.prompts[:1])
    steps, rounds = describe_length(made, steps_per_epoch=5)
    assert steps.startswith(f"Steps: {total}, which is {total / 5:.3g} times all images")
    assert rounds.startswith(saves) and rounds.endswith(samples)


@pytest.mark.parametrize(
    ("steps", "per_epoch", "sizes", "line"),
    [
        (5, 5, (1,), "Steps: 5, which is 1 time all images; an epoch has 5 steps of up to 6 images."),
        (3, 1, (8, 1), "Steps: 3, which is 3 times all images; an epoch has 1 step of up to 6 or 48 images."),
        (1998, 2, (2, 2), "Steps: 1,998, which is 999 times all images; an epoch has 2 steps of up to 12 images."),
        (201, 2, (1,), "Steps: 201, which is 100 times all images; an epoch has 2 steps of up to 6 images."),
        (1250, 100, (1,), "Steps: 1,250, which is 12.5 times all images; an epoch has 100 steps of up to 6 images."),
        (2000, 2, (1,), "Steps: 2,000, which is 1,000 times all images; an epoch has 2 steps of up to 6 images."),
        (1999, 2, (1,), "Steps: 1,999, which is 1,000 times all images; an epoch has 2 steps of up to 6 images."),
        (None, 7, (1,), "Steps: 28, which is 4 times all images; an epoch has 7 steps of up to 6 images."),
        (2001, 2, (1,), "Steps: 2,001, which is 1,000 times all images; an epoch has 2 steps of up to 6 images."),
    ],
)
def test_a_step_has_the_images_of_all_pieces_and_gpus_the_smallest_batch_first(plan, steps, per_epoch, sizes, line):
    datasets = tuple(dataclasses.replace(plan.data.datasets[0], batch_size=size) for size in sizes)
    made = dataclasses.replace(
        plan,
        train=dataclasses.replace(plan.train, max_steps=steps, max_epochs=4, gradient_accumulation=3),
        engine=dataclasses.replace(plan.engine, num_gpus=2),
        data=dataclasses.replace(plan.data, datasets=datasets),
        output=dataclasses.replace(plan.output, save_every=0, sample_every=0),
    )
    assert describe_length(made, steps_per_epoch=per_epoch)[0] == line


@pytest.mark.parametrize(
    ("total", "every", "saves", "rounds"),
    [(1, 10, 1, 2), (9, 10, 1, 2), (10, 10, 1, 2), (11, 10, 2, 3), (20, 10, 2, 3), (21, 10, 3, 4), (21, 0, 0, 0)],
)
def test_the_last_step_is_a_save_and_a_round_of_samples_too(plan, total, every, saves, rounds):
    """Samples also at step 0."""
    made = dataclasses.replace(plan, output=dataclasses.replace(plan.output, save_every=every, sample_every=every))
    assert (count_saves(made, total), count_sample_rounds(made, total)) == (saves, rounds)
    assert count_sample_rounds(dataclasses.replace(made, prompts=()), total) == 0


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(AUTO, "all LoRA files and the newest two states are kept"), (2, "the newest 2 are"), (9, "the newest 4 are")],
)
def test_how_many_saves_are_kept_and_how_many_images_a_round_has(plan, keep, kept):
    output = dataclasses.replace(plan.output, save_every=5, sample_every=5, keep_checkpoints=keep)
    train = dataclasses.replace(plan.train, max_steps=20)
    made = dataclasses.replace(plan, output=output, train=train, prompts=(plan.prompts[0],) * 3)
    _, line = describe_length(made, steps_per_epoch=5)
    assert f"Saves: 4, every 5 steps, of which {kept}" in line and "5 rounds of 3 images, " in line


@pytest.mark.parametrize(
    ("count", "shown"),
    [(1, "from a0, to"), (3, "from a0, a1, a2, to"), (4, "from a0, a1, a2 and 1 more, to")],
)
def test_three_places_of_images_are_named_and_no_prompt(plan, count, shown):
    (dataset,) = plan.data.datasets
    subsets = [Subset(Source("hub", f"a{i}"), trigger_word="ohwx") for i in range(count)]
    subsets.append(Subset(Source("generated", "a person"), is_reg=True))
    data = dataclasses.replace(plan.data, datasets=(dataclasses.replace(dataset, subsets=tuple(subsets)),))
    assert shown in headline(dataclasses.replace(plan, data=data))


def test_shapes_of_equal_frequency_come_by_size():
    text = describe_shapes({(128, 64): 3, (64, 128): 3, (64, 64): 1, (96, 96): 3})
    assert text.endswith("64 × 128 (3), 96 × 96 (3), 128 × 64 (3), 64 × 64 (1).")
    assert "more" not in describe_shapes({(64, 8 * i): i for i in range(1, 9)})


def test_the_most_frequent_shapes_come_first():
    examples = {(64, 64 + 8 * i): i for i in range(1, 11)}
    text = describe_shapes(examples)
    assert text.count("×") == 8
    assert text.startswith("Shapes: 10, in pixels (with examples an epoch): 64 × 144 (10), 64 × 136 (9)")
    assert text.endswith(", 2 more.")
