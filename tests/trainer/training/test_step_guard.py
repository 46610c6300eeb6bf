"""The scale of backward passes against torch's own GradScaler, and what a gradient that overflows does to a run."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.batches import MicroBatch
from trainer.training import step_guard
from trainer.training.loop import train
from trainer.training.objective import NoisedBatch
from trainer.training.step_guard import StepGuard


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
