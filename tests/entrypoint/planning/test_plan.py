"""Settings, manifest and hardware → the plan: every `auto` with its reason, every impossible request refused."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.fetch import fetch, flash_attention
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from entrypoint.settings.variables import NAMES
from entrypoint.system.hardware import Hardware
from tests.support.machines import CPU, FULL, HOME, LARGE_GPU, MINI, NOW, SMALL_GPU
from trainer.spec.errors import SettingsError
from trainer.spec.family import base_models, facts_of, get_family, timestep_samplings, trainable_encoders
from trainer.spec.optimizers import OPTIMIZERS, SCHEDULERS
from trainer.spec.plan import Dataset, Plan
from trainer.spec.rules.resume_rules import changes

ROOT = Path(__file__).parents[3]
MODELS = base_models()
MULTIPLE = get_family(MODELS[MINI][0]).FACTS.multiple


def plan(*, on: Hardware = CPU, config: Any = None, prompts: Any = None, **variables: str) -> Plan:
    settings = read_settings({"BASE_MODEL": MINI, "DATASET_NAME": "org/pictures", **variables})
    manifest = read_manifest(json.dumps(config) if config else None, json.dumps(prompts) if prompts else None)
    return make_plan(settings, manifest, on, now=NOW)


def refusal(**options: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        plan(**options)
    return str(caught.value)


def config(subset: dict[str, Any] | None = None, **dataset: Any) -> dict[str, Any]:
    return {"datasets": [{"resolution": 512, **dataset, "subsets": [subset or {}]}]}


def dataset(**options: Any) -> Dataset:
    return plan(**options).data.datasets[0]


# ---- the whole


def test_a_limit_of_a_steps_time_gets_to_the_trainer():
    assert plan(PARAMS_STEP_TIMEOUT="7").engine.step_timeout_s == 7.0 and plan().engine.step_timeout_s is None


# ---- several GPUs

FOUR_GPUS = dataclasses.replace(LARGE_GPU, count=4)


@pytest.mark.parametrize(
    ("on", "asked", "model", "count"),
    [
        (LARGE_GPU, "auto", FULL, 1),
        (FOUR_GPUS, "auto", FULL, 1),
        (FOUR_GPUS, "auto", MINI, 1),
        (FOUR_GPUS, "3", FULL, 3),
        (FOUR_GPUS, "2", MINI, 2),
        (CPU, "auto", MINI, 1),
        (CPU, "2", MINI, 2),
    ],
)
def test_one_gpu_is_taken_or_as_many_as_are_asked_for(on, asked, model, count):
    made = plan(on=on, BASE_MODEL=model, NUM_GPUS=asked)
    assert made.engine.num_gpus == count
    assert any(reason.startswith("NUM_GPUS:") for reason in made.reasons) == (asked == "auto" and on is FOUR_GPUS)


@pytest.mark.parametrize(("on", "asked"), [(LARGE_GPU, "2"), (FOUR_GPUS, "5")])
def test_more_gpus_than_there_are_is_refused(on, asked):
    assert f"NUM_GPUS={asked}: there are not so many here, only {on}. Allowed: auto, 1 to {on.count}." in refusal(
        on=on, NUM_GPUS=asked
    )


def test_the_hosts_memory_is_divided_among_the_gpus():
    one, four = (plan(on=FOUR_GPUS, BASE_MODEL=FULL, NUM_GPUS=n).engine.host_gib for n in "14")
    assert one == 4 * four > 0


def test_a_plan_survives_json():
    made = plan()
    assert Plan.from_json(made.to_json()) == made


def test_the_same_request_makes_the_same_plan():
    assert plan() == plan()


def test_every_choice_has_a_reason():
    words = "\n".join(plan().reasons)
    for variable in ("BACKEND", "PARAMS_PRECISION", "PARAMS_COMPILE", "PARAMS_ATTENTION", "DATASET_NAME"):
        assert re.search(rf"^{variable}: .+ \(.+\)$", words, re.MULTILINE)
    for variable in ("PARAMS_LEARNING_RATE", "PARAMS_TIMESTEP_SAMPLING"):
        assert re.search(rf"^{variable}: .+ \(.+\)$", words, re.MULTILINE)


def test_what_was_asked_for_needs_no_reason():
    asked = {"PARAMS_PRECISION": "fp32", "PARAMS_COMPILE": "false", "PARAMS_ATTENTION": "native", "BACKEND": "cpu"}
    assert not [r for r in plan(**asked).reasons if r.split(":")[0] in asked]


def test_everything_impossible_is_in_one_message():
    message = refusal(
        on=CPU,
        config=config({"split": "test"}, bucket_reso_steps=MULTIPLE + 1, enable_bucket=True),
        prompts=["a cat"],
        BACKEND="cuda",
        DATASET_NAME="/pictures",
        PARAMS_WARMUP_STEPS="10",
        PARAMS_OPTIMIZER_ARGS="beta=1",
        PARAMS_VALIDATE_EVERY_N_STEPS="10",
        PARAMS_RESUME_FROM="/nothing",
        MODEL_PATH="/nothing",
    )
    for word in ("split", "bucket_reso_steps", "BACKEND", "PARAMS_WARMUP_STEPS", "PARAMS_OPTIMIZER_ARGS: beta=1"):
        assert word in message
    for word in ("PARAMS_VALIDATE_EVERY_N_STEPS", "PARAMS_RESUME_FROM", "MODEL_PATH"):
        assert word in message


def test_planning_imports_no_torch_and_takes_less_than_a_second():
    program = f"""
import sys, time
from datetime import datetime
from entrypoint import settings
from entrypoint.dataset_config import manifest
from entrypoint.planning import plan
from entrypoint.system import hardware
asked = settings.read_settings({{"BASE_MODEL": {MINI!r}, "DATASET_NAME": "org/pictures"}})
said = manifest.read_manifest(asked.data.dataset_config, asked.output.sample_prompts)
plan.make_plan(asked, said, hardware.Hardware("cpu", "x86_64", 8.0, 0, "", 8.0, 2), now=datetime.now())
print(time.process_time(), *(m for m in ("torch", "numpy", "diffusers", "transformers") if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.split()
    assert float(seconds) < 1 and modules == []


# ---- model


def test_a_base_model_has_its_source_and_family():
    name, model = MODELS[FULL]
    made = plan(BASE_MODEL=FULL, on=LARGE_GPU).model
    assert (made.base, made.family, made.source, made.revision) == (FULL, name, model.source, None)


def test_another_repository_or_folder_may_take_its_place(tmp_path):
    made = plan(BASE_MODEL=FULL, MODEL_PATH="org/model", MODEL_REVISION="v2").model
    assert (made.source, made.revision) == ("org/model", "v2")
    assert plan(MODEL_PATH=str(tmp_path)).model.source == str(tmp_path)


@pytest.mark.parametrize(
    "path", ["/a/model.safetensors", "model.ckpt", __file__, "/nothing", "a/b/c", "name", "org/x.gguf"]
)
def test_anything_else_says_what_is_accepted(path):
    message = refusal(MODEL_PATH=path)
    assert f"MODEL_PATH={path!r}" in message and "model_index.json" in message


def test_a_folder_has_no_revision():
    assert "MODEL_REVISION" in refusal(MODEL_REVISION="v1")


# ---- data


def test_dataset_name_goes_to_every_subset_without_a_source(tmp_path):
    both = {"datasets": [{"resolution": 512, "subsets": [{}, {"image_dir": str(tmp_path)}, {"split": "test"}]}]}
    first, second, third = (s.source for s in dataset(config=both, DATASET_SPLIT="dev", IMAGE_COLUMN="img").subsets)
    assert (first.kind, first.location, first.split, first.image_column) == ("hub", "org/pictures", "dev", "img")
    assert (second.kind, second.location, second.split) == ("folder", str(tmp_path), "train")
    assert (third.location, third.split) == ("org/pictures", "test")


def test_messages_name_a_source_where_the_user_has_named_it(tmp_path):
    both = {"datasets": [{"resolution": 512, "subsets": [{}, {"image_dir": str(tmp_path)}]}]}
    first, second = (subset.source for subset in dataset(config=both).subsets)
    assert fetch.named(first) == "DATASET_NAME=org/pictures"
    assert fetch.named(second).endswith(f": datasets[0].subsets[1]: {tmp_path}")


def test_a_subsets_own_revision_comes_before_the_datasets():
    both = {"datasets": [{"resolution": 512, "subsets": [{}, {"revision": "v2"}]}]}
    sources = [s.source for s in dataset(config=both, DATASET_REVISION="v1").subsets]
    assert [s.revision for s in sources] == ["v1", "v2"]


def test_without_a_name_every_subset_needs_a_source():
    named = config({"dataset": "org/other"})
    assert dataset(config=named, DATASET_NAME="").subsets[0].source.split == "train"
    assert "DATASET_NAME is not set" in refusal(DATASET_NAME="")
    assert "DATASET_NAME is not set" in refusal(config=config(), DATASET_NAME="")


def test_a_name_that_no_subset_takes_is_refused():
    assert "every subset" in refusal(config=config({"dataset": "org/other"}))


@pytest.mark.parametrize("name", ["a/b/c", "pictures.rar", "ftp://a/b.zip"])
def test_a_name_that_is_none_is_refused(name):
    assert f"DATASET_NAME: {name!r}" in refusal(DATASET_NAME=name)


@pytest.mark.parametrize("variable", ["DATASET_SPLIT", "DATASET_REVISION"])
def test_a_folder_has_no_splits_and_revisions(variable):
    assert variable in refusal(DATASET_NAME="/pictures", **{variable: "x"})


def test_settings_override_dataset_json():
    said = config({"num_repeats": 2, "caption_dropout_rate": 0.1}, batch_size=2)
    made = dataset(config=said)
    assert (made.resolution, made.batch_size) == ((512, 512), 2)
    assert (made.subsets[0].num_repeats, made.subsets[0].caption_dropout_rate) == (2, 0.1)
    asked = {"PARAMS_RESOLUTION": "640x384", "PARAMS_BATCH_SIZE": "3", "PARAMS_NUM_REPEATS": "4"}
    made = dataset(config=said, **asked, PARAMS_CAPTION_DROPOUT_RATE="0", TRIGGER_WORD="sks")
    assert (made.resolution, made.batch_size) == ((640, 384), 3)
    subset = made.subsets[0]
    assert (subset.num_repeats, subset.caption_dropout_rate, subset.trigger_word) == (4, 0.0, "sks")


def test_a_subset_may_have_a_trigger_word_of_its_own_or_none():
    three = {"resolution": 512, "subsets": [{}, {"trigger_word": "zot"}, {"trigger_word": ""}]}
    assert [s.trigger_word for s in dataset(config={"datasets": [three]}, TRIGGER_WORD="sks").subsets] == (
        ["sks", "zot", None]
    )
    assert [s.trigger_word for s in dataset(config={"datasets": [three]}).subsets] == [None, "zot", None]


def test_columns_are_also_for_folders(tmp_path):
    both = {"datasets": [{"resolution": 512, "subsets": [{"image_dir": str(tmp_path)}, {"caption_column": "c"}]}]}
    asked = {"DATASET_NAME": str(tmp_path), "IMAGE_COLUMN": "img", "CAPTION_COLUMN": "text"}
    first, second = (s.source for s in dataset(config=both, **asked).subsets)
    assert (first.image_column, first.caption_column) == ("img", "text")
    assert (second.kind, second.image_column, second.caption_column) == ("folder", "img", "c")


def test_a_caption_dropout_rate_is_the_runs_and_every_subsets():
    made = plan(PARAMS_CAPTION_DROPOUT_RATE="0.2")
    assert made.train.caption_dropout_rate == made.data.datasets[0].subsets[0].caption_dropout_rate == 0.2


@pytest.mark.parametrize("base", MODELS)
def test_without_a_dataset_json_the_resolution_is_the_models(base):
    made, resolution = dataset(BASE_MODEL=base), MODELS[base][1].resolution
    assert made.resolution == (resolution, resolution) and made.enable_bucket
    assert made.min_bucket_reso <= resolution // 2 and made.max_bucket_reso >= 2 * resolution
    assert made.subsets[0].caption_extension == ".txt"


def test_a_miniature_has_buckets_of_its_size():
    made = dataset()
    assert (made.min_bucket_reso, made.max_bucket_reso, made.bucket_reso_steps) == (64, 256, MULTIPLE)


def test_limits_that_the_user_has_set_stay():
    said = config(enable_bucket=True, min_bucket_reso=96, bucket_reso_steps=2 * MULTIPLE)
    made = dataset(config=said, PARAMS_RESOLUTION="128")
    assert (made.min_bucket_reso, made.max_bucket_reso, made.bucket_reso_steps) == (96, 256, 2 * MULTIPLE)


def test_the_usual_limits_stay_where_they_fit():
    made = dataset(config=config(enable_bucket=True))
    assert (made.min_bucket_reso, made.max_bucket_reso, made.bucket_reso_steps) == (256, 1024, 64)


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ({"enable_bucket": True, "bucket_reso_steps": MULTIPLE * 3 // 2}, "bucket_reso_steps"),
        ({"enable_bucket": True, "bucket_reso_steps": 1024}, "larger than the resolution"),
        ({"enable_bucket": True, "min_bucket_reso": 1024, "max_bucket_reso": 512}, "min_bucket_reso"),
        ({"resolution": 500}, f"multiples of {MULTIPLE}"),
        ({"resolution": [512, 500]}, f"multiples of {MULTIPLE}"),
        ({"resolution": None}, "resolution is missing"),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_refused_with_their_place(said, word):
    message = refusal(config=config(**said))
    assert word in message and "datasets[0]" in message


def test_with_buckets_any_resolution_fits():
    assert dataset(config=config(resolution=500, enable_bucket=True)).resolution == (500, 500)


# ---- adapter, optimiser, training


def test_the_targets_are_the_familys_or_the_users():
    assert plan().lora.targets == get_family(MODELS[MINI][0]).FACTS.targets
    assert plan(PARAMS_TARGET_MODULES="to_q,to_k").lora.targets == ("to_q", "to_k")


def test_a_state_folder_may_be_gone_on_from(tmp_path):  # a LoRA file: see test_resume.py
    (tmp_path / "state.json").write_text("{}")
    assert plan(PARAMS_RESUME_FROM=str(tmp_path)).lora.resume_from == str(tmp_path)
    assert "PARAMS_RESUME_FROM" in refusal(PARAMS_RESUME_FROM=__file__)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_comes_with_its_defaults(name):
    made = plan(PARAMS_OPTIMIZER_TYPE=name).optim
    assert (made.learning_rate, made.args) == (OPTIMIZERS[name].learning_rate, OPTIMIZERS[name].defaults)


def test_prodigy_is_as_the_existing_interface_has_it():
    made = plan().optim
    assert (made.name, made.learning_rate, made.weight_decay) == ("prodigy", 1.0, 0.1)
    assert {"betas": [0.9, 0.999], "decouple": True, "d_coef": 2.0}.items() <= made.args.items()
    assert not made.args["use_bias_correction"] and not made.args["safeguard_warmup"]


def test_optimizer_arguments_are_added_to_the_defaults():
    args = plan(PARAMS_OPTIMIZER_ARGS="betas=0.8,0.99 slice_p=11", PARAMS_D_COEF="0.5").optim.args
    assert (args["betas"], args["slice_p"], args["d_coef"], args["decouple"]) == ([0.8, 0.99], 11, 0.5, True)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ("beta=0.9,0.99", "did you mean betas?"),
        ("lr=1", "PARAMS_LEARNING_RATE"),
        ("weight_decay=0", "PARAMS_WEIGHT_DECAY"),
        ("betas=0.9", "two numbers"),
        ("betas=0.9,2", "two numbers"),
        ("betas=fast", "two numbers"),
        ("decouple=1", "neither true nor false"),
        ("d_coef=True", "not a number"),
        ("slice_p=abc", "not a whole number"),
        ("slice_p=1,2", "not a whole number"),
        ("slice_p=0", "not a whole number, 1 to"),
        ("d0=0", "not a number, 1e-12 to 1"),
        ("eps=none", "not a number"),
        ("weight_decay=0.01", "set PARAMS_WEIGHT_DECAY=0.01"),
        ("learning_rate=1", "set PARAMS_LEARNING_RATE=1"),
        ("amsgrad=true", "is an argument of adamw, adamw8bit"),
        ("fsdp_in_use=true", "Kiln's own"),
    ],
)
def test_wrong_optimizer_arguments_are_refused(args, word):
    message = refusal(PARAMS_OPTIMIZER_ARGS=args)
    assert f"PARAMS_OPTIMIZER_ARGS: {args.split('=')[0]}=" in message and word in message


def test_an_argument_is_not_given_twice():
    assert "PARAMS_D_COEF" in refusal(PARAMS_OPTIMIZER_ARGS="d_coef=1", PARAMS_D_COEF="1")


def test_variables_of_other_optimizers_and_schedules_change_nothing_and_say_so():
    made = plan(PARAMS_OPTIMIZER_TYPE="adamw", PARAMS_D_COEF="1", PARAMS_NUM_CYCLES="2")
    assert made.optim.args == OPTIMIZERS["adamw"].defaults and made.optim.num_cycles == 1
    for variable in ("PARAMS_D_COEF=1", "PARAMS_NUM_CYCLES=2"):
        assert any(warning.startswith(f"{variable} has no effect: ") for warning in made.warnings)


@pytest.mark.parametrize(("epochs", "asked", "cycles"), [("auto", "", 1), ("2", "", 1), ("9", "", 3), ("9", "5", 5)])
def test_cycles_are_a_third_of_the_epochs(epochs, asked, cycles):
    scheduler = "cosine_with_restarts"
    made = plan(PARAMS_LEARNING_SCHEDULER=scheduler, PARAMS_MAX_EPOCHS=epochs, PARAMS_NUM_CYCLES=asked)
    assert made.optim.num_cycles == cycles


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedule_free_optimizers_take_no_schedule(scheduler):
    free = next(name for name, spec in OPTIMIZERS.items() if spec.schedule_free)
    options = {"PARAMS_OPTIMIZER_TYPE": free, "PARAMS_LEARNING_SCHEDULER": scheduler}
    if scheduler.startswith("constant"):
        assert plan(**options).optim.scheduler == scheduler
    else:
        assert f"PARAMS_LEARNING_SCHEDULER={scheduler}" in refusal(**options)


def test_a_warm_up_needs_a_schedule_that_has_one():
    assert "constant_with_warmup" in refusal(PARAMS_WARMUP_STEPS="10")
    made = plan(PARAMS_WARMUP_STEPS="10", PARAMS_LEARNING_SCHEDULER="constant_with_warmup")
    assert made.optim.warmup_steps == 10


@pytest.mark.parametrize("base", MODELS)
def test_the_timestep_sampling_is_one_of_the_familys(base):
    own = get_family(MODELS[base][0]).FACTS.timestep_samplings
    assert plan(on=LARGE_GPU, BASE_MODEL=base).train.timestep_sampling == own[0]
    for sampling in timestep_samplings():
        asked = {"on": LARGE_GPU, "BASE_MODEL": base, "PARAMS_TIMESTEP_SAMPLING": sampling}
        if sampling in own:
            assert plan(**asked).train.timestep_sampling == sampling
        else:
            assert f"PARAMS_TIMESTEP_SAMPLING='{sampling}' is not one of {base}" in refusal(**asked)


def test_validation_needs_pictures_that_are_held_out():
    assert "validation_split" in refusal(PARAMS_VALIDATE_EVERY_N_STEPS="10")
    made = plan(PARAMS_VALIDATE_EVERY_N_STEPS="10", config=config(validation_split=0.1))
    assert made.output.validate_every == 10


# ---- engine


def test_a_cpu_computes_in_full_precision_and_compiles_nothing():
    engine = plan(on=CPU).engine
    assert (engine.device, engine.precision, engine.compile) == ("cpu", "fp32", False)
    assert (engine.recompute, engine.offload) == ("none", "none")


def test_an_accelerator_computes_in_8_bits_where_it_has_them(monkeypatch):
    monkeypatch.setattr(flash_attention, "is_installed", lambda cache: False)
    engine = plan(on=LARGE_GPU, BASE_MODEL=FULL).engine
    assert (engine.device, engine.precision, engine.replay, engine.attention) == ("cuda", "fp8", True, "native")
    older = dataclasses.replace(LARGE_GPU, architecture="8.0")
    assert plan(on=older, BASE_MODEL=FULL).engine.precision == "bf16"


@pytest.mark.parametrize(
    ("base", "changes", "compiled"),
    [
        (FULL, {}, False),
        (FULL, {"PARAMS_PRECISION": "bf16"}, True),
        (FULL, {"PARAMS_GRADIENT_CHECKPOINTING": "true"}, False),  # but products
        (FULL, {"PARAMS_GRADIENT_CHECKPOINTING": "true", "PARAMS_PRECISION": "int8"}, True),
        (FULL, {"PARAMS_GRADIENT_CHECKPOINTING": "true", "PARAMS_OFFLOAD": "activations"}, True),
        (FULL, {"PARAMS_LORA_TYPE": "dora"}, True),
        (FULL, {"PARAMS_COMPILE": "true"}, True),
        ("sd3", {}, False),
        ("sd3", {"PARAMS_PRECISION": "bf16"}, True),
        ("sd3", {"PARAMS_COMPILE": "false"}, False),
        ("sdxl", {}, False),
        ("sdxl", {"PARAMS_GRADIENT_CHECKPOINTING": "true", "PARAMS_PRECISION": "bf16"}, False),
        ("mini-sd3", {}, True),
        # What is not recorded is compiled.
        ("sdxl", {"PARAMS_TEXT_ENCODER_LR": "1e-5", "PARAMS_OPTIMIZER_TYPE": "adamw"}, True),
        ("sdxl", {"PARAMS_GRADIENT_CHECKPOINTING": "true", "PARAMS_OFFLOAD": "weights"}, True),
        # What waits on the host is recorded as well.
        ("sdxl", {"PARAMS_GRADIENT_CHECKPOINTING": "true", "PARAMS_OFFLOAD": "activations"}, False),
        (FULL, {"PARAMS_TEXT_ENCODER_LR": "1e-5", "PARAMS_OPTIMIZER_TYPE": "adamw"}, True),
    ],
)
def test_what_is_recorded_is_compiled_where_that_saves_more(base, changes, compiled):
    assert plan(on=LARGE_GPU, BASE_MODEL=base, **changes).engine.compile is compiled
    unrecorded = Hardware("amd", "gfx942", 192.0, 1, "6.4", 500.0, 32)
    assert plan(on=unrecorded, BASE_MODEL=base).engine.compile is True
    assert plan(on=CPU, BASE_MODEL=base).engine.compile is False


def test_a_run_goes_on_where_there_is_less_memory_and_so_another_way():
    small = dataclasses.replace(LARGE_GPU, memory_gib=24.0)
    before, after = (plan(on=on, BASE_MODEL=FULL) for on in (LARGE_GPU, small))
    assert (before.engine.recompute, before.engine.compile) != (after.engine.recompute, after.engine.compile)
    assert changes(before.essence(), after).settings == ()


def test_a_miniature_gains_nothing_from_8_bits():
    assert plan(on=LARGE_GPU).engine.precision == "bf16"


def test_what_the_hardware_cannot_do_is_refused():
    old = dataclasses.replace(SMALL_GPU, architecture="7.5")
    assert "PARAMS_PRECISION='bf16'" in refusal(on=old, PARAMS_PRECISION="bf16")
    assert "it needs tensor cores for FP8: compute capability 8.9" in refusal(on=old, PARAMS_PRECISION="fp8")


@pytest.mark.parametrize(
    ("hardware", "limit", "batch", "recompute", "offload"),
    [
        (LARGE_GPU, "", "1", "none", "none"),
        (LARGE_GPU, "19", "4", "attention", "activations"),
        (LARGE_GPU, "16", "4", "all", "weights"),
        (LARGE_GPU, "", "16", "attention", "none"),
        (SMALL_GPU, "", "1", "attention", "none"),
    ],
)
def test_it_recomputes_where_memory_is_short(hardware, limit, batch, recompute, offload):
    made = plan(on=hardware, BASE_MODEL="flux", MEMORY_LIMIT_GIB=limit, PARAMS_BATCH_SIZE=batch)
    assert (made.engine.recompute, made.engine.offload) == (recompute, offload)
    said = r"^PARAMS_GRADIENT_CHECKPOINTING: (true|false) \(a step is predicted to take .* GiB\)$"
    assert re.search(said, "\n".join(made.reasons), re.MULTILINE)


def test_a_home_machine_trains_flux_in_8_gib():
    made = plan(on=HOME, BASE_MODEL="flux", PARAMS_RESOLUTION="512", PARAMS_OPTIMIZER_TYPE="adamw8bit")
    engine, told = made.engine, "\n".join([*made.reasons, *made.details])
    assert (engine.precision, engine.offload, engine.stream_encoders, engine.tile_vae) == (
        "fp8",
        "weights",
        True,
        False,
    )
    assert re.search(
        r"Peaks predicted, in GiB of 8: texts \d\.\d, latents \d\.\d, training \d\.\d, samples \d\.\d\.", told
    )
    (too_large,) = re.findall(r"Faster, but too large: (.*)\.\n", told)
    assert too_large.count(" GiB") == 3 and "layer by layer" in told  # the nearest, of many


def test_a_dora_adapter_needs_its_weights_there():
    one = {"on": HOME, "BASE_MODEL": "flux", "PARAMS_LORA_TYPE": "dora", "PARAMS_RESOLUTION": "512"}
    assert plan(**one).engine.offload != "weights"
    assert "PARAMS_LORA_TYPE=dora" in refusal(**one, PARAMS_OFFLOAD="weights")


def test_a_batch_for_several_sizes_is_that_of_the_largest():
    sizes = [{"batch_size": 8}, {"batch_size": 1, "resolution": 1024}]
    several = {"general": {"resolution": 512}, "datasets": [{**size, "subsets": [{}]} for size in sizes]}
    made = plan(on=LARGE_GPU, BASE_MODEL="flux", PARAMS_BATCH_SIZE="auto", config=several)
    alone = plan(on=LARGE_GPU, BASE_MODEL="flux", PARAMS_BATCH_SIZE="auto", PARAMS_RESOLUTION="1024")
    assert {d.batch_size for d in made.data.datasets} == {alone.data.datasets[0].batch_size}


def test_the_tokens_of_texts_count_for_the_largest_batch():
    few, many = (
        {"batch_size": 1, "resolution": 1024},
        {"batch_size": 12, "resolution": 256},
    )  # 4.5 and 9 thousand tokens

    def way(*sizes):
        config = {"datasets": [{**size, "subsets": [{}]} for size in sizes]}
        engine = plan(on=SMALL_GPU, BASE_MODEL="flux", config=config).engine
        return engine.recompute, engine.kept_blocks, engine.offload

    assert way(few, many) == way(many) != way(few)


def test_the_batch_that_is_fastest_is_chosen_and_said():
    made = plan(on=LARGE_GPU, BASE_MODEL="flux", PARAMS_BATCH_SIZE="auto")
    (dataset,) = made.data.datasets
    assert dataset.batch_size > 1 and f"PARAMS_BATCH_SIZE: {dataset.batch_size} (most images" in "\n".join(made.reasons)
    assert (
        plan(on=CPU, PARAMS_BATCH_SIZE="auto").data.datasets[0].batch_size == plan(on=CPU).data.datasets[0].batch_size
    )


@pytest.mark.parametrize("asked", ["activations", "weights"])
def test_a_cpu_has_nowhere_to_send_anything(asked):
    assert f"PARAMS_OFFLOAD={asked}" in refusal(on=CPU, PARAMS_OFFLOAD=asked)


def test_activations_have_16_bits_of_the_kind_that_the_hardware_has():
    turing = dataclasses.replace(SMALL_GPU, architecture="7.5")
    assert plan(on=turing, BASE_MODEL="flux", PARAMS_PRECISION="int8").engine.dtype == "float16"
    assert plan(on=LARGE_GPU, BASE_MODEL="flux", PARAMS_PRECISION="int8").engine.dtype == "bfloat16"
    assert plan(on=CPU).engine.dtype == "float32"


def test_what_the_user_says_about_it_is_done():
    assert plan(on=LARGE_GPU, BASE_MODEL="flux", PARAMS_GRADIENT_CHECKPOINTING="true").engine.recompute != "none"
    assert plan(on=SMALL_GPU, BASE_MODEL=FULL, PARAMS_GRADIENT_CHECKPOINTING="false").engine.recompute == "none"
    asked = plan(on=LARGE_GPU, BASE_MODEL="flux", PARAMS_OFFLOAD="activations").engine
    assert (asked.recompute, asked.offload) == ("attention", "activations")
    both = {"PARAMS_OFFLOAD": "activations", "PARAMS_GRADIENT_CHECKPOINTING": "false"}
    assert "PARAMS_OFFLOAD=activations" in refusal(on=LARGE_GPU, BASE_MODEL="flux", **both)


def test_a_backend_that_is_not_there_is_refused_and_the_cpu_always_is():
    assert "BACKEND='cuda'" in refusal(on=CPU, BACKEND="cuda")
    assert plan(on=LARGE_GPU, BACKEND="cpu").engine.device == "cpu"


# ---- output, prompts


def test_the_name_tells_the_job_and_the_start():
    made = plan()
    assert re.fullmatch(r"[0-9a-f]{8}-20260102-030405", made.output.name)
    assert made.output.started == int(NOW.timestamp())
    assert plan(OUTPUT_PATH="/elsewhere").output.name == made.output.name
    assert plan(PARAMS_SEED="1").output.name != made.output.name
    assert plan(OUTPUT_NAME="mine").output.name == "mine"


def test_a_prompt_is_completed_from_the_model_and_the_seed():
    facts = get_family(MODELS[MINI][0]).FACTS
    first, second = plan(prompts=["a cat", "a dog"], PARAMS_SEED="7", PARAMS_RESOLUTION="144x96").prompts
    assert (first.text, first.width, first.height) == ("a cat", 144, 96)
    assert (first.steps, first.guidance, first.cfg) == (facts.prompt_steps, facts.prompt_guidance, facts.prompt_cfg)
    assert (first.seed, second.seed, first.negative) == (7, 8, "")


ESTABLISHED = {"flux": (20, 1.0), "sd3": (28, 5.0), "sdxl": (30, 7.0)}  # steps, classifier-free guidance


@pytest.mark.parametrize("base", ["flux", "flux-krea", "sd3", "sd3.5-medium", "sd3.5-large", "sdxl"])
def test_the_defaults_of_prompts_are_the_established_ones(base):
    (made,) = plan(on=LARGE_GPU, BASE_MODEL=base, prompts=["a cat"]).prompts
    assert (made.steps, made.cfg) == ESTABLISHED[MODELS[base][0]] and (made.width, made.height) == (1024, 1024)
    if MODELS[base][0] == "flux":
        assert made.guidance == 3.5


def test_flags_stay_and_sides_are_rounded_down():
    side = MULTIPLE * 5
    (made,) = plan(prompts=[f"a cat --w {side + 1} --h {side - 1} --d 3 --s 2 --l 1.5 --g 0 --n dark"]).prompts
    assert (made.width, made.height, made.seed, made.steps) == (side, side - MULTIPLE, 3, 2)
    assert (made.cfg, made.guidance, made.negative) == (1.5, 0.0, "dark")


def test_a_side_that_is_rounded_down_is_said():
    made = plan(prompts=["a cat", f"a dog --w {MULTIPLE * 5 + 1} --h {MULTIPLE * 4}"])
    said = [reason for reason in made.reasons if "becomes" in reason]
    assert said == [
        f"SAMPLE_PROMPTS, prompts[1]: width {MULTIPLE * 5 + 1} becomes {MULTIPLE * 5}, a multiple of {MULTIPLE}",
    ]


@pytest.mark.parametrize(
    ("base", "idle"),
    [("z-image", True), ("flux2-klein-4b", True), ("sdxl", True), ("flux-schnell", True), ("flux", False)],
)
def test_guidance_that_a_model_does_not_read_is_said_of_each_prompt(base, idle):
    prompts = ["a cat --g 4", "a dog", {"prompt": "a fox", "guidance_scale": 3.5}, "a hen --guidance_scale 1"]
    made = plan(on=LARGE_GPU, BASE_MODEL=base, prompts=prompts)
    said = [warning for warning in made.warnings if "embedded guidance" in warning]
    because = "has no effect: this model has no embedded guidance. Fix: --l, its classifier-free guidance."
    assert (
        said
        == [f"SAMPLE_PROMPTS, prompts[0]: --g 4 {because}", f"SAMPLE_PROMPTS, prompts[2]: --g 3.5 {because}"] * idle
    )


@pytest.mark.parametrize("base", MODELS)
def test_a_model_may_have_defaults_of_its_own(base):
    (made,) = plan(BASE_MODEL=base, prompts=["a cat"], on=LARGE_GPU).prompts
    assert MODELS[base][1].defaults.items() <= dataclasses.asdict(made).items()


def test_the_trigger_word_goes_before_the_packaged_prompts_alone():
    assert all(p.text.startswith("sks, ") for p in plan(TRIGGER_WORD="sks").prompts)
    assert plan(TRIGGER_WORD="sks", prompts=["a cat"]).prompts[0].text == "a cat"


def test_a_prompt_has_the_trigger_word_where_it_wants_it():
    prompts = ["[trigger] on a bench --n [Trigger], dark"]
    made = plan(TRIGGER_WORD="sks", prompts=prompts)
    assert (made.prompts[0].text, made.prompts[0].negative) == ("sks on a bench", "sks, dark")
    assert made.warnings == ()
    subsets = [{"is_reg": True, "trigger_word": ""}, {"trigger_word": "zot"}]
    own = {"datasets": [{"resolution": 512, "subsets": subsets}]}
    assert plan(config=own, prompts=prompts).prompts[0].text == "zot on a bench"
    assert all(p.text.startswith("zot, ") for p in plan(config=own).prompts)
    (warning,) = plan(prompts=prompts).warnings
    assert "[trigger] in it, which stays as it is" in warning


# ---- anything at all


@given(
    st.dictionaries(
        st.sampled_from(NAMES), st.text(max_size=20) | st.sampled_from(["1", "true", "auto", "512", "a.zip"])
    )
)
@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_settings_make_a_plan_or_a_settings_error(variables):
    variables = {k: v for k, v in variables.items() if k not in ("DATASET_CONFIG", "SAMPLE_PROMPTS", "HF_TOKEN_FILE")}
    try:
        made = plan(**variables)
    except SettingsError:
        return
    assert Plan.from_json(made.to_json()) == made


# ---- what only some models have

OBJECTIVES = {get_family(name).FACTS.objective: base for base, (name, _) in sorted(MODELS.items())}


@pytest.mark.parametrize(
    ("objective", "name", "value"),
    [
        ("flow", "PARAMS_MIN_SNR_GAMMA", "5"),
        ("flow", "PARAMS_PREDICTION_TYPE", "v_prediction"),
        ("flow", "PARAMS_ZERO_TERMINAL_SNR", "true"),
        ("flow", "PARAMS_ZERO_TERMINAL_SNR", "false"),
        ("denoising", "PARAMS_LOSS_WEIGHTING", "cosmap"),
        ("denoising", "PARAMS_DISCRETE_FLOW_SHIFT", "3"),
        ("denoising", "PARAMS_TIMESTEP_SAMPLING", "sigmoid"),
    ],
)
def test_what_the_objective_has_not_is_refused_with_the_variable(objective, name, value):
    base = OBJECTIVES[objective]
    message = refusal(BASE_MODEL=base, **{name: value})
    assert name in message and value in message and base in message


def test_what_the_objective_has_is_planned():
    asked = {"PARAMS_MIN_SNR_GAMMA": "5", "PARAMS_PREDICTION_TYPE": "v_prediction", "PARAMS_ZERO_TERMINAL_SNR": "true"}
    train = plan(BASE_MODEL=OBJECTIVES["denoising"], **asked).train
    assert (train.min_snr_gamma, train.prediction_type, train.zero_terminal_snr) == (5.0, "v_prediction", True)
    train = plan(BASE_MODEL=OBJECTIVES["denoising"], PARAMS_MIN_SNR_GAMMA="0").train
    assert (train.min_snr_gamma, train.prediction_type, train.zero_terminal_snr) == (0.0, "auto", None)


def test_without_signal_there_is_no_noise_to_predict():
    asked = {"PARAMS_PREDICTION_TYPE": "epsilon", "PARAMS_ZERO_TERMINAL_SNR": "true"}
    assert "PARAMS_ZERO_TERMINAL_SNR" in refusal(BASE_MODEL=OBJECTIVES["denoising"], **asked)


def test_the_shift_is_the_models_or_the_users():
    for base, (name, _) in MODELS.items():
        facts = get_family(name).FACTS
        if "shift" in facts.timestep_samplings:
            made = plan(BASE_MODEL=base, PARAMS_TIMESTEP_SAMPLING="shift")
            assert made.train.discrete_flow_shift == facts.flow_shift
            assert any(r.startswith("PARAMS_DISCRETE_FLOW_SHIFT") for r in made.reasons)
            assert plan(BASE_MODEL=base, PARAMS_DISCRETE_FLOW_SHIFT="2").train.discrete_flow_shift == 2


def test_another_attention_needs_a_model_that_can_switch():
    for base, (name, _) in MODELS.items():
        if get_family(name).FACTS.attention_backends:
            assert plan(BASE_MODEL=base, PARAMS_ATTENTION="flex").engine.attention == "flex"
        else:
            assert "PARAMS_ATTENTION" in refusal(BASE_MODEL=base, PARAMS_ATTENTION="flex")
            assert plan(BASE_MODEL=base, PARAMS_ATTENTION="native").engine.attention == "native"


def test_attention_without_masks_is_refused_where_captions_are_masked():
    for base, (name, _) in MODELS.items():
        facts = get_family(name).FACTS
        if facts.masks_captions:
            said = refusal(BASE_MODEL=base, PARAMS_ATTENTION="_native_flash")
            assert f"PARAMS_ATTENTION=_native_flash takes no mask, and {base} masks" in said
            assert "Fix: set PARAMS_ATTENTION=auto." in said
        elif facts.attention_backends:
            assert plan(BASE_MODEL=base, PARAMS_ATTENTION="_native_flash").engine.attention == "_native_flash"


def test_a_rate_for_text_encoders_that_are_never_trained_is_refused():
    for base, (name, _) in MODELS.items():
        if trainable_encoders(name):
            continue
        for rates in ("1e-4", "1e-4,0"):
            said = refusal(BASE_MODEL=base, PARAMS_TEXT_ENCODER_LR=rates, PARAMS_OPTIMIZER_TYPE="adamw")
            shown = rates.replace("1e-4", "0.0001")
            assert f"PARAMS_TEXT_ENCODER_LR={shown}: {base}'s text encoder is not trained. Fix: remove it." in said
        made = plan(on=LARGE_GPU, BASE_MODEL=base, PARAMS_TEXT_ENCODER_LR="0,0")
        assert made.engine.replay and made.optim.text_encoders == {}


def test_a_length_for_clip_is_refused_with_what_the_model_reads_by():
    for base, (name, _) in MODELS.items():
        facts = facts_of(name, base)
        if 225 in facts.max_token_lengths:
            continue
        said = refusal(BASE_MODEL=base, PARAMS_MAX_TOKEN_LENGTH="225")
        reader, tokens = next(iter(facts.text_readers.values()))
        assert f"in {base}, {reader} reads {tokens} tokens of a caption" in said
        assert ("CLIP gives a summary of its beginning" in said) == (reader == "T5")
