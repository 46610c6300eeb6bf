"""The plan goes through JSON unharmed, and its essence is what decides the weights."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from entrypoint.settings.variables import NAMES
from trainer.spec.errors import SettingsError
from trainer.spec.plan import (
    AUTO,
    VARIANTS,
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
from trainer.spec.rules.resume_rules import Changes, changes, check_fits, check_named_state, differences, variable


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
        f"PARAMS_SPLIT_QKV: {str(plan.lora.split_qkv).lower()} → {str(not plan.lora.split_qkv).lower()}",
        f"PARAMS_SEED: {plan.train.seed} → {plan.train.seed + 1}",
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
    assert changes(spread(*then).essence(), spread(*now)) == Changes()


def test_a_run_of_before_there_were_several_gpus_goes_on():
    begun = spread(1, 1).essence()
    del begun["engine.num_gpus"]
    assert changes(begun, spread(1, 1)) == Changes()


def test_a_run_of_before_attention_was_neutral_goes_on():
    made, begun = spread(1, 1), {**spread(1, 1).essence(), "engine.attention": "native"}
    other = dataclasses.replace(made, engine=dataclasses.replace(made.engine, attention="flash_4"))
    assert changes(begun, made) == Changes() == changes(begun, other)


def test_another_number_of_gpus_is_refused_by_name_where_a_step_would_have_other_batches():
    with pytest.raises(SettingsError, match=r"NUM_GPUS: 2 → 4"):
        check_named_state(spread(4, 1), spread(2, 1).essence(), step=1)
    with pytest.raises(SettingsError, match=r"NUM_GPUS: 2 → 1\n  PARAMS_GRADIENT_ACCUMULATION: 1 → 3"):
        check_named_state(spread(1, 3), spread(2, 1).essence(), step=1)


def test_a_field_that_is_not_there_is_absent():
    assert differences({"train.a": 1}, {"train.b": 2}) == ["PARAMS_A: 1 → not set", "PARAMS_B: not set → 2"]


def changed(plan, section, **values):
    return dataclasses.replace(plan, **{section: dataclasses.replace(getattr(plan, section), **values)})


def test_every_field_of_the_essence_has_a_name_that_the_user_knows():
    source = Source("folder", "/a")
    data = DataPlan((Dataset((Subset(source),), (64, 64)),))
    plan = dataclasses.replace(spread(1, 1), data=data)
    for key in plan.essence():
        name = variable(key)
        if key in ("data.strict", "version"):
            continue  # no setting that changes what comes out
        if "in dataset.json" in name:
            assert key.startswith("data.datasets[0].") and "(datasets[0]" in name, name
        elif key != "model.family":
            assert set(re.split(r", | and ", name)) <= set(NAMES), f"{key}: {name}"


def test_what_differs_is_sorted_by_what_follows():
    plan = spread(1, 1)
    essence = plan.essence()
    assert changes(essence, changed(plan, "optim", learning_rate=0.5)).settings == ("PARAMS_LEARNING_RATE: 1 → 0.5",)
    longer = changes(essence, changed(plan, "train", max_steps=20, max_epochs=AUTO))
    assert longer.settings == () and longer.steps == ("PARAMS_MAX_EPOCHS: 5 → auto", "PARAMS_MAX_STEPS: not set → 20")
    moved = changes(essence, changed(plan, "model", source="/elsewhere"))
    assert moved.settings == () and moved.model == ("MODEL_PATH: a → /elsewhere",)
    strict = changed(plan, "data", strict=True)
    assert changes(essence, strict) == Changes()


def test_what_auto_chose_on_other_hardware_is_the_same_run_and_what_the_user_set_is_not():
    plan = spread(1, 1)
    other = changed(plan, "engine", device="cuda", precision="bf16", dtype="bfloat16")
    assert len(changes(plan.essence(), other).settings) == 3
    left = dataclasses.replace(other, automatic=("BACKEND", "PARAMS_PRECISION"))
    found = changes(plan.essence(), left)
    assert found.settings == () and "PARAMS_PRECISION: fp32 → bf16" in found.hardware


def test_a_field_that_an_older_version_lacked_is_no_change_at_its_default():
    plan = dataclasses.replace(spread(1, 1), data=DataPlan((Dataset((Subset(Source("folder", "/a")),), (64, 64)),)))
    older = plan.essence()
    for key in ("train.max_loss_spike", "optim.text_encoders", "data.datasets[0].subsets[0].alpha_mask"):
        del older[key]
    assert changes(older, plan) == Changes()
    assert changes(older, changed(plan, "train", max_loss_spike=2.0)).settings == ("PARAMS_MAX_LOSS_SPIKE: 10 → 2",)


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("lora", {"rank": 8}, r"PARAMS_NETWORK_DIM: 32 → 8\nIt fits PARAMS_NETWORK_DIM=32\."),
        ("lora", {"kind": "dora"}, "PARAMS_LORA_TYPE: lora → dora"),
        ("optim", {"name": "adamw"}, "PARAMS_OPTIMIZER_TYPE: prodigy → adamw"),
        ("optim", {"args": {"slice_p": 2}}, "slice_p in PARAMS_OPTIMIZER_ARGS: not set → 2"),
        ("optim", {"text_encoders": {"text_encoder": 1e-5}}, "PARAMS_TEXT_ENCODER_LR: not set → text_encoder=1e-05"),
    ],
)
def test_a_state_does_not_go_on_with_what_has_no_place_in_it(section, values, named):
    plan = spread(1, 1)
    with pytest.raises(SettingsError, match=named):
        check_fits(plan.essence(), changed(plan, section, **values), step=4, lora="/x.safetensors")


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("optim", {"learning_rate": 2.0}),
        ("optim", {"args": {"d_coef": 1.0, "betas": [0.9, 0.99]}}),
        ("train", {"ema_decay": 0.9, "seed": 1}),
        ("lora", {"alpha": 8.0}),
        ("engine", {"precision": "bf16", "dtype": "bfloat16"}),
    ],
)
def test_a_state_goes_on_with_what_only_changes_the_next_step(section, values):
    plan = spread(1, 1)
    check_fits(plan.essence(), changed(plan, section, **values), step=4, lora=None)


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


@pytest.mark.parametrize(
    ("keys", "views", "captions"),
    [
        ({}, 1, 1),
        ({"flip_aug": True}, 2, 1),
        ({"random_crop": True}, VARIANTS, 1),
        ({"color_aug": True}, VARIANTS, 1),
        ({"flip_aug": True, "color_aug": True}, VARIANTS, 1),
        ({"enable_wildcard": True}, 1, VARIANTS),
        ({"shuffle_caption": True}, 1, VARIANTS),
        ({"caption_tag_dropout_rate": 0.1}, 1, VARIANTS),
        ({"caption_dropout_rate": 0.1}, 1, 1),
    ],
)
def test_the_cache_holds_one_variant_unless_something_varies(keys, views, captions):
    one = Subset(Source("folder", "/a"), **keys)
    assert (one.image_variants, one.caption_variants) == (views, captions) and VARIANTS == 8
