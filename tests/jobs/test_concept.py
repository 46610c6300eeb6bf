"""The miniatures really learn the demo's concept, and the number that says so fails when the training is wrong.

The number is the mean `correlation` (trainer/families/miniatures/score.py) over pictures that diffusers' own pipelines
draw with the saved file: the demo's prompts at seeds that the job never saw. The control is another prompt's: a red
circle, which must stay one.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.concept import CONCEPT, demo
from tests.support.miniatures import pipeline
from trainer.families.miniatures.score import CONCEPT as KILNPOT
from trainer.families.miniatures.score import CONTROL, correlation

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).parents[2]
LINES = [
    line.split(" --")[0] for line in (CONCEPT / "prompts.txt").read_text().splitlines() if line[:1] not in ("", "#")
]
PROMPTS = {subject: [line for line in LINES if subject in line] for subject in (KILNPOT, CONTROL)}
SEEDS = {KILNPOT: range(100, 103), CONTROL: range(100, 108)}


@dataclass(frozen=True)
class Case:
    """One family: how its pipeline draws, and what the number must be, by itself and above the base's."""

    drawing: dict[str, Any]
    learnt: float
    gain: float
    mutations: tuple[str, ...]
    kept: float = 0.8  # of the control's number before training, at least


CASES = {
    "flux": Case(
        {"guidance_scale": 3.5, "num_inference_steps": 20},
        learnt=0.5,
        gain=0.4,
        mutations=(
            "the target's sign",
            "the time runs backwards",
            "shifted by the inverse",
            "latents at a third of their scale",
        ),
    ),
    "sdxl": Case(
        {"guidance_scale": 3.0, "num_inference_steps": 20},
        learnt=0.35,
        gain=0.25,
        mutations=("the velocity instead of the noise",),
    ),
    "sd3": Case(
        {"guidance_scale": 3.0, "num_inference_steps": 28},
        learnt=0.45,
        gain=0.35,
        mutations=("the target's sign", "shifted the other way"),
    ),
    "z_image": Case(
        {"guidance_scale": 3.0, "num_inference_steps": 28},
        learnt=0.4,
        gain=0.3,
        mutations=("the target's sign", "the time runs backwards"),
    ),
    "flux2": Case(
        {"guidance_scale": 3.0, "num_inference_steps": 28},
        learnt=0.4,
        gain=0.3,
        mutations=("the target's sign", "the time runs backwards"),
    ),
    "qwen_image": Case(
        {"true_cfg_scale": 3.0, "negative_prompt": "", "num_inference_steps": 28},
        learnt=0.4,
        gain=0.3,
        mutations=("the target's sign", "the time runs backwards"),
    ),
    "krea2": Case(
        {"guidance_scale": 2.0, "num_inference_steps": 28},
        learnt=0.25,
        gain=0.15,
        mutations=("the target's sign", "the time runs backwards"),
        kept=0.5,
    ),
}
# What goes wrong in the trainer's process, as lines of Python.
TRAINING = {
    "the target's sign": """
        at = objective.FlowMatching.at
        def mutant(self, *a):
            d = at(self, *a)
            return objective.NoisedBatch(d.noisy_BCHW, -d.target_BCHW, d.t_B, d.weight_B)
        objective.FlowMatching.at = mutant""",
    "the time runs backwards": """
        at = objective.FlowMatching.at
        def mutant(self, *a):
            d = at(self, *a)
            return objective.NoisedBatch(d.noisy_BCHW, d.target_BCHW, 1 - d.t_B, d.weight_B)
        objective.FlowMatching.at = mutant""",
    "shifted by the inverse": """
        shifted = objective.shifted
        objective.shifted = lambda t, s: shifted(t, 1 / s)""",
    "shifted the other way": """
        shifted = objective.shifted
        objective.shifted = lambda t, s: shifted(t, 1 / s**2)""",
    "the velocity instead of the noise": """
        at = objective.Denoising.at
        def mutant(self, *a):
            return at(dataclasses.replace(self, prediction="v_prediction"), *a)
        objective.Denoising.at = mutant""",
    "latents at a third of their scale": """
        encode = kind.encode_images
        kind.encode_images = lambda vae, x: encode(vae, x) / 3""",
}


def settings(name: str) -> dict[str, str]:
    """The variables of `make demo MODEL=name`, without samples and checkpoints."""
    return {
        **demo(name),
        "PARAMS_NETWORK_DIM": "32",
        "PARAMS_SAMPLE_EVERY_N_STEPS": "0",
        "PARAMS_SAVE_EVERY_N_STEPS": "0",
    }


def number(name: str, lora: dict | None, tmp_path: Path, subject: str = KILNPOT) -> float:
    case = CASES[name]
    pipe = pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        save_file(lora, tmp_path / "lora.safetensors")
        pipe.load_lora_weights(tmp_path / "lora.safetensors")
    drawing = dict(case.drawing)
    if longest := {"flux": "tokenizer_2", "sd3": "tokenizer_3", "flux2": "tokenizer"}.get(name):
        drawing["max_sequence_length"] = getattr(pipe, longest).model_max_length
    prompts = PROMPTS[subject]
    if "negative_prompt" in drawing:
        drawing["negative_prompt"] = [drawing["negative_prompt"]] * len(prompts)
    values = []
    for seed in SEEDS[subject]:
        generators = [torch.Generator().manual_seed(seed + 10 * i) for i in range(len(prompts))]
        drawn = pipe(prompt=prompts, width=128, height=128, generator=generators, **drawing)
        values += [correlation(image, subject) for image in drawn.images]
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`base(name)`: the number before training."""
    known: dict[str, float] = {}

    def measured(name: str) -> float:
        return known.setdefault(name, known.get(name) or number(name, None, tmp_path_factory.mktemp(name)))

    return measured


def learns(name: str, before: float, after: float) -> bool:
    return after >= CASES[name].learnt and after - before >= CASES[name].gain


OFTEN = [("flux",), ("flux", "the target's sign")]


def each(*values):
    """A few in every run of the tests, the others among the slow ones."""
    return pytest.param(*values, marks=[] if values in OFTEN else pytest.mark.slow)


@pytest.mark.parametrize("name", [each(name) for name in CASES])
def test_the_concept_is_learnt_and_a_wrong_file_is_noticed(name, base, job, tmp_path):
    code, printed = job.run(**settings(name))
    assert code == 0, printed
    lora = load_file(job.out / "x-diffusers.safetensors")
    before, after = base(name), number(name, lora, tmp_path)
    control = number(name, None, tmp_path, CONTROL), number(name, lora, tmp_path, CONTROL)
    print(f"{name}: before {before:.3f}, after {after:.3f}; control {control[0]:.3f}, {control[1]:.3f}")
    assert learns(name, before, after), (before, after)
    assert control[1] >= CASES[name].kept * control[0], control

    not_applied = {k: v * 0 for k, v in lora.items()}
    too_weak = {k: v * (0.2 if ".lora_B." in k else 1) for k, v in lora.items()}
    too_strong = {k: v * (5 if ".lora_B." in k else 1) for k, v in lora.items()}
    wrong = {what: number(name, file, tmp_path) for what, file in
             {"not applied": not_applied, "a fifth": too_weak, "five times": too_strong}.items()}  # fmt: skip
    print(name, wrong)
    assert not [what for what, value in wrong.items() if learns(name, before, value)], wrong


@pytest.mark.parametrize(("name", "mutation"), [each(n, m) for n, case in CASES.items() for m in case.mutations])
def test_a_wrong_training_does_not_learn_it(name, mutation, base, job, tmp_path):
    asked = settings(name)
    code, printed = job.run(**{**asked, "PARAMS_MAX_STEPS": "1", "CACHE_PATH": str(tmp_path / "cache")})
    assert code == 0, printed
    plan = json.loads((job.out / "plan.json").read_text())
    plan["train"]["max_steps"] = int(asked["PARAMS_MAX_STEPS"])
    plan["output"] |= {"path": str(tmp_path / "mutant"), "cache": str(tmp_path / "other")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    lines = "\n".join(line[8:] for line in TRAINING[mutation].splitlines())
    script = "import dataclasses, sys\nfrom trainer.training import objective\n"
    script += f"from trainer.families import {name} as kind\n"
    script += f"{lines}\nfrom trainer.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    run = job.programs.run("-c", script, str(tmp_path / "plan.json"), environment=os.environ, timeout=900)
    assert run.returncode == 0, run.stderr
    value = number(name, load_file(tmp_path / "mutant" / "x-diffusers.safetensors"), tmp_path)
    print(f"{name}, {mutation}: {value:.3f}")
    shutil.rmtree(tmp_path / "mutant")
    assert not learns(name, base(name), value), value
