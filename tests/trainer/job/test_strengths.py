"""SAMPLE_STRENGTHS: the last samples of a job once more, with other strengths of its LoRA."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from trainer.job.run import run
from trainer.spec.plan import Prompt
from trainer.storage import own_files
from trainer.training.stop_flag import StopFlag

PROMPTS = (
    Prompt("a red circle", 64, 64, 7, 2, 3.5, 1.0),
    Prompt("a blue square", 64, 64, 8, 2, 3.5, 1.0),
)
QUICK = {
    "PARAMS_MAX_STEPS": "3", "PARAMS_OPTIMIZER_TYPE": "adamw", "PARAMS_LEARNING_RATE": "0.05",
    "PARAMS_SAMPLE_EVERY_N_STEPS": "2", "PARAMS_NETWORK_DIM": "4",
}  # fmt: skip


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("family", "more"), [("flux", {}), ("sdxl", {"PARAMS_TEXT_ENCODER_LR": "0.05", "PARAMS_EMA_DECAY": "0.9"})]
)
def test_the_last_samples_are_drawn_at_each_strength_and_the_lora_stays(job_plan, tmp_path, family, more):
    plan = dataclasses.replace(job_plan(family, **QUICK, **more, SAMPLE_STRENGTHS="1, 0.5,0"), prompts=PROMPTS)
    assert plan.output.sample_strengths == (0.0, 0.5)
    run(plan, StopFlag())
    folder = tmp_path / "out" / "sample"
    plain = [own_files.sample_name(step, number) for step in (0, 2, 3) for number in (0, 1)]
    others = [own_files.sample_name(3, number, strength) for number in (0, 1) for strength in (0.0, 0.5)]
    assert others[1] == "step-00000003-00-at-0.5.png"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*plain, *others, "contact-sheet.png"])
    for number in (0, 1):
        base, half, whole = (pixels(folder / own_files.sample_name(3, number, s)) for s in (0.0, 0.5, 1.0))
        assert np.array_equal(base, pixels(folder / own_files.sample_name(0, number)))  # before training
        assert not np.array_equal(half, base) and not np.array_equal(half, whole)
    with Image.open(folder / others[1]) as image:
        assert image.info["lora_strength"] == "0.5" and image.info["prompt_text"] == "a red circle"
    final = (tmp_path / "out" / "x.safetensors").read_bytes()

    again = dataclasses.replace(plan.output, path=str(tmp_path / "again"), sample_strengths=())
    run(dataclasses.replace(plan, output=again), StopFlag())
    assert (tmp_path / "again" / "x.safetensors").read_bytes() == final
    assert sorted(path.name for path in (tmp_path / "again" / "sample").glob("step-*")) == sorted(plain)
