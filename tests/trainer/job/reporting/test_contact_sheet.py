"""The contact sheet of a run, and the last lines of its log."""

import numpy as np
import pytest
from PIL import Image

from tests.support.drawings import draw
from tests.support.plans import job_plan
from trainer.job.reporting.closing import closing_lines
from trainer.job.reporting.contact_sheet import COLUMN_WIDTH, EMPTY, MARGIN, MAX_WIDTH, contact_sheet
from trainer.spec.plan import Prompt
from trainer.storage import own_files


def prompt(width, height, text="a pot", **changes):
    fields = {"text": text, "negative": "", "width": width, "height": height, "seed": 7, "steps": 20, "cfg": 1.0}
    return Prompt(**{**fields, "guidance": 3.5, **changes})


@pytest.fixture
def sheet(tmp_path):
    """A function that draws samples of these steps, and returns the pixels of their contact sheet."""

    def make(prompts, steps, *, without=()):
        for step in steps:
            for number, wanted in enumerate(prompts):
                if (step, number) not in without:
                    image = Image.new("RGB", (wanted.width, wanted.height), (200, 10 + 40 * number, step % 256))
                    image.save(tmp_path / f"step-{step:08d}-{number:02d}.png")
        with Image.open(contact_sheet(tmp_path, prompts)) as image:
            return np.asarray(image.convert("RGB"))

    return make


def test_strengths_are_columns_after_the_step_of_strength_1(tmp_path):
    """By colour, from left to right, and with a column of their own each."""
    columns = [(0, 1.0, 10), (40, 1.0, 60), (40, 0.0, 110), (40, 0.5, 160)]
    for step, strength, red in columns:
        Image.new("RGB", (64, 64), (red, 0, 0)).save(tmp_path / own_files.sample_name(step, 0, strength))
    with Image.open(contact_sheet(tmp_path, [prompt(64, 64)])) as image:
        pixels = np.asarray(image.convert("RGB"))
    lefts = [np.argwhere((pixels == (red, 0, 0)).all(-1))[:, 1].min() for _, _, red in columns]
    assert lefts == [MARGIN + place * (COLUMN_WIDTH + MARGIN) for place in range(4)]


def width_of(pixels, colour):
    """The most pixels of a row that have this colour."""
    return int((pixels == np.array(colour)).all(-1).sum(1).max())


@pytest.mark.parametrize("sizes", [[(512, 512)], [(768, 512), (512, 768)], [(1024, 256), (256, 1024), (512, 512)]])
def test_images_of_every_shape_fill_their_columns(sheet, sizes):
    prompts = [prompt(width, height) for width, height in sizes]
    pixels = sheet(prompts, [0, 100])
    for number, (width, height) in enumerate(sizes):
        for step in (0, 100):
            colour = (200, 10 + 40 * number, step)
            matches = (pixels == np.array(colour)).all(-1)
            assert width_of(pixels, colour) == COLUMN_WIDTH
            assert matches.sum() == COLUMN_WIDTH * round(COLUMN_WIDTH * height / width)


def test_many_steps_make_narrow_columns_and_no_endless_sheet(sheet):
    pixels = sheet([prompt(64, 64)], range(0, 4000, 100))
    assert pixels.shape[1] <= MAX_WIDTH and width_of(pixels, (200, 10, 0)) >= 128


def test_an_image_that_was_not_drawn_is_a_grey_box_and_no_gap(sheet):
    pixels = sheet([prompt(64, 64), prompt(64, 64)], [0, 100], without=[(100, 1)])
    grey = tuple(int(EMPTY[i : i + 2], 16) for i in (1, 3, 5))
    assert width_of(pixels, grey) == COLUMN_WIDTH


def test_a_sheet_of_no_samples_can_be_drawn(sheet):
    assert sheet([prompt(64, 64, "a long prompt " * 100)], []).shape[1] > 10 * MARGIN


def test_the_last_lines_say_where_the_lora_is_and_how_to_use_it(tmp_path):
    plan = job_plan(tmp_path, "flux", TRIGGER_WORD="zot")
    final = tmp_path / "x.safetensors"
    final.write_bytes(bytes(2_000_000))
    (tmp_path / "x-diffusers.safetensors").write_bytes(b"0")
    (tmp_path / "sample").mkdir()
    draw(8, 8).save(tmp_path / "sample/contact-sheet.png")
    text = "\n".join(closing_lines(final, plan, steps=1200, samples=tmp_path / "sample", seconds=3725))
    assert f"{final} (2 MiB), 1,200 steps" in text and "1:02:05" in text
    assert "models/loras" in text and "models/Lora" in text
    assert f"load_lora_weights(\"{tmp_path}/x-diffusers.safetensors\"), then pipe(prompt='zot, a prompt')" in text
    assert "<lora:x:1>" in text and "strength_model" in text
    assert "'zot'" in text and "strength 1" in text and "contact-sheet.png" in text
