"""The words for what differs between a run and a plan, and which differences are none."""

import dataclasses

import pytest

from trainer.spec.errors import SettingsError
from trainer.spec.plan import AUTO
from trainer.spec.rules.resume_rules import (
    SHOWN_CHARACTERS,
    changes,
    check_named_state,
    completed,
    line,
    misfits,
    variable,
)


@pytest.fixture
def plan(job_plan):
    return job_plan("flux")


@pytest.mark.parametrize(
    ("key", "old", "new", "words"),
    [
        ("train.seed", 42, 1, "PARAMS_SEED: 42 → 1"),
        ("train.max_epochs", AUTO, 3, "PARAMS_MAX_EPOCHS: auto → 3"),
        ("train.max_steps", AUTO, None, "PARAMS_MAX_STEPS: -1 → not set"),
        ("lora.split_qkv", True, False, "PARAMS_SPLIT_QKV: true → false"),
        ("optim.learning_rate", 1e-4, 0.5, "PARAMS_LEARNING_RATE: 0.0001 → 0.5"),
        ("optim.args", {}, {"betas": [0.9, 0.99]}, "PARAMS_OPTIMIZER_ARGS and PARAMS_D_COEF: not set → betas=0.9,0.99"),
        ("lora.targets", ["a", "b"], [], "PARAMS_TARGET_MODULES: a,b → not set"),
        ("data.datasets[0].resolution", [512, 768], [64, 64], "PARAMS_RESOLUTION: 512x768 → 64x64"),
        ("data.datasets[1].subsets[2].num_repeats", 1, 2, "PARAMS_NUM_REPEATS: 1 → 2"),
        (
            "data.datasets[1].subsets[2].source.count", 1, 2,
            "count in dataset.json (datasets[1].subsets[2].source): 1 → 2"
        ),
        (
            "data.datasets[0].flip_aug", False, True, "flip_aug in dataset.json (datasets[0]): false → true"
        ),
        ("model.base", "flux", "sdxl", "BASE_MODEL: flux → sdxl"),
    ],
)  # fmt: skip
def test_a_line_names_the_variable_and_both_values(key, old, new, words):
    assert line(key, {key: old}, {key: new}) == words


def test_a_long_value_is_cut():
    value = "x" * (SHOWN_CHARACTERS + 1)
    assert line("train.a", {"train.a": value[:-1]}, {"train.a": value}).endswith(f"{'x' * 120} → {'x' * 120}…")
    assert variable("lora.rank") == "PARAMS_NETWORK_DIM" and variable("train.ema_decay") == "PARAMS_EMA_DECAY"


def replaced(plan, section, **values):
    return dataclasses.replace(plan, **{section: dataclasses.replace(getattr(plan, section), **values)})


def test_the_number_of_cycles_follows_the_length_and_is_a_setting_without_it(plan):
    begun = plan.essence()
    alone = changes(begun, replaced(plan, "optim", num_cycles=plan.optim.num_cycles + 1))
    assert alone.steps == () and len(alone.settings) == 1
    longer = replaced(plan, "train", max_epochs=plan.train.max_epochs + 1)
    both = changes(begun, replaced(longer, "optim", num_cycles=plan.optim.num_cycles + 1))
    assert both.settings == () and len(both.steps) == 2


def test_buckets_follow_the_resolution_and_the_family_the_base_model(plan):
    (dataset,) = plan.data.datasets
    buckets = dataclasses.replace(dataset, max_bucket_reso=dataset.max_bucket_reso + 64)
    width, height = dataset.resolution
    larger = dataclasses.replace(buckets, resolution=(width + 64, height))

    def lines(changed):
        return changes(plan.essence(), replaced(plan, "data", datasets=(changed,))).settings

    assert len(lines(buckets)) == 1 and "max_bucket_reso" in lines(buckets)[0]
    assert [text.partition(":")[0] for text in lines(larger)] == ["PARAMS_RESOLUTION"]
    family = replaced(plan, "model", family="sd3")
    assert len(changes(plan.essence(), family).settings) == 1
    base = replaced(plan, "model", family="sd3", base="sd3-medium")
    assert [text.partition(":")[0] for text in changes(plan.essence(), base).settings] == ["BASE_MODEL"]


def test_fields_of_older_versions_are_completed(plan):
    now = plan.essence()
    older = {key: value for key, value in now.items() if key not in ("train.max_token_length", "data.strict")}
    older["engine.attention"] = "native"
    assert completed(older, now) == now
    longer = replaced(plan, "train", max_token_length=150)
    assert changes(older, longer).settings == ("PARAMS_MAX_TOKEN_LENGTH: 77 → 150",)


def test_what_a_state_fixes_is_told_with_how_it_was(plan):
    begun = {**plan.essence(), "optim.args": {"slice_p": 1, "d_coef": 2.0}}
    other = replaced(plan, "optim", args={"slice_p": 2, "d_coef": 3.0})
    assert misfits(begun, other) == ["slice_p in PARAMS_OPTIMIZER_ARGS: 1 → 2"]
    assert misfits(begun, replaced(other, "optim", name="lion")) == [f"PARAMS_OPTIMIZER_TYPE: {plan.optim.name} → lion"]
    encoders = replaced(plan, "optim", text_encoders={"text_encoder": 1e-4})
    begun = encoders.essence()
    assert misfits(begun, replaced(encoders, "optim", text_encoders={"text_encoder": 1e-5})) == []
    assert len(misfits(begun, plan)) == 1


def test_a_named_state_says_what_to_do_about_gpus_only_where_it_is_about_them(plan):
    begun = plan.essence()
    gpus = replaced(plan, "engine", num_gpus=4)
    with pytest.raises(SettingsError, match=r"NUM_GPUS times PARAMS_GRADIENT_ACCUMULATION must stay the same\."):
        check_named_state(gpus, begun, step=3)
    with pytest.raises(SettingsError) as raised:
        check_named_state(replaced(plan, "train", seed=7), begun, step=3)
    assert "must stay the same" not in str(raised.value) and "at step 3" in str(raised.value)
    pieces = replaced(plan, "train", gradient_accumulation=4)
    with pytest.raises(SettingsError, match=r"must stay the same\."):
        check_named_state(pieces, begun, step=3)
    place = {key: "/else" if key.endswith("source.location") else value for key, value in begun.items()}
    check_named_state(plan, place, step=3)
    with pytest.raises(SettingsError, match="DATASET_NAME"):
        check_named_state(plan, place, step=3, places_differ=True)
    with pytest.raises(SettingsError, match="MODEL_PATH"):
        check_named_state(replaced(plan, "model", source="/else"), begun, step=3)
