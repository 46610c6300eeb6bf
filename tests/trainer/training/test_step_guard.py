"""The guard against its rules, said again over the whole history, and against torch's own GradScaler; what a skipped
step does to a run; and which cause is named.
"""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.batches import MicroBatch
from trainer.training import step_guard
from trainer.training.loop import train
from trainer.training.objective import NoisedBatch
from trainer.training.step_guard import LOSS_SCALE, StepGuard, likely_cause

LOSSES = st.one_of(
    st.floats(0, 4), st.floats(0, 4), st.sampled_from([0.0, 1.0, 10.0, 10.001, 39.0, 41.0, 200.0, math.inf, math.nan])
)
NORMS = st.sampled_from([0.5] * 8 + [math.inf, math.nan])


def verdicts(history, *, spike, scale, growth):
    """For each (loss, norm): "overflow", "bad", "spike" or "good", and the scale after it. The rule in plain words:

    a finite loss with a gradient that is not, under a scale above 1, is an overflow, and halves the scale; after
    `growth` steps in a row without one, the scale is doubled. Other numbers that are not finite are bad. A loss above
    `spike` times the largest of the last 64 good ones is a spike, once there are 16.
    """
    good, since, out = [], 0, []
    for loss, norm in history:
        if scale > 1 and math.isfinite(loss) and not math.isfinite(norm):
            scale, since = scale / 2, 0
            out.append(("overflow", scale))
            continue
        since += 1
        if scale > 1 and since == growth:
            scale, since = scale * 2, 0
        window = good[-64:]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            out.append(("bad", scale))
        elif spike > 0 and len(good) >= 16 and max(window) > 0 and loss > spike * max(window):
            out.append(("spike", scale))
        else:
            good.append(loss)
            out.append(("good", scale))
    return out


def judged(guard, loss, norm):
    """As the loop asks it."""
    if guard.overflows(loss, norm):
        return "overflow", guard.scale
    objection = guard.objection(loss, norm)
    if objection is None:
        return "good", guard.scale
    return ("spike" if "times the largest" in objection else "bad"), guard.scale


@given(
    st.lists(st.tuples(LOSSES, NORMS), min_size=20, max_size=140),
    st.sampled_from([0.0, 1.0, 2.0, 10.0]),
    st.sampled_from([1.0, 2.0, 4.0, 2.0**16]),
    st.sets(st.integers(0, 140), max_size=3),
)
def test_every_verdict_is_that_of_the_rule_also_after_a_resume(history, spike, scale, saves):
    """The state goes through JSON, as a saved one does."""
    one = StepGuard(spike=spike, scale=scale)
    expected = verdicts(history, spike=spike, scale=scale, growth=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_guard, "SCALE_GROWTH_INTERVAL_STEPS", 3)
        for number, ((loss, norm), verdict) in enumerate(zip(history, expected, strict=True)):
            if number in saves:
                saved = json.loads(json.dumps(one.state()))
                one = StepGuard(spike=spike, scale=scale)
                one.restore(saved)
            assert judged(one, loss, norm) == verdict


@pytest.mark.parametrize(
    ("before", "loss", "is_spike"),
    [
        ([1.0] * 16, 10.0, False),  # not above
        ([1.0] * 16, 10.1, True),
        ([1.0] * 15, 1e9, False),  # too few to tell
        ([3.0] + [1.0] * 63, 29.0, False),  # the largest of the last 64 is the first of them
        ([3.0] + [1.0] * 64, 29.0, True),  # and has left the window
        ([0.0] * 64, 1e9, False),  # ten times nothing is no measure
        ([1.0] * 15 + [0.0], 10.1, True),  # the largest, not the last
        ([1e-6] * 16, 1.1e-5, True),
    ],
)
def test_a_spike_is_ten_times_the_largest_of_the_last_64_losses(before, loss, is_spike):
    for resumed in (False, True):
        one = StepGuard()
        for value in before:
            assert one.objection(value, 1.0) is None
        if resumed:
            saved = one.state()
            one = StepGuard()
            one.restore(saved)
        objection = one.objection(loss, 1.0)
        assert (objection is not None) == is_spike
        if is_spike:
            assert f"{loss:g}" in objection and f"({max(before[-64:]):g})" in objection and "10 times" in objection
        # A loss that is refused does not become what the next ones are measured against.
        assert list(one.recent) == (before if is_spike else [*before, loss])[-64:]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_numbers_that_are_not_finite_are_refused_and_not_remembered(loss, norm):
    one = StepGuard(spike=0.0)
    assert one.objection(loss, norm) == f"the loss is {loss:g} and the gradient's norm {norm:g}"
    assert not one.recent and one.objection(1e9, 1e9) is None and list(one.recent) == [1e9]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_run_may_skip_as_many_steps_as_the_limit_also_with_a_resume_between(limit):
    one = StepGuard(limit=limit)
    for count in range(1, limit + 1):
        assert one.skip() and one.skipped == count
        other = StepGuard(limit=limit)
        other.restore(one.state())
        one = other
    assert not one.skip() and one.skipped == limit + 1
    assert not one.skip()


def test_the_defaults_are_the_documented_ones():
    """docs/settings.md: 3 steps, 10 times. torch's GradScaler: a scale of 2^16, doubled after 2000 steps."""
    one, theirs = StepGuard(), torch.amp.GradScaler("cpu")
    assert (one.limit, one.spike, one.scale, one.skipped, one.steps_since_scale_change) == (3, 10.0, 1.0, 0, 0)
    assert (step_guard.RECENT_LOSSES, step_guard.MIN_LOSSES_FOR_SPIKE) == (64, 16)
    assert {"float16": theirs._init_scale} == LOSS_SCALE
    assert theirs.get_growth_interval() == step_guard.SCALE_GROWTH_INTERVAL_STEPS


def test_the_scale_is_doubled_after_2000_steps_and_an_overflow_begins_the_count_anew():
    one = StepGuard(scale=8.0)
    for _ in range(1999):
        one.overflows(1.0, 1.0)
    assert one.scale == 8.0 and one.overflows(1.0, math.inf) and one.scale == 4.0
    for _ in range(1999):
        assert not one.overflows(1.0, 1.0)
    assert one.scale == 4.0
    saved = one.state()
    one = StepGuard(scale=2.0)
    one.restore(saved)
    assert not one.overflows(1.0, 1.0) and one.scale == 8.0
    without = StepGuard()
    for _ in range(4001):
        without.overflows(1.0, 1.0)
    assert without.scale == 1.0


NAN, ONE = torch.tensor([1.0, math.nan]), torch.ones(2)


def weights(value, gradient):
    out = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(value.clone()), torch.nn.Parameter(torch.ones(2))]
    out[1].grad = gradient
    out[2].grad = torch.ones(2)
    return out


@pytest.mark.parametrize(
    ("inputs", "losses", "params", "words"),
    [
        (
            [("a", [ONE]), ("b", [ONE, NAN])],
            [("a", 1.0), ("b", math.nan)],
            weights(NAN, NAN),
            "bad data: the encoded b ",
        ),
        ([("a", [NAN]), ("b", [NAN])], [("a", 1.0)], weights(ONE, ONE), "bad data: the encoded a, b "),
        ([("a", [ONE])], [("a", math.nan)], weights(NAN, NAN), "the adapter's own weights are not finite"),
        ([("a", [ONE])], [("a", math.inf), ("b", 1.0)], weights(ONE, NAN), "its output for a is not"),
        ([("a", [ONE])], [("a", 1.0)], weights(ONE, NAN), "overflow in the backward pass"),
        ([("a", [ONE])], [("a", 1.0)], weights(ONE, ONE), "the run diverges"),
        ([("a", [ONE])], [("a", 1.0)], weights(ONE, None), "the run diverges"),
    ],
)
def test_the_first_cause_from_the_data_to_the_gradient_is_named(inputs, losses, params, words):
    assert words in likely_cause(inputs, losses, params)


@given(st.lists(st.sampled_from([0.5, 0.5, 0.5, math.inf, math.nan]), max_size=60))
def test_the_loss_scale_follows_torchs_grad_scaler(norms):
    ours = StepGuard(scale=2.0**60)
    scale, tracker = torch.full((), 2.0**60, dtype=torch.float32), torch.zeros((), dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_guard, "SCALE_GROWTH_INTERVAL_STEPS", 3)
        for norm in norms:
            lost = torch.tensor(float(not math.isfinite(norm)))
            torch._amp_update_scale_(scale, tracker, lost, 2.0, 0.5, 3)
            assert ours.overflows(1.0, norm) == bool(lost)
            assert (ours.scale, ours.steps_since_scale_change) == (scale.item(), tracker.item())


def test_without_a_scale_or_with_a_nan_loss_it_is_no_overflow():
    for one, loss in ((StepGuard(), 1.0), (StepGuard(scale=1024.0), math.nan)):
        before = one.scale
        assert not one.overflows(loss, math.inf) and one.scale == before


def test_a_resumed_run_keeps_its_loss_scale():
    one, other = StepGuard(scale=1024.0), StepGuard(scale=1024.0)
    one.overflows(1.0, math.inf)
    one.overflows(1.0, 1.0)
    other.restore(one.state())
    assert (other.scale, other.steps_since_scale_change) == (512.0, 1)
    other.restore({"skipped": 0, "recent": []})  # as it was before there was a scale
    assert other.scale == 512.0


class Line:
    """A goal of one number, whose gradient in fp16 is 0.8 times the scale."""

    def add_noise(self, latents, generator):
        return NoisedBatch(latents, torch.full_like(latents, 0.1), torch.zeros(len(latents)), torch.ones(len(latents)))


def steps(one, count):
    weight = torch.nn.Parameter(torch.tensor(0.5))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    batch = MicroBatch(torch.ones(1, 2, 1, 1), {}, torch.zeros(1, 6), None, torch.ones(1), ("a",))
    for step in train(
        ((1, [batch]) for _ in range(count)),
        predict=lambda noisy, t, _: (noisy.new_ones(noisy.shape, dtype=torch.float16) * weight.half()).float(),
        objective=Line(),
        params=[weight],
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        max_grad_norm=0.0,
        guard=one,
        device="cpu",
        seed=0,
        first_step=1,
    ):
        yield step, weight.item()


def test_a_step_whose_gradient_overflows_is_skipped_and_not_counted_as_bad():
    one = StepGuard(limit=0, scale=2.0**19)
    found = list(steps(one, 6))
    skipped = [step.skipped for step, _ in found]
    assert skipped == sorted(skipped, reverse=True) and 0 < sum(skipped) < 6
    assert one.scale == 2.0 ** (19 - sum(skipped)) and one.skipped == 0
    assert {weight for step, weight in found if step.skipped} == {0.5}
    plain = [weight for _, weight in steps(StepGuard(limit=0), 6 - sum(skipped))]
    assert [weight for step, weight in found if not step.skipped] == pytest.approx(plain, rel=1e-3)


def test_a_state_from_before_the_scale_had_a_rule_begins_to_count():
    guard = StepGuard(scale=4.0, steps_since_scale_change=7)
    guard.restore({"skipped": 2, "recent": [1.0, 2.0]})
    assert guard.state() == {"skipped": 2, "recent": [1.0, 2.0], "scale": 4.0, "steady": 0}
