"""What `--check` says about the images: how many, which shapes, steps, saves, samples and bytes."""

import json
import logging
import shutil

import pytest

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.planning.summary import log_summary
from entrypoint.settings.read import read_settings
from tests.support.drawings import draw
from tests.support.machines import CPU, NOW, SMALL_GPU
from trainer.spec.errors import DataError


@pytest.fixture
def photos(tmp_path):
    """Five images of three shapes; two have captions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (width, height) in enumerate([(128, 128), (128, 128), (96, 192), (192, 96), (192, 96)]):
        draw(width, height, seed=i).save(folder / f"{i}.png")
    for i in range(2):
        (folder / f"{i}.txt").write_text(f"caption {i}")
    return folder


@pytest.fixture
def summary(tmp_path, caplog):
    """A function that returns the lines for a plan with the given variables."""

    def lines(source, *, on=CPU, config=None, estimate_captions=False, **variables):
        asked = {"BASE_MODEL": "mini-flux", "CACHE_PATH": str(tmp_path / "cache"), **variables}
        if source:
            asked["DATASET_NAME"] = str(source)
        plan = make_plan(read_settings(asked), read_manifest(json.dumps(config) if config else None, None), on, now=NOW)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            log_summary(plan, token=None, hub_cache=tmp_path / "hub", estimate_captions=estimate_captions)
        return caplog.text

    return lines


def test_images_captions_shapes_steps_saves_and_samples_are_said(photos, summary):
    config = {"datasets": [{"resolution": 128, "enable_bucket": True, "min_bucket_reso": 64, "subsets": [{}]}]}
    every = {"PARAMS_SAVE_EVERY_N_STEPS": "4", "PARAMS_SAMPLE_EVERY_N_STEPS": "5", "KEEP_CHECKPOINTS": "2"}
    text = summary(photos, config=config, PARAMS_MAX_EPOCHS="2", **every)
    assert "5 found, 5 used" in text
    assert "2 captions" in text
    assert "Shapes: 3" in text and "128 × 128 (2)" in text
    assert "Steps: 10, which is 2 times all images; an epoch has 5 steps of up to 1 image." in text
    assert "Saves: 3, every 4 steps, of which the newest 2 are kept"  # 4, 8, and the last in text
    assert "Samples: 3 rounds of" in text


def test_steps_of_batches_accumulation_and_repeats(photos, summary):
    variables = {"PARAMS_BATCH_SIZE": "2", "PARAMS_GRADIENT_ACCUMULATION": "2", "PARAMS_NUM_REPEATS": "3"}
    text = summary(photos, PARAMS_MAX_STEPS="8", **variables)
    assert "Steps: 8, which is 2 times all images; an epoch has 4 steps of up to 4 images." in text


def test_the_sizes_of_files_are_said_for_full_models(photos, summary):
    text = summary(photos, on=SMALL_GPU, BASE_MODEL="flux", PARAMS_NETWORK_DIM="16")
    assert "a LoRA has about 135 MiB in fp16" in text
    wide = {"PARAMS_NETWORK_DIM": "16", "PARAMS_SAVE_PRECISION": "fp32"}
    assert "a LoRA has about 271 MiB in fp32" in summary(photos, on=SMALL_GPU, BASE_MODEL="flux", **wide)
    assert "the 2 LoRA files of a save have about" in summary(photos, on=SMALL_GPU, BASE_MODEL="sd3", **wide)


def test_captions_that_are_cut_are_named_with_the_place(photos, summary):
    (photos / "1.txt").write_text("a red wall " * 60)
    text = summary(photos)
    assert "1 captions are longer than the 64 tokens that T5 reads" in text
    assert "0.0/1.png: " in text and "cut before" in text
    assert "dataset-report.txt" not in text
    text = summary(photos, BASE_MODEL="flux-dev", BACKEND="cpu")
    assert "is known once its tokenizer is on this machine" in text


def test_a_broken_file_is_named(photos, summary):
    for i in range(20):
        shutil.copy(photos / "0.png", photos / f"copy{i}.png")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 not really")
    assert "skipped broken.jpg" in summary(photos)


def test_a_folder_without_a_usable_image_ends_the_check(photos, summary):
    for path in photos.glob("*.png"):
        path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="No usable image"):
        summary(photos)


def test_an_archive_on_this_machine_is_looked_into(photos, summary, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", photos)
    assert "5 found, 5 used" in summary(archive)


def test_few_steps_are_described_as_they_happen(photos, summary):
    text = summary(photos, PARAMS_MAX_STEPS="2")
    assert "Saves: at step 2, with the finished LoRA. Samples: 2 rounds of 4 images, at step 0 and at the end." in text


def test_a_line_is_said_once(photos, summary):
    messages = [line.split(" ", 2)[-1] for line in summary(photos, PARAMS_NUM_REPEATS="5").splitlines()]
    assert len(messages) == len(set(messages))
    about_saves = [message for message in messages if "every" in message and "save" in message.lower()]
    assert len(about_saves) == 1


def test_class_images_that_will_be_drawn_count(photos, summary):
    subsets = [{"image_dir": str(photos)}, {"class_prompt": "a dog", "num_class_images": 7, "is_reg": True}]
    text = summary(None, config={"datasets": [{"resolution": 128, "subsets": subsets}]}, PARAMS_MAX_EPOCHS="1")
    assert "Steps: 10, which is 1 time all images" in text


def test_captions_that_no_tokenizer_reads_whole_are_named_without_one(photos, summary):
    (photos / "0.txt").write_text("a red dog's tail, " * 20)  # 6 pieces each: a, red, dog, 's, tail, and the comma
    of_clip = {"BASE_MODEL": "sdxl", "on": SMALL_GPU, "estimate_captions": True}
    text = summary(photos, **of_clip)
    assert "1 text is longer than the 77 tokens that CLIP reads" in text and "0.0/0.png (122 tokens or more)" in text
    assert "PARAMS_MAX_TOKEN_LENGTH=225" in text
    assert "longer than" not in summary(photos, **of_clip, PARAMS_MAX_TOKEN_LENGTH="225")
    assert "longer than" not in summary(photos, **{**of_clip, "BASE_MODEL": "flux"})
