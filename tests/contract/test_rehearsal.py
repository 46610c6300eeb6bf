"""The step before the first: what runs out of memory there, and what is given up for it."""

import dataclasses
import hashlib

import pytest
import torch

from trainer import session
from trainer.replay import Flat
from trainer.run import run
from trainer.stop import StopFlag


@pytest.fixture
def job(job_plan, tmp_path, monkeypatch):
    """`job(failures)`: a short job whose recorded steps run out of memory so many times; its LoRA and what was made."""
    plan = job_plan("flux", PARAMS_MAX_STEPS="2", PARAMS_OPTIMIZER_TYPE="adamw")

    def make(failures, *, replay=True):
        made, lowered = [], []

        class Recording(Flat):
            def __init__(self, params):
                super().__init__(params)
                made.append(self)
                self.calls = 0

            def __call__(self, work, inputs):
                self.calls += 1
                if self.calls <= failures:
                    raise torch.OutOfMemoryError("no memory")
                return super().__call__(work, inputs)

        monkeypatch.setattr(session, "Replayed", Recording)
        monkeypatch.setattr(session.Engine, "lower", lambda self, problem: lowered.append(problem))
        out = tmp_path / f"out-{failures}-{replay}"
        output = dataclasses.replace(plan.output, path=str(out))
        run(
            dataclasses.replace(plan, engine=dataclasses.replace(plan.engine, replay=replay), output=output), StopFlag()
        )
        return hashlib.sha256((out / "x.safetensors").read_bytes()).hexdigest(), made, lowered

    return make


def test_a_recorded_step_is_rehearsed_as_it_trains(job):
    plain, none, _ = job(0, replay=False)
    recorded, (runner,), lowered = job(0)
    assert none == [] and lowered == [] and recorded == plain
    assert runner.calls == 1 + 2  # the rehearsal, and two steps


def test_recording_is_given_up_before_anything_is_computed_again(job):
    plain, _, _ = job(0, replay=False)
    given_up, (runner,), lowered = job(1)
    assert runner.calls == 1 and lowered == [] and given_up == plain
