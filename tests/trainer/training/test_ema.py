"""The average of the weights against its recurrence in float64, alone and in the session's own loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.job.run import run
from trainer.job.session import Session
from trainer.spec.memory_model import FLOAT32_BYTES
from trainer.training.ema import Ema
from trainer.training.gradients import Backward
from trainer.training.stop_flag import StopFlag


def recurrence(start, weights, decay):
    """shadow ← d·shadow + (1 - d)·weight, where d rises as (1 + n) / (10 + n) from the first update, n = 1."""
    shadow = start
    for n, weight in enumerate(weights, start=1):
        d = min(decay, (1 + n) / (10 + n))
        shadow = d * shadow + (1 - d) * weight
    return shadow


@given(
    st.lists(st.floats(-4, 4, width=32), max_size=40),
    st.sampled_from([0.1, 0.25, 0.5, 0.9, 0.999, 0.9999]),
    st.floats(-4, 4, width=32),
    st.integers(0, 40),
)
def test_it_is_the_recurrence_also_after_a_resume(weights, decay, start, saved_at):
    params = [torch.nn.Parameter(torch.tensor([start, 2.0], dtype=torch.float64)) for _ in range(2)]
    ema = Ema(params, decay)
    for number, weight in enumerate(weights):
        if number == saved_at:
            steps, shadow = ema.steps, [tensor.clone() for tensor in ema.shadow]
            ema = Ema([torch.nn.Parameter(torch.zeros_like(p)) for p in params], decay)
            ema.steps, ema.shadow = steps, shadow
        with torch.no_grad():
            params[0].fill_(weight)
        ema.update(params)
    assert ema.steps == len(weights)
    assert ema.shadow[0][0].item() == pytest.approx(recurrence(start, weights, decay), rel=1e-12, abs=1e-12)
    assert ema.shadow[1].tolist() == pytest.approx([start, 2.0])  # what does not move stays


def test_the_decay_rises_by_diffusers_own_rule():
    """diffusers begins to count one update earlier: its n-th decay is that of our n-th update."""
    from diffusers.training_utils import EMAModel

    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    theirs, ours = EMAModel([weight], decay=0.97, use_ema_warmup=False), Ema([weight], 0.97)
    for number in range(1, 400):
        with torch.no_grad():
            weight.fill_(number**0.5)
        before = ours.shadow[0].item()
        ours.update([weight])
        moved = (ours.shadow[0].item() - before) / (weight.item() - before)
        assert 1 - moved == pytest.approx(theirs.get_decay(number + 1), abs=1e-9)


def test_an_average_is_a_copy_that_no_gradient_reaches():
    weight = torch.nn.Parameter(torch.ones(3))
    ema = Ema([weight], 0.9)
    with torch.no_grad():
        weight += 1
    assert ema.shadow[0].tolist() == [1.0, 1.0, 1.0] and not ema.shadow[0].requires_grad
    assert ema.shadow[0].nbytes == 3 * FLOAT32_BYTES  # which is what the prediction of memory counts
    ema.update([weight])
    assert not ema.shadow[0].requires_grad
    with pytest.raises(ValueError, match="zip"):
        ema.update([weight, weight])


def test_one_update_for_each_step_that_is_taken_and_none_for_one_that_is_skipped(job_plan, monkeypatch):
    """A run with two micro-batches a step; the second step's gradient is not finite."""
    plan = job_plan(
        "flux", PARAMS_MAX_STEPS="4", PARAMS_EMA_DECAY="0.95", PARAMS_GRADIENT_ACCUMULATION_STEPS="2",
        PARAMS_OPTIMIZER_TYPE="adamw", PARAMS_BATCH_SIZE="1", PARAMS_LEARNING_RATE="1e-2",
    )  # fmt: skip
    gradient, steps, seen, sessions = Backward.group_gradient, Session.steps, [], []

    def with_a_bad_second_step(self, group, number):
        losses = gradient(self, group, number)
        if number == 2:
            self.runner.flat_grad.fill_(float("nan"))
        return losses

    def watched(self, first, *others):
        sessions.append(self)
        seen.append([p.detach().double() for p in self.training_state.optimizer_params])
        for step in steps(self, first, *others):
            seen.append([p.detach().double() for p in self.training_state.optimizer_params])
            yield step

    monkeypatch.setattr(Backward, "group_gradient", with_a_bad_second_step)
    monkeypatch.setattr(Session, "steps", watched)
    run(plan, StopFlag())
    start, first, skipped, third, fourth = seen
    assert all(map(torch.equal, first, skipped))
    ema = sessions[0].training_state.ema
    assert ema.steps == 3 and len(ema.shadow) == len(start)
    for i, shadow in enumerate(ema.shadow):
        expected = recurrence(start[i], [first[i], third[i], fourth[i]], 0.95)
        assert torch.allclose(shadow.double(), expected, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(shadow.double(), fourth[i], rtol=1e-5, atol=1e-7)
