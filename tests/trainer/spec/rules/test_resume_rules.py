"""The words for what differs between a run and a plan, and which differences are none."""

import dataclasses

import pytest

from trainer.spec.errors import SettingsError
from trainer.spec.plan import AUTO
from trainer.spec.rules.resume_rules import (
    SHOWN_CHARACTERS,
    changes,
    check_fits,
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


def test_other_steps_hide_no_other_difference(plan):
    longer = replaced(plan, "train", max_epochs=plan.train.max_epochs + 1, seed=plan.train.seed + 1)
    found = changes(plan.essence(), longer)
    assert [text.partition(":")[0] for text in found.steps] == ["PARAMS_MAX_EPOCHS"]
    assert [text.partition(":")[0] for text in found.settings] == ["PARAMS_SEED"]


def test_what_auto_chose_on_other_hardware_is_no_setting(plan):
    other = replaced(replaced(plan, "engine", precision="int8"), "optim", learning_rate=0.5)
    names = ("PARAMS_PRECISION", "PARAMS_LEARNING_RATE")
    asked = changes(plan.essence(), dataclasses.replace(other, automatic=()))
    assert asked.hardware == () and [text.partition(":")[0] for text in asked.settings] == list(names)
    found = changes(plan.essence(), dataclasses.replace(other, automatic=names))
    assert [text.partition(":")[0] for text in found.hardware] == ["PARAMS_PRECISION"]
    assert [text.partition(":")[0] for text in found.settings] == ["PARAMS_LEARNING_RATE"]


def test_differences_are_listed_by_their_keys_also_what_this_version_does_not_know(plan):
    begun = {**plan.essence(), "train.zzz": 3, "train.aaa": 1, "train.seed": 7}
    now = plan.train.seed
    assert changes(begun, plan).settings == (
        "PARAMS_AAA: 1 → not set", f"PARAMS_SEED: 7 → {now}", "PARAMS_ZZZ: 3 → not set"
    )  # fmt: skip


def test_what_an_older_version_lacks_was_at_its_default(plan):
    """A number, a list, a table, in a dataset, in a subset; and what has no default."""
    now = plan.essence()
    subset = "data.datasets[0].subsets[0].num_repeats"
    lacking = ("train.ema_decay", "optim.args", "data.datasets[0].flip_aug", subset, "lora.targets", "model.base")
    older = {key: value for key, value in now.items() if key not in lacking}
    found = completed(older, now)
    assert found["train.ema_decay"] == 0.0 and found["optim.args"] == {} and found["lora.targets"] == []
    assert found[subset] == 1 and "model.base" not in found
    unknown = {"train.zzz": 1, "optim.args.zzz": 1, "zzz": 1, "model.base.zzz": 1}
    assert completed(older, {**now, **unknown}).keys() == found.keys()  # of a newer version: no default is known
    averaged = replaced(plan, "train", ema_decay=0.5)
    assert "PARAMS_EMA_DECAY: 0 → 0.5" in changes(older, averaged).settings
    assert f"BASE_MODEL: not set → {plan.model.base}" in changes(older, plan).settings


@pytest.mark.parametrize(
    ("begun", "now", "differ"),
    [((2, 2), (4, 1), False), ((1, 4), (2, 2), False), ((2, 2), (2, 1), True), ((None, 2), (2, 1), False),
     ((None, None), (1, 1), False), ((None, None), (2, 1), True)],
)  # fmt: skip
def test_a_step_of_as_many_batches_on_another_number_of_gpus_is_the_same(plan, begun, now, differ):
    keys = ("engine.num_gpus", "train.gradient_accumulation")
    essence = plan.essence()
    for key, value in zip(keys, begun, strict=True):
        essence[key] = value
        if value is None:
            del essence[key]
    planned = replaced(replaced(plan, "engine", num_gpus=now[0]), "train", gradient_accumulation=now[1])
    assert bool(changes(essence, planned).settings) is differ


def test_buckets_follow_the_resolution_and_the_family_the_base_model(plan):
    (dataset,) = plan.data.datasets
    buckets = dataclasses.replace(
        dataset,
        min_bucket_reso=dataset.min_bucket_reso + 64,
        max_bucket_reso=dataset.max_bucket_reso + 64,
        bucket_reso_steps=dataset.bucket_reso_steps + 8,
    )
    width, height = dataset.resolution
    larger = dataclasses.replace(buckets, resolution=(width + 64, height))

    def lines(changed):
        return changes(plan.essence(), replaced(plan, "data", datasets=(changed,))).settings

    assert len(lines(buckets)) == 3 and "max_bucket_reso" in lines(buckets)[1]
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


def test_a_state_without_arguments_or_text_encoders_fits_a_plan_without_any(plan):
    plain = replaced(plan, "optim", args={}, text_encoders={})
    begun = {**plain.essence(), "optim.args": None, "optim.text_encoders": None}
    assert misfits(begun, plain) == []
    encoders = replaced(plain, "optim", text_encoders={"text_encoder": 1e-5})
    assert misfits(begun, encoders) == ["PARAMS_TEXT_ENCODER_LR: not set → text_encoder=1e-05"]
    assert misfits(begun, replaced(plain, "optim", args={"slice_p": 2})) == [
        "slice_p in PARAMS_OPTIMIZER_ARGS: not set → 2"
    ]


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


def test_what_a_state_does_not_fit_is_refused_with_what_it_fits(plan):
    begun = plan.essence()
    assert check_fits(begun, replaced(plan, "train", seed=7), step=3, lora=None) is None
    other = replaced(replaced(plan, "lora", rank=plan.lora.rank + 1), "optim", name="lion", args={})
    with pytest.raises(SettingsError) as raised:
        check_fits(begun, other, step=3, lora="/out/x.safetensors")
    assert str(raised.value) == (
        "RESUME_WITH_CHANGES=true: the state at step 3 does not fit these settings:\n"
        f"  PARAMS_NETWORK_DIM: {plan.lora.rank} → {plan.lora.rank + 1}\n"
        f"  PARAMS_OPTIMIZER_TYPE: {plan.optim.name} → lion\n"
        f"It fits PARAMS_NETWORK_DIM={plan.lora.rank} PARAMS_OPTIMIZER_TYPE={plan.optim.name}. Put that back, or unset "
        "RESUME_WITH_CHANGES to begin a new run. "
        "Or start from the weights alone: PARAMS_RESUME_FROM=/out/x.safetensors."
    )
    with pytest.raises(SettingsError, match=r"to begin a new run\.$"):
        check_fits(begun, other, step=3, lora=None)


def test_arguments_that_do_not_fit_are_listed_by_name(plan):
    begun = {**plan.essence(), "optim.args": {"slice_p": 1, "d0": 1e-6, "beta": 1}}
    other = replaced(plan, "optim", args={"zeta": 1, "slice_p": 2, "d0": 1e-5})
    names = [text.partition(" ")[0] for text in misfits(begun, other)]
    assert names == ["beta", "d0", "slice_p", "zeta"]


def test_a_named_state_goes_on_with_changes_that_it_fits(plan):
    """The state cannot have named itself."""
    begun = plan.essence()
    asked = replaced(plan, "lora", resume_from="/out/state/step-00000003")
    check_named_state(asked, begun, step=3)
    going_on = replaced(replaced(asked, "train", seed=7), "output", resume_with_changes=True)
    check_named_state(going_on, begun, step=3)
    with pytest.raises(SettingsError, match=r"the state at step 3 does not fit(?s:.)*to begin a new run\.$"):
        check_named_state(replaced(going_on, "optim", name="lion"), begun, step=3)
    both = replaced(replaced(asked, "train", seed=7), "engine", num_gpus=4)
    with pytest.raises(SettingsError, match=r"PARAMS_SEED(?s:.)*must stay the same\."):
        check_named_state(both, begun, step=3)


def test_a_state_is_not_resumed_on_top_of_another_training_adapter(plan):
    """The same file elsewhere is told by its content, as the base model is; one where there was none is another run."""
    first = replaced(plan, "model", training_adapter="/a/v1.safetensors")
    second = replaced(plan, "model", training_adapter="/a/v2.safetensors")
    text = "PARAMS_TRAINING_ADAPTER: /a/v1.safetensors → /a/v2.safetensors"
    moved = changes(first.essence(), second)
    assert moved.model == (text,) and moved.settings == ()
    assert changes(plan.essence(), first).settings == ("PARAMS_TRAINING_ADAPTER: not set → /a/v1.safetensors",)
    assert changes(first.essence(), plan).settings == ("PARAMS_TRAINING_ADAPTER: /a/v1.safetensors → not set",)
    with pytest.raises(SettingsError, match=r"It fits PARAMS_TRAINING_ADAPTER=/a/v1\.safetensors"):
        check_fits(first.essence(), second, step=3, lora=None)
    with pytest.raises(SettingsError, match=text):
        check_named_state(replaced(second, "lora", resume_from="/state"), first.essence(), step=3)
    older = {key: value for key, value in plan.essence().items() if key != "model.training_adapter"}
    assert changes(older, plan).settings == ()
