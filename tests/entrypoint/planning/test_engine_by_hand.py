"""What the hardware is used for, with a model of round numbers: every peak and every choice was worked out by hand.

ROUND has 8 GiB of weights in blocks and 1 outside, a quarter of a GiB of trained numbers at rank 16, ten blocks, 512
tokens of text. In GiB: fp8 takes 11.08 for weights and 4 for AdamW; each kilotoken 0.125 and what is kept: 4 of
everything, 2 of products, 1 of attention, 0.5 where all is recomputed; 0.375 and 0.3125 where that is offloaded.
"""

import dataclasses

import pytest

from entrypoint.fetch import flash_attention
from entrypoint.planning import engine_choice
from entrypoint.settings.checks import Notes
from entrypoint.settings.read import read_settings
from entrypoint.system.hardware import Hardware
from tests.support.machines import CPU, GIB, ROUND
from trainer.spec.family import BaseModel, get_family
from trainer.spec.memory_model import Strategy, Workload
from trainer.spec.plan import Dataset, Prompt, Source, Subset

MODEL = BaseModel("org/round", 20.0, ROUND)
# A twentieth of the weights: 1 GiB in blocks, an eighth outside.
SMALL = BaseModel(
    "org/small",
    2.0,
    dataclasses.replace(
        ROUND, block_weights=GIB, other_weights=GIB / 8, fp8_weights=0.75 * GIB, encoder_weights=GIB / 4
    ),
)
PLAIN = Subset(Source("hub", "org/pictures"))
DRAWN = Subset(Source("generated", "a cat", count=5), is_reg=True)


def card(gib, **changes):
    return dataclasses.replace(Hardware("nvidia", "9.0", gib, 1, "580.1", 500.0, 32), **changes)


def data(width, height, batch=1, subset=PLAIN):
    return Dataset((subset,), (width, height), batch)


def prompt(width, height):
    return Prompt("a cat", width, height, 7, 20, 3.5, 1.0)


class Planned:
    """The plan for the engine, what was refused, and the reasons by their first words."""

    def __init__(self, on, *datasets, model=MODEL, rank=16, prompts=(), family="flux", **variables):
        asked = {"BASE_MODEL": "flux", "DATASET_NAME": "org/pictures", "PARAMS_OPTIMIZER_TYPE": "adamw", **variables}
        notes = Notes()
        settings = read_settings(asked)
        self.engine, self.datasets = engine_choice.engine_plan(
            settings,
            on,
            facts=get_family(family).FACTS,
            model=model,
            datasets=datasets or (data(1024, 512, 2),),
            rank=rank,
            trains_text=any(settings.training.text_encoder_lr),
            prompts=tuple(prompts),
            notes=notes,
        )
        self.refused = notes.lines
        self.reasons = notes.reasons
        self.details = notes.details

    def said(self, start):
        told = [*self.reasons, *self.details]
        return [reason.removeprefix(start).strip() for reason in told if reason.startswith(start)]

    @property
    def mode(self):
        return self.engine.precision, self.engine.recompute, self.engine.kept_blocks, self.engine.offload


@pytest.fixture(autouse=True)
def torchs_own_attention(monkeypatch):
    monkeypatch.setattr(flash_attention, "is_installed", lambda cache: False)


# ---- memory


def test_a_plan_and_all_its_reasons():
    """5 kilotokens: 35.7 GiB, 25.7 with products, 20.7 with attention; 22.3 of 24 may be filled."""
    planned = Planned(card(24.0), prompts=[prompt(1024, 1024), prompt(512, 512)])
    assert planned.mode == ("fp8", "attention", 0, "none") and not planned.refused
    assert planned.reasons == [
        "BACKEND: cuda (1 × nvidia 9.0, 24 GiB each)",
        "PARAMS_ATTENTION: native (torch picks the kernel; flash_4 is faster here, and PARAMS_ATTENTION=flash_4 "
        "installs it)",
        "PARAMS_PRECISION: fp8 (fastest for 1 × nvidia 9.0, 24 GiB each)",
        "PARAMS_GRADIENT_CHECKPOINTING: true (a step is predicted to take 20.7 of 24 GiB)",
        "PARAMS_OFFLOAD: none (a step is predicted to take 20.7 of 24 GiB)",
        # 6 + 0.5; 0.31 + 2.6 for each 2^20 of four images; 11.08 + 4 + 0.31 + 3.2.
        "Peaks predicted, in GiB of 24: texts 6.5, latents 5.5, training 20.7, samples 18.6.",
        "Memory mode for steps of 2 images: fp8, all but attention recomputed: 20.7 GiB.",
        "PARAMS_COMPILE: false (steps are captured as CUDA graphs, and their kernels are fused already)",
    ]
    assert planned.details[:4] == [
        "Faster, but too large: fp8, everything kept: 35.7 GiB; fp8, all but products recomputed: 25.7 GiB.",
        "Memory mode, by preference: fp8, everything kept: 35.7 GiB.",
        "Memory mode, by preference: fp8, all but products recomputed: 25.7 GiB.",
        "Memory mode, by preference: fp8, all but attention recomputed: 20.7 GiB (chosen).",
    ]
    engine = planned.engine
    assert (engine.device, engine.dtype, engine.compile, engine.replay) == ("cuda", "bfloat16", False, True)
    assert (engine.host_gib, engine.stream_encoders, engine.tile_vae, engine.turned_weights) == (
        250.0,
        False,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("optimizer", "args", "decay", "trained"),
    [
        ("adamw", "amsgrad=true", "0", 5.0),
        ("adafactor", "", "0", 2.0625),
        ("adafactor", "beta1=0.9", "0", 3.0625),
        ("adamw", "", "0.9", 5.0),
    ],
)
def test_the_state_of_the_optimiser_its_arguments_and_an_average_are_counted(optimizer, args, decay, trained):
    """A quarter of a GiB of numbers at rank 16; with AdamW alone it is 4 GiB, and 32.3 in all."""
    variables = {"PARAMS_OPTIMIZER_TYPE": optimizer, "PARAMS_OPTIMIZER_ARGS": args, "PARAMS_EMA_DECAY": decay}
    planned = Planned(card(139.0), data(1024, 512), **variables)
    gib = 18 + trained + 2.5 * 4.125
    assert planned.said("Memory mode for steps of 1 image:") == [
        f"fp8, everything kept, transposed weight copies: {gib:.1f} GiB."
    ]


def test_where_everything_fits_it_is_kept_with_copies_and_nothing_is_compiled():
    """A single image has 2.5 kilotokens: 18 GiB with copies, 4, and 10.3."""
    planned = Planned(card(139.0), data(1024, 512), prompts=[prompt(1024, 1024)])
    assert planned.mode == ("fp8", "none", 0, "none") and planned.engine.turned_weights and not planned.engine.compile
    assert planned.said("Memory mode for steps of 1 image:") == [
        "fp8, everything kept, transposed weight copies: 32.3 GiB."
    ]
    assert not planned.said("Faster, but too large")
    assert planned.said("PARAMS_COMPILE:") == [
        "false (steps are captured as CUDA graphs, and their kernels are fused already)"
    ]
    assert planned.said("PARAMS_GRADIENT_CHECKPOINTING:") == ["false (a step is predicted to take 32.3 of 139 GiB)"]


def test_only_the_nearest_faster_modes_are_named():
    planned = Planned(card(12.5))
    assert planned.mode == ("fp8", "all", 0, "weights")  # 11.46 of 11.6
    (said,) = planned.said("Faster, but too large:")
    assert [words.split(":")[0] for words in said.split("; ")] == [
        "fp8, all but attention recomputed, activations offloaded",
        "fp8, all recomputed",
        "fp8, all recomputed, activations offloaded",
    ]
    assert not planned.engine.turned_weights and planned.engine.compile


@pytest.mark.parametrize(
    ("limit", "mode"),
    [
        ("", ("fp8", "none", 0, "none")),
        ("24", ("fp8", "attention", 0, "none")),
        ("200", ("fp8", "none", 0, "none")),  # more than there is
        ("30", ("fp8", "products", 0, "none")),  # 27.9 of 25.7, and a graph takes 2
        ("31.1", ("fp8", "products", 1, "none")),  # a GiB for each block
    ],
)
def test_a_limit_of_memory_is_what_there_is(limit, mode):
    planned = Planned(card(139.0), MEMORY_LIMIT_GIB=limit)
    assert planned.mode == mode and planned.engine.memory_limit_gib == (float(limit) if limit else None)


def test_without_a_graph_its_memory_is_spent_too():
    """Text encoders that train cannot be captured: 27.9 - 25.7 GiB are two blocks."""
    planned = Planned(card(30.0), PARAMS_TEXT_ENCODER_LR="1e-5")
    assert planned.mode == ("fp8", "products", 2, "none")
    assert (planned.engine.replay, planned.engine.compile) == (False, True)


@pytest.mark.parametrize(
    ("variables", "gib", "mode"),
    [
        # Half of the host's memory may be pinned, a part of it for each process: 5 GiB of attention, or 2.5.
        ({}, 10.0, ("fp8", "attention", 0, "activations")),
        ({}, 9.9, ("fp8", "all", 0, "activations")),
        ({"NUM_GPUS": "2"}, 20.0, ("fp8", "attention", 0, "activations")),
        ({"NUM_GPUS": "2"}, 19.9, ("fp8", "all", 0, "activations")),
        ({"PARAMS_COMPILE": "false"}, 500.0, ("fp8", "all", 0, "activations")),  # needs the compiler
    ],
)
def test_the_hosts_memory_is_what_is_offloaded_to(variables, gib, mode):
    """17.6 and 17.3 GiB, where 18.5 x 0.97 = 17.9 may be filled."""
    planned = Planned(card(18.5, host_memory_gib=gib, count=2), **variables)
    assert planned.mode == mode


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, ("all", "activations")),  # SDXL is captured and not compiled, which offloading attention's outputs needs
        ({"PARAMS_COMPILE": "true"}, ("attention", "activations")),
        ({"PARAMS_TEXT_ENCODER_LR": "1e-5,0"}, ("attention", "activations")),  # not captured, and so compiled
        ({"PARAMS_TEXT_ENCODER_LR": "0,0"}, ("all", "activations")),
    ],
)
def test_what_needs_the_compiler_is_taken_where_it_may_run(variables, mode):
    planned = Planned(card(18.5), family="sdxl", BASE_MODEL="sdxl", **variables)
    assert (planned.engine.recompute, planned.engine.offload) == mode


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({"PARAMS_GRADIENT_CHECKPOINTING": "true"}, ("fp8", "products", 10, "none")),
        ({"PARAMS_GRADIENT_CHECKPOINTING": "false"}, ("fp8", "none", 0, "none")),
        ({"PARAMS_OFFLOAD": "activations"}, ("fp8", "attention", 0, "activations")),
        ({"PARAMS_OFFLOAD": "weights"}, ("fp8", "all", 0, "weights")),
        ({"PARAMS_OFFLOAD": "none"}, ("fp8", "none", 0, "none")),
        ({"PARAMS_PRECISION": "nf4"}, ("nf4", "none", 0, "none")),
        ({"PARAMS_PRECISION": "bf16", "PARAMS_OFFLOAD": "activations"}, ("bf16", "attention", 0, "activations")),
    ],
)
def test_what_is_set_is_done_and_has_no_reason(variables, mode):
    planned = Planned(card(139.0), **variables)
    assert planned.mode == mode
    for variable in ("PARAMS_PRECISION", "PARAMS_GRADIENT_CHECKPOINTING", "PARAMS_OFFLOAD"):
        assert bool(planned.said(f"{variable}:")) == (variable not in variables)


def test_dora_needs_its_weights_on_the_device():
    planned = Planned(card(12.0), PARAMS_LORA_TYPE="dora")
    assert planned.engine.offload != "weights"
    refused = "PARAMS_OFFLOAD=weights does not work with PARAMS_LORA_TYPE=dora"
    planned = Planned(card(12.0), PARAMS_LORA_TYPE="dora", PARAMS_OFFLOAD="weights")
    assert any(refused in line for line in planned.refused)
    both = {"PARAMS_OFFLOAD": "activations", "PARAMS_GRADIENT_CHECKPOINTING": "false"}
    assert any("PARAMS_OFFLOAD=activations needs" in line for line in Planned(card(139.0), **both).refused)


def several(gib, count, **fields):
    return dataclasses.replace(card(gib), count=count, **fields)


def test_the_weights_are_sharded_over_the_gpus_of_a_job_where_one_does_not_hold_them():
    """Where a single card would stream them from the host."""
    assert (
        Planned(several(16.5, 4)).engine.offload == Planned(several(16.5, 4), NUM_GPUS="1").engine.offload == "weights"
    )
    planned = Planned(several(16.5, 4), NUM_GPUS="4")
    assert planned.mode == ("fp8", "all", 0, "shards") and planned.engine.replay and not planned.refused
    assert planned.said("PARAMS_OFFLOAD: shards")  # a line of the log with the reason
    # One that holds them all keeps them.
    assert Planned(several(139.0, 4), NUM_GPUS="4").engine.offload == "none"
    # GPUs that do not read each other's memory have the host's.
    apart = several(16.5, 4, reading_each_other=1)
    assert Planned(apart, NUM_GPUS="4").engine.offload == "weights"
    (line,) = Planned(apart, NUM_GPUS="4", PARAMS_OFFLOAD="shards").refused
    assert "cannot read each other's memory. Fix: set PARAMS_OFFLOAD=auto" in line


def test_the_gpus_that_the_job_takes_read_each_others_memory():
    """Of four, the first two do; the job takes the first ones. The host has no memory for weights or activations."""
    pairs = several(19.0, 4, reading_each_other=2, host_memory_gib=4.0)
    assert Planned(pairs, NUM_GPUS="2").engine.offload == "shards"
    asked = {"PARAMS_OFFLOAD": "shards", "PARAMS_PRECISION": "fp8"}
    assert Planned(pairs, NUM_GPUS="3", PARAMS_PRECISION="fp8").engine.offload == "none"
    assert not Planned(pairs, NUM_GPUS="2", **asked).refused
    line = Planned(pairs, NUM_GPUS="3", **asked).refused[0]
    assert "by their driver, the first 3 of 4 × nvidia 9.0, 19 GiB each, cannot read each other's memory" in line


@pytest.mark.parametrize(
    ("variables", "is_refused"),
    [
        ({}, False),
        ({"PARAMS_OFFLOAD": "shards"}, False),
        ({"PARAMS_OFFLOAD": "none"}, True),
        ({"PARAMS_OFFLOAD": "activations"}, True),
        ({"PARAMS_LORA_TYPE": "dora"}, True),
    ],
)
def test_what_fits_with_shards_alone_is_refused_where_there_are_none(variables, is_refused):
    """The host has no memory for weights: each of four GPUs takes 14.7 GiB with shards, and 18.2 without."""
    asked = {"NUM_GPUS": "4", "PARAMS_PRECISION": "fp8", **variables}
    planned = Planned(several(16.0, 4, host_memory_gib=4.0), **asked)
    assert bool(planned.refused) == is_refused, planned.refused
    if is_refused:
        assert "in the most frugal mode, and the card has 16 GiB" in planned.refused[0]


def test_sharded_weights_are_refused_where_they_cannot_be():
    (line,) = Planned(several(139.0, 4), PARAMS_OFFLOAD="shards").refused
    assert line.startswith("PARAMS_OFFLOAD=shards spreads the weights over the GPUs of a job, and this job has one.")
    both = {"PARAMS_OFFLOAD": "shards", "NUM_GPUS": "2"}
    (line,) = Planned(several(139.0, 4), **both, PARAMS_LORA_TYPE="dora").refused
    assert line == "PARAMS_OFFLOAD=shards does not work with PARAMS_LORA_TYPE=dora. Fix: change one of them."
    assert Planned(several(139.0, 4), **both).mode == ("fp8", "none", 0, "shards")
    mini = dataclasses.replace(MODEL, footprint=None)
    assert Planned(several(24.0, 2), model=mini, **both).mode == ("bf16", "none", 0, "shards")
    assert Planned(CPU, model=mini, **both).mode == ("fp32", "none", 0, "shards")  # to try it out


# ---- the other phases


@pytest.mark.parametrize(
    ("variables", "datasets", "samples"),
    [
        ({}, [data(1024, 512)], 15.39 + 3.2 * 2),  # the largest prompt, 2,048 x 1,024
        ({"PARAMS_SAMPLE_EVERY_N_STEPS": "0"}, [data(1024, 512)], 15.39),
        ({"PARAMS_SAMPLE_EVERY_N_STEPS": "0"}, [data(512, 512, 1, DRAWN), data(1024, 512)], 15.39 + 3.2 / 4),
        ({}, [data(2048, 2048, 1, DRAWN)], 15.39 + 3.2 * 4),  # class images
        ({}, [Dataset((PLAIN, DRAWN), (2048, 2048), 1)], 15.39 + 3.2 * 4),
    ],
)
def test_the_largest_image_that_is_drawn_counts(variables, datasets, samples):
    planned = Planned(card(139.0), *datasets, prompts=[prompt(512, 512), prompt(2048, 1024)],
                      PARAMS_GRADIENT_CHECKPOINTING="true", **variables)  # fmt: skip
    (said,) = planned.said("Peaks predicted, in GiB of 139:")
    assert said.endswith(f"samples {samples:.1f}.")


def test_a_job_that_draws_nothing_has_no_largest_image():
    asked = {"BASE_MODEL": "flux", "DATASET_NAME": "org/pictures", "PARAMS_SAMPLE_EVERY_N_STEPS": "0"}
    assert engine_choice._largest_sample(read_settings(asked), [data(512, 512)], [prompt(512, 512)]) == 0


def test_phases_that_are_too_large_are_streamed_and_tiled():
    encoders = dataclasses.replace(MODEL, footprint=dataclasses.replace(ROUND, encoder_weights=20 * GIB))
    planned = Planned(card(24.0), model=encoders)
    assert (planned.engine.stream_encoders, planned.engine.tile_vae) == (True, False)
    assert planned.said("Peaks predicted, in GiB of 24: texts 3.8, ")  # 40 / 12 + 0.5
    assert planned.said("The text encoders come to the device layer by layer.") == [""]
    assert not planned.said("Samples are decoded in tiles")

    encoders = dataclasses.replace(MODEL, footprint=dataclasses.replace(ROUND, encoder_weights=11.25 * GIB))
    assert Planned(card(24.0), model=encoders).engine.stream_encoders  # 23 GiB, of which 22.3 may be filled

    planned = Planned(card(24.0), prompts=[prompt(2048, 2048)])  # 28.2 to decode at once
    assert (planned.engine.stream_encoders, planned.engine.tile_vae) == (False, True)
    assert planned.said("Peaks predicted, in GiB of 24: texts 6.5, latents 1.6, training 20.7, samples 16.4.") == [""]
    assert planned.said("Samples are decoded in tiles, and images encoded one by one.") == [""]

    planned = Planned(card(5.0), data(1024, 512), data(512, 512), model=SMALL, rank=1)  # 5.5 to encode four images
    assert planned.engine.tile_vae and not planned.engine.stream_encoders and not planned.refused


def test_phases_that_fill_the_usable_share_to_the_last_byte_fit():
    """6.5 GiB for the captions; 5.51 for four images at once."""
    assert 6.5 / 0.93 * 0.93 == 6.5 and not Planned(card(6.5 / 0.93)).engine.stream_encoders
    assert Planned(card(6.5 / 0.9301)).engine.stream_encoders
    latents = 0.31 + 2.6 * 2
    assert latents / 0.93 * 0.93 == latents and not Planned(card(latents / 0.93), model=SMALL, rank=1).engine.tile_vae
    assert Planned(card(latents / 0.9301), model=SMALL, rank=1).engine.tile_vae


def test_the_largest_image_is_encoded():
    planned = Planned(card(139.0), data(512, 512), data(2048, 2048))
    assert planned.said("Peaks predicted, in GiB of 139: texts 6.5, latents 10.7, ")


# ---- the batch


def test_the_batch_is_worked_out():
    """12 on a large card (three per cent more images than 6; 8 and 16 are too little), 4 where 6 would fill it."""
    large = Planned(card(139.0), data(1024, 512, 3), data(512, 512, 5), PARAMS_BATCH_SIZE="auto")
    assert [dataset.batch_size for dataset in large.datasets] == [12, 12]
    assert large.mode == ("fp8", "products", 8, "none")
    assert large.said("PARAMS_BATCH_SIZE:") == ["12 (most images per second that fit in memory)"]
    small = Planned(card(24.0), data(1024, 512, 3), PARAMS_BATCH_SIZE="auto")
    assert [dataset.batch_size for dataset in small.datasets] == [4]
    assert small.mode == ("fp8", "attention", 0, "activations")


def test_no_batch_is_worth_fewer_bits_or_the_last_of_the_memory():
    def tried(*found):
        return [(Workload(1, batch, 16, "adamw"), Strategy(precision, "all", 0, "none", gib))
                for batch, precision, gib in found]  # fmt: skip

    several = tried((1, "fp8", 5.0), (2, "fp8", 9.3), (3, "fp8", 9.31), (4, "nf4", 6.0), (6, "fp8", 9.0))
    kept = engine_choice._comparable(several, have_gib=10.0)
    assert [workload.batch for workload, _ in kept] == [1, 2, 6]
    assert engine_choice._comparable(several[2:], have_gib=1.0) == several[2:3]
    assert engine_choice._comparable(several[3:], have_gib=10.0) == several[3:4]


def test_the_batch_with_the_most_tokens_counts():
    """Six small images have 6 x (1,024 + 512) tokens, one large image 4,096 + 512."""
    assert Planned(card(24.0), data(512, 512, 6), data(1024, 1024)).mode == Planned(card(24.0), data(512, 512, 6)).mode
    assert Planned(card(24.0), data(512, 512, 2), data(1024, 1024)).mode == Planned(card(24.0), data(1024, 1024)).mode
    assert Planned(card(24.0), data(512, 512, 6)).mode != Planned(card(24.0), data(1024, 1024)).mode


def test_a_batch_that_nothing_can_train_is_refused():
    planned = Planned(card(24.0), data(512, 512), data(1024, 512, 200), PARAMS_PRECISION="bf16")
    (line,) = planned.refused
    assert line.startswith("batch_size of dataset.json=200: a step of 200 images of 1024 × 512 at rank 16")
    assert "instead of bf16" not in line
    assert not Planned(card(24.0), data(1024, 512, 2), PARAMS_PRECISION="bf16").refused


# ---- devices


@pytest.mark.parametrize("model", [MODEL, dataclasses.replace(MODEL, footprint=None)])
def test_a_cpu_keeps_everything_in_32_bits(model):
    planned = Planned(CPU, model=model, PARAMS_BATCH_SIZE="auto")
    assert planned.mode == ("fp32", "none", 0, "none") and planned.engine.dtype == "float32"
    assert planned.reasons == [
        "BACKEND: cpu (8 CPU cores (x86_64), 32 GiB)",
        "PARAMS_ATTENTION: native (torch picks the kernel)",
        "PARAMS_PRECISION: fp32 (best for 8 CPU cores (x86_64), 32 GiB)",
        "PARAMS_BATCH_SIZE: dataset.json's (the speed of this model is not known here)",
        "PARAMS_COMPILE: false (compiling takes longer than it saves on a CPU)",
    ]
    assert planned.datasets == (data(1024, 512, 2),)


def test_a_miniature_on_an_accelerator_does_as_it_is_told():
    mini = dataclasses.replace(MODEL, footprint=None)
    assert Planned(card(24.0), model=mini).mode == ("bf16", "none", 0, "none")
    assert Planned(card(24.0), model=mini).engine.dtype == "bfloat16"
    assert Planned(card(24.0), model=mini, PARAMS_PRECISION="fp16").engine.dtype == "float16"
    asked = {"PARAMS_PRECISION": "fp8", "PARAMS_GRADIENT_CHECKPOINTING": "true", "PARAMS_OFFLOAD": "weights"}
    planned = Planned(card(24.0), model=mini, **asked)
    assert planned.mode == ("fp8", "all", 0, "weights") and not planned.refused
    assert not planned.said("PARAMS_PRECISION") and not planned.said("PARAMS_BATCH_SIZE")
    (line,) = Planned(card(24.0), model=mini, **asked, PARAMS_LORA_TYPE="dora").refused
    assert line.startswith("PARAMS_OFFLOAD=weights does not work with PARAMS_LORA_TYPE=dora")
    assert not Planned(card(24.0), model=mini, PARAMS_OFFLOAD="activations", PARAMS_LORA_TYPE="dora").refused
    (line,) = Planned(CPU, model=mini, PARAMS_OFFLOAD="weights", PARAMS_LORA_TYPE="dora").refused
    assert line.startswith("PARAMS_OFFLOAD=weights needs an accelerator")
    assert not Planned(CPU, model=mini, PARAMS_OFFLOAD="none").refused


@pytest.mark.parametrize(
    ("architecture", "miniature", "installed", "chosen", "why"),
    [
        ("9.0", False, True, "flash_4", "the fastest here"),
        ("9.0", False, False, "native", "torch picks the kernel; flash_4 is faster here"),
        ("9.0", True, True, "native", "torch picks the kernel)"),  # its heads are too narrow
        ("10.0", False, True, "native", "torch picks the kernel)"),  # not measured
        ("8.9", False, True, "native", "torch picks the kernel)"),
    ],
)
def test_attention(monkeypatch, architecture, miniature, installed, chosen, why):
    monkeypatch.setattr(flash_attention, "is_installed", lambda cache: installed)
    model = dataclasses.replace(MODEL, footprint=None) if miniature else MODEL
    planned = Planned(card(24.0, architecture=architecture), model=model)
    assert planned.engine.attention == chosen
    (said,) = planned.said(f"PARAMS_ATTENTION: {chosen} (")
    assert said.startswith(why)


@pytest.mark.parametrize(
    ("architecture", "family", "asked", "refused"),
    [
        ("9.0", "flux", "flash_4", ""),
        ("10.0", "sdxl", "flash_4", ""),
        ("8.9", "flux", "flash_4", "PARAMS_ATTENTION=flash_4 needs compute capability 9.0 or more, which"),
        ("9.0", "flux", "flex", ""),
        ("9.0", "sdxl", "flex", "PARAMS_ATTENTION=flex: flux supports only torch's own attention."),
        ("9.0", "sdxl", "native", ""),
    ],
)
def test_attention_that_is_asked_for(architecture, family, asked, refused):
    planned = Planned(card(24.0, architecture=architecture), family=family, PARAMS_ATTENTION=asked)
    assert planned.engine.attention == asked and not planned.said("PARAMS_ATTENTION")
    assert len(planned.refused) == bool(refused) and all(line.startswith(refused) for line in planned.refused)


@pytest.mark.parametrize(
    ("family", "variables", "compiled", "why"),
    [
        ("sdxl", {}, False, "compiling its many kinds of blocks takes minutes; steps are captured as CUDA graphs"),
        ("sdxl", {"PARAMS_OFFLOAD": "weights"}, True, "faster on accelerators"),  # these are not captured
        ("sd3", {}, False, "steps are captured as CUDA graphs, and their kernels are fused already"),
        ("flux", {"PARAMS_LORA_TYPE": "dora"}, True, "faster on accelerators"),
        ("flux", {"PARAMS_PRECISION": "fp8-storage"}, True, "faster on accelerators"),
    ],
)
def test_what_is_compiled(family, variables, compiled, why):
    planned = Planned(card(139.0), family=family, **variables)
    assert planned.engine.compile is compiled
    assert planned.said("PARAMS_COMPILE:") == [f"{str(compiled).lower()} ({why})"]
    set_by_hand = Planned(card(139.0), family=family, **variables, PARAMS_COMPILE=str(not compiled).lower())
    assert set_by_hand.engine.compile is not compiled and not set_by_hand.said("PARAMS_COMPILE:")


def test_a_device_or_precision_that_is_not_there_is_refused():
    (line,) = Planned(CPU, BACKEND="cuda").refused
    assert "BACKEND" in line
    planned = Planned(card(139.0), BACKEND="cuda")
    assert not planned.said("BACKEND") and planned.engine.device == "cuda"
    (line,) = Planned(card(139.0, architecture="8.0"), PARAMS_PRECISION="fp8").refused
    assert line.startswith(
        "PARAMS_PRECISION='fp8' is not what 1 × nvidia 8.0, 139 GiB each can do: it needs tensor cores"
    )
    assert line.endswith("Allowed: auto, bf16, fp16, int8, int8-storage, fp8-storage, nf4, fp32.")


def test_several_accelerators_are_for_the_user_to_take():
    planned = Planned(card(24.0, count=4))
    assert planned.engine.num_gpus == 1
    assert planned.said("NUM_GPUS:") == [
        "1 (keeps the batch size; NUM_GPUS=4 trains on all of them with 4 times as many images a step)"
    ]
    planned = Planned(card(24.0, count=4), NUM_GPUS="5")  # refused, and the rest is planned for one
    assert (planned.engine.num_gpus, len(planned.refused), planned.engine.host_gib) == (1, 1, 250.0)
    assert Planned(card(24.0, count=4), NUM_GPUS="4").engine.host_gib == 62.5
