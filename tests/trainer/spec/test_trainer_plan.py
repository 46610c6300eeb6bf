"""The plan goes through JSON unharmed, and its essence is what decides the weights."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trainer.spec.errors import SettingsError
from trainer.spec.plan import (
    VERSION,
    DataPlan,
    Dataset,
    EnginePlan,
    LoraPlan,
    ModelPlan,
    OptimPlan,
    OutputPlan,
    Plan,
    Source,
    Subset,
    TrainPlan,
)
from trainer.spec.resume_rules import differences, resumes_state


def anything(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated type, as a plan may hold them."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{f.name: anything(hints[f.name]) for f in dataclasses.fields(kind)})
    if origin is tuple:
        return (
            st.lists(anything(args[0]), max_size=3).map(tuple) if args[-1] is ... else st.tuples(*map(anything, args))
        )
    if origin in (types.UnionType, typing.Union):
        return st.none() | anything(next(a for a in args if a is not type(None)))
    if origin is dict:
        return st.dictionaries(st.text(), anything(args[1]), max_size=3)
    if kind is typing.Any:
        return st.booleans() | st.integers() | NUMBERS | st.text() | st.lists(NUMBERS)
    return {int: st.integers(), float: NUMBERS, bool: st.booleans(), str: st.text()}[kind]


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PLANS = anything(Plan).map(lambda plan: dataclasses.replace(plan, version=VERSION))
SLOW = hypothesis_settings(max_examples=25, deadline=None)


@given(PLANS)
@SLOW
def test_a_plan_survives_json(plan):
    assert Plan.from_json(plan.to_json()) == plan


@given(PLANS)
@SLOW
def test_a_plan_from_before_there_were_warnings_is_read(plan):
    raw = json.loads(plan.to_json())
    del raw["warnings"]
    assert Plan.from_json(json.dumps(raw)) == dataclasses.replace(plan, warnings=())


@given(PLANS)
@SLOW
def test_its_essence_survives_json_too(plan):
    kept = json.loads(json.dumps(plan.essence()))
    assert differences(kept, Plan.from_json(plan.to_json()).essence()) == []


@given(PLANS, PLANS)
@SLOW
def test_neutral_fields_make_no_difference(plan, other):
    model = dataclasses.replace(plan.model, commit=other.model.commit, path=other.model.path)
    engine = dataclasses.replace(plan.engine, memory_limit_gib=other.engine.memory_limit_gib)
    changed = dataclasses.replace(
        plan,
        model=model,
        engine=engine,
        output=other.output,
        prompts=other.prompts,
        reasons=other.reasons,
        warnings=other.warnings,
    )
    assert differences(plan.essence(), changed.essence()) == []


@given(PLANS)
@SLOW
def test_everything_else_is_named_when_it_changes(plan):
    changed = dataclasses.replace(
        plan,
        train=dataclasses.replace(plan.train, seed=plan.train.seed + 1),
        lora=dataclasses.replace(plan.lora, split_qkv=not plan.lora.split_qkv),
    )
    assert differences(plan.essence(), changed.essence()) == [
        f"lora.split_qkv: {plan.lora.split_qkv} → {not plan.lora.split_qkv}",
        f"train.seed: {plan.train.seed} → {plan.train.seed + 1}",
    ]


@given(PLANS)
@SLOW
def test_the_key_in_an_address_is_no_part_of_the_essence(plan):
    def at(address):
        source = Source("archive", address)
        data = DataPlan((Dataset((Subset(source),), (64, 64)),))
        return dataclasses.replace(plan, data=data).essence()

    assert at("https://host/p.zip?key=1") == at("https://host/p.zip?key=2") != at("https://host/q.zip?key=1")
    assert "?key" not in str(at("https://host/p.zip?key=1"))


@given(PLANS)
@SLOW
def test_map_sources_changes_the_sources_and_nothing_else(plan):
    def moved(source, dataset):
        return dataclasses.replace(source, path=f"{source.path}/{dataset.batch_size}")

    def moved_back(source, dataset):
        return dataclasses.replace(source, path=source.path.removesuffix(f"/{dataset.batch_size}"))

    changed = plan.map_sources(moved)
    for before, after in zip(plan.data.datasets, changed.data.datasets, strict=True):
        for old, new in zip(before.subsets, after.subsets, strict=True):
            assert new.source.path == f"{old.source.path}/{before.batch_size}"
    assert changed.map_sources(moved_back) == plan


def spread(gpus, each):
    engine, train = EnginePlan(num_gpus=gpus), TrainPlan(gradient_accumulation=each)
    model, output = ModelPlan("a", "a", "a"), OutputPlan("out", "x", "cache")
    return Plan(model, DataPlan(()), LoraPlan(), OptimPlan(), train, engine, output)


@pytest.mark.parametrize(("then", "now"), [((2, 1), (1, 2)), ((4, 1), (2, 2)), ((1, 6), (3, 2)), ((2, 3), (2, 3))])
def test_another_number_of_gpus_goes_on_where_a_step_has_as_many_batches(then, now):
    assert resumes_state(spread(*now), spread(*then).essence(), step=1, in_output=True)


def test_a_run_of_before_there_were_several_gpus_goes_on():
    begun = spread(1, 1).essence()
    del begun["engine.num_gpus"]
    assert resumes_state(spread(1, 1), begun, step=1, in_output=True)


def test_a_run_of_before_attention_was_neutral_goes_on():
    made, begun = spread(1, 1), {**spread(1, 1).essence(), "engine.attention": "native"}
    other = dataclasses.replace(made, engine=dataclasses.replace(made.engine, attention="flash_4"))
    assert resumes_state(made, begun, step=1, in_output=True) and resumes_state(other, begun, step=1, in_output=False)


def test_another_number_of_gpus_is_refused_by_name_where_a_step_would_have_other_batches():
    with pytest.raises(SettingsError, match=r"engine\.num_gpus: 2 → 4"):
        resumes_state(spread(4, 1), spread(2, 1).essence(), step=1, in_output=True)
    with pytest.raises(SettingsError, match=r"engine\.num_gpus: 2 → 1\n  train\.gradient_accumulation: 1 → 3"):
        resumes_state(spread(1, 3), spread(2, 1).essence(), step=1, in_output=False)


def test_a_field_that_is_not_there_is_absent():
    assert differences({"a": 1}, {"b": 2}) == ["a: 1 → absent", "b: absent → 2"]


@given(PLANS, st.data())
@SLOW
def test_a_damaged_plan_is_a_value_error(plan, data):
    raw = json.loads(plan.to_json())
    section = data.draw(st.sampled_from(["model", "lora", "optim", "train", "engine", "output"]))
    key = data.draw(st.sampled_from(sorted(raw[section])))
    # A list of texts in an object: no field is that, not even the one that holds texts by name.
    raw[section][key] = {"not": ["this"]} if key != "args" else 3.5
    with pytest.raises(ValueError, match="plan"):
        Plan.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"version": 0}', f'{{"version": {VERSION}}}'])
def test_what_is_no_plan_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"plan|JSON|Expecting"):
        Plan.from_json(text)
