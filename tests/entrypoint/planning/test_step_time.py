"""What the planner predicts a job to take, on cards and for models of which figures are known."""

import dataclasses
import math

import pytest

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning import step_time
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from entrypoint.system.cards import hardware_of
from entrypoint.system.speeds import SPEEDS
from tests.support.machines import CPU, FULL, MINI, NOW
from trainer.spec.errors import SettingsError
from trainer.spec.family import base_models
from trainer.spec.memory_model import Strategy, Workload


@pytest.fixture
def quoted(tmp_path):
    """`quoted(card, **variables)`: the quote of the plan for a card."""

    def plan(card="RTX 4090", **variables):
        (tmp_path / "images").mkdir(exist_ok=True)
        asked = {"BASE_MODEL": FULL, "DATASET_NAME": str(tmp_path / "images"), "OUTPUT_PATH": str(tmp_path / "out")}
        hardware = CPU if card == "CPU" else hardware_of(card)
        return make_plan(read_settings(asked | variables), read_manifest(None, None), hardware, now=NOW)

    return plan


def test_a_step_is_predicted_for_the_way_that_the_plan_has_chosen(quoted):
    plan = quoted()
    footprint = base_models()[FULL][1].footprint
    engine = plan.engine
    way = Strategy(engine.precision, engine.recompute, engine.kept_blocks, engine.offload, 0.0)
    size = Workload(math.prod(plan.data.datasets[0].resolution), 1, plan.lora.rank, plan.optim.name)
    by_hand = step_time.step_seconds(footprint, size, way, SPEEDS["RTX 4090"])
    assert plan.quote.card == "RTX 4090" and plan.quote.batch_s == (by_hand,)
    assert plan.quote.start_s > 0 and plan.quote.image_s > 0 and plan.quote.round_s > 0


def test_a_faster_card_is_quoted_as_faster_in_everything(quoted):
    slow, fast = quoted("RTX 3090").quote, quoted("H100").quote
    assert fast.batch_s < slow.batch_s and fast.round_s < slow.round_s and fast.image_s < slow.image_s


def test_guidance_takes_two_passes_and_twice_the_steps_twice_the_time(quoted):
    plan = quoted()
    footprint = base_models()[FULL][1].footprint
    finish = read_settings({"BASE_MODEL": FULL, "DATASET_NAME": "/x"}).finish
    prompt = dataclasses.replace(plan.prompts[0], steps=20, cfg=1.0)

    def round_s(*prompts):
        drawn = dataclasses.replace(plan, prompts=prompts)
        return step_time.quote_plan(drawn, footprint, hardware_of("H100"), finish).round_s

    once = round_s(prompt)
    assert round_s(dataclasses.replace(prompt, cfg=4.0)) == pytest.approx(2 * once)
    assert round_s(dataclasses.replace(prompt, steps=40)) == pytest.approx(2 * once)
    assert round_s(prompt, prompt) == pytest.approx(2 * once)
    plan = dataclasses.replace(plan, engine=dataclasses.replace(plan.engine, num_gpus=2))  # each draws every second one
    assert round_s(prompt, prompt, prompt) == pytest.approx(2 * once)


@pytest.mark.parametrize(
    ("card", "variables"),
    [
        ("CPU", {"BASE_MODEL": MINI}),
        ("RTX 4090", {"BASE_MODEL": MINI}),
        ("24 GB", {}),
        ("RTX 4090", {"PARAMS_LORA_TYPE": "dora"}),
    ],
)
def test_what_nobody_has_measured_is_not_predicted(quoted, card, variables):
    quote = quoted(card, PRICE_PER_HOUR="0.5", **variables).quote
    assert quote.batch_s == () and quote.price_per_hour == 0.5


@pytest.mark.parametrize(
    ("variables", "hours", "words"),
    [
        ({"MAX_RUNTIME": "2"}, 2.0, "MAX_RUNTIME=2"),
        ({"MAX_COST": "1", "PRICE_PER_HOUR": "0.5"}, 2.0, "MAX_COST=1 at PRICE_PER_HOUR=0.5"),
        ({"MAX_RUNTIME": "1", "MAX_COST": "1", "PRICE_PER_HOUR": "0.5"}, 1.0, "MAX_RUNTIME=1"),
        ({}, None, ""),
    ],
)
def test_the_nearer_limit_counts(quoted, variables, hours, words):
    quote = quoted(**variables).quote
    assert (quote.limit_hours, quote.limit) == (hours, words)


def test_a_limit_before_the_first_step_is_refused_where_that_is_certain(quoted):
    seconds = step_time.START_S * step_time.SURELY
    with pytest.raises(SettingsError, match=r"MAX_RUNTIME=0\.001 ends the job after 4 s, before its first step"):
        quoted(MAX_RUNTIME="0.001")
    assert quoted(MAX_RUNTIME=str((seconds + 1) / 3600)).quote.limit_hours
    assert quoted("CPU", BASE_MODEL=MINI, MAX_RUNTIME="0.001").quote.limit_hours == 0.001  # nothing is known there


def test_no_model_is_quoted_without_a_measured_step(quoted):
    plan = quoted()
    unmeasured = dataclasses.replace(base_models()[FULL][1].footprint, measured_steps={})
    finish = read_settings({"BASE_MODEL": FULL, "DATASET_NAME": "/x"}).finish
    assert step_time.quote_plan(plan, unmeasured, hardware_of("H100"), finish).batch_s == ()
