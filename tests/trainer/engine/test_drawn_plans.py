"""What tests/support/attempts.py makes of random plans, where memory runs out only as it is told to."""

import dataclasses
import logging
import random

import pytest
import torch

from entrypoint.system.hardware import Hardware
from tests.support import random_plans as plans
from tests.support.attempts import attempt
from trainer.engine import execution
from trainer.engine.memory.checkpointing import POLICIES
from trainer.job.session import Session
from trainer.spec.family import family_names
from trainer.spec.optimizers import OPTIMIZERS

NEEDS = {"none": 4, "products": 3, "attention": 2, "all": 1}
H100 = Hardware("nvidia", "9.0", 80.0, 1, "580", 100.0, 8)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return plans.Ground(tmp_path_factory.mktemp("ground"), Hardware("cpu", "x86_64", 8.0, 0, "", 8.0, 2))


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level(logging.WARNING)  # some other test may have turned it off


@pytest.fixture
def memory(monkeypatch):
    """`memory(room, later=None)`: of `NEEDS`; after so many forward passes for a gradient there is none at all."""
    ladder, predict, passes = execution.fallbacks, Session.predict, []

    def without_offload(*mode, compiled):
        return [fallback for fallback in ladder(*mode, compiled=compiled) if fallback[2] == "none"]

    monkeypatch.setattr(execution, "fallbacks", without_offload)

    def give(room, later=None):
        def short(self, *given):
            if torch.is_grad_enabled():
                passes.append(self.engine.fallbacks[0][0])
                if NEEDS[passes[-1]] > room or later == len(passes):
                    raise torch.OutOfMemoryError("no room")
            return predict(self, *given)

        monkeypatch.setattr(Session, "predict", short)

    return give


def simple(recompute="none"):
    """A plan of few steps, with several pictures at once."""
    drawn = plans.drawn(0, Hardware("cpu", "x86_64", 8.0, 0, "", 8.0, 2))
    datasets = tuple({**d, "batch_size": 2} for d in drawn.datasets)
    less = {"PARAMS_PRECISION": "fp32", "PARAMS_MAX_STEPS": "2", "PARAMS_EMA_DECAY": "0"}
    less |= {f"PARAMS_{what}_EVERY_N_STEPS": "0" for what in ("SAMPLE", "VALIDATE", "SAVE")}
    less |= {"PARAMS_GRADIENT_ACCUMULATION": "1", "PARAMS_OPTIMIZER_TYPE": "adamw", "PARAMS_LORA_TYPE": "lora"}
    settings, way = {**drawn.settings, **less}, {**drawn.engine, "recompute": recompute, "kept_blocks": 0}
    return dataclasses.replace(drawn, family="flux", settings=settings, engine=way, datasets=datasets, samples=False)


# Three plans, one of each family; the others are `slow`.
@pytest.mark.parametrize("seed", [0, 2, 5, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 30))])
def test_plans_run_to_their_end(seed, ground):
    found = attempt(plans.drawn(seed, ground.hardware), ground)
    assert (str(found), found.notes, found.why) == ("ran as planned", {}, "")


@pytest.mark.parametrize(
    ("room", "what", "way"),
    [
        (1, "fell back 3 times", "all 0 none"),
        (0, "refused", ""),
    ],
)
def test_fallbacks_and_refusals_are_counted(room, what, way, ground, memory):
    memory(room)
    found = attempt(simple(), ground)
    assert (str(found), found.way) == (what, way) and ("Fix: lower" in found.why) is (what == "refused")


def test_memory_that_runs_out_after_the_rehearsal_is_a_failure_though_the_loop_goes_on(ground, memory):
    memory(4, later=2)
    found = attempt(simple(), ground)
    assert str(found) == "failed" and "from now on 1 at once" in found.why


def test_memory_that_runs_out_beside_the_steps_is_a_failure(ground, monkeypatch):
    def full(self, *_given, **_named):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Session, "save", full)
    of = simple()
    found = attempt(dataclasses.replace(of, settings={**of.settings, "PARAMS_SAVE_EVERY_N_STEPS": "1"}), ground)
    assert str(found) == "failed" and "Memory ran out after the rehearsal" in found.why


def test_a_seed_gives_the_same_plan_and_many_all_there_is(tmp_path):
    ground = plans.Ground(tmp_path, H100)
    ground.models = dict.fromkeys(family_names(), tmp_path)
    drawn = [plans.drawn(seed, H100) for seed in range(100)]
    random.seed(1)
    assert drawn == [plans.drawn(seed, H100) for seed in range(100)]
    made = [ground.plan(of) for of in drawn]  # none is refused
    ways = {(p.engine.recompute, p.engine.offload) for p in made}
    assert {p.engine.precision for p in made} == set(H100.formats) and {r for r, _ in ways} == set(POLICIES)
    assert {p.model.family for p in made} == set(family_names()) and {p.optim.name for p in made} == set(OPTIMIZERS)
    assert {o for _, o in ways} == {"none", "activations", "weights"} and {p.engine.replay for p in made} == {0, 1}
    assert sum(p.engine.compile for p in made) == 100 // plans.COMPILED
