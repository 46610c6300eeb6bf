"""The jobs that both trees run, as data.

In values, <data>, <job>, <run> and <tree> stand for the folder of input files, the job's own folder, the folder with a
folder for each job, and the tree that is being recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from bench.same.bad_input import ACCEPTED, BAD_DATA, BAD_INPUT

FAMILIES = ("flux", "sdxl", "sd3")
TRAIN, CHECK, PLAN, COMMANDS = "train", "check", "plan", "commands"
REFUSED = -1  # as an expected exit code: any but 0 and that of a bug


@dataclass(frozen=True)
class Job:
    """Something to run in a tree. `needs` names jobs whose output folders it reads, which run before it."""

    name: str
    about: str
    kind: str = TRAIN  # check: with --check; plan: on made-up cards; commands: other command lines
    variables: Mapping[str, str] = field(default_factory=dict)
    commands: tuple[tuple[str, ...], ...] = ()  # of COMMANDS: a module and its arguments, run one after the other
    needs: tuple[str, ...] = ()
    folder: str = ""  # whose output folder it works in, if not its own
    expects: int = 0  # exit code
    kill_at: int = 0  # the step whose state is there when the job is killed; it is then started again


# Of every job. The clock of the header and of names is fixed, and with one thread sums have one order.
COMMON = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "SOURCE_DATE_EPOCH": "1700000000",
    "HF_HUB_OFFLINE": "1",
    "OUTPUT_PATH": "<job>/out",
    "CACHE_PATH": "<job>/cache",
    "HF_HOME": "<job>/hf",
}
SHORT = {
    "BACKEND": "cpu",
    "DATASET_NAME": "<data>/few",
    "OUTPUT_NAME": "x",
    "PARAMS_MAX_STEPS": "6",
    "PARAMS_SAVE_EVERY_N_STEPS": "3",
    "PARAMS_SAMPLE_EVERY_N_STEPS": "0",
    "PARAMS_NETWORK_DIM": "4",
    "PARAMS_BATCH_SIZE": "2",
}
SMALLEST = {"BASE_MODEL": "mini-flux", "DATASET_NAME": "<data>/few", "BACKEND": "cpu", "OUTPUT_NAME": "x"}
SAMPLES = {"SAMPLE_PROMPTS": "<data>/prompts.txt", "PARAMS_SAMPLE_EVERY_N_STEPS": "6"}
ADAMW = {"PARAMS_OPTIMIZER_TYPE": "adamw", "PARAMS_LEARNING_RATE": "1e-3"}
MESSY = {"DATASET_NAME": "", "PARAMS_BATCH_SIZE": ""}

DEFAULT = {
    # As few variables as a user can set: defaults for all else, this program's own prompts, a name made of the plan.
    "flux": {
        "BACKEND": "cpu",
        "DATASET_NAME": "<data>/concept",
        "TRIGGER_WORD": "zot",
        "PARAMS_MAX_STEPS": "6",
        "PARAMS_BATCH_SIZE": "2",
    },
    "sdxl": {
        **SHORT, **SAMPLES, **ADAMW, **MESSY,
        "DATASET_CONFIG": "<data>/tags.json",
        "TRIGGER_WORD": "zot",
        "PARAMS_MIN_SNR_GAMMA": "5",
        "PARAMS_NOISE_OFFSET": "0.05",
        "PARAMS_VALIDATE_EVERY_N_STEPS": "3",
    },
    "sd3": {
        **SHORT, **SAMPLES, **MESSY,
        "DATASET_CONFIG": "<data>/lines.json",
        "PARAMS_OPTIMIZER_TYPE": "adafactor",
        "PARAMS_TIMESTEP_SAMPLING": "shift",
        "PARAMS_DISCRETE_FLOW_SHIFT": "5",
        "PARAMS_PRIOR_LOSS_WEIGHT": "0.5",
    },
}  # fmt: skip
SPLIT = {
    "flux": {
        "PARAMS_OPTIMIZER_TYPE": "adamw8bit",
        "PARAMS_TIMESTEP_SAMPLING": "flux_shift",
        "PARAMS_LORA_TYPE": "rslora",
        "PARAMS_LOSS_WEIGHTING": "sigma_sqrt",
        "PARAMS_GUIDANCE_SCALE": "3.5",
        "PARAMS_ATTENTION": "_native_math",
    },
    "sdxl": {
        "PARAMS_OPTIMIZER_TYPE": "lion",
        "PARAMS_LEARNING_SCHEDULER": "cosine_with_restarts",
        "PARAMS_NUM_CYCLES": "2",
        "PARAMS_WARMUP_STEPS": "2",
        "PARAMS_PREDICTION_TYPE": "v_prediction",
        "PARAMS_ZERO_TERMINAL_SNR": "true",
        "PARAMS_GRADIENT_CHECKPOINTING": "true",
        "DATASET_NAME": "<data>/few.zip",
    },
    "sd3": {
        "PARAMS_OPTIMIZER_TYPE": "adamw-schedulefree",
        "PARAMS_TIMESTEP_SAMPLING": "uniform",
        "PARAMS_LOSS_WEIGHTING": "cosmap",
        "PARAMS_LORA_TYPE": "rslora",
        "KEEP_CHECKPOINTS": "1",
    },
}
DORA = {
    "flux": {**ADAMW, "PARAMS_SAMPLE_EVERY_N_STEPS": "3", "SAMPLE_PROMPTS": "<data>/prompts.txt"},
    "sdxl": {
        "PARAMS_OPTIMIZER_TYPE": "prodigy-schedulefree",
        "PARAMS_MAX_GRAD_NORM": "0",
        "PARAMS_TARGET_MODULES": "attn1.to_q,attn1.to_k,attn2.to_out.0",
    },
    "sd3": {"PARAMS_D_COEF": "1", "PARAMS_MAX_LOSS_SPIKE": "0"},
}
ENCODERS = {
    "PARAMS_EMA_DECAY": "0.9",
    "PARAMS_GRADIENT_ACCUMULATION": "2",
    "PARAMS_CAPTION_DROPOUT_RATE": "0.3",
    "TRIGGER_WORD": "zot",
}
ENCODERS_OF = {
    "flux": {"PARAMS_TEXT_ENCODER_LR": "1"},
    "sdxl": {**ADAMW, "PARAMS_TEXT_ENCODER_LR": "1e-4,5e-5", **SAMPLES},
    "sd3": {"PARAMS_OPTIMIZER_TYPE": "adamw8bit", "PARAMS_TEXT_ENCODER_LR": "1e-4", "PARAMS_NUM_REPEATS": "2"},
}
PRECISIONS = {
    "flux-default": ("fp8", "int8", "bf16"),
    "sdxl-split": ("fp8", "int8"),
    "sd3-dora": ("fp8", "int8", "nf4"),
    "flux-encoders": ("fp8", "int8"),
}
KILLED = {"PARAMS_MAX_STEPS": "12", "PARAMS_SAVE_EVERY_N_STEPS": "6"}  # six steps of time to be killed in
TWO = {"NUM_GPUS": "2", "PARAMS_VALIDATE_EVERY_N_STEPS": "3", "PARAMS_EMA_DECAY": "0.9", **ADAMW, **SAMPLES, **MESSY}

# A vendor, an architecture, GiB of the card and of the host that may be pinned.
CARDS = (
    ("nvidia", "8.6", "8", "16"),
    ("nvidia", "8.6", "12", "24"),
    ("nvidia", "8.9", "24", "48"),
    ("nvidia", "9.0", "48", "200"),
    ("amd", "gfx942", "192", "500"),
)
# What nvidia-smi prints of them: number, compute capability, MiB, driver.
MADE_UP = {
    "8": "0, 8.6, 8192, 580.65",
    "12": "0, 7.5, 12288, 580.65",
    "24": "0, 8.9, 24564, 580.65",
    "48": "0, 9.0, 49140, 580.65",
    "two-of-80": "0, 9.0, 81559, 580.65\n1, 9.0, 81559, 580.65",
}
FULL_SIZE = {
    "flux": {"BASE_MODEL": "flux", "PARAMS_BATCH_SIZE": "auto", "DATASET_NAME": "<data>/concept"},
    "sdxl": {"BASE_MODEL": "sdxl", "PARAMS_TEXT_ENCODER_LR": "1", "PARAMS_RESOLUTION": "1024x768"},
    "sd3": {"BASE_MODEL": "sd3.5-large", "PARAMS_LORA_TYPE": "dora", "PARAMS_BATCH_SIZE": "4"},
}


def dashed(words: str) -> str:
    """Words as a name that needs no quotes in a shell or a path."""
    return re.sub(r"[^\w.]+", "-", words).strip("-")


def all_jobs() -> tuple[Job, ...]:
    """In the order in which they begin: a job comes after those that it needs."""
    return (
        *_twelve(),
        *_in_other_formats(),
        *_interrupted(),
        *_begun_with_files(),
        *_checks(),
        *_plans(),
        *_bad_inputs(),
        *_commands(),
    )


def _twelve() -> Iterator[Job]:
    """Three families, each with defaults, with q, k and v split, as DoRA, and with text encoders."""
    for family in FAMILIES:
        model = {"BASE_MODEL": f"mini-{family}"}
        yield Job(
            f"{family}-default", "what a user gets who sets little, or messy data", variables=model | DEFAULT[family]
        )
        split = SHORT | {"PARAMS_SPLIT_QKV": "true"} | SPLIT[family]
        yield Job(f"{family}-split", "an adapter each for q, k and v", variables=model | split)
        dora = SHORT | {"PARAMS_LORA_TYPE": "dora"} | DORA[family]
        yield Job(f"{family}-dora", "DoRA", variables=model | dora)
        encoders = SHORT | ENCODERS | ENCODERS_OF[family]
        yield Job(f"{family}-encoders", "text encoders, EMA and accumulation", variables=model | encoders)


def _in_other_formats() -> Iterator[Job]:
    """Some of the twelve with frozen weights in other formats."""
    twelve = {job.name: job for job in _twelve()}
    less = {"PARAMS_SAMPLE_EVERY_N_STEPS": "0", "PARAMS_MAX_STEPS": "3"}
    for name, formats in PRECISIONS.items():
        for precision in formats:
            variables = {**twelve[name].variables, **less, "PARAMS_PRECISION": precision}
            yield Job(f"{name}-{precision}", f"{name} with weights in {precision}", variables=variables)


def _interrupted() -> Iterator[Job]:
    """Killed and resumed, in the same tree and, begun by BASE, in the working tree; and on two processes."""
    killed = {"flux": SHORT | SAMPLES, "sdxl": SHORT | ENCODERS | ENCODERS_OF["sdxl"]}
    for family, variables in killed.items():
        variables = {"BASE_MODEL": f"mini-{family}", **variables, **KILLED, "PARAMS_SAMPLE_EVERY_N_STEPS": "12"}
        yield Job(f"{family}-killed", "killed after its first state, and resumed", variables=variables, kill_at=6)
    two = {"BASE_MODEL": "mini-sd3", **SHORT, **TWO, "DATASET_CONFIG": "<data>/tags.json"}
    yield Job("sd3-two-processes", "one job on two processes", variables=two)


def _begun_with_files() -> Iterator[Job]:
    """What begins with the files of another job, and what is done again."""
    flux = {"BASE_MODEL": "mini-flux", **SHORT, "PARAMS_MAX_STEPS": "3", "PARAMS_NETWORK_DIM": ""}
    split = {"PARAMS_RESUME_FROM": "<run>/flux-split/out/x-diffusers.safetensors"}
    yield Job("flux-from-lora", "begins with a LoRA file", variables=flux | split, needs=("flux-split",))
    sdxl = {"BASE_MODEL": "mini-sdxl", **SHORT, **ENCODERS, **ENCODERS_OF["sdxl"]}
    state = {"PARAMS_RESUME_FROM": "<run>/sdxl-encoders/out/state/step-00000003"}
    yield Job("sdxl-from-state", "begins with a state", variables=sdxl | state, needs=("sdxl-encoders",))
    dora = {"BASE_MODEL": "mini-sd3", **SHORT, "PARAMS_LORA_TYPE": "dora", **DORA["sd3"]}
    yield Job("done", "a finished job", CHECK, dora, needs=("sd3-dora",), folder="sd3-dora")
    changed = dora | {"PARAMS_NETWORK_DIM": "8", "PARAMS_SEED": "1", "PARAMS_MAX_STEPS": "9"}
    yield Job("changed", "other settings", CHECK, changed, needs=("sd3-dora",), folder="sd3-dora")
    rank = dora | {"PARAMS_RESUME_FROM": "<run>/sd3-dora/out/x.safetensors", "PARAMS_NETWORK_DIM": "16"}
    yield Job("other-rank", "a LoRA of another rank", CHECK, rank, needs=("sd3-dora",), expects=78)


def _checks() -> Iterator[Job]:
    """`--check` of the twelve, and of unusual inputs that are right."""
    for job in _twelve():
        yield Job(f"check-{job.name}", f"--check of {job.name}", CHECK, job.variables)
    for name, changes in ACCEPTED.items():
        yield Job(f"good-{dashed(name)}", "an unusual input", CHECK, SMALLEST | changes)


def _plans() -> Iterator[Job]:
    """The plan that the trainer gets for full-size models on made-up cards; needs neither cards nor models."""
    for family, variables in FULL_SIZE.items():
        model = {"MODEL_PATH": f"<tree>/trainer/families/miniatures/{family}", "PARAMS_ATTENTION": "native"}
        common = {"DATASET_NAME": "<data>/concept", "OUTPUT_NAME": "x", "NUM_GPUS": "", **model}
        for card, printed in MADE_UP.items():
            number = {"NUM_GPUS": "2"} if card.startswith("two") else {}
            made_up = {"SAME_CARDS": printed, **number}
            yield Job(f"plan-{family}-{card}", f"the plan on {card} GB", PLAN, common | variables | made_up)


def _bad_inputs() -> Iterator[Job]:
    for name, changes in BAD_INPUT.items():
        yield Job(f"bad-{dashed(name)}", "a wrong input", CHECK, SMALLEST | changes, expects=REFUSED)
    for name, changes in BAD_DATA.items():
        variables = SMALLEST | SHORT | {"PARAMS_MAX_STEPS": "1"} | changes
        yield Job(f"data-{dashed(name)}", "data that only the trainer looks at", TRAIN, variables, expects=REFUSED)


def _commands() -> Iterator[Job]:
    """The other command lines; those of one job run in one process, because each would import torch for seconds."""
    yield Job("command-lines", "entrypoint's options", COMMANDS, commands=(
        ("entrypoint", "--help-env"),
        ("entrypoint", "--version"),
        ("entrypoint", "--nope"),
        ("entrypoint", "--help"),
    ))  # fmt: skip
    plans = []
    for family in FAMILIES:
        for vendor, architecture, memory, host in CARDS:
            card = ("--vendor", vendor, "--architecture", architecture, "--memory", memory, "--host", host)
            plans.append(("bench", "plans", "--family", family, *card))
    yield Job("bench-plans", "predicted memory on five made-up cards", COMMANDS, commands=tuple(plans))
    tools: list[tuple[str, ...]] = [("trainer.export", "--help"), ("trainer.sample", "--help"), ("trainer",)]
    for family in FAMILIES:
        file = f"<run>/{family}-split/out/x.safetensors"
        for names in ("kohya", "peft", "comfyui"):
            tools.append(("trainer.export", file, "--to", names, "--out", f"<job>/out/{family}-{names}.safetensors"))
        drawn = ("--prompts", "<data>/prompts.txt", "--out", f"<job>/out/{family}")
        tools.append(("trainer.sample", "--base", f"mini-{family}", "--lora", f"{file}:0.8", *drawn))
    encoders = "<run>/sdxl-encoders/out/x.safetensors"
    merged = ("--merge", f"{encoders}:0.5", "<run>/sdxl-split/out/x.safetensors:0.6")
    tools += [
        ("trainer.export", *merged, "--out", "<job>/out/merged.safetensors"),
        ("trainer.export", encoders, "--without-text-encoders", "--out", "<job>/out/without.safetensors"),
        ("trainer.export", *merged, "<run>/sd3-split/out/x.safetensors", "--out", "<job>/out/mixed.safetensors"),
        ("trainer.export", "<data>/garbage.safetensors", "--out", "<job>/out/garbage.safetensors"),
        ("trainer.sample", "--base", "no-such-model", *drawn),
        ("trainer.sample", "--base", "mini-sd3", "--prompts", "<data>/prompts-bad.txt", "--out", "<job>/out/bad"),
        ("trainer.families.miniatures.score", "<run>/sdxl-default/out/sample"),
    ]
    needs = ("flux-split", "sdxl-split", "sd3-split", "sdxl-encoders", "sdxl-default")
    yield Job("tools", "export, merge, sample, score", COMMANDS, commands=tuple(tools), needs=needs)
