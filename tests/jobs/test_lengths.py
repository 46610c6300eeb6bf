"""Whole jobs whose captions and images have many sizes, on the families that read captions by a language model."""

import shutil
import signal

import pytest
from safetensors import safe_open

from tests.support.miniatures import base, pipeline
from trainer.storage.digests import sha256

ASKED = {
    "PARAMS_OPTIMIZER_TYPE": "adamw",
    "PARAMS_LEARNING_RATE": "0.01",
    "PARAMS_BATCH_SIZE": "3",
    "PARAMS_CAPTION_DROPOUT_RATE": "0.2",
    "PARAMS_MAX_STEPS": "20",
    "PARAMS_SAMPLE_EVERY_N_STEPS": "10",
    "SAMPLE_PROMPTS": '["a dog --w 96 --h 128 --s 2"]',
}


# How many tokens a caption's are filled up to a multiple of, whether longer captions have more of them, and the layers
# that get adapters.
@pytest.mark.parametrize(
    ("family", "multiple", "varies", "layers"),
    [
        ("z_image", 32, True, 6 * 7),
        ("qwen_image", 1, True, 4 * 12),
        ("flux2", 96, False, 2 * 12 + 4 * 2),
        ("krea2", 1, True, 10 * 8),
    ],
)
def test_photographs_and_captions_of_many_sizes_train_stop_resume_and_are_drawn(
    job, tmp_path, photographs, family, multiple, varies, layers
):
    images = tmp_path / "photographs"
    images.mkdir()
    for number, photograph in enumerate(
        sorted([*(photographs / "dog").glob("*.jpg"), *(photographs / "can").glob("*.jpg")])
    ):
        shutil.copy(photograph, images / f"{number}.jpg")
        (images / f"{number}.txt").write_text("a photograph of something, seen from one side; " * (number % 4 + 1))
    asked = {**ASKED, "BASE_MODEL": base(family), "DATASET_NAME": str(images), "CACHE_PATH": str(tmp_path / "cache")}
    whole = tmp_path / "whole"
    code, printed = job.run(**asked, OUTPUT_PATH=str(whole))
    assert code == 0 and "Shapes: " in printed, printed
    lengths = set()
    for path in (tmp_path / "cache" / "text").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            lengths.add(file.get_slice("tokens").get_shape()[0])
    assert all(length % multiple == 0 for length in lengths)
    assert len(lengths) >= 3 if varies else len(lengths) == 1

    process = job.start(**asked)
    job.wait_for_step(process, 5)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 143, printed
    assert max(row["step"] for row in job.metrics()) < 20, "the interruption must come before the end"
    code, printed = job.run(**asked)
    assert code == 0 and "Resumed at step" in printed, printed
    assert sha256(job.out / "x.safetensors") == sha256(whole / "x.safetensors")
    drawn = sorted(path.name for path in (whole / "sample").glob("step-*.png"))
    assert drawn == [f"step-{step:08}-00.png" for step in (0, 10, 20)]
    for file in drawn:
        assert sha256(job.out / "sample" / file) == sha256(whole / "sample" / file)

    pipe = pipeline(family)
    pipe.load_lora_weights(whole / "x.safetensors")  # raises for a key that it does not know
    loaded = {name for name, _ in pipe.transformer.named_modules() if name.endswith(".lora_A.default_0")}
    assert len(loaded) == layers
