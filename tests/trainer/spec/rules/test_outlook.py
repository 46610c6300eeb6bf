"""What the log says that a job will do."""

import dataclasses

import pytest

from tests.support.plans import job_plan
from trainer.spec.rules.outlook import describe_length, describe_shapes, headline


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


def test_the_most_frequent_shapes_come_first():
    examples = {(64, 64 + 8 * i): i for i in range(1, 11)}
    text = describe_shapes(examples)
    assert text.startswith("Shapes: 10, in pixels (with examples an epoch): 64 × 144 (10), 64 × 136 (9)")
    assert text.endswith(", 2 more.")
