"""How long a job takes and what it costs, in words and numbers that can be added up by hand."""

import dataclasses

import pytest

from tests.support.plans import job_plan
from trainer.spec.plan import QuotePlan
from trainer.spec.rules import outlook, quote

KNOWN = QuotePlan(card="RTX 4090", batch_s=(2.0,), round_s=50.0, start_s=33.0, image_s=0.5, price_per_hour=0.72)
EXAMPLES = {(0, (128, 128)): 6, (0, (96, 160)): 2}


@pytest.fixture
def plan(tmp_path):
    """400 steps of one image, with samples each 100."""
    made = job_plan(tmp_path, "flux", PARAMS_MAX_STEPS="400", PARAMS_SAMPLE_EVERY_N_STEPS="100")
    return dataclasses.replace(made, quote=KNOWN)


def of(plan, *, first=0, total=400, examples=EXAMPLES):
    return quote.predict(plan, first=first, total=total, images=8, examples=examples)


def test_steps_samples_loading_and_encoding_are_added_up(plan):
    predicted = of(plan)
    assert predicted == quote.Quote(step=2.0, start=33.0 + 8 * 0.5, steps=800.0, samples=5 * 50.0)
    assert predicted.total == 1087.0
    (line,) = quote.describe(plan, predicted, first=0, total=400)
    assert line == (
        "Quote, predicted for RTX 4090: 400 steps at 2.00 s take 13 min. With loading, encoding and samples that is "
        "18 min and costs 0.22 at 0.72 an hour; downloads come on top."
    )


def test_captions_by_a_model_are_part_of_it_or_said_to_be_none(plan):
    known = dataclasses.replace(plan, quote=dataclasses.replace(KNOWN, caption_s=1.5, captioner_s=9.0))
    asked = {"first": 0, "total": 400, "to_caption": 6}
    predicted = quote.predict(known, **asked, images=8, examples=EXAMPLES)
    assert predicted.captions == 9.0 + 6 * 1.5 and predicted.total == 1087.0 + 18.0
    assert "With captions, loading, encoding and samples that is 18 min" in quote.describe(known, predicted, **asked)[0]
    assert of(known).captions == 0.0  # each image has one
    unknown = quote.predict(plan, **asked, images=8, examples=EXAMPLES)
    (line,) = quote.describe(plan, unknown, **asked)
    assert unknown.captions == 0.0 and line.endswith("; captions and downloads come on top.")


def test_a_limit_meets_captions_first(plan):
    """Of 1,000 s, captions take 500 and loading 37: 463 are left for steps and samples that take 1,050."""
    limit = {"limit_hours": 1000 / 3600, "limit": "MAX_RUNTIME=0.28"}
    known = dataclasses.replace(KNOWN, caption_s=50.0, captioner_s=0.0, **limit)
    limited = dataclasses.replace(plan, quote=known)
    predicted = quote.predict(limited, first=0, total=400, images=8, examples=EXAMPLES, to_caption=10)
    assert "at about step 176 of 400" in quote.limit_warning(limited, predicted, first=0, total=400)


def test_a_resumed_run_pays_for_what_is_left(plan):
    assert of(plan, first=250).steps == 300.0
    assert of(plan, first=250).samples == 2 * 50.0  # at 300, and at the end


def test_accumulation_takes_as_many_batches_a_step(plan):
    train = dataclasses.replace(plan.train, gradient_accumulation=4)
    assert of(dataclasses.replace(plan, train=train)).step == 8.0


def test_datasets_count_by_their_batches(plan):
    dataset = plan.data.datasets[0]
    twice = dataclasses.replace(plan.data, datasets=(dataset, dataclasses.replace(dataset, batch_size=2)))
    known = dataclasses.replace(KNOWN, batch_s=(2.0, 5.0))
    both = dataclasses.replace(plan, data=twice, quote=known)
    # 6 batches of one image, and 2 of two
    assert of(both, examples={(0, (128, 128)): 6, (1, (128, 128)): 4}).step == (6 * 2.0 + 2 * 5.0) / 8


@pytest.mark.parametrize("every", [0, 1, 7, 100, 400, 500])
@pytest.mark.parametrize("total", [1, 7, 399, 400])
def test_rounds_that_are_left_are_those_that_a_job_draws(plan, every, total):
    plan = dataclasses.replace(plan, output=dataclasses.replace(plan.output, sample_every=every))
    drawn = [0]
    for step in range(1, total + 1):
        if every and (step % every == 0 or step == total):
            drawn.append(step)
    if not every:
        drawn = []
    assert quote.rounds_left(plan, -1, total) == len(drawn) == outlook.count_sample_rounds(plan, total)
    for step in range(total):
        assert quote.rounds_left(plan, step, total) == sum(later > step for later in drawn)
        assert quote.next_round(plan, step, total) == min((later for later in drawn if later > step), default=None)


@pytest.mark.parametrize(("processes", "last"), [(1, 3), (2, 3), (3, 2), (5, 3), (8, 2), (16, 1)])
def test_the_last_round_has_all_strengths_which_processes_draw_side_by_side(plan, processes, last):
    """Four prompts at strength 1, 0.5 and 0: twelve images, each process every N-th."""
    output = dataclasses.replace(plan.output, sample_strengths=(0.5, 0.0))
    engine = dataclasses.replace(plan.engine, num_gpus=processes)
    plan = dataclasses.replace(plan, output=output, engine=engine, prompts=plan.prompts[:1] * 4)
    assert quote.rounds_left(plan, 399, 400) == pytest.approx(last)
    assert quote.rounds_left(plan, 299, 400) == pytest.approx(last + 1)


def test_what_is_not_known_is_said_to_come(plan):
    unknown = dataclasses.replace(plan, quote=QuotePlan())
    assert of(unknown) is None
    (line,) = quote.describe(unknown, None, first=0, total=400)
    assert line == "Quote: how long 400 steps take here is known after the first 20."
    assert quote.describe(unknown, None, first=395, total=400) == [
        "Quote: how long 5 steps take here is known after the first 5."
    ]


@pytest.mark.parametrize("hours", [None, 0.31])  # all of it takes 0.302 hours
def test_a_limit_that_is_far_enough_says_nothing(plan, hours):
    plan = dataclasses.replace(plan, quote=dataclasses.replace(KNOWN, limit_hours=hours, limit="MAX_RUNTIME=0.31"))
    assert quote.limit_warning(plan, of(plan), first=0, total=400) is None


def test_a_limit_that_ends_the_job_first_says_where(plan):
    plan = dataclasses.replace(plan, quote=dataclasses.replace(KNOWN, limit_hours=0.1, limit="MAX_RUNTIME=0.1"))
    text = quote.limit_warning(plan, of(plan), first=0, total=400)
    assert text.startswith("MAX_RUNTIME=0.1 ends this job after 6 min, at about step 123 of 400: all of it takes about")
    assert "18 min and costs 0.22 at 0.72 an hour" in text
    later = quote.limit_warning(plan, of(plan), first=0, total=400, spent=200.0)
    assert "at about step 46 of 400" in later


def test_a_measurement_takes_the_place_of_the_prediction(plan):
    left = quote.Quote(step=1.5, start=0.0, steps=570.0, samples=100.0)
    text = quote.measured(plan, left, spent=95.0)
    assert text == (
        "Quote, measured: 1.50 s a step. About 11 min are left; this start takes 13 min in all and costs 0.15 at 0.72 "
        "an hour."
    )
    free = dataclasses.replace(plan, quote=QuotePlan())
    assert quote.measured(free, left, spent=95.0).endswith("this start takes 13 min in all.")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.4, "4 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (86400, "24.0 h")],
)
def test_durations_read_well(seconds, text):
    assert quote.duration(seconds) == text
