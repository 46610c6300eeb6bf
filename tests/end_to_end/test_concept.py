"""The miniature really learns the demo's concept, and the number that says so fails when the training is wrong.

The number is the mean `correlation` (trainer/families/miniatures/score.py) over pictures that diffusers' own pipeline
draws with the saved file: the demo's prompts at seeds that the job never saw.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.families import family
from trainer.families.miniatures.score import correlation

pytestmark = pytest.mark.slow

CONCEPT = Path(__file__).parents[2] / "trainer" / "families" / "miniatures" / "concept"
PROMPTS = [line.split(" --")[0] for line in (CONCEPT / "prompts.txt").read_text().splitlines() if "kilnpot" in line]
SEEDS = range(100, 103)
LEARNT, GAIN = 0.28, 0.18
DEMO = {
    "DATASET_NAME": str(CONCEPT),
    "PARAMS_MAX_STEPS": "200",
    "PARAMS_BATCH_SIZE": "4",
    "PARAMS_NETWORK_DIM": "32",
    "PARAMS_NETWORK_ALPHA": "32",
    "PARAMS_NOISE_OFFSET": "0",
    "PARAMS_TIMESTEP_SAMPLING": "shift",
    "PARAMS_SAVE_EVERY_N_STEPS": "0",
}
# What goes wrong in the trainer's process, as lines of Python.
TRAINING = {
    "the target's sign": """
        at = objective.FlowMatching.at
        def mutant(self, *a):
            d = at(self, *a)
            return objective.Drawn(d.noisy_BCHW, -d.target_BCHW, d.t_B, d.weight_B)
        objective.FlowMatching.at = mutant""",
    "the time runs backwards": """
        at = objective.FlowMatching.at
        def mutant(self, *a):
            d = at(self, *a)
            return objective.Drawn(d.noisy_BCHW, d.target_BCHW, 1 - d.t_B, d.weight_B)
        objective.FlowMatching.at = mutant""",
    "the noise levels are shifted the other way": """
        shifted = objective.shifted
        objective.shifted = lambda t, s: shifted(t, 1 / s**2)""",
    "latents without their scale": """
        encode = flux.encode_images
        flux.encode_images = lambda vae, x: encode(vae, x) / vae.config.scaling_factor / 3""",
}


def number(lora: dict | None, tmp_path: Path) -> float:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(family("flux").FACTS.models["mini-flux"].source, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        save_file(lora, tmp_path / "lora.safetensors")
        pipe.load_lora_weights(tmp_path / "lora.safetensors")
    drawn = [
        pipe(
            PROMPTS,
            width=128,
            height=128,
            num_inference_steps=20,
            guidance_scale=3.5,
            max_sequence_length=pipe.tokenizer_2.model_max_length,
            generator=[torch.Generator().manual_seed(seed + 10 * i) for i in range(len(PROMPTS))],
        ).images
        for seed in SEEDS
    ]
    values = [correlation(picture) for some in drawn for picture in some]
    return sum(values) / len(values)


def learns(before: float, after: float) -> bool:
    return after >= LEARNT and after - before >= GAIN


def test_the_concept_is_learnt_and_a_wrong_file_is_noticed(job, tmp_path):
    code, printed = job.run(**DEMO)
    assert code == 0, printed
    lora = load_file(job.out / "x-diffusers.safetensors")
    before, after = number(None, tmp_path), number(lora, tmp_path)
    print(f"before {before:.3f}, after {after:.3f}")
    assert learns(before, after), (before, after)

    not_applied = {k: v * 0 for k, v in lora.items()}
    too_weak = {k: v * (0.2 if ".lora_B." in k else 1) for k, v in lora.items()}
    too_strong = {k: v * (5 if ".lora_B." in k else 1) for k, v in lora.items()}
    wrong = {name: number(file, tmp_path) for name, file in
             {"not applied": not_applied, "a fifth": too_weak, "five times": too_strong}.items()}  # fmt: skip
    print(wrong)
    assert not [name for name, value in wrong.items() if learns(before, value)], wrong


@pytest.mark.parametrize("mutation", TRAINING)
def test_a_wrong_training_does_not_learn_it(job, tmp_path, mutation):
    code, printed = job.run(**{**DEMO, "PARAMS_MAX_STEPS": "1", "CACHE_PATH": str(tmp_path / "cache")})
    assert code == 0, printed
    plan = json.loads((job.out / "plan.json").read_text())
    plan["train"]["max_steps"] = 200
    plan["output"] |= {"path": str(tmp_path / "mutant"), "cache": str(tmp_path / "other")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    lines = "\n".join(line[8:] for line in TRAINING[mutation].splitlines())
    script = f"import sys\nfrom trainer import objective\nfrom trainer.families import flux\n{lines}\n"
    script += "from trainer.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "plan.json"], cwd=CONCEPT.parents[3], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    value = number(load_file(tmp_path / "mutant" / "x-diffusers.safetensors"), tmp_path)
    print(f"{mutation}: {value:.3f}")
    shutil.rmtree(tmp_path / "mutant")
    assert not learns(number(None, tmp_path), value), value
