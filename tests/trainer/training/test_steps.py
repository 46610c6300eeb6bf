"""What the loop does around a step: clipping, the schedule, skipped steps and their words, errors while reading."""

import dataclasses
import logging
import math

import pytest
import torch

from trainer.data.batches import MicroBatch
from trainer.engine.cuda_graphs import EagerStep
from trainer.spec.errors import DataError, NumbersError
from trainer.training import loop
from trainer.training.distributed import StepTotals, Workers
from trainer.training.loop import train
from trainer.training.objective import NoisedBatch
from trainer.training.step_guard import StepGuard


class Line:
    """Of one number: the prediction is the weight w, the target the latents m. The loss has the slope 2 (w - m)."""

    def add_noise(self, latents, generator):
        return NoisedBatch(latents, latents, torch.zeros(len(latents)), torch.ones(len(latents)))


def batch(*values, text=1.0):
    """An image for each value, whose latents are that value everywhere."""
    moments = torch.cat([torch.tensor(values)[:, None, None, None], torch.zeros(len(values), 1, 1, 1)], dim=1)
    words = {"tokens": torch.full((len(values), 2), text)}
    names = tuple(f"{value:g}.png" for value in values)
    return MicroBatch(moments, words, torch.zeros(len(values), 6), None, torch.ones(len(values)), names)


def run(groups, *, guard=None, clip=0.0, weight=None, rate=0.25, course=None, **keywords):
    weight = torch.nn.Parameter(torch.tensor(0.0)) if weight is None else weight
    optimizer = torch.optim.SGD([weight], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, course or (lambda _: 1.0))
    steps = train(
        groups, predict=lambda noisy, t, given: noisy * 0 + weight, params=[weight],
        objective=keywords.pop("objective", Line()),
        optimizer=optimizer, schedule=schedule, max_grad_norm=clip, guard=guard or StepGuard(), device="cpu", seed=0,
        first_step=keywords.pop("first_step", 1), **keywords,
    )  # fmt: skip
    for step in steps:
        yield step, weight.item(), optimizer.param_groups[0]["lr"]


def test_steps_count_their_epoch_their_images_their_loss_and_the_norm_before_clipping():
    """By hand: w ← w - 0.25 · g, where g = mean of 2 (w - m) over all images of the step, cut to 1."""
    groups = [(1, [batch(2.0, 4.0), batch(3.0)]), (2, [batch(-1.0)])]
    found = list(run(groups, clip=1.0, first_step=7))
    (first, w1, _), (second, w2, _) = found
    assert (first.number, first.epoch, first.images, first.skipped) == (7, 1, 3, False)
    assert first.loss == pytest.approx((4 + 16 + 9) / 3) and first.grad_norm == pytest.approx(6.0)
    assert w1 == pytest.approx(0.25)
    assert (second.number, second.epoch, second.images) == (8, 2, 1)
    assert second.loss == pytest.approx(1.25**2) and second.grad_norm == pytest.approx(2.5)
    assert w2 == pytest.approx(0.0, abs=1e-6)


def test_a_step_has_the_loss_of_each_band_of_noise_levels():
    """By hand: w is 0, so the loss of an image is m²; its noise level is drawn by the objective."""

    class Drawn(Line):
        def add_noise(self, latents, generator):
            noised = super().add_noise(latents, generator)
            return dataclasses.replace(noised, t_B=torch.tensor([0.3, 0.26, 0.8])[: len(latents)])

    groups = [(1, [batch(2.0, 4.0, 3.0), batch(6.0)]), (1, [batch(math.nan, 1.0)])]
    first, second = [step for step, _, _ in run(groups, objective=Drawn(), rate=0.0)]
    assert first.band_losses == (None, pytest.approx((4 + 16 + 36) / 3), None, pytest.approx(9.0))
    assert second.skipped and second.band_losses[0] is second.band_losses[2] is None


def test_zero_does_not_clip():
    ((_, weight, _),) = run([(1, [batch(40.0)])], clip=0.0)
    assert weight == pytest.approx(20.0)


def test_the_schedule_goes_on_in_every_step_also_in_skipped_ones(caplog):
    groups = [(1, [batch(value)]) for value in (1.0, math.nan, 1.0)]
    found = list(run(groups, course=lambda step: 0.5**step))
    assert [step.skipped for step, _, _ in found] == [False, True, False]
    assert [rate for _, _, rate in found] == pytest.approx([0.125, 0.0625, 0.03125])
    weights = [weight for _, weight, _ in found]
    assert weights == pytest.approx([0.5, 0.5, 0.5 + 0.0625])


def test_a_skipped_step_is_told_with_its_images_and_its_cause(caplog):
    guard = StepGuard(limit=2)
    groups = [(1, [batch(1.0, 2.0), batch(3.0, math.nan)]), (1, [batch(1.0)])]
    with caplog.at_level(logging.WARNING):
        list(run(groups, guard=guard))
    (line,) = caplog.messages
    assert line.startswith("Step 1 is skipped: the loss is nan and the gradient's norm nan. ")
    assert "Images: 1.png, 2.png, 3.png, nan.png. Most likely bad data: the encoded nan.png (image" in line
    assert line.endswith("(1 of the 2 skipped steps that are allowed)") and guard.skipped == 1


def test_a_broken_caption_is_bad_data_too(caplog):
    weight = torch.nn.Parameter(torch.tensor(math.nan))
    list(run([(1, [batch(1.0, text=math.inf)])], weight=weight))
    assert "bad data: the encoded 1.png" in caplog.text
    caplog.clear()
    list(run([(1, [batch(1.0)])], weight=weight))
    assert "the adapter's own weights are not finite" in caplog.text


def test_one_step_more_than_allowed_stops_the_run():
    guard = StepGuard(limit=1)
    steps = run([(1, [batch(math.nan)]) for _ in range(3)], guard=guard)
    assert next(steps)[0].skipped
    words = r"Step 2 is skipped: .* skipped 2 steps, more than PARAMS_MAX_SKIPPED_STEPS=1 allows\."
    with pytest.raises(NumbersError, match=words):
        next(steps)


def test_a_spike_leaves_the_weights_as_they_are(caplog):
    groups = [(1, [batch(1.0)])] * 16 + [(1, [batch(100.0)]), (1, [batch(1.0)])]
    found = list(run(groups, rate=0.0001))
    assert [step.skipped for step, _, _ in found] == [False] * 16 + [True, False]
    assert found[16][1] == found[15][1] and found[17][1] != found[16][1]
    assert "more than 10 times the largest" in caplog.text and "the run diverges" in caplog.text


def test_an_image_of_another_process_is_not_blamed_on_this_one():
    losses = [torch.tensor([1.0])]
    weight = torch.nn.Parameter(torch.tensor(0.0))
    common = {"loss": math.nan, "guard": StepGuard(limit=0), "params": [weight], "objection": "bad"}
    for size, own, words in (
        (2, losses, "an image of another process, whose log names it"),
        (1, losses, "the run diverges"),
        (2, [torch.tensor([math.nan])], "overflow in the model's arithmetic"),
        (2, [torch.tensor([1.0, math.nan])], "overflow in the model's arithmetic"),
    ):
        workers = Workers(size=size)
        group = [batch(*range(1, len(own[0]) + 1))]
        with pytest.raises(NumbersError, match=words):
            loop._skip(3, group, own, workers=workers, **{**common, "guard": StepGuard(limit=0)})
    workers = Workers(size=2)
    with pytest.raises(NumbersError, match="the run diverges"):
        loop._skip(3, [batch(1.0)], losses, workers=workers, **{**common, "loss": 1.0})


def test_the_numbers_of_all_processes_decide():
    """Here this one's are good, and another's are not."""

    class Two(Workers):
        def read_totals(self, totals, norm):
            return StepTotals(math.inf, 9, 1.5)

    ((step, weight, _),) = run([(1, [batch(1.0)])], workers=Two(size=1))
    assert (step.loss, step.images, step.grad_norm, step.skipped) == (math.inf, 9, 1.5, True) and weight == 0.0


@pytest.mark.parametrize("problem", [OSError("gone"), ValueError("odd"), DataError("bad")])
def test_an_error_while_reading_is_raised_after_the_step_before_it(problem):
    def groups():
        yield 1, [batch(1.0)]
        raise problem

    steps = run(groups())
    assert next(steps)[1] == pytest.approx(0.5)
    with pytest.raises(type(problem)):
        next(steps)
    assert list(run([])) == []


def test_the_next_group_is_noised_while_the_step_runs():
    seen = []

    class Graphs(EagerStep):
        capturing = True

    weight = torch.nn.Parameter(torch.tensor(0.0))
    runner = Graphs([weight])
    runner.capturing = True
    prefetch = loop.Backward.prefetch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop.Backward, "prefetch", lambda self, group, number: seen.append(number) or prefetch(self, group, number)
        )
        found = list(run([(1, [batch(1.0)]), (1, [batch(3.0)])], weight=weight, runner=runner))
    assert seen == [2] and [weight for _, weight, _ in found] == pytest.approx([0.5, 1.75])


def test_the_validation_loss_without_images_is_zero():
    found = loop.validation_loss([], predict=None, objective=Line(), device="cpu", seed=1)
    assert found == 0.0 and loop.VALIDATION_TIMES == (0.1, 0.3, 0.5, 0.7, 0.9)
